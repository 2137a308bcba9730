"""List the presets, or print one preset's flags as JSON.

ddpm_hf presets            # one line each
ddpm_hf presets cifar10    # all that `ddpm_hf train --preset cifar10` sets
"""

import json


def add_flags(parser):
    parser.add_argument("name", nargs="?", help="preset whose flags are printed; default: list all presets")


def run(arguments):
    from ..config.presets import PRESETS, find_preset

    if arguments.name is None:
        for name, preset in PRESETS.items():
            print(f"{name:15} {preset.about}")
    else:
        print(json.dumps(find_preset(arguments.name)._asdict(), indent=2))
