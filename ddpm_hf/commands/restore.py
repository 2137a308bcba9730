"""Denoise, inpaint, enlarge, color or deblur images with a model trained on clean ones.

ddpm_hf restore runs/mnist noisy/ clean/ --task denoise        # estimates the noise level
ddpm_hf restore runs/mnist torn.png whole.png --task inpaint --mask hole.png
ddpm_hf restore runs/cats small/ large/ --task super_resolution --scale_factor 4
"""

import statistics
from pathlib import Path


def add_flags(parser):
    parser.add_argument("model", help="folder of a pipeline, checkpoint-<step> of a run, or Hub id")
    parser.add_argument(
        "input",
        help="an image, or a folder of images. The UNet must be able to halve the height and the width at each level",
    )
    parser.add_argument("output", help="a .png file, or a folder for .png files with the names of the inputs")
    add = parser.add_argument
    add("--task", required=True, metavar="TASK", help="denoise, inpaint, super_resolution, colorize or deblur")
    add(
        "--noise_level",
        type=float,
        help="standard deviation of the noise in the input, for pixels in [0, 1]; default: for denoise, it is "
        "estimated; for other tasks, it is the noise of rounding to 8 bits",
    )
    add(
        "--mask",
        metavar="FILE|FOLDER",
        help="for inpaint: a mask image, or a folder that has a mask of the same name for each input. Areas to paint "
        "are white. If a mask has transparent parts, all its opaque parts are areas to paint, whatever their color",
    )
    add(
        "--scale_factor",
        type=int,
        help="for super_resolution: how many times wider and higher the result is; default: 2",
    )
    add("--blur_sigma", type=float, help="for deblur: standard deviation of the Gaussian blur in pixels; default: 1")
    add(
        "--num_inference_steps",
        type=int,
        help="number of steps; default: 1 for denoise, else 25, or T if T is below 25",
    )
    add(
        "--num_samples",
        type=int,
        help="number of restorations to average. 1 gives the sharpest result. Do not measure uncertainty by the "
        "spread of results from different seeds: this spread is too small. Default: 1 with one step, else 4",
    )
    add("--batch_size", type=int, default=16, help="images restored together; halved if memory runs out; default: 16")
    add(
        "--seed",
        type=int,
        default=0,
        help="image k, in name order, uses the generator seeded with seed + k; default: 0",
    )
    add("--overwrite", action="store_true", help="replace earlier results in OUTPUT")


def run(arguments):
    """Restore the images and print where they are.

    Raises:
        UserError: as in `sampling.restoration.restore`, and if several processes were launched.
    """
    from accelerate import PartialState

    from ..errors import UserError
    from ..processes import start_processes
    from ..sampling.restoration import restore

    start_processes()
    if (processes := PartialState().num_processes) > 1:
        raise UserError(
            f"restore was launched with {processes} processes, but needs one: run it without the launcher."
        )
    settings = {name: value for name, value in vars(arguments).items() if name not in ("command", "prog", "input")}
    restored = restore(images=arguments.input, **settings)
    what = f"{restored.num_images:,} restored images are in"
    if Path(arguments.input).is_file():
        what = "The restored image is"
    print(f"{what} {arguments.output}; {restored.sheet.name} next to it shows inputs above results.")
    if shares := restored.painted:
        low, middle, high = (f"{100 * share:.1f} %" for share in (min(shares), statistics.median(shares), max(shares)))
        spread = f" (median, from {low} to {high})" if low != high else ""
        print(f"The mask repaints {middle} of the pixels{spread}.")
    levels = restored.noise_levels
    if levels and arguments.task == "denoise" and arguments.noise_level is None:
        low, middle, high = min(levels), statistics.median(levels), max(levels)
        print(f"Estimated noise, for pixels in [0, 1]: sigma {middle:.3f} (median, from {low:.3f} to {high:.3f}).")
