"""`ddpm_hf card`."""

from pathlib import Path

from ..sharing.card import check_has_model, write_card


def card_command(arguments):
    """Run `python -m ddpm_hf card` with its parsed flags."""
    check_has_model(Path(arguments.run))
    if write_card(arguments.run, arguments.hub_model_id):
        print(f"The card is {Path(arguments.run, 'README.md')}.")
    else:
        print(f"{Path(arguments.run, 'README.md')} was not written by ddpm_hf and stays: remove it for a new one.")
