"""Prepare the run folder; save, find, check and load its checkpoints.

A checkpoint is either complete or absent, and saving one never changes the earlier ones. accelerate writes the
weights, the optimizer and the gradient scaler. We add the EMA as safetensors, and the counters as state.pt, which
torch.load can read with weights_only=True. All files are written to the folder `checkpoint-<step>.tmp`. When every
process is done, this folder is renamed. If a kill leaves a .tmp folder, the next run removes it.
"""

import contextlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors.torch
import torch

from ..diffusion.losses import NUM_BANDS
from ..errors import UserError
from ..evaluation.records import read_record
from ..files import read_json, remove, writing
from ..locks import LOCK, locked
from ..manifest import check_files, damaged, reading, write_manifest
from ..models.post_hoc_ema import find_snapshots, load_state, state_of
from ..run_folder import (
    BEST,
    HALF_WRITTEN,
    RECORDS,
    RUN_FILES,
    checkpoint_folders,
    checkpoints,
    files_in,
    is_checkpoint_name,
    step_of,
)
from .resume_changes import check_fixed_flags, warnings_about


FOLDERS = sorted({name.split("/")[0] for name in [*RUN_FILES, *RECORDS] if "/" in name})  # a run writes in these
SECOND_RUN = "wait until that run ends, or give another --output_dir"
# The fields of TrainState in state.pt, and their types. All checkpoints have these.
SAVED = {"step": int, "images_seen": int, "seconds": (int, float), "best_score": (int, float), "best_measure": str}
SAVED |= {"pending": list, "stream": (dict, NoneType), "loss_history": (torch.Tensor, NoneType)}


@dataclass
class TrainState:
    """Everything that changes during a run. Progress is counted in optimizer steps and images seen.

    Saved in state.pt (the fields in SAVED, and `interrupted` if it is not empty):
        seconds: time of the training steps alone, without validation, scores, sheets and checkpoints.
        best_score, best_measure: the score of the model in best/ (lower is better), and the name of this score.
        pending: a row for each step since the last line of metrics.jsonl, with its losses and its gradient norm.
        stream: the position in a streamed dataset, after the last batch that was used; None for other data.
        loss_history: the last losses of each timestep, see timestep_sampling.py. All processes have the same history.
            None without --timestep_sampling loss_second_moment.
        interrupted: the names of the tasks that a signal interrupted at this step, see TASKS in periodic.py. The
            resumed run does these tasks before its next step.

    Not saved, because these fields belong to the current process:
        signals: the numbers of the signals caught so far.
        stop_announced: True if a message has said that the run stops because of a signal.
        figures_missing: True if a signal stopped the drawing of the figures. The run is then not finished.
        push: the future of the last push to the Hub, which runs in the background.
    """

    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    best_score: float = float("inf")
    best_measure: str = ""
    pending: list = field(default_factory=list)
    stream: dict | None = None
    loss_history: torch.Tensor | None = None
    interrupted: list[str] = field(default_factory=list)

    signals: list[int] = field(default_factory=list)
    stop_announced: bool = False
    figures_missing: bool = False
    push: Any = None


def find_checkpoint(config) -> Path | None:
    """Return the checkpoint to resume from, or None to start a new run. Nothing is written.

    Raises:
        UserError: if the checkpoint to resume from does not exist or is not complete, if --output_dir or
            --logging_dir cannot be used, or if the run folder is not empty and its run is neither resumed nor
            overwritten.
    """
    output_dir = Path(config.output_dir)
    with writing("the run", output_dir):  # a name that is too long raises an error here
        is_file = output_dir.exists() and not output_dir.is_dir()
    if is_file:
        raise UserError(f"--output_dir {output_dir} is a file: give the name of a folder.")
    check_places(output_dir, config.logging_dir)
    if config.resume_from_checkpoint is not None and config.overwrite_output_dir:
        raise UserError(
            "--resume_from_checkpoint goes on with a run and --overwrite_output_dir removes it: give only one of them."
        )
    if config.resume_from_checkpoint not in (None, "latest"):
        checkpoint = Path(config.resume_from_checkpoint)
        if not checkpoint.exists() and checkpoint.name == config.resume_from_checkpoint:
            checkpoint = output_dir / checkpoint  # a name without a folder, as in diffusers' script
        parts = [(checkpoint / name).is_file() for name in ("state.pt", "model.safetensors")]
        if not all(parts) or not is_checkpoint_name(checkpoint.name):
            raise UserError(
                f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint: give a folder named "
                f"checkpoint-<step>, or `latest`."
            )
        elsewhere = checkpoint.parent.resolve() != output_dir.resolve()
        if elsewhere and in_use(output_dir):
            raise UserError(
                f"{checkpoint} is from another run folder, and --output_dir {output_dir} is not empty: give a new or "
                "empty --output_dir."
            )
        return checkpoint
    if config.resume_from_checkpoint == "latest":
        if found := checkpoints(output_dir):
            return found[-1]
        if parts := checkpoint_folders(output_dir):  # they may hold work, so a new start does not remove them
            raise UserError(
                f"--resume_from_checkpoint latest found no complete checkpoint in {output_dir}, but an "
                f"incomplete {parts[-1].name}: give --overwrite_output_dir instead to remove this run, or "
                "another --output_dir."
            )
    taken = in_use(output_dir)
    if taken and config.resume_from_checkpoint == "latest":
        taken = not can_start_again(output_dir, config.logging_dir)
    if taken and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} is not empty: give --resume_from_checkpoint latest to go on with its run "
            "(if it has a checkpoint), --overwrite_output_dir to replace it, or another folder."
        )
    if taken and not is_run(output_dir) and (strange := checkpoint_folders(output_dir)):
        raise UserError(
            f"--output_dir {output_dir} has a {strange[0].name}, but no train_config.json of a run, so the folder is "
            f"not overwritten: remove {strange[0].name}, or give another folder."
        )
    return None


def check_places(output_dir: Path, logging_dir: str):
    """Raise a UserError for a --logging_dir where the run writes other files, and for names that are already taken.

    A name is taken if the folder has a file where the run writes a folder, or a folder where the run writes a file.
    """
    files = ["train_config.json", "metrics.jsonl", "model_index.json"]
    if (first := Path(logging_dir).parts[0]) in [*FOLDERS, *files, "README.md"] or is_checkpoint_name(first):
        raise UserError(f"--logging_dir {logging_dir} is where the run writes other files: give a name such as logs.")
    for name in [*FOLDERS, *files, first]:
        is_folder = (output_dir / name).is_dir()
        if os.path.lexists(output_dir / name) and is_folder == (name in files):
            found, needed = ("folder", "file") if is_folder else ("file", "folder")
            raise UserError(
                f"--output_dir {output_dir} has a {found} named {name}, where the run writes a {needed}: move it "
                "away, or give another folder."
            )


def check_data_is_elsewhere(config):
    """Raise a UserError if the images are in a place where the run writes its own files.

    Otherwise a resumed run would train on its own sample sheets, and --overwrite_output_dir would remove images. A Hub
    id must differ from the name of the run's folder, too, because a resumed run would take this folder as the data.
    """
    given = config.dataset_name or config.train_data_dir
    output_dir, data = Path(config.output_dir), Path(given).expanduser()
    if config.dataset_name == "digits" and (not data.exists() or (data / "train_config.json").is_file()):
        return  # the digits are the bundled ones, as in data/sources.py
    data = data.resolve()
    places = [(output_dir / name).resolve() for name in (*FOLDERS, config.logging_dir)]
    if data == output_dir.resolve() or any(map(data.is_relative_to, places)):
        raise UserError(
            f"--output_dir {output_dir} would put the files of the run where its images are looked for ({given}): "
            "give another --output_dir."
        )


def in_use(folder: Path) -> bool:
    """Return whether a folder exists and has files, apart from the lock."""
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())


def is_run(folder: Path) -> bool:
    """Return whether a folder has a train_config.json of a run of ddpm_hf. Other programs also use this name."""
    try:
        record = read_json(folder / "train_config.json", missing={})
    except UserError:
        return False
    flags = record.get("flags")
    known = {"output_dir", "resolution", "ddpm_num_steps", "ddpm_beta_schedule"}
    return isinstance(flags, dict) and flags.keys() >= known and isinstance(record.get("versions"), dict)


def can_start_again(folder: Path, logging_dir: str) -> bool:
    """Return whether the previous run was killed before its first checkpoint. `latest` then starts a new run.

    Before train_config.json, a run writes only the lock, the folder of its tracker and temporary files. A run saves no
    network before its first checkpoint.
    """
    first = {LOCK, ".writable.tmp", ".train_config.json.tmp", Path(logging_dir).parts[0]}
    if {path.name for path in folder.iterdir()} <= first:
        return True
    return is_run(folder) and not (folder / "model_index.json").exists() and not (folder / "classifier").exists()


@contextlib.contextmanager
def output_dir_locked(config, checkpoint: Path | None):
    """Create the run folder if it is missing, and keep other runs out of it during a `with` block.

    Raises:
        UserError: if the folder cannot be written to, if another run is writing to it, or if another run has changed
            it since `find_checkpoint` returned `checkpoint`.
    """
    output_dir = Path(config.output_dir)
    with contextlib.ExitStack() as stack:
        with writing("the run", output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(output_dir, SECOND_RUN))
        if find_checkpoint(config) != checkpoint:
            raise UserError(f"{output_dir} was changed by another run while this one started: start this one again.")
        yield


def replaced_by(config, checkpoint: Path | None) -> list[Path]:
    """Return the files and checkpoints of an earlier run that this run will replace. Nothing is removed.

    The list has only names that a run writes. If the folder is not that of a run, the list is empty. All other files
    belong to the user.
    """
    output_dir = Path(config.output_dir)
    resumed_here = checkpoint is not None and checkpoint.parent.resolve() == output_dir.resolve()
    if not resumed_here and not is_run(output_dir):
        return []
    found = [path for path in output_dir.iterdir() if HALF_WRITTEN.fullmatch(path.name)]
    if resumed_here:
        return found + abandoned(output_dir, checkpoint)
    files = files_in(output_dir, RUN_FILES)
    return found + checkpoint_folders(output_dir)[::-1] + files + records(output_dir) + logs(config)


def abandoned(output_dir: Path, checkpoint: Path) -> list[Path]:
    """Return the files that a run wrote after the step of a checkpoint. The resumed run writes them again.

    Raises:
        UserError: if the checkpoint cannot be read.
    """
    step = step_of(checkpoint)
    # List the newest checkpoints first, so that a kill during their removal leaves no gap.
    found = [path for path in checkpoints(output_dir) if step_of(path) > step][::-1]
    found += [path for number, path in find_snapshots(output_dir).items() if number > step]
    sheets = files_in(output_dir, ["samples/epoch_#.png"])
    last = last_sheet(checkpoint)
    found += [path for path in sheets if int(path.stem.removeprefix("epoch_")) > last]
    found += records(output_dir, after=step)
    return found + ([] if step_of_best(output_dir) <= step else files_in(output_dir, BEST))


def last_sheet(checkpoint: Path) -> float:
    """Return the last epoch, counted from 1, whose sample sheet may have been drawn before a checkpoint.

    Checkpoints of earlier versions may not say how long an epoch is. For these, return infinity.
    """
    images_seen = read_state(checkpoint)["images_seen"]
    with reading(checkpoint):
        facts = dict(saved_config(checkpoint).get("facts", {}))
        if not facts:
            return float("inf")
        batch, steps = facts["global_batch_size"], facts["total_steps"]
        epoch = facts["num_images"] or steps * batch  # a stream of unknown length is one epoch
        # At its end, a run also draws the sheet of an epoch that is not complete.
        return (images_seen - batch) // epoch + 1 if steps == step_of(checkpoint) else images_seen // epoch


def step_of_best(output_dir: Path) -> int:
    """Return the step of the model in best/, or 0 if best.json is missing or has no step, as in earlier versions."""
    with contextlib.suppress(UserError):
        step = read_json(output_dir / "best" / "best.json", missing={}).get("step")
        return step if isinstance(step, int) else 0
    return 0


def has_best(output_dir: Path, step: int) -> bool:
    """Return whether best/ has a network that a run saved at `step` or before."""
    networks = files_in(output_dir, ["best/model_index.json", "best/classifier/config.json"])
    return bool(networks) and step_of_best(output_dir) <= step


def records(output_dir: Path, after: int | None = None) -> list[Path]:
    """Return the records in the run's evaluations/, and the pictures of these records, but no other files.

    Args:
        after: a training step. Only records of later steps are returned. None: all records.
    """
    found = []
    for path in files_in(output_dir, ["evaluations/*.json" if after is None else "evaluations/step_#.json"]):
        if after is not None and int(path.stem.removeprefix("step_")) <= after:
            continue
        with contextlib.suppress(UserError):
            read_record(path)
            found += [path, *files_in(output_dir, [f"evaluations/{path.stem}.pairs.png"])]
    return found


def logs(config) -> list[Path]:
    """Return the files that TensorBoard and wandb wrote in --logging_dir. No link is followed."""
    folder = Path(config.output_dir, config.logging_dir)
    if folder.resolve() != Path(config.output_dir).resolve() / config.logging_dir:
        return []
    tensorboard = [
        path
        for path in (folder / "ddpm_hf").rglob("*")
        if re.fullmatch(r"events\.out\.tfevents\..+|hparams\.yml", path.name) and not path.is_dir()
    ]
    wandb = (path for path in (folder / "wandb").glob("*") if re.fullmatch(r"(offline-)?run-\d+_\d+-\w+", path.name))
    return [*tensorboard, *wandb]


def describe_replaced(output_dir: Path, replaced: list[Path]) -> list[str]:
    """Return a list with one sentence about the files that will be removed, or [] if there are none."""
    if not replaced:
        return []
    folders = [path.name for path in replaced if path in checkpoint_folders(output_dir)]
    others = len(replaced) - len(folders)
    parts = [*sorted(folders, key=len), *([f"{others:,} other file{'s' * (others != 1)}"] if others else [])]
    return [f"Removing what this run replaces in {output_dir}: {', '.join(parts)}. Your own files there stay."]


def remove_replaced(output_dir: Path, replaced: list[Path]):
    """Remove the files that `replaced_by` listed, then the subfolders that have become empty.

    Raises:
        UserError: if a file cannot be removed.
    """
    with writing("the run", output_dir):
        folders = checkpoint_folders(output_dir)
        for path in replaced:
            if path in folders:
                remove_checkpoint(path)
            else:
                remove(path)
        parents = {parent for path in replaced for parent in path.parents if output_dir in parent.parents}
        for folder in sorted(parents, reverse=True):  # inner folders first
            with contextlib.suppress(OSError):  # it still has files of the user
                folder.rmdir()


def set_damaged_aside(output_dir: Path, checkpoint: Path) -> list[str]:
    """Rename the incomplete checkpoints of a folder, and return a sentence about each.

    They are not removed, because they may hold work.

    Args:
        checkpoint: the checkpoint that the run resumes. It keeps its name.

    Raises:
        UserError: if a folder cannot be renamed.
    """
    complete = {path.resolve() for path in [*checkpoints(output_dir), checkpoint]}
    sentences = []
    with writing("the run", output_dir):
        for path in checkpoint_folders(output_dir):
            if path.resolve() in complete:
                continue
            number = 1
            while os.path.lexists(aside := path.with_name(f"{path.name}.damaged{f'-{number}' * (number > 1)}")):
                number += 1
            path.rename(aside)
            sentences.append(
                f"Warning: {path} is not a complete checkpoint of this version, so it was renamed to {aside.name}."
            )
    return sentences


def remove_checkpoint(checkpoint: Path):
    """Rename a checkpoint, then remove it, so that a kill leaves no incomplete checkpoint under its name."""
    partial = checkpoint.with_name(checkpoint.name + ".tmp")  # if a kill leaves this folder, the next run removes it
    remove(partial)
    checkpoint.rename(partial)
    remove(partial)


def save_checkpoint(run, facts: dict, rows: list):
    """Write `checkpoint-<step>` of a run. Every process calls this.

    If the run then has more than --checkpoints_total_limit checkpoints, the oldest ones are removed.

    Args:
        facts: the content of the checkpoint's train_config.json besides the flags: "unet" and "scheduler" (their
            configs), "class_names" (None if the UNet is not conditional), "base_model" (as in the run's
            train_config.json) and "facts" (the result of `facts_to_compare`).
        rows: `state.pending` summed over the processes, as `pending_rows` returns it.

    Raises:
        UserError: if the checkpoint cannot be written. The earlier checkpoints are then unchanged.
    """
    accelerator, config, state = run.accelerator, run.config, run.state
    final = Path(config.output_dir) / f"checkpoint-{state.step}"
    partial = final.with_name(final.name + ".tmp")
    try:
        with writing("a checkpoint", final, also=(RuntimeError,)):
            accelerator.save_state(str(partial))
            if accelerator.is_main_process:
                if run.ema is not None:
                    safetensors.torch.save_file(run.ema.state_dict(), partial / "ema.safetensors")
                if run.power_averages:
                    safetensors.torch.save_file(state_of(run.power_averages), partial / "power_averages.safetensors")
                record = {"flags": config.to_dict()} | facts
                (partial / "train_config.json").write_text(json.dumps(record), encoding="utf-8")
                saved = {name: getattr(state, name) for name in SAVED} | {"pending": rows}
                saved |= {"interrupted": state.interrupted} if state.interrupted else {}
                torch.save(saved, partial / "state.pt")
        accelerator.wait_for_everyone()
        with writing("a checkpoint", final):
            if accelerator.is_main_process:
                write_manifest(partial, state.step)
                partial.rename(final)
                if config.checkpoints_total_limit is not None:
                    for old in checkpoints(config.output_dir)[: -config.checkpoints_total_limit]:
                        remove_checkpoint(old)
    finally:
        if accelerator.is_main_process:
            remove(partial)  # a full disk can leave part of this folder
    accelerator.wait_for_everyone()


def saved_config(checkpoint: Path) -> dict:
    """Return the train_config.json of a checkpoint, with "flags" and "unet" (the config of its network).

    Raises:
        UserError: if it cannot be read.
    """
    with reading(checkpoint):
        saved = json.loads((checkpoint / "train_config.json").read_text(encoding="utf-8"))
        return {**saved, "flags": dict(saved["flags"]), "unet": dict(saved["unet"])}


def check_same_run(checkpoint: Path, run) -> list[str]:
    """Return lines to print about the checkpoint that a run resumes: its step, and warnings about changed settings.

    Raises:
        UserError: if the checkpoint is damaged, has another network or noise schedule, has no average of the weights
            although the flags ask for one, or is past the end of this run.
    """
    check_files(checkpoint)
    saved = saved_config(checkpoint)
    with reading(checkpoint):
        flags, network, facts = saved["flags"], saved["unet"], dict(saved.get("facts", {}))
    step = read_state(checkpoint)["step"]
    check_same_network(checkpoint, network, dict(run.network.config))
    check_fixed_flags(str(checkpoint), flags, run)
    if run.config.use_ema and not (checkpoint / "ema.safetensors").is_file():
        raise UserError(f"{checkpoint} was trained without --use_ema: leave --use_ema out, or start a new run.")
    if run.power_averages and not (checkpoint / "power_averages.safetensors").is_file():
        raise UserError(f"{checkpoint} was trained without --ema_snapshots: leave this flag out, or start a new run.")
    if step > run.total_steps:
        raise UserError(
            f"{checkpoint} is past the {run.total_steps} steps of this run: give a larger --max_train_steps."
        )
    where = f"Resuming from {checkpoint} (step {step:,} of {run.total_steps:,})."
    return [where, *warnings_about(checkpoint.name, flags, facts, step, run)]


def read_state(checkpoint: Path) -> dict:
    """Return the content of state.pt: the fields of TrainState in SAVED, and "interrupted".

    Raises:
        UserError: if state.pt is damaged or has other fields, or if its step is not the step in the checkpoint's name.
    """
    with reading(checkpoint):
        saved = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        for name, kind in SAVED.items():
            if not isinstance(saved[name], kind):
                raise damaged(checkpoint, f"state.pt has a {type(saved[name]).__name__} as {name}")
        if any(row.shape != (2 * NUM_BANDS + 1,) for row in saved["pending"]):
            raise damaged(checkpoint, "state.pt has losses of another shape")
        interrupted = saved.setdefault("interrupted", [])
        if not isinstance(interrupted, list) or not all(isinstance(name, str) for name in interrupted):
            raise damaged(checkpoint, "state.pt has interrupted tasks that are not names")
    if saved["step"] != step_of(checkpoint):
        raise UserError(
            f"{checkpoint} holds step {saved['step']}: rename it to checkpoint-{saved['step']}, or give another "
            "checkpoint."
        )
    return saved


def check_same_network(checkpoint: Path, saved: dict, network_config: dict):
    """Raise a UserError if the network of a checkpoint and the network of this run have different configs."""
    for name, value in json.loads(json.dumps(network_config)).items():
        # Skip names with an underscore: diffusers keeps notes there, and their order differs between processes.
        if not name.startswith("_") and saved.get(name) != value:
            raise UserError(
                f"{checkpoint} is of another model ({name} is {saved.get(name)} in the checkpoint, but {value} "
                f"in this run): give the flags that it was trained with, or another --output_dir."
            )


def load_checkpoint(run, checkpoint: Path):
    """Restore the weights, the optimizer, all averages and the state of a run, in place. Every process calls this.

    Raises:
        UserError: if a file is damaged.
    """
    accelerator, state = run.accelerator, run.state
    with reading(checkpoint):
        accelerator.load_state(str(checkpoint))
        for name, value in read_state(checkpoint).items():
            if name in SAVED or name == "interrupted":
                setattr(state, name, value)
    # accelerate counts micro-batches to find the end of each optimizer step, and has restored its count. Set the count
    # again, because this run may have another number of micro-batches in a step.
    accelerator.step = state.step * accelerator.gradient_accumulation_steps
    # Each row is already a sum over all processes, so only the main process keeps it. The others keep zeros.
    device, keep = accelerator.device, accelerator.is_main_process
    state.pending = [(row if keep else torch.zeros_like(row)).to(device) for row in state.pending]
    with reading(checkpoint):
        if run.ema is not None:
            run.ema.load_state_dict(safetensors.torch.load_file(checkpoint / "ema.safetensors"))
        if run.power_averages:
            load_state(run.power_averages, safetensors.torch.load_file(checkpoint / "power_averages.safetensors"))
