"""From a command line to a TrainingConfig: default < preset < flag. No torch in here: `--help` answers at once."""

import argparse
import dataclasses

from transformers.hf_argparser import HfArgumentParser

from ..errors import UserError, no_such, no_such_flag, one_sentence
from .presets import PRESETS
from .training_config import GROUPS, TrainingConfig


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of the description, which has examples."""


class FlagParser(HfArgumentParser):
    """HfArgumentParser in which every boolean can be negated, lists may be empty, and errors are one sentence."""

    def __init__(self, prog: str, description: str | None):
        super().__init__(
            GROUPS,
            prog=prog,
            usage="%(prog)s [--preset NAME] [--dataset_name ID_OR_FOLDER] [flags]",
            description=description,
            epilog="A flag given here wins over the preset, and a preset over the defaults.\n"
            "Every boolean can be negated: --no_use_ema is --use_ema false.",
            formatter_class=HelpFormatter,
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

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            self.error(no_such(action.option_strings[0], value, action.choices))

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_sentence(message)}\n")


def parse_config(
    argv: list[str] | None = None, prog: str = "train_unconditional.py", description: str | None = None
) -> TrainingConfig:
    """Turn a command line into a TrainingConfig: default < preset < flag. Leaves with exit code 2 on bad input."""
    parser = FlagParser(prog, description)
    # argparse fills in no default for what the namespace has already: what is still None was not given.
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    flags, unknown = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names)))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(no_such_flag(unknown[0], known))
    given = {name: value for name, value in vars(flags).items() if value is not None}
    recipe = {}
    if preset := given.get("preset"):
        if preset not in PRESETS:
            parser.error(no_such("preset", preset, PRESETS))
        recipe = dict(PRESETS[preset].flags)
        if "num_epochs" in given:  # two flags say how long: the one given wins over the other of the preset
            recipe.pop("max_train_steps", None)
    try:
        return TrainingConfig(**recipe | given)
    except UserError as error:
        parser.error(str(error))
