"""Score a model, or samples, against real images and write a record.

The record is JSON that says how each number was measured, so that `ddpm_hf compare` can refuse unlike ones.

ddpm_hf evaluate runs/mnist                                  # the metrics that suit the data; 2,000 images, DDIM-50
ddpm_hf evaluate me/ddpm-cifar10 --suite paper --metrics fid,kid,bits_per_dim     # 50,000 images, all steps
ddpm_hf evaluate samples/mnist --dataset_name ylecun/mnist --validation_split test     # from the images alone
"""

import sys

from .flags import add_sampler_flags, names, sampler_settings


METRICS = "fid, kid, precision_recall, inception_score, fd_dinov2, fd_mnist, bits_per_dim, memorization"
SUITES = ["smoke", "fast", "standard", "paper"]
PIPELINES = ["tf1", "antialias", "pytorch"]


def add_flags(parser):
    parser.add_argument(
        "subject",
        nargs="?",
        help="a model (folder, checkpoint, Hub id), or samples: PNG files, or an .npz (arr_0: uint8 NHWC)",
    )
    parser.add_argument(
        "--from_samples", "--from-samples", metavar="FOLDER|NPZ", help="score these images of the model"
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="score held-out images against train: no model at all"
    )
    group = parser.add_argument_group("what is measured")
    add = group.add_argument
    add("--metrics", type=names, metavar="NAME,NAME", help=f"of {METRICS}; default: those that suit the data")
    add(
        "--suite",
        choices=SUITES,
        help="smoke: 256 images, 10 steps of DDIM; fast: 2,000 of DDIM-50; standard: 10,000 of "
        "DDIM-50; paper: 50,000 of all T steps, the whole bound on all held-out images; default: fast",
    )
    add("--num_images", type=int, help="generated images; default: the suite's")
    add(
        "--features",
        choices=["inception", "dinov2", "digits"],
        help="that kid and precision_recall look through; default: digits for grey digits, else inception",
    )
    add("--bound_images", type=int, help="images of bits_per_dim; 0: all held-out ones; default: the suite's")
    add(
        "--bound_timesteps",
        type=int,
        help="of the bound, per image, drawn by importance; 0: all T; default: the suite's",
    )
    add("--require", type=names, default=[], help="metrics that must not be skipped: exit code 1 if one is")
    group = parser.add_argument_group("real images", "Default: those of the run's train_config.json.")
    add = group.add_argument
    for flag, text in [
        ("dataset_name", "Hub id, or local folder in the Hub's layout or of images"),
        ("dataset_config_name", "configuration of the dataset, if it has several"),
        ("image_column", "column of the images"),
        ("label_column", "column of the classes"),
        ("validation_split", "held-out images: a split's name, a count or a share, as in training"),
    ]:
        add(f"--{flag}", help=text)
    add("--class_names", type=names, help="keep only these classes")
    add("--resolution", type=int, help="of --calibrate, in pixels; else the model's or the samples'; default: 32")
    add("--reference", metavar="NPZ", help="statistics (mu, sigma) to take for FID, e.g. EDM's or pytorch-fid's")
    add("--reference_pipeline", choices=PIPELINES, help="that such a file was made with, if it does not say so")
    group = parser.add_argument_group("networks that look at images")
    add = group.add_argument
    add(
        "--inception", metavar="FILE", help="weights of FID's Inception; default: pytorch-fid's, from its release page"
    )
    add(
        "--inception_pipeline",
        choices=PIPELINES,
        default="tf1",
        help="resize and scale: tf1 (default; TTUR, EDM, "
        "torch-fidelity), pytorch (pytorch-fid) or antialias (torchmetrics from 1.8)",
    )
    add("--dinov2", metavar="FOLDER|ID", default="facebook/dinov2-large", help="default: facebook/dinov2-large")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output", metavar="JSON", help="the record; default: evaluations/... in the run's folder, or here")
    add("--overwrite", action="store_true", help="replace the record that is in --output")
    add(
        "--samples_dir",
        help="where the images are drawn to; default: evaluation_samples/... in the run's folder, or here",
    )
    add("--cache_dir", help="where features of real images are kept; default: ddpm_hf in HuggingFace's cache")
    add_sampler_flags(parser, "the suite's", "the suite's; of another sampler all T for ddpm, else 50")


def run(arguments):
    """Evaluate, print the scores, and write the card of the run anew.

    Raises:
        SystemExit: with code 1, if a metric of --require was skipped; the record is written first.
    """
    from ..evaluation.evaluate import evaluate
    from ..evaluation.inputs import DATA_FLAGS, check_metrics
    from ..processes import start_processes
    from ..sharing.card import write_card

    start_processes()
    check_metrics(arguments.require)
    data = {name: getattr(arguments, name) for name in DATA_FLAGS if getattr(arguments, name) is not None}
    evaluated = evaluate(
        arguments.subject,
        samples=arguments.from_samples,
        calibrate=arguments.calibrate,
        metrics=arguments.metrics,
        suite=arguments.suite or "fast",
        num_images=arguments.num_images,
        bound_images=arguments.bound_images,
        bound_timesteps=arguments.bound_timesteps,
        features=arguments.features,
        weights=arguments.weights,
        batch_size=arguments.batch_size,
        sampler=arguments.sampler,
        resolution=arguments.resolution or 32,
        inception=arguments.inception,
        inception_pipeline=arguments.inception_pipeline,
        dinov2=arguments.dinov2,
        reference=arguments.reference,
        reference_pipeline=arguments.reference_pipeline,
        output=arguments.output,
        overwrite=arguments.overwrite,
        samples_dir=arguments.samples_dir,
        cache_dir=arguments.cache_dir,
        **data,
        **sampler_settings(arguments),
    )
    if evaluated is None:  # this is not the main process
        return
    print(f"{evaluated}\n\nThe record is {evaluated.path}.")
    folder = evaluated.path.parent
    if folder.name == "evaluations" and (folder.parent / "README.md").is_file():
        write_card(folder.parent)
    measured = {name for name in evaluated.metrics if name not in evaluated.skipped}
    if missing := [name for name in arguments.require if name not in measured]:
        print(f"ddpm_hf evaluate: {', '.join(missing)} is required, but was skipped.", file=sys.stderr)
        sys.exit(1)
