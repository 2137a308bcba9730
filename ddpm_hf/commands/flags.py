"""The flags of `python -m ddpm_hf`; no torch in here, so that `--help` answers at once."""

import argparse

from ..config.training_config import METRICS


SUITES = ["smoke", "fast", "standard", "paper"]
PIPELINES = ["tf1", "antialias", "pytorch"]
TASKS = ["denoise", "inpaint", "super_resolution", "colorize", "deblur"]


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def presets(parser: argparse.ArgumentParser):
    parser.add_argument("name", nargs="?", help="show this recipe in full")


def figures(parser: argparse.ArgumentParser):
    parser.add_argument("run", help="the --output_dir of a finished training")


def sample(parser: argparse.ArgumentParser):
    parser.add_argument("model", help="folder of a pipeline, checkpoint-<step> of a run, or Hub id")
    parser.add_argument("--output", help="folder, or file ending in .npz; default: samples/MODEL-SAMPLER")
    parser.add_argument("--num_images", type=int, default=64, help="default: 64")
    sampler(parser)


def sampler(parser: argparse.ArgumentParser, method="ddpm, ancestral sampling", steps="all T for ddpm, else 50"):
    """Add what decides how an image looks; `method` and `steps` say what it is unless told otherwise."""
    group = parser.add_argument_group("sampler")
    add = group.add_argument
    add("--sampler", choices=["ddpm", "ddim", "dpmsolver++"], help=f"default: {method}")
    add("--num_inference_steps", type=int, help=f"default: {steps}")
    add(
        "--timesteps",
        default="trailing",
        metavar="SPACING",
        help="trailing (default, begins in pure noise), leading (diffusers' default), linspace, uniform or quad (the "
        "DDIM paper's), or timesteps such as 999,500,0",
    )
    add("--eta", type=float, default=0.0, help="ddim's share of fresh noise, 0 to 1; default: 0")
    add(
        "--variance_type",
        choices=["fixed_small", "fixed_large", "learned_range"],
        help="ddpm's; default: the model's own on all T steps, fixed_small on fewer",
    )
    add("--dtype", default="float32", help="precision inside the UNet: float32 (default), bfloat16 or float16")
    add("--seed", type=int, default=0, help="image k is drawn from the generator seeded with seed + k; default: 0")
    add(
        "--class_labels",
        type=names,
        help="of a conditional or guided model, by name or number: cat or 0,1,2 in turn; default: all in turn",
    )
    add(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="how strongly the class is asked for; default: 1, the conditional model itself",
    )
    add("--classifier", help="guide an unconditional model by this classifier: run of --objective classify, or Hub id")
    add("--weights", default="published", choices=["published", "raw"], help="raw: before averaging, of a checkpoint")
    add("--batch_size", type=int, default=64, help="images per process at a time; changes rounding only; default: 64")


def evaluate(parser: argparse.ArgumentParser):
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
    add("--metrics", type=names, help=f"of {','.join(METRICS)}; default: those that suit the data")
    add(
        "--suite",
        choices=SUITES,
        help="smoke: 256 images, 10 steps of DDIM; fast: 2,000 of DDIM-50; standard: 10,000 of "
        "DDIM-50; paper: 50,000 of all T steps, the whole bound on all held-out images; default: fast",
    )
    add("--num_images", type=int, help="generated images per seed range; default: the suite's")
    add("--seed_ranges", type=int, default=1, help="score so many successive sets of seeds; mean, deviation, min")
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
    sampler(parser, "the suite's", "the suite's; of another sampler all T for ddpm, else 50")


def compare(parser: argparse.ArgumentParser):
    parser.add_argument("records", nargs="+", help="JSON files written by evaluate")
    parser.add_argument(
        "--vary",
        type=names,
        default=[],
        help="what may differ: sampler, or fields such as "
        "sampler.num_inference_steps,model.weights; all the rest must be equal",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def export(parser: argparse.ArgumentParser):
    parser.add_argument("model", help="folder of a pipeline, checkpoint-<step> of a run, or Hub id")
    parser.add_argument("output", help="folder to write; must not exist")
    parser.add_argument("--classifier", help="take this classifier along: run of --objective classify, or Hub id")
    parser.add_argument("--weights", default="published", choices=["published", "raw"], help="raw: before averaging")
    parser.add_argument(
        "--pipeline",
        help="that `DiffusionPipeline.from_pretrained(output, trust_remote_code=True)` gives, e.g. restoration; "
        "default: class_conditional or classifier_guided where there are classes, else stock DDPMPipeline",
    )


def card(parser: argparse.ArgumentParser):
    parser.add_argument("run", help="--output_dir of a run, or an export")
    parser.add_argument(
        "--hub_model_id", help="repository that the card is for; default: the run's, or the folder's name"
    )


def push(parser: argparse.ArgumentParser):
    parser.add_argument("run", help="--output_dir of a run, or an export")
    repository(parser, "the name of the folder")


def push_space(parser: argparse.ArgumentParser):
    parser.add_argument("model", help="that the Space shows: a Hub id, e.g. me/ddpm-mnist")
    repository(parser, "the model's name and -demo")


def repository(parser: argparse.ArgumentParser, name: str):
    add = parser.add_argument
    add("--hub_model_id", metavar="[USER/]NAME", help=f"repository, created if need be; default: {name}")
    add("--hub_private_repo", action="store_true", help="create it private; one that exists must be private")
    add("--hub_token", help="token to push with; default: that of `hf auth login`")


def restore(parser: argparse.ArgumentParser):
    parser.add_argument("model", help="folder of a pipeline, checkpoint-<step> of a run, or Hub id")
    parser.add_argument("input", help="an image, or a folder of images, of any sizes that the model's UNet can halve")
    parser.add_argument("output", help="a .png file, or a folder: each result has its input's name, and ends in .png")
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="what has happened to the images, or what is to be done")
    add(
        "--noise_level",
        type=float,
        help="standard deviation of the noise in the input, on pixels in [0, 1]; default: denoise estimates it, other "
        "tasks take that of rounding to 8 bits",
    )
    add(
        "--mask",
        metavar="FILE|FOLDER",
        help="of inpaint: white where to paint; one for all images, or one of each name",
    )
    add("--scale_factor", type=int, help="of super_resolution: times as wide and as high; default: 2")
    add("--blur_sigma", type=float, help="of deblur: standard deviation of the Gaussian blur in pixels; default: 1")
    add("--num_inference_steps", type=int, help="of the reverse process; default: the pipeline's for the task")
    add(
        "--num_samples",
        type=int,
        help="restorations that are averaged: many for fidelity, 1 for sharpness; default: the pipeline's",
    )
    add("--batch_size", type=int, default=16, help="images at a time; changes rounding only; default: 16")
    add(
        "--seed",
        type=int,
        default=0,
        help="image k, by name, is drawn from the generator seeded with seed + k; default: 0",
    )
    add("--overwrite", action="store_true", help="replace results that are in OUTPUT")
