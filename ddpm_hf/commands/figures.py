"""Draw the figures of a finished run again.

They are drawn from the run's pipeline, its metrics and its data.

ddpm_hf figures runs/mnist
"""

from pathlib import Path


def add_flags(parser):
    parser.add_argument("run", help="the --output_dir of a finished training")


def run(arguments):
    from ..training.figures import redraw_figures

    redraw_figures(arguments.run)
    print(f"The figures are in {Path(arguments.run, 'figures')}.")
