"""The training loop. Read this file from top to bottom.

run.py does everything before the first step. periodic.py does what is due only after some steps, e.g. checkpoints.
Progress is counted in optimizer steps and images seen, never in micro-batches or processes.
"""

import contextlib
import json
import math
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..config.training_config import TrainingConfig
from ..diffusion.losses import NUM_BANDS, by_band
from ..diffusion.timestep_sampling import draw_timesteps, update_history
from ..errors import UserError
from ..models.ema import ema_decay, update_ema
from ..models.post_hoc_ema import power_decay
from ..models.pretrained import Pretrained, load_pretrained
from ..output import drop_failing_output
from ..processes import tuned_convolutions
from ..run_folder import read_metrics
from ..sharing.hub import wait_for_push
from . import plan
from .batches_ahead import draw_batches
from .periodic import announce_stop, due_when_resumed, run_due_tasks, what_is_due
from .run import Run, check_run, open_run
from .trackers import end_trackers


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The result of `train`: a run that has ended.

    Attributes:
        folder: the run folder.
        step: the last optimizer step.
        finished: True if all steps were taken and all figures drawn; False if a signal stopped the run.
        signal: the number of the signal that stopped the run, or None.
        losses: the losses in the last line of metrics.jsonl: "loss" and, if this line has a validation,
            "validation_loss" and "validation_loss_ema". Each loss also has a list of its means in the four quarters
            of the timesteps, e.g. "loss_by_band". If no line was written, `losses` is {}.
    """

    folder: Path
    step: int
    finished: bool
    signal: int | None
    losses: dict

    def __fspath__(self) -> str:
        """Return the folder, so that a finished run can be passed to functions that take the path of a model."""
        return str(self.folder)

    def load(self) -> Pretrained:
        """Load the model of the run from its folder, and return it: float32, on the CPU, in eval mode.

        Raises:
            UserError: for a classifier, which draws no images.
        """
        return load_pretrained(str(self.folder))


def train(config: TrainingConfig) -> FinishedRun | None:
    """Train as `config` says, and return the finished run. A dry run makes no run folder and returns None.

    After SIGINT, SIGTERM or SIGHUP (the terminal was closed), training finishes the current step, saves a checkpoint
    and the pipeline, and stops. Signals are caught only in the main thread. `train` can be called several times in one
    process, and in any thread.

    Raises:
        UserError: if the input cannot be trained on; nothing is written then. Also if a loss is not finite, or if a
            file cannot be written; the last checkpoint stays valid then.

    Example:
        >>> smaller = {"base_channels": 8, "ddpm_num_inference_steps": 10, "eval_batch_size": 4}
        >>> config = TrainingConfig.from_preset("digits", max_train_steps=2, output_dir="runs/short", **smaller)
        >>> run = ddpm_hf.train(config)
        Data: 1,797 images; classes: 0 178, ...
        1,617 images of 8x8x1 (180 held out), ...
        >>> run.step, run.finished
        (2, True)
    """
    drop_failing_output()
    if config.dry_run:
        return rehearse(config)
    run = open_run(config)
    with run.lock:
        take_steps(run)
        run.accelerator.wait_for_everyone()
        end_trackers(run.accelerator)
        run.accelerator.end_training()
        if run.state.push is not None:
            wait_for_push(run.state.push, config.output_dir, run.repo_id)  # if it fails, this prints a warning
        finished = finished_run(run)
    if run.accelerator.is_main_process:
        print_summary(run, finished)
    return finished


def rehearse(config: TrainingConfig):
    """Print the disk space, time and memory of a run, and draw what its network would see. No run folder is changed.

    The first steps are taken in memory, to measure them, and their results are discarded.

    Raises:
        UserError: if the input cannot be trained on, or if the picture cannot be written.
    """
    run, _ = check_run(config)
    config = run.config  # with --init_from, some flags follow the other model
    is_main = run.accelerator.is_main_process
    if is_main and config.verbose:
        print(json.dumps(config.to_dict() | {"network": dict(run.network.config)}, indent=2))
    if is_main:
        print(plan.disk(run), "Measuring a few steps ...", sep="\n", flush=True)
    step, images_seen = run.state.step, run.state.images_seen
    seconds = seconds_per_step(run)
    run.state.step, run.state.images_seen = step, images_seen  # discard the measured steps
    if is_main:
        preview = plan.draw_preview(run)
        print(plan.time_and_memory(run, seconds), f"What the network sees is in {preview}.", sep="\n", flush=True)


def seconds_per_step(run: Run) -> float:
    """Take a first step, then up to 30 steps in about 10 seconds. Return the mean seconds of these later steps."""
    device = run.accelerator.device
    run.model.train()

    def measure(batches, count):
        started = time.perf_counter()
        for _ in range(count):
            step(run, batches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        # Every process uses the mean of all, so that all take the same number of steps.
        seconds = torch.tensor((time.perf_counter() - started) / count, device=device)
        return float(run.accelerator.reduce(seconds, "mean"))

    with contextlib.closing(draw_batches(run)) as batches, tuned_convolutions(run.config.cudnn_benchmark):
        return measure(batches, max(1, min(30, int(10 / measure(batches, 1)))))


def take_steps(run: Run):
    """Take the steps that are left, and do what is due between them, until the last step or a signal."""
    state = run.state
    run.model.train()
    due, log_lines = due_when_resumed(run), 0
    state.interrupted = []
    with (
        catching_signals(state.signals),
        tuned_convolutions(run.config.cudnn_benchmark),
        progress_bar(run) as bar,
        contextlib.closing(draw_batches(run)) as batches,
    ):
        if due:
            run_due_tasks(run, due, None)
        timed_steps, started = 0, time.perf_counter()
        while state.step < run.total_steps and "stop" not in due:
            try:
                step(run, batches)
            except UserError as error:
                error.on_one_process = True  # e.g. an image that only this process reads
                raise
            bar.update()
            timed_steps += 1
            if state.signals:
                announce_stop(state)
            due = what_is_due(run)
            if all_agree_to_stop(run, due):
                due |= {"stop", "checkpoint", "pipeline"}
            if due:
                if run.accelerator.device.type == "cuda":
                    torch.cuda.synchronize()  # a log line reads results anyway, and its speed must count their time
                seconds = time.perf_counter() - started
                state.seconds += seconds
                speed = timed_steps * run.global_batch / seconds
                line = run_due_tasks(run, due, speed)
                if "log" in due:
                    loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
                    bar.set_postfix(loss=loss, images_per_second=f"{speed:.0f}")
                    log_lines += 1
                    if log_lines == 2 and run.accelerator.is_main_process:  # the first steps are slower
                        tqdm.write(plan.time_and_memory(run, run.global_batch / speed))
                timed_steps, started = 0, time.perf_counter()


def step(run: Run, batches):
    """Take one optimizer step: Algorithm 1 of Ho et al., with accumulation, clipping and the moving average.

    The CPU only tells the GPU what to compute. The CPU reads no result, because the GPU would then have to wait.
    """
    config, accelerator, state = run.config, run.accelerator, run.state
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate(state.step)
    bands, seen = torch.zeros(2, NUM_BANDS, device=accelerator.device), []
    for _ in range(config.gradient_accumulation_steps):
        with accelerator.accumulate(run.model):
            # Get the next images, with the noise, the timestep and the label of each.
            batch, uniform, dropout_seed, state.stream = next(batches)
            if state.loss_history is not None:
                timesteps, weights = (
                    each.to(accelerator.device) for each in draw_timesteps(state.loss_history, uniform)
                )
                batch |= {"timesteps": timesteps, "weights": weights * batch.get("weights", 1.0)}
            torch.manual_seed(dropout_seed)  # dropout draws from torch's global generator
            # Predict the noise (or another target) and compute the losses.
            losses = run.loss(run.model, batch)
            # Follow the gradient.
            weights = batch.get("weights", 1.0)
            accelerator.backward((losses * weights).mean())
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm or math.inf)
            run.optimizer.step()
            run.optimizer.zero_grad()
            bands += by_band(losses.detach(), batch["timesteps"], config.ddpm_num_steps, weights)
            seen.append((batch["ordinals"], batch["timesteps"], losses.detach()))
    if state.loss_history is not None:
        # Every process adds the losses of all processes, so that their histories stay equal.
        update_history(state.loss_history, *accelerator.gather([torch.cat(column) for column in zip(*seen)]))
    # Update the moving averages.
    if run.ema is not None:
        update_ema(run.ema, run.network, ema_decay(config, state.step))
    for length, average in run.power_averages.items():
        update_ema(average, run.network, power_decay(length, state.step))
    # Keep the losses on their device, because reading them now would make the GPU wait. The rows will be summed over
    # the processes. The gradient's norm is equal in all of them, so only the main process reports it.
    norm = grad_norm.detach().float().reshape(1) * accelerator.is_main_process
    state.pending.append(torch.cat([bands.flatten(), norm]))
    state.step += 1
    state.images_seen += run.global_batch


def progress_bar(run: Run) -> tqdm:
    """Return a progress bar of the optimizer steps, which only the main process shows."""
    return tqdm(
        desc="train",
        total=run.total_steps,
        initial=run.state.step,
        unit="step",
        dynamic_ncols=True,
        disable=not run.accelerator.is_main_process,
    )


@contextlib.contextmanager
def catching_signals(caught: list[int]):
    """Append the number of a SIGINT, SIGTERM or SIGHUP to `caught`, instead of ending the process.

    If the same signal comes a second time, it acts as usual. But a second SIGHUP changes nothing, because the system
    and the shell may both send one if a terminal is closed. A SIGHUP that is ignored stays ignored, because `nohup`
    asks for that. Python allows handlers only in the main thread, so in other threads signals act as usual.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hangup = {}, getattr(signal, "SIGHUP", None)  # Windows has no SIGHUP

    def note(number, frame):
        # Do not print here, because a signal may interrupt any line, also one that prints. The loop prints a message.
        caught.append(number)
        if number != hangup:
            signal.signal(number, before[number])

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    for number in numbers:
        before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def all_agree_to_stop(run: Run, due: set) -> bool:
    """Return whether to stop after this step, because a process caught a signal.

    Several processes exchange their signals only when a log line is due, because an exchange after every step is slow.
    """
    accelerator, count = run.accelerator, len(run.state.signals)
    if accelerator.num_processes == 1:
        return count > 0
    if "log" not in due:
        return False
    return bool(accelerator.reduce(torch.tensor(count, device=accelerator.device), "sum") > 0)


def finished_run(run: Run) -> FinishedRun:
    """Return the FinishedRun of a run that has ended."""
    state, folder = run.state, Path(run.config.output_dir)
    finished = state.step == run.total_steps and not state.interrupted and not state.figures_missing
    last = next(reversed(read_metrics(folder / "metrics.jsonl")), {})
    number = state.signals[0] if state.signals else signal.SIGTERM  # if another process caught it
    return FinishedRun(
        folder=folder,
        step=state.step,
        finished=finished,
        signal=None if finished else int(number),
        losses={name: value for name, value in last.items() if "loss" in name},
    )


def print_summary(run: Run, finished: FinishedRun):
    """Print where the pipeline, the samples and the figures are, or how to continue a run that was stopped."""
    folder, config = finished.folder, run.config
    if not finished.finished:
        print(
            f"\nStopped after step {finished.step:,} of {run.total_steps:,}: the checkpoint and the pipeline are "
            f"in {folder}; add --resume_from_checkpoint latest to go on.",
            flush=True,
        )
        return
    if config.objective == "classify":
        found = {"classifier": f"{folder / 'classifier'}  (for --classifier {folder} of `sample` and `evaluate`)"}
    else:
        use = f"DDPMPipeline.from_pretrained({str(folder)!r})"
        if config.class_conditional:
            use = "for `python -m ddpm_hf sample` and pipelines/class_guided.py"
        sheets = (folder / "samples").glob("epoch_*.png")
        found = {
            "pipeline": f"{folder}  ({use})",
            "sample sheet": max(sheets, key=lambda path: (len(path.name), path.name)),
            "reverse GIF": folder / "figures" / "reverse.gif",
        }
    found |= {"loss curve": folder / "figures" / "loss.png", "all figures": folder / "figures"}
    print(
        f"\nTrained {finished.step:,} steps in {run.state.seconds / 60:.1f} minutes, not counting samples, scores and "
        "checkpoints.",
        *(f"  {what:12}  {where}" for what, where in found.items()),
        sep="\n",
        flush=True,
    )
