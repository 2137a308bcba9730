"""Denoise, inpaint, enlarge, color or deblur images with a model trained on clean ones.

ddpm_hf restore runs/mnist noisy/ clean/ --task denoise        # estimates how much noise there is
ddpm_hf restore runs/mnist torn.png whole.png --task inpaint --mask hole.png
ddpm_hf restore runs/cats small/ large/ --task super_resolution --scale_factor 4
"""

import hashlib
import statistics
from pathlib import Path


TASKS = ["denoise", "inpaint", "super_resolution", "colorize", "deblur"]


def add_flags(parser):
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
    add("--batch_size", type=int, default=16, help="images at a time; changes nothing else; default: 16")
    add(
        "--seed",
        type=int,
        default=0,
        help="image k, by name, is drawn from the generator seeded with seed + k; default: 0",
    )
    add("--overwrite", action="store_true", help="replace results that are in OUTPUT")


def run(arguments):
    """Refuse what cannot be, restore, write, draw a sheet.

    Raises:
        UserError: for flags that do not go together, images or masks that are missing, unreadable or of a wrong kind,
            an output that is there already, and whatever the pipeline refuses.
    """
    from accelerate import PartialState

    from ..community_pipelines import pipeline_file
    from ..errors import UserError
    from ..files import writing
    from ..models.pretrained import load_pretrained
    from ..processes import start_processes
    from ..sampling.restoration import (
        ON_SHEET,
        SCHEMA,
        begin,
        check_items,
        draw_sheet,
        find_items,
        open_pipeline,
        pipeline_options,
        restore_items,
    )

    start_processes()
    output, seed = Path(arguments.output).resolve(), arguments.seed
    if (processes := PartialState().num_processes) > 1:
        raise UserError(f"restore was launched in {processes} processes, but runs in one: leave the launcher out.")
    options, items = pipeline_options(arguments), find_items(arguments)
    model = load_pretrained(arguments.model)
    pipeline = open_pipeline(model, "restoration")
    pipeline.set_progress_bar_config(disable=True)
    record = {
        "schema": SCHEMA,
        "model": model.facts,
        "pipeline_sha256": hashlib.sha256(pipeline_file("restoration").read_bytes()).hexdigest(),
        "settings": options | {"seed": seed},
        "num_images": len(items),
        "inputs_sha256": check_items(items, pipeline, options, seed),
    }
    to_do = begin(items, arguments, record)
    noise_levels = restore_items(to_do, pipeline, options, seed, arguments.batch_size)
    with writing("the sheet", output):
        sheet = draw_sheet(items[:ON_SHEET], output.with_name(f"{output.name}.sheet.png"))
    what = "The restored image is" if Path(arguments.input).is_file() else f"{len(items):,} restored images are in"
    print(f"{what} {arguments.output}; {sheet.name} beside it shows inputs above results.")
    if noise_levels and options["task"] == "denoise" and "noise_level" not in options:
        low, middle, high = min(noise_levels), statistics.median(noise_levels), max(noise_levels)
        print(f"Noise as estimated, on pixels in [0, 1]: sigma {middle:.3f} (median, from {low:.3f} to {high:.3f}).")
