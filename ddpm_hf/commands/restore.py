"""Denoise, inpaint, enlarge, color or deblur images with a model trained on clean ones.

ddpm_hf restore runs/mnist noisy/ clean/ --task denoise        # estimates how much noise there is
ddpm_hf restore runs/mnist torn.png whole.png --task inpaint --mask hole.png
ddpm_hf restore runs/cats small/ large/ --task super_resolution --scale_factor 4
"""

import statistics
from pathlib import Path


def add_flags(parser):
    parser.add_argument("model", help="folder of a pipeline, checkpoint-<step> of a run, or Hub id")
    parser.add_argument("input", help="an image, or a folder of images, of any sizes that the model's UNet can halve")
    parser.add_argument("output", help="a .png file, or a folder: each result has its input's name, and ends in .png")
    add = parser.add_argument
    add(
        "--task",
        required=True,
        metavar="TASK",
        help="denoise, inpaint, super_resolution, colorize or deblur: what has happened to the images",
    )
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


def run(arguments):
    """Restore the images and say where they are.

    Raises:
        UserError: as `sampling.restoration.restore`, and for a launch of several processes.
    """
    from accelerate import PartialState

    from ..errors import UserError
    from ..processes import start_processes
    from ..sampling.restoration import restore

    start_processes()
    if (processes := PartialState().num_processes) > 1:
        raise UserError(f"restore was launched in {processes} processes, but runs in one: leave the launcher out.")
    names = ["task", "mask", "noise_level", "scale_factor", "blur_sigma", "num_inference_steps", "num_samples"]
    settings = {name: getattr(arguments, name) for name in [*names, "batch_size", "seed", "overwrite"]}
    restored = restore(arguments.model, arguments.input, arguments.output, **settings)
    what = f"{restored.num_images:,} restored images are in"
    if Path(arguments.input).is_file():
        what = "The restored image is"
    print(f"{what} {arguments.output}; {restored.sheet.name} beside it shows inputs above results.")
    levels = restored.noise_levels
    if levels and arguments.task == "denoise" and arguments.noise_level is None:
        low, middle, high = min(levels), statistics.median(levels), max(levels)
        print(f"Noise as estimated, on pixels in [0, 1]: sigma {middle:.3f} (median, from {low:.3f} to {high:.3f}).")
