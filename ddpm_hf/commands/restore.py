"""`ddpm_hf restore`."""

import hashlib
import statistics
from pathlib import Path

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


def restore_command(arguments):
    """Run `python -m ddpm_hf restore` with its parsed flags: refuse what cannot be, restore, write, draw a sheet.

    Raises:
        UserError: for flags that do not go together, images or masks that are missing, unreadable or of a wrong kind,
            an output that is there already, and whatever the pipeline refuses.
    """
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
