"""Score a model, or a set of images, against real images and write a record.

The record is a JSON file that says how each number was measured. `ddpm_hf compare` reads it, and refuses to compare
numbers that were measured differently.

ddpm_hf evaluate runs/mnist                                  # 2,000 images by DDIM in 50 steps
ddpm_hf evaluate me/ddpm-cifar10 --suite paper --metrics fid,kid,bits_per_dim     # 50,000 images, all steps
ddpm_hf evaluate samples/mnist --dataset_name ylecun/mnist --validation_split test     # scores images without a model
"""

import sys
from pathlib import Path

from .flags import add_sampler_flags, names, sampler_settings


METRICS = "fid, kid, precision_recall, inception_score, fd_dinov2, fd_mnist, fd_cifar10, bits_per_dim, memorization"
SUITES = ["smoke", "fast", "standard", "paper"]
PIPELINES = ["tf1", "antialias", "pytorch"]


def add_flags(parser):
    parser.add_argument(
        "subject",
        nargs="?",
        help="model to score (folder, checkpoint or Hub id). Or samples to score: a folder of PNG files, also in "
        "subfolders, or an .npz file whose arr_0 is uint8 (N, H, W, C)",
    )
    parser.add_argument(
        "--from_samples",
        "--from-samples",
        dest="samples",
        metavar="FOLDER|NPZ",
        help="score these images, which the model drew earlier, instead of drawing new ones",
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="score held-out real images against training images, without a model"
    )
    add_measurement_flags(parser)
    add_data_flags(parser)
    add_network_flags(parser)
    add_output_flags(parser)
    add_sampler_flags(
        parser,
        "the sampler of the suite",
        "the suite's number; with another sampler than the suite's, all T for ddpm and 50 for the others",
    )


def add_measurement_flags(parser):
    add = parser.add_argument_group("what is measured").add_argument
    add("--metrics", type=names, metavar="NAME,NAME", help=f"some of {METRICS}; default: those that suit the data")
    add(
        "--suite",
        choices=SUITES,
        help="how much is measured. smoke: 256 images by DDIM in 10 steps. fast: 2,000 images by DDIM in 50 steps. "
        "standard: 10,000 images by DDIM in 50 steps. paper: 50,000 images by DDPM in all T steps, and bits_per_dim "
        "from all held-out images and all timesteps. Default: fast",
    )
    add("--num_images", type=int, help="number of generated images; default: the suite's number")
    add(
        "--features",
        choices=["inception", "dinov2", "digits", "cifar10"],
        help="network for the features of kid and precision_recall; default: digits for MNIST, else inception",
    )
    add(
        "--bound_images",
        type=int,
        help="number of held-out images for bits_per_dim; 0: all; default: the suite's number",
    )
    add(
        "--bound_timesteps",
        type=int,
        help="number of random timesteps per image for bits_per_dim; 0: all; default: the suite's number",
    )
    add(
        "--require",
        type=names,
        default=[],
        help="metrics that must not be skipped; if one of them is skipped, the exit code is 1",
    )


def add_data_flags(parser):
    group = parser.add_argument_group("real images", "Default: the data in the run's train_config.json.")
    add = group.add_argument
    add("--dataset_name", help="Hub id, or local folder: images, or a copy of a Hub dataset")
    add("--dataset_config_name", help="configuration of the dataset, if it has several")
    add("--image_column", help="column with the images")
    add("--label_column", help="column with the classes")
    add(
        "--validation_split",
        help="held-out images: the name of a split, or how many of the training images (a count or a share)",
    )
    add("--class_names", type=names, help="keep only these classes, e.g. cat,dog")
    add(
        "--channels",
        type=int,
        help="channels: 1 (grey), 2 (grey and opacity), 3 (RGB) or 4 (RGBA); for arrays, as many as they have",
    )
    add(
        "--pixel_range",
        type=names,
        metavar="BLACK,WHITE",
        help="values of black and white in images of more than 8 bits, e.g. --pixel_range=0,4095",
    )
    add(
        "--on_bad_image",
        choices=["refuse", "skip"],
        help="refuse the data set if an image cannot be read, or skip such images",
    )
    add(
        "--pages",
        choices=["first", "all", "channels"],
        help="use the first page of each file, each page as an image, or all pages as the channels of one image",
    )
    add("--resolution", help="image size in pixels, if --calibrate has no model, e.g. 64 or 48x64; default: 32")
    add(
        "--reference",
        metavar="NPZ",
        help="statistics (mu, sigma) of real images for FID, e.g. from EDM or pytorch-fid",
    )
    add(
        "--reference_pipeline",
        choices=PIPELINES,
        help="how the images of --reference were resized; only needed if its file does not say how",
    )


def add_network_flags(parser):
    add = parser.add_argument_group("networks that extract features").add_argument
    add(
        "--inception",
        metavar="FILE",
        help="weights of the Inception network for FID; default: the weights of pytorch-fid, which are downloaded",
    )
    add(
        "--inception_pipeline",
        choices=PIPELINES,
        default="tf1",
        help="how images are resized and scaled for Inception: tf1 (as in TTUR, EDM and torch-fidelity), pytorch (as "
        "in pytorch-fid) or antialias (as in torchmetrics 1.8 and later); default: tf1",
    )
    add(
        "--dinov2",
        metavar="FOLDER|ID",
        default="facebook/dinov2-large",
        help="DINOv2 model for fd_dinov2; default: facebook/dinov2-large",
    )


def add_output_flags(parser):
    add = parser.add_argument_group("output").add_argument
    add(
        "--output",
        metavar="JSON",
        help="file for the record; default: a new file in evaluations/, in the folder of the run if there is one, "
        "else in the current folder",
    )
    add("--overwrite", action="store_true", help="replace the record in --output")
    add("--samples_dir", help="folder for the images; default: a folder in evaluation_samples/, beside evaluations/")
    add("--cache_dir", help="folder that keeps features of real images; default: ddpm_hf in HuggingFace's cache")


def run(arguments):
    """Evaluate, print the scores, and write the run's model card again, unless the run is still training.

    Raises:
        SystemExit: with code 1, if a metric failed, or if a metric of --require was skipped. The record is written all
            the same.
    """
    from ..evaluation.evaluate import evaluate
    from ..evaluation.inputs import check_metrics
    from ..locks import writer_of
    from ..processes import start_processes
    from ..sharing.card import write_card_or_warn

    start_processes()
    check_metrics(arguments.require)
    flags = {name: value for name, value in vars(arguments).items() if value is not None}  # None: not given
    for name in ("command", "prog", "require", "own_settings"):
        flags.pop(name, None)
    evaluated = evaluate(**flags | sampler_settings(arguments))
    if evaluated is None:  # this is not the main process
        return
    print(f"{evaluated}\n\nThe record is {evaluated.path}.")
    if arguments.output is not None and Path(arguments.output).resolve() != evaluated.path.resolve():
        print(
            f"Warning: another evaluation wrote {arguments.output} meanwhile, so this record has another name.",
            file=sys.stderr,
        )
    folder = evaluated.path.parent
    has_card = folder.name == "evaluations" and (folder.parent / "README.md").is_file()
    if has_card and writer_of(folder.parent) is None:
        write_card_or_warn(folder.parent)
    measured = {name for name in evaluated.metrics if name not in evaluated.skipped}
    if missing := [name for name in arguments.require if name not in measured]:
        print(
            f"ddpm_hf evaluate: {', '.join(missing)} is required, but was skipped: see the reason above.",
            file=sys.stderr,
        )
    if evaluated.failed:
        print(f"ddpm_hf evaluate: {', '.join(evaluated.failed)} failed: see the error above.", file=sys.stderr)
    if missing or evaluated.failed:
        sys.exit(1)
