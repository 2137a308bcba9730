"""Read a command line into a TrainingConfig.

This file does not import torch, because `--help` has to answer quickly.
"""

import argparse
import copy
import dataclasses

from transformers.hf_argparser import HfArgumentParser

from ..errors import UserError
from .parser_errors import OneSentenceErrors
from .training_config import GROUPS, TrainingConfig


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A help formatter that shows defaults. It keeps the line breaks of the description, which contains examples."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class FlagParser(OneSentenceErrors, HfArgumentParser):
    """An HfArgumentParser with a `--no_` form of every boolean. Lists may be empty, and an error is one sentence."""

    def __init__(self, prog: str, description: str | None):
        super().__init__(
            GROUPS,
            prog=prog,
            usage="%(prog)s [--preset NAME] [--dataset_name ID_OR_FOLDER] [flags]",
            description=description,
            epilog="A flag overrides the preset, and the preset overrides the defaults.\n"
            "Every boolean has a negative form: --no_use_ema is --use_ema false.",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        for group in GROUPS:
            for field in dataclasses.fields(group):
                if field.type is bool and not field.default:  # for a default of True, HfArgumentParser adds --no_
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
        # Keep only the help text. HfArgumentParser passes all metadata to argparse, which does not know our bounds.
        plain = copy.copy(field)
        plain.metadata = {"help": field.metadata["help"]}
        if plain.type == int | str:  # e.g. 64 or 48x64; TrainingConfig reads it
            plain.type = str
        HfArgumentParser._parse_dataclass_field(parser, plain)


def parse_config(
    argv: list[str], prog: str = "train_unconditional.py", description: str | None = None
) -> TrainingConfig:
    """Return the TrainingConfig of a command line. If a flag is wrong, print one sentence and exit with code 2."""
    parser = FlagParser(prog, description)
    # Set every flag to None first. argparse then fills in no defaults, so a flag that is still None was not given.
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    flags = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names)))
    given = {name: value for name, value in vars(flags).items() if value is not None}
    try:
        return TrainingConfig.from_preset(**given)
    except UserError as error:
        parser.error(str(error))
