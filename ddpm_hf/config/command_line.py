"""Read a command line into a TrainingConfig. No torch in here, because `--help` has to answer quickly."""

import argparse
import copy
import dataclasses

from transformers.hf_argparser import HfArgumentParser

from ..errors import UserError
from .presets import did_you_mean
from .training_config import GROUPS, TrainingConfig


class FlagParser(HfArgumentParser):
    """HfArgumentParser with a `--no_` form of every boolean, lists that may be empty, and errors of one sentence."""

    def __init__(self):
        super().__init__(
            GROUPS,
            prog="train_unconditional.py",
            usage="accelerate launch train_unconditional.py [--preset NAME] [--dataset_name ID_OR_FOLDER] [flags]",
            description="Train a DDPM that stock diffusers can load. Flags win over the preset.",
            epilog="Every boolean flag can be negated: --no_use_ema means --use_ema false.",
            allow_abbrev=False,
        )
        for group in GROUPS:
            for field in dataclasses.fields(group):
                if field.type is bool and not field.default:  # if True, HfArgumentParser has added the --no_ form
                    no = [f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"]
                    self.add_argument(
                        *no, dest=field.name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
                    )
        for action in self._actions:
            if action.nargs == "+":
                action.nargs = "*"
            if action.const is False:
                action.help = argparse.SUPPRESS

    @staticmethod
    def _parse_dataclass_field(parser, field):
        # HfArgumentParser hands all metadata of a field on to argparse, which does not know our bounds.
        plain = copy.copy(field)
        plain.metadata = {"help": field.metadata["help"]}
        HfArgumentParser._parse_dataclass_field(parser, plain)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_config(argv: list[str] | None = None) -> TrainingConfig:
    """Return the TrainingConfig of a command line. Prints one sentence and exits with code 2 if the line is wrong."""
    parser = FlagParser()
    # With None for every flag in the namespace, argparse fills in no defaults: what is still None was not given.
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    flags, unknown = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names)))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        advice = did_you_mean(unknown[0].split("=")[0], known) or "see --help."
        parser.error(f"there is no flag {unknown[0]!r}: {advice}")
    given = {name: value for name, value in vars(flags).items() if value is not None}
    try:
        return TrainingConfig.from_preset(**given)
    except UserError as error:
        parser.error(str(error))
