"""`ddpm_hf restore`."""

import statistics
from pathlib import Path


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
