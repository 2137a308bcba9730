"""Write the model card (README.md) of a run or an export again, from its records.

ddpm_hf card runs/mnist
ddpm_hf card runs/mnist --hub_model_id me/ddpm-mnist
"""

from pathlib import Path


def add_flags(parser):
    parser.add_argument("run", help="folder of a run or of an export")
    parser.add_argument(
        "--hub_model_id",
        help="repository named on the card; default: the repository of the last push, else the run's --hub_model_id, "
        "else the name of the folder",
    )


def run(arguments):
    from ..locks import check_unlocked
    from ..sharing.card import check_has_model, write_card

    check_has_model(Path(arguments.run))
    check_unlocked(Path(arguments.run), "wait until it ends; it writes the card itself")
    if write_card(arguments.run, arguments.hub_model_id):
        print(f"The card is {Path(arguments.run, 'README.md')}.")
    else:
        print(
            f"{Path(arguments.run, 'README.md')} was not written by ddpm_hf and is kept: remove it to get a new card."
        )
