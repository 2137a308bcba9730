"""Average the weights of a run over another length after its training, or find the best length (post-hoc EMA).

The run must have been trained with --ema_snapshots. A length is a share of the training: an average of length 0.05 is
mostly over the last tenth of the steps. If there are several lengths, each is measured, and the best average is
written, with a plot ema_sweep.png.

ddpm_hf ema runs/mnist runs/mnist-ema --length 0.05
ddpm_hf ema runs/mnist runs/mnist-ema                                # the best of nine lengths, by validation loss
ddpm_hf ema runs/mnist runs/mnist-ema --length 0.02,0.05,0.1 --by fd_mnist --num_images 1000
"""

from ..errors import UserError


def add_flags(parser):
    parser.add_argument("run", help="folder of a run with --ema_snapshots and a pipeline")
    parser.add_argument("output", nargs="?", help="new folder to write; default: the run's folder followed by -ema")
    add = parser.add_argument
    add(
        "--length",
        metavar="LIST",
        help="length, or lengths to compare, e.g. 0.02,0.05; default: nine lengths from 0.01 to 0.25",
    )
    add(
        "--by",
        default="validation_loss",
        help="score that decides between lengths: validation_loss, or a metric of `evaluate`; "
        "default: validation_loss",
    )
    add("--num_images", type=int, help="images to draw if --by is a metric; default: as many as `evaluate` draws")
    add("--step", type=int, help="step of a snapshot, at which the average ends; default: the last snapshot")


def run(arguments):
    from ..config.fields import split_list
    from ..training.post_hoc_ema import average_after_training

    lengths = split_list(arguments.length, float, "--length 0.05,0.1")
    if lengths == []:
        raise UserError("--length is empty: give a number such as 0.05, or leave it out.")
    output = arguments.output or f"{arguments.run.rstrip('/')}-ema"
    facts = average_after_training(
        arguments.run,
        output,
        lengths=lengths,
        by=arguments.by,
        num_images=arguments.num_images,
        step=arguments.step,
    )
    print(f"{output} is a pipeline, averaged over the length {facts['length']:g}: try `ddpm_hf sample {output}`.")
