"""List the presets, or print every flag of one as JSON.

ddpm_hf presets            # one line each
ddpm_hf presets cifar10    # all that `ddpm_hf train --preset cifar10` sets
"""

import json


def add_flags(parser):
    parser.add_argument("name", nargs="?", help="show this recipe in full")


def run(arguments):
    from ..config.presets import PRESETS
    from ..errors import UserError, no_such

    if arguments.name is None:
        for name, preset in PRESETS.items():
            print(f"{name:15} {preset.about}")
    elif arguments.name in PRESETS:
        preset = PRESETS[arguments.name]
        print(json.dumps({"about": preset.about, "flags": preset.flags, "unet": preset.unet}, indent=2))
    else:
        raise UserError(no_such("preset", arguments.name, PRESETS))
