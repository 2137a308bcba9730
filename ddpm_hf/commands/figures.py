"""Draw the figures of a run again, from its pipeline, metrics and data.

ddpm_hf figures runs/mnist
"""

from pathlib import Path


def add_flags(parser):
    parser.add_argument("run", help="run folder that contains a pipeline")


def run(arguments):
    from ..processes import start_processes
    from ..training.figures import redraw_figures

    start_processes()
    redraw_figures(arguments.run)
    print(f"The figures are in {Path(arguments.run, 'figures')}.")
