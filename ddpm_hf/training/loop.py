"""The training loop, to be read downwards; what comes before the first step is in run.py, what is due now and then in
milestones.py. Everything counts optimizer steps and images seen, never micro-batches or processes.
"""

import contextlib
import math
import os
import signal
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..data.batches import training_batches
from ..diffusion.losses import NUM_BANDS, by_band, draw_noise, told_labels
from ..diffusion.timestep_sampling import draw_timesteps, remember
from ..errors import UserError
from ..sharing.hub import finish_push
from .periodic import reach, what_is_due
from .run import Run, open_run


def train(config):
    """Train as `config` (a TrainingConfig) says; leave the run folder that the README describes behind.

    Raises:
        UserError: for input that cannot be trained on (nothing is written then), for a loss that is no number any
            more, or a disk that takes no more; the last checkpoint is good in every case.
        SystemExit: 128 + the signal's number, when SIGINT or SIGTERM was answered with a checkpoint and the pipeline.
    """
    run = open_run(config)
    if run is None:
        return
    accelerator, state = run.accelerator, run.state
    batches = training_batches(
        run.train_set, config, state.images_seen, accelerator.process_index, accelerator.num_processes
    )
    run.model.train()
    due, timed_steps, started = set(), 0, time.perf_counter()
    with catching_signals() as signals, progress_bar(run) as bar:
        if state.step == run.total_steps:
            # Resumed at its end: what a kill may have kept from being written then.
            reach(run, {"sheet", "pipeline", "end"}, 0.0, signals)
        while state.step < run.total_steps and "stop" not in due:
            try:
                step(run, batches)
            except UserError as error:
                error.on_one_process = True  # an image that only this one was to read
                raise
            bar.update()
            timed_steps += 1
            due = what_is_due(run)
            if stop_agreed(run, signals, due):
                due |= {"stop", "checkpoint", "pipeline"}
            if due:
                seconds = time.perf_counter() - started
                state.seconds += seconds
                speed = timed_steps * run.global_batch / seconds
                line = reach(run, due, speed, signals)
                if "log" in due:
                    bar.set_postfix(loss=f"{line['loss']:.4f}", images_per_second=f"{speed:.0f}")
                timed_steps, started = 0, time.perf_counter()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if run.pushing is not None:
        finish_push(run.pushing)
    close(run, signals)


def step(run: Run, batches):
    """Take one optimizer step: Algorithm 1 of Ho et al., with accumulation, clipping and the moving average."""
    config, accelerator, state = run.config, run.accelerator, run.state
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate(state.step)
    bands, seen = torch.zeros(2, NUM_BANDS, device=accelerator.device), []
    for _ in range(config.gradient_accumulation_steps):
        with accelerator.accumulate(run.model):
            # Draw images, and a timestep and noise for each.
            batch = next(batches)
            ordinals, shape = batch["ordinals"], batch["images"].shape[1:]
            batch["noise"], batch["timesteps"] = draw_noise(ordinals, shape, config.ddpm_num_steps, config.seed)
            if state.loss_history is not None:
                batch["timesteps"], batch["weights"] = draw_timesteps(state.loss_history, ordinals, config.seed)
            if config.class_conditional:
                batch["class_labels"] = told_labels(
                    batch["labels"], ordinals, len(run.train_set.class_names), config.label_dropout, config.seed
                )
            batch = {name: values.to(accelerator.device, non_blocking=True) for name, values in batch.items()}
            # Dropout knows only the global generator: it is keyed by the first image of the batch.
            torch.manual_seed(config.seed + int(ordinals[0]))
            # Predict the noise and compare.
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
        # All processes learn of all losses, so that they go on drawing by one history.
        remember(state.loss_history, *accelerator.gather([torch.cat(column) for column in zip(*seen)]))
    # Update the moving average.
    if run.ema is not None:
        run.ema.update_parameters(run.network)
    # Keep the losses where they are: to read them now would make a GPU wait. The gradient's norm is the same
    # everywhere, so one process reports it.
    norm = grad_norm.detach().float().reshape(1) * accelerator.is_main_process
    state.pending.append(torch.cat([bands.flatten(), norm]))
    state.step += 1
    state.images_seen += run.global_batch


def progress_bar(run: Run):
    return tqdm(
        desc="train",
        total=run.total_steps,
        initial=run.state.step,
        unit="step",
        dynamic_ncols=True,
        disable=not run.accelerator.is_main_process,
    )


@contextlib.contextmanager
def catching_signals():
    """Collect SIGINT and SIGTERM in a list instead of dying of them; the second one of a kind acts as ever."""
    caught, before = [], {}

    process = os.getpid()

    def note(number, frame):
        caught.append(number)
        signal.signal(number, before[number])
        if os.getpid() == process:  # not a worker that decodes images
            print(f"\n{signal.Signals(number).name}: finishing this step, then writing a checkpoint.", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_agreed(run: Run, signals: list, due: set) -> bool:
    """Return whether to stop after this step. Several processes ask each other, when they meet for a log line."""
    if run.accelerator.num_processes == 1:
        return bool(signals)
    if "log" not in due:
        return False
    return bool(run.accelerator.reduce(torch.tensor(len(signals), device=run.accelerator.device), "sum") > 0)


def close(run: Run, signals: list):
    """Say where everything lies, or how to go on."""
    folder = Path(run.config.output_dir)
    finished = run.state.step == run.total_steps and not run.unfinished
    if run.accelerator.is_main_process and finished:
        found = {"pipeline": f"{folder}  (DDPMPipeline.from_pretrained({str(folder)!r}))"}
        if run.config.class_conditional:
            found = {"pipeline": f"{folder}  (for `python -m ddpm_hf sample` and pipelines/class_guided.py)"}
        if run.config.objective == "classify":
            found = {"classifier": f"{folder / 'classifier'}  (for --classifier {folder} of `sample` and `evaluate`)"}
        else:
            sheets = (folder / "samples").glob("epoch_*.png")
            found["sample sheet"] = max(sheets, key=lambda path: (len(path.name), path.name))
            found["reverse GIF"] = folder / "figures" / "reverse.gif"
        found |= {"loss curve": folder / "figures" / "loss.png", "all figures": folder / "figures"}
        print(
            f"\nTrained {run.state.step:,} steps in {run.state.seconds / 60:.1f} minutes.",
            *(f"  {what:12}  {where}" for what, where in found.items()),
            sep="\n",
            flush=True,
        )
    elif run.accelerator.is_main_process:
        print(
            f"\nStopped after step {run.state.step:,} of {run.total_steps:,}: checkpoint and pipeline so far are "
            f"in {folder}; add --resume_from_checkpoint latest to go on.",
            flush=True,
        )
    if not finished:
        raise SystemExit(128 + (signals[0] if signals else signal.SIGTERM))
