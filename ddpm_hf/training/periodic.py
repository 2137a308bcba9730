"""What a run does besides steps: log lines, validation, sample sheets, checkpoints, pipelines, pushes, the end."""

import contextlib
import json
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .. import run_folder
from ..diffusion.losses import NUM_BANDS
from ..errors import UserError
from ..files import writing
from ..models.ema import ema_decay
from ..models.saving import save_classifier, save_pipeline
from ..pictures import image_sheet
from ..sampling.generate import sample_images
from ..sampling.settings import Sampler
from ..sharing.card import write_card
from ..sharing.hub import push
from . import checkpoints
from .figures import loss_figure, run_figures
from .run import Run
from .scoring import score_run
from .validation import per_band, validate


def what_is_due(run: Run) -> set[str]:
    """Return what is due after this step. An epoch is over when the images seen pass a multiple of the set."""
    config, step = run.config, run.state.step
    every = {
        "validation": config.validation_epochs,
        "sheet": config.save_images_epochs,
        "pipeline": config.save_model_epochs,
        "scores": config.eval_epochs,
    }
    due = {name for name, n in every.items() if run.epochs(step) // n > run.epochs(step - 1) // n}
    if step == run.total_steps:
        due |= every.keys() | {"end"}
    if run.validation_set is None:
        due.discard("validation")
    if run.evaluation is None:
        due.discard("scores")
    if config.objective == "classify":
        due.discard("sheet")
    if due & {"validation", "scores", "end"} or step % config.logging_steps == 0:
        due.add("log")
    # A pipeline never lies there without a checkpoint to go on from.
    if "pipeline" in due or step % config.checkpointing_steps == 0:
        due.add("checkpoint")
    return due


class Interrupted(Exception):
    """A signal came while pictures were being drawn."""


def yielding_to(signals: list, run: Run):
    """Return an `on_step` for sampling that raises Interrupted once there is a signal.

    Several processes would lose each other: there the picture is finished first.
    """

    def on_step(*step):
        if signals and run.accelerator.num_processes == 1:
            raise Interrupted

    return on_step


def reach(run: Run, due: set[str], images_per_second: float, signals: list) -> dict:
    """Do what is due, in an order that a kill at any point cannot upset; return the log line. All processes call this.

    `signals` has the signals caught so far: one that comes while a sheet is drawn ends the sheet.

    Raises:
        UserError: if a loss is no number any more, or if something cannot be written.
    """
    config, state, main = run.config, run.state, run.accelerator.is_main_process
    folder = Path(config.output_dir)
    rows = pending_rows(run)
    line = {
        "step": state.step,
        "epoch": round(state.images_seen / run.num_images, 4),
        "images_seen": state.images_seen,
    }
    if "log" in due:
        line |= averages(rows) | {
            "lr": run.learning_rate(state.step - 1),
            "ema_decay": ema_decay(config, state.step - 1) if run.ema is not None else None,
            "images_per_second": round(images_per_second, 2),
            "seconds": round(state.seconds, 1),
        }
        state.pending.clear()
        rows = []
    compared = None  # what best/ is chosen by, lower is better
    if "validation" in due:
        line |= validate(run)
        if config.best_by == "validation_loss":
            compared = line["validation_loss" if run.ema is None else "validation_loss_ema"]
    if "scores" in due:
        with contextlib.suppress(Interrupted):
            line["scores"], by_score = score_run(run, yielding_to(signals, run))
            compared = compared if by_score is None else by_score
            if main:
                numbers = ", ".join(f"{id} {value:.4g}" for id, value in line["scores"].items())
                tqdm.write(f"Step {state.step}: {numbers}")
    measure = config.best_by if config.best_by == "validation_loss" else f"{config.best_by} {config.eval_num_images}"
    if state.best_measure != measure:  # a resumed run may go on by another
        state.best_measure, state.best_score = measure, float("inf")
    if config.save_best and main and compared is not None and compared < state.best_score:
        state.best_score = compared
        with writing("the best pipeline", folder / "best"):
            save_network(run, folder / "best")
    if "log" in due and main:
        with writing("metrics.jsonl", folder), open(folder / "metrics.jsonl", "a") as metrics:
            metrics.write(json.dumps(line) + "\n")
        numbers = {k: v for k, v in (line | line.get("scores", {})).items() if isinstance(v, (int, float))}
        run.accelerator.log(numbers, step=state.step)
    if "sheet" in due:
        try:
            draw_sheet(run, signals)
        except Interrupted:
            run.unfinished = "end" in due
    if "checkpoint" in due:
        state.stream = run.train_set.state_dict() if config.streaming else None
        network = {"unet": dict(run.network.config), "class_names": run.told_names}
        checkpoints.save_checkpoint(run.accelerator, config, network, run.ema, state, rows)
    if "pipeline" in due and main:
        with writing("the pipeline", folder):
            save_network(run, folder)
            if "end" in due and config.objective == "classify":
                loss_figure(folder / "metrics.jsonl", folder / "figures" / "loss.png")
            elif "end" in due:
                images = run.train_set.get(list(range(min(8, run.num_images))))
                count = min(16, config.eval_batch_size)
                steps = config.ddpm_num_inference_steps
                try:
                    give_way = yielding_to(signals, run)
                    labels = run.class_labels(range(count))
                    run_figures(
                        folder, run.published, run.scheduler, images, config.seed, count, steps, give_way, labels
                    )
                except Interrupted:
                    run.unfinished = True
            write_card(folder, run.repo_id)
        if run.repo_id is not None:
            message = "End of training" if "end" in due else f"Step {state.step}"
            run.pushing = push(folder, run.repo_id, config.hub_token, message)
    return line


def save_network(run: Run, folder: Path):
    """Save what is published: the pipeline, or the classifier in a folder `classifier`."""
    if run.config.objective == "classify":
        save_classifier(folder, run.published)
    else:
        save_pipeline(folder, run.published, run.scheduler, run.told_names)


def pending_rows(run: Run) -> list[torch.Tensor]:
    """Return one row per step since the last log line, summed over the processes, on the CPU.

    Each process has its share. Summed row by row, the rows can be given back to one process alone by a checkpoint
    and still add up to the same, bit for bit.

    Raises:
        UserError: naming the first step whose loss or gradient was no finite number.
    """
    state, config = run.state, run.config
    if not state.pending:
        return []
    table = run.accelerator.reduce(torch.stack(state.pending), "sum").cpu()
    # With fp16 an overflowing gradient is everyday life: the scaler skips that step.
    checked = table[:, :-1] if config.mixed_precision == "fp16" else table
    if not checked.isfinite().all():
        first = int((~checked.isfinite().all(dim=1)).nonzero()[0])
        step = state.step - len(table) + first + 1
        what = "the gradient" if checked[first, :-1].isfinite().all() else "the loss"
        last_good = run_folder.checkpoints(config.output_dir)[-1:]
        raise UserError(
            f"{what} became nan or infinite at step {step} (learning rate {run.learning_rate(step - 1):.2g}): "
            "lower --learning_rate, lengthen --lr_warmup_steps or take --mixed_precision no; "
            + (f"the last good checkpoint is {last_good[0]}." if last_good else "there was no checkpoint yet.")
        )
    return list(table)


def averages(rows: list[torch.Tensor]) -> dict:
    """Return the log line's means over all images since the last line."""
    table = torch.stack(rows).double()
    sums, counts = table[:, :-1].sum(dim=0).view(2, NUM_BANDS)
    norms = table[:, -1][table[:, -1].isfinite()]
    return {
        "loss": float(sums.sum() / counts.sum()),
        "loss_by_band": per_band(sums, counts),
        # Under fp16 some overflow, and infinity is no JSON.
        "grad_norm": float(norms.mean()) if len(norms) else None,
    }


def draw_sheet(run: Run, signals: list):
    """Write samples/epoch_<n>.png from the same noise each time; every process draws its share of the images.

    Raises:
        Interrupted: if a signal comes. (Not on several processes, which would lose each other.)
    """
    config, accelerator = run.config, run.accelerator
    share = range(accelerator.process_index, config.eval_batch_size, accelerator.num_processes)
    # Trailing timesteps begin at T - 1, in pure noise; leading ones would begin where cosine betas leave signal.
    sampler = Sampler(num_inference_steps=config.ddpm_num_inference_steps, seed=config.seed).resolve(run.pretrained)
    images = sample_images(
        run.pretrained,
        sampler,
        share,
        batch_size=config.eval_batch_size,
        on_step=yielding_to(signals, run),
        progress=accelerator.is_main_process,
    )
    drawn = gather_object(list(zip(share, images.cpu().numpy())))
    if accelerator.is_main_process:
        images = np.stack([image for _, image in sorted(drawn, key=lambda pair: pair[0])])
        epoch = run.epochs(run.state.step - 1) + 1  # the one that this step belongs to
        path = Path(config.output_dir) / "samples" / f"epoch_{epoch:04d}.png"
        with writing("a sample sheet", path):
            path.parent.mkdir(exist_ok=True)
            # A class a column, if there is room.
            columns = len(run.train_set.class_names) if config.class_conditional else None
            image_sheet(torch.from_numpy(images), path, columns if columns is None or columns <= 16 else None)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": images.transpose(0, 2, 3, 1)}, step=run.state.step, dataformats="NHWC")
