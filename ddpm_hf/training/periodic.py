"""Do what is due between steps: log lines, validation, scores, sample sheets, checkpoints, pipelines and pushes.

`what_is_due` names the tasks that are due after a step. `run_due_tasks` runs these tasks, in the order of TASKS.
"""

import json
import math
import signal
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from .. import run_folder
from ..diffusion.losses import NUM_BANDS
from ..errors import UserError
from ..files import write_json, writing
from ..models.ema import ema_decay
from ..models.post_hoc_ema import save_snapshot
from ..models.saving import save_classifier, save_pipeline
from ..pictures import image_sheet, side_by_side
from ..sampling.generate import sample_together
from ..sampling.settings import Sampler
from ..sharing.card import write_card_or_warn
from ..sharing.hub import push_in_background
from . import checkpoints, trackers
from .figures import figures_of_run, loss_figure
from .resume_changes import facts_to_compare
from .run import Run
from .scoring import score_run
from .validation import mean, per_band, validate


def epochs_between(run: Run) -> dict[str, int]:
    """Return the repeated tasks as {name: n}. Each task is due every n epochs, and at the end of this run."""
    config = run.config
    every = {"pipeline": config.save_model_epochs}
    if run.validation_set is not None:
        every["validation"] = config.validation_epochs
    if run.evaluation is not None:
        every["scores"] = config.eval_epochs
    if config.objective != "classify":
        every["sheet"] = config.save_images_epochs
    return every


def what_is_due(run: Run) -> set[str]:
    """Return what is due after this step. An epoch ends whenever another `num_images` images have been seen."""
    config, step, every = run.config, run.state.step, epochs_between(run)
    due = {name for name, n in every.items() if run.epochs(step) // n > run.epochs(step - 1) // n}
    if step == run.total_steps:
        due |= every.keys() | {"end"}
    if step * config.ema_snapshots // run.total_steps > (step - 1) * config.ema_snapshots // run.total_steps:
        due.add("snapshot")
    if due & {"validation", "scores", "end"} or step % config.logging_steps == 0:
        due.add("log")
    # A pipeline is never saved without a checkpoint to continue from.
    if "pipeline" in due or step % config.checkpointing_steps == 0:
        due.add("checkpoint")
    return due


def due_when_resumed(run: Run) -> set[str]:
    """Return the tasks that a signal or a kill left undone at the step of the checkpoint; set() for a new run."""
    # Flags may have changed, so leave out tasks that this run does not have.
    due = set(run.state.interrupted) & {"log", *epochs_between(run)}
    if run.state.step == run.total_steps:  # a kill may have come after the checkpoint of the last step
        due |= {"pipeline", "end"} if run.config.objective == "classify" else {"sheet", "pipeline", "end"}
    return due


def run_due_tasks(run: Run, due: set[str], images_per_second: float | None) -> dict:
    """Run the tasks that are due, in the order of TASKS, and return the log line. Every process calls this.

    If a signal interrupts a task, "stop" is added to `due`, and the tasks that the resumed run will do are removed.

    Args:
        images_per_second: the speed of the steps, for the log line; None if no step was timed.

    Raises:
        UserError: if a loss is not finite, or if a file cannot be written.
    """
    pending_rows(run)  # raises an error if a loss is not finite, before anything is drawn or saved
    state = run.state
    line = {
        "step": state.step,
        "epoch": round(state.images_seen / run.num_images, 4),
        "images_seen": state.images_seen,
        "images_per_second": None if images_per_second is None else round(images_per_second, 2),
        "seconds": round(state.seconds, 1),
    }
    for name, task in TASKS:
        if name in due:
            task(run, due, line)
    return line


def leave_to_resumed_run(run: Run, due: set[str], tasks: set[str]):
    """Stop after this step, because a signal interrupted one of `tasks`. The resumed run does all of `tasks` again.

    These tasks need the weights of this step, so a checkpoint of this step is saved.
    """
    state = run.state
    announce_stop(state)
    state.interrupted += sorted(tasks & due)
    due.difference_update(tasks, {"end"})  # a resumed run draws the figures of the last step again
    due.update({"stop", "pipeline"})
    # A resumed run that is interrupted before its first step has this checkpoint already.
    if Path(run.config.output_dir, f"checkpoint-{state.step}") not in run_folder.checkpoints(run.config.output_dir):
        due.add("checkpoint")


def announce_stop(state: checkpoints.TrainState):
    """Print once that the run stops because of a signal."""
    if not state.stop_announced:
        state.stop_announced = True
        tqdm.write(f"{signal.Signals(state.signals[0]).name}: writing a checkpoint, then stopping.")


def add_averages(run: Run, due: set[str], line: dict):
    """Add to `line` the mean losses since the last log line, the learning rate and the EMA decay."""
    state = run.state
    line |= averages(pending_rows(run))
    line["lr"] = run.learning_rate(state.step - 1)
    line["ema_decay"] = ema_decay(run.config, state.step - 1) if run.ema is not None else None


def add_validation_loss(run: Run, due: set[str], line: dict):
    """Add the validation loss to `line`. If --best_by is this loss, and it is the lowest so far, save best/.

    Raises:
        UserError: if the loss is not finite. The steps may all have had finite losses, but the last of them can make
            the weights too large.
    """
    measured = validate(run)
    means = [value for value in measured.values() if isinstance(value, float)]
    if not all(map(math.isfinite, means)):
        raise diverged(run, "the validation loss", run.state.step)
    line |= measured
    if run.config.best_by == "validation_loss":
        keep_best(run, "validation_loss", line["validation_loss" if run.ema is None else "validation_loss_ema"])


def add_scores(run: Run, due: set[str], line: dict):
    """Add the scores to `line`. Save best/ if the score that --best_by names is the best so far.

    After a signal, no more images are drawn. The resumed run measures the scores instead, and writes the log line.
    """
    config = run.config
    try:
        scores, best = score_run(run, stop_on_signal(run))
    except Interrupted:
        leave_to_resumed_run(run, due, {"log", "validation", "scores"})
        return
    line["scores"] = scores
    keep_best(run, f"{config.best_by} {config.eval_num_images}", best)
    if run.accelerator.is_main_process:
        numbers = ", ".join(f"{id} {value:.4g}" for id, value in scores.items())
        if numbers:
            tqdm.write(f"Step {run.state.step}: {numbers}")


def keep_best(run: Run, measure: str, value: float | None):
    """Save the pipeline in best/ if `value` is the lowest value of `measure` so far. Save nothing if it is None."""
    config, state = run.config, run.state
    if not config.save_best or value is None or not run.accelerator.is_main_process:
        return
    if state.best_measure != measure:  # a resumed run may have another --best_by
        state.best_measure = measure
        state.best_score = float("inf")
    if value < state.best_score:
        state.best_score = value
        folder = Path(config.output_dir, "best")
        with writing("the best pipeline", folder):
            folder.mkdir(exist_ok=True)
            # Write the step first. If a kill comes before the pipeline is saved, the resumed run saves it again.
            write_json(folder / "best.json", {"step": state.step, "measure": measure, "value": value})
            save_network(run, folder)


def write_log_line(run: Run, due: set[str], line: dict):
    """Append `line` to metrics.jsonl, and give its numbers to the tracker."""
    folder = Path(run.config.output_dir)
    if run.accelerator.is_main_process:
        with writing("metrics.jsonl", folder), open(folder / "metrics.jsonl", "a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(line) + "\n")
        numbers = {k: v for k, v in (line | line.get("scores", {})).items() if isinstance(v, (int, float))}
        trackers.log(run.accelerator, lambda tracker: tracker.log(numbers, step=run.state.step))
    run.state.pending.clear()


def add_sheet(run: Run, due: set[str], line: dict):
    """Draw the sample sheet samples/epoch_<n>.png, from the same noise each time. After a signal, stop drawing it."""
    config, accelerator = run.config, run.accelerator
    # By default a Sampler's timesteps are trailing and begin in pure noise. With cosine betas, leading timesteps would
    # begin where some signal is left.
    model = run.pretrained
    sampler = Sampler(num_inference_steps=config.ddpm_num_inference_steps, seed=config.seed).resolve(model)
    count = config.eval_batch_size
    try:
        images = sample_together(model, sampler, count, batch_size=count, on_step=stop_on_signal(run))
    except Interrupted:
        leave_to_resumed_run(run, due, {"sheet"})
        return
    if accelerator.is_main_process:
        epoch = run.epochs(run.state.step - 1) + 1  # the epoch that this step belongs to
        path = Path(config.output_dir) / "samples" / f"epoch_{epoch:04d}.png"
        with writing("a sample sheet", path):
            path.parent.mkdir(exist_ok=True)
            # Use one column per class, if there are at most 16 classes.
            columns = len(run.class_names) if run.class_names and len(run.class_names) <= 16 else None
            image_sheet(images, path, columns)
        trackers.log(accelerator, lambda tracker: log_sheet(tracker, images, path, run.state.step))


def log_sheet(tracker, images: torch.Tensor, sheet: Path, step: int):
    """Give a sample sheet to a tracker of accelerate. TensorBoard gets the `images`, the others the file `sheet`."""
    if tracker.name == "tensorboard":
        tracker.log_images({"samples": side_by_side(images).numpy()}, step=step, dataformats="NCHW")
    elif tracker.name == "wandb":
        with Image.open(sheet) as picture:
            tracker.log_images({"samples": [picture]}, step=step)
    elif tracker.name == "trackio":
        import trackio  # accelerate's tracker has no method for pictures

        tracker.log({"samples": trackio.Image(str(sheet))}, step=step)


def add_snapshot(run: Run, due: set[str], line: dict):
    """Save the averages of --ema_snapshots."""
    if run.accelerator.is_main_process:
        with writing("an average of the weights", Path(run.config.output_dir)):
            save_snapshot(run.config.output_dir, run.power_averages, run.state.step)


def save_checkpoint(run: Run, due: set[str], line: dict):
    """Write checkpoint-<step>, with everything that is needed to resume exactly."""
    facts = {
        "unet": dict(run.network.config),
        "scheduler": run.scheduler.arguments,
        "base_model": run.facts["base_model"],
        "class_names": run.class_names,
        "facts": facts_to_compare(run, run.state.step),
    }
    checkpoints.save_checkpoint(run, facts, pending_rows(run))


def save_published(run: Run, due: set[str], line: dict):
    """Save the pipeline, or the classifier, in the run folder."""
    folder = Path(run.config.output_dir)
    if run.accelerator.is_main_process:
        with writing("the pipeline", folder):
            save_network(run, folder)


def draw_figures(run: Run, due: set[str], line: dict):
    """Draw the figures of the finished run; for a classifier, only the loss curve. A signal stops the drawing."""
    config, folder = run.config, Path(run.config.output_dir)
    if not run.accelerator.is_main_process:
        return
    with writing("the figures", folder):
        if config.objective == "classify":
            loss_figure(folder / "metrics.jsonl", folder / "figures" / "loss.png")
            return
        try:
            figures_of_run(folder, run.pretrained, run.train_set, config, stop_on_signal(run))
        except Interrupted:
            run.state.figures_missing = True


def write_run_card(run: Run, due: set[str], line: dict):
    """Write the model card, README.md."""
    if run.accelerator.is_main_process:
        write_card_or_warn(run.config.output_dir, run.repo_id)


def start_push(run: Run, due: set[str], line: dict):
    """With --push_to_hub, start to push the run folder to the Hub. Only the main process does so."""
    if run.repo_id is not None:
        message = "End of training" if "end" in due else f"Step {run.state.step}"
        run.state.push = push_in_background(
            run.config.output_dir, run.repo_id, run.config.hub_token, message, replaces=run.state.push
        )


# Pairs of a name that `what_is_due` returns, and the function that then runs, called as `task(run, due, line)`.
#
# A kill can come at any point. A resumed run then repeats the steps after the last checkpoint, and everything that was
# due in them, with the same results. So everything that belongs to a step is done before the checkpoint of the step.
TASKS = [
    # First collect the numbers of the log line: the training losses, the validation losses and the scores.
    ("log", add_averages),
    ("validation", add_validation_loss),
    ("scores", add_scores),
    # Write the line before the checkpoint, because the checkpoint no longer has the losses of this line. In the other
    # order, a kill between the two would lose the line. In this order, a kill leaves one line too many, which
    # the resumed run removes.
    ("log", write_log_line),
    # Draw before the checkpoint. Otherwise a run killed between the two would never draw this sheet. If a signal
    # interrupts the drawing, the checkpoint says so, see `leave_to_resumed_run`.
    ("sheet", add_sheet),
    ("snapshot", add_snapshot),
    # Save the checkpoint before the pipeline, because a folder with a pipeline but no checkpoint cannot be resumed.
    ("checkpoint", save_checkpoint),
    # Save the pipeline before the figures, because figures take minutes. A run that is resumed at its last step does
    # the rest of the list again.
    ("pipeline", save_published),
    ("end", draw_figures),
    # Write the card after the figures, because it shows them. Push last, because the push publishes all of these.
    ("pipeline", write_run_card),
    ("pipeline", start_push),
]


class Interrupted(Exception):
    """Raised to stop drawing images after a signal."""


def stop_on_signal(run: Run):
    """Return an `on_step` for sampling that raises Interrupted after a signal.

    With several processes `on_step` does nothing, because a process that stops alone would leave the others waiting.
    """

    def on_step(*step):
        if run.state.signals and run.accelerator.num_processes == 1:
            raise Interrupted

    return on_step


def save_network(run: Run, folder: Path):
    """Save the published weights: as a pipeline in `folder`, or as a classifier in `folder`/classifier."""
    if run.config.objective == "classify":
        save_classifier(folder, run.published)
    else:
        save_pipeline(folder, run.published, run.scheduler, run.class_names)


def pending_rows(run: Run) -> list[torch.Tensor]:
    """Return the losses and gradient norms since the last log line: a row per step, summed over processes, on the CPU.

    A checkpoint saves these sums. When a run loads the checkpoint, the main process takes the sums, and the others
    take zeros. So the next sum over all processes is the same, bit for bit.

    Raises:
        UserError: if a loss or a gradient is not finite. The message names the first such step.
    """
    state, config = run.state, run.config
    if not state.pending:
        return []
    table = run.accelerator.reduce(torch.stack(state.pending), "sum").cpu()
    # With fp16 gradients overflow now and then, and the gradient scaler skips those steps.
    checked = table[:, :-1] if config.mixed_precision == "fp16" else table
    if not checked.isfinite().all():
        first = int((~checked.isfinite().all(dim=1)).nonzero()[0])
        step = state.step - len(table) + first + 1
        what = "the gradient" if checked[first, :-1].isfinite().all() else "the loss"
        raise diverged(run, what, step)
    return list(table)


def diverged(run: Run, what: str, step: int) -> UserError:
    """Return the error of a run in which `what`, e.g. "the loss", is not finite at an optimizer step."""
    last_good = run_folder.checkpoints(run.config.output_dir)[-1:]
    return UserError(
        f"{what} became nan or infinite at step {step} (learning rate {run.learning_rate(step - 1):.2g}): "
        "lower --learning_rate, lengthen --lr_warmup_steps or give --mixed_precision no; "
        + (f"the last good checkpoint is {last_good[0]}." if last_good else "there was no checkpoint yet.")
    )


def averages(rows: list[torch.Tensor]) -> dict:
    """Return the averages of the rows of several steps: losses over all images, the gradient norm over all steps."""
    table = torch.stack(rows).double()
    sums, counts = table[:, :-1].sum(dim=0).view(2, NUM_BANDS)
    norms = table[:, -1][table[:, -1].isfinite()]
    return {
        "loss": mean(sums, counts),  # None if no image of a classifier had a class
        "loss_by_band": per_band(sums, counts),
        # With fp16 every norm may have overflowed. Then write None, because JSON has no infinity.
        "grad_norm": float(norms.mean()) if len(norms) else None,
    }
