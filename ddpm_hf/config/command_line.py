"""From a command line to a TrainingConfig: default < preset < flag. No torch in here: `--help` answers at once."""

import argparse
import dataclasses
import difflib

from transformers.hf_argparser import HfArgumentParser

from ..errors import UserError
from .presets import PRESETS
from .training_config import GROUPS, TrainingConfig


class FlagParser(HfArgumentParser):
    """HfArgumentParser in which every boolean can be negated, lists may be empty, and errors are one sentence."""

    def __init__(self):
        super().__init__(
            GROUPS,
            prog="train_unconditional.py",
            usage="accelerate launch train_unconditional.py [--preset NAME] [--dataset_name ID_OR_FOLDER] [flags]",
            description="Train a DDPM that stock diffusers loads. Defaults < preset < flags given here.",
            epilog="Every boolean can be negated: --no_use_ema is --use_ema false.",
            allow_abbrev=False,
        )
        for group in GROUPS:
            for field in dataclasses.fields(group):
                if field.type is bool:
                    no = [f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"]
                    self.add_argument(
                        *no, dest=field.name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
                    )
        for action in self._actions:
            if action.nargs == "+":
                action.nargs = "*"

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_config(argv: list[str] | None = None) -> TrainingConfig:
    """Turn a command line into a TrainingConfig: default < preset < flag. Leaves with exit code 2 on bad input."""
    parser = FlagParser()
    # argparse fills in no default for what the namespace has already: what is still None was not given.
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    flags, unknown = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names)))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        parser.error(f"there is no flag {unknown[0]!r}: {f'did you mean {close[0]}?' if close else 'see --help.'}")
    given = {name: value for name, value in vars(flags).items() if value is not None}
    recipe = {}
    if preset := given.get("preset"):
        if preset not in PRESETS:
            parser.error(f"there is no preset {preset!r}: choose from {', '.join(PRESETS)}.")
        recipe = dict(PRESETS[preset].flags)
        if "num_epochs" in given:  # two flags say how long: the one given wins over the other of the preset
            recipe.pop("max_train_steps", None)
    try:
        return TrainingConfig(**recipe | given)
    except UserError as error:
        parser.error(str(error))
