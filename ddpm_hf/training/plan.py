"""Estimate the disk space, time and memory of a run, and draw the images that its network sees."""

import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from ..data.batches import training_batches
from ..diffusion.losses import draw_noise
from ..pictures import strip, to_uint8
from ..run_folder import DRY_RUN
from .figures import GUIDED_CLASSES, GUIDED_STEPS, SHEET_IMAGES, ddim_steps
from .periodic import epochs_between
from .run import Run
from .scoring import STEPS
from .validation import VALIDATION_IMAGES


def count_tasks(run: Run) -> dict[str, int]:
    """Return how often each task of `epochs_between` is due from the next step to the last."""
    done, before_last, last = (run.epochs(step) for step in (run.state.step, run.total_steps - 1, run.total_steps))
    # Each is due once more at the end, unless an interval ends there.
    return {name: last // n - done // n + (last // n == before_last // n) for name, n in epochs_between(run).items()}


def disk(run: Run) -> str:
    """Return a line about the disk space that a run needs."""
    config, parameters = run.config, run.facts["parameters"]
    # float32: the weights, the two moments of Adam, and the moving averages
    checkpoint = parameters * 4 * (3 + (run.ema is not None) + len(run.power_averages))
    every = config.checkpointing_steps
    count = run.total_steps // every + count_tasks(run)["pipeline"]  # or fewer: both may use the same one
    if config.checkpoints_total_limit:  # an old checkpoint is removed only after the new one is written
        count = min(count, config.checkpoints_total_limit + 1)
    published = parameters * 4 * (1 + config.save_best)
    snapshots = parameters * 4 * len(run.power_averages) * config.ema_snapshots
    also = f", {format_bytes(snapshots)} for {config.ema_snapshots} --ema_snapshots" if snapshots else ""
    return (
        f"Disk: {format_bytes(count * checkpoint + published + snapshots)}: up to {count:,} checkpoints of "
        f"{format_bytes(checkpoint)} each, one every {every:,} steps{also}, and {format_bytes(published)} for the "
        "model."
    )


def forward_passes(run: Run) -> dict[str, float]:
    """Return how many forward passes of one image the main process needs besides training, for each kind of work.

    The main process draws all images of the figures. All processes share the other work.
    """
    config, processes, count = run.config, run.accelerator.num_processes, count_tasks(run)
    measured = 1 + (run.ema is not None) + (config.objective == "classify")
    passes = {"validation": min(len(run.validation_set), VALIDATION_IMAGES) * measured if run.validation_set else 0}
    passes["sheet"] = config.eval_batch_size * config.ddpm_num_inference_steps
    passes["scores"] = config.eval_num_images * min(STEPS, config.ddpm_num_steps)
    passes = {name: number * count.get(name, 0) / processes for name, number in passes.items()}
    passes["figures"] = figure_passes(run) if config.objective != "classify" else 0
    return passes


def figure_passes(run: Run) -> int:
    """Return how many forward passes of one image the figures need."""
    config, T = run.config, run.config.ddpm_num_steps
    strip, sheet = min(16, config.eval_batch_size), min(SHEET_IMAGES, config.eval_batch_size)
    passes = strip * config.ddpm_num_inference_steps + sheet * sum(ddim_steps(T))
    if run.classes.no_class is not None:  # with guidance, each image passes twice
        passes += 2 * sheet * min(GUIDED_CLASSES, len(run.classes)) * min(GUIDED_STEPS, T)
    return passes


def seconds_left(run: Run, seconds_per_step: float) -> tuple[float, float]:
    """Return the seconds for the remaining steps, and those for validation, sample sheets, scores and figures."""
    steps = (run.total_steps - run.state.step) * seconds_per_step
    images = run.global_batch / run.accelerator.num_processes
    # A forward pass takes about a third of a training step, because the backward pass takes about twice as long.
    return steps, sum(forward_passes(run).values()) * seconds_per_step / images / 3


def time_and_memory(run: Run, seconds_per_step: float) -> str:
    """Return two lines: the time per step, the time left and when the run ends; and the memory used so far."""
    count = run.total_steps - run.state.step
    steps, rest = seconds_left(run, seconds_per_step)
    end = time.strftime("%H:%M on %A, %d %B", time.localtime(time.time() + steps + rest))
    more = f", and about {format_seconds(rest)} for samples, scores and figures" if rest >= 1 else ""
    return (
        f"Time: {seconds_per_step:.2g} s a step, {format_seconds(steps)} for {count:,} steps"
        f"{more}: until about {end}.\nMemory: {memory_used(run.accelerator.device)}."
    )


def memory_used(device: torch.device) -> str:
    """Return the memory of this process as text. On a CUDA device, return the peak memory of its tensors instead."""
    if device.type == "cuda":
        return f"{format_bytes(torch.cuda.max_memory_allocated(device))} of the GPU"
    return format_bytes(psutil.Process().memory_info().rss)


def format_bytes(count: float) -> str:
    """Return a number of bytes with its unit, e.g. "16 MB"."""
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 1000 or unit == "TB":
            return f"{count:.2g} {unit}" if count < 10 else f"{count:.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """Return a time as text, in the largest unit that gives at least 2, e.g. "52 minutes"."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            count = seconds / size
            return f"{count:.1f} {unit}" if count < 10 else f"{count:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def draw_preview(run: Run) -> Path:
    """Draw the first 16 training images as the network sees them, and below each image its x_t at four timesteps.

    The picture is next to the run folder, because a dry run does not create this folder. Return its path.
    """
    config, T = run.config, run.config.ddpm_num_steps
    batch = next(training_batches(run.train_set, replace(config, train_batch_size=16), 0, 0, 1))
    images, names = batch["images"], run.train_set.class_names
    noise, _ = draw_noise(batch["ordinals"], images.shape[1:], T, config.seed)
    rows = {"image": images}
    for t in sorted({T // 8, T // 4, T // 2, T - 1}):
        rows[f"t = {t}"] = run.scheduler.q_sample(images, noise, torch.full((len(images),), t))
    labels = (
        [names[k][:12] if k >= 0 else "no class" for k in batch["labels"].tolist()] if names else [""] * len(images)
    )
    path = Path(f"{Path(config.output_dir)}{DRY_RUN}")
    return strip([to_uint8(row) for row in rows.values()], labels, list(rows), path)
