"""The run folder and its checkpoints: a checkpoint is complete or absent, and the last good one is never touched.

accelerate writes the weights, the optimizer and the gradient scaler; the EMA goes beside them as safetensors and the
counters as plain tensors and numbers, all read back with `weights_only`. It is written to `checkpoint-<step>.tmp` and
renamed when every process is done, so a kill leaves at worst a `.tmp` that the next run sweeps away.
"""

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..errors import UserError
from ..files import remove, writing
from ..run_folder import HALF_WRITTEN, RUN_FILES, checkpoints, step_of


# Flags that a checkpoint fixes, for the weights mean nothing under others; a change of the next ones is told.
FIXED = ["prediction_type", "variance_type", "ddpm_num_steps", "ddpm_beta_schedule"]
TOLD = ["seed", "dataset_name", "class_names", "label_dropout", "random_flip", "objective", "timestep_sampling"]
TOLD += ["loss_type"]
TOLD += ["snr_gamma", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler", "use_ema"]
TOLD += ["ema_max_decay", "mixed_precision"]


@dataclass
class TrainState:
    """Where a run stands, in optimizer steps and images seen.

    `pending` holds one row per optimizer step that metrics.jsonl has not averaged yet; `stream` is the position of a
    streamed dataset; `seconds` is the time spent training so far, over all interruptions. `best_score` is that of
    best/, in what `best_measure` names; `loss_history` is that of --timestep_sampling loss_second_moment, the same in
    every process.
    """

    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    best_score: float = float("inf")
    best_measure: str = ""
    pending: list = field(default_factory=list)
    stream: dict | None = None
    loss_history: torch.Tensor | None = None


def find_checkpoint(config) -> Path | None:
    """Return the checkpoint to resume from, or None to start afresh. Writes nothing.

    Raises:
        UserError: if the run folder is in use and neither resuming nor overwriting is asked for, or if the checkpoint
            to resume from does not exist or is not complete.
    """
    output_dir = Path(config.output_dir)
    with writing("the run", output_dir):  # a name too long shows itself here
        is_file = output_dir.exists() and not output_dir.is_dir()
    if is_file:
        raise UserError(f"--output_dir {output_dir} is a file: give the name of a folder.")
    if config.resume_from_checkpoint not in (None, "latest"):
        checkpoint = Path(config.resume_from_checkpoint)
        if not checkpoint.exists() and checkpoint.name == config.resume_from_checkpoint:
            checkpoint = output_dir / checkpoint  # a bare name, as diffusers' script takes it
        if not (checkpoint / "state.pt").is_file() or not re.fullmatch(r"checkpoint-\d+", checkpoint.name):
            raise UserError(
                f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint: give a folder named "
                f"checkpoint-<step>, or `latest`."
            )
        elsewhere = checkpoint.parent.resolve() != output_dir.resolve()
        if elsewhere and output_dir.is_dir() and any(output_dir.iterdir()):
            raise UserError(f"--output_dir {output_dir} is not empty, and {checkpoint} is not its own: give another.")
        return checkpoint
    if config.resume_from_checkpoint == "latest" and (found := checkpoints(output_dir)):
        return found[-1]
    in_use = output_dir.is_dir() and any(output_dir.iterdir())
    if in_use and config.resume_from_checkpoint == "latest" and (output_dir / "train_config.json").exists():
        # `latest` may meet what a run left that was killed before its first checkpoint, which precedes any pipeline.
        in_use = (output_dir / "model_index.json").exists()
    if in_use and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} is not empty: give --resume_from_checkpoint latest to go on with its run "
            "(if it has a checkpoint), --overwrite_output_dir to replace it, or another folder."
        )
    return None


def prepare_output_dir(config, checkpoint: Path | None):
    """Make the run folder ready to be written to: sweep away what an overwritten or abandoned run left in it.

    Raises:
        UserError: if it cannot be written to.
    """
    output_dir = Path(config.output_dir)
    with writing("the run", output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".writable.tmp").touch()
        for pattern in HALF_WRITTEN:
            for stale in output_dir.glob(pattern):
                remove(stale)
        if checkpoint is None and (output_dir / "train_config.json").exists():
            # Only what a run writes goes: anything else in the folder is the user's.
            for pattern in [*RUN_FILES, config.logging_dir, "train_config.json"]:
                for old in output_dir.glob(pattern):
                    remove(old)
            for old in checkpoints(output_dir):
                remove(old)
        elif checkpoint is not None and checkpoint.parent.resolve() == output_dir.resolve():
            # Going on from an earlier checkpoint abandons what was trained after it.
            for later in checkpoints(output_dir):
                if step_of(later) > step_of(checkpoint):
                    remove(later)


def save_checkpoint(accelerator, config, network: dict, ema, state: TrainState, pending: list):
    """Write `checkpoint-<step>`, then forget the oldest beyond --checkpoints_total_limit. Every process calls this.

    Args:
        network: "unet", the config of the network, and "class_names", those of a conditional one or None.
        pending: the rows of `state.pending`, each summed over the processes.

    Raises:
        UserError: if it cannot be written; the checkpoints before it are untouched then.
    """
    final = Path(config.output_dir) / f"checkpoint-{state.step}"
    partial = final.with_name(final.name + ".tmp")
    try:
        with writing("a checkpoint", final):
            accelerator.save_state(str(partial))
            if accelerator.is_main_process:
                if ema is not None:
                    safetensors.torch.save_file(ema.module.state_dict(), partial / "ema.safetensors")
                record = {"flags": config.to_dict()} | network
                (partial / "train_config.json").write_text(json.dumps(record))
                torch.save({**vars(state), "pending": pending}, partial / "state.pt")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                partial.rename(final)
                if config.checkpoints_total_limit is not None:
                    for old in checkpoints(config.output_dir)[: -config.checkpoints_total_limit]:
                        remove(old)
    finally:
        if accelerator.is_main_process:
            remove(partial)  # what a full disk left of it
    accelerator.wait_for_everyone()


def check_same_run(checkpoint: Path, config, unet_config: dict, total_steps: int) -> list[str]:
    """Refuse a checkpoint that this run cannot go on from; return a sentence about flags that differ, if any do.

    Raises:
        UserError: if it is of another model or process, has no average where one is asked for, is past the end of
            this run, or cannot be read.
    """
    with reading(checkpoint):
        saved = json.loads((checkpoint / "train_config.json").read_text())
        step = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)["step"]
    for name, value in json.loads(json.dumps(unet_config)).items():
        # Names with an underscore are diffusers' own notes, in an order that differs from process to process.
        if not name.startswith("_") and saved["unet"].get(name) != value:
            raise UserError(
                f"{checkpoint} is of another model: its network has {name} {saved['unet'].get(name)}, this run's has "
                f"{value}: give the flags it was trained with, or another --output_dir."
            )
    was, now = saved["flags"], config.to_dict()
    for name in FIXED:
        if was[name] != now[name]:
            raise UserError(f"{checkpoint} was trained with --{name} {was[name]}, not {now[name]}: give that.")
    if config.use_ema and not (checkpoint / "ema.safetensors").is_file():
        raise UserError(f"{checkpoint} was trained without --use_ema: leave --use_ema out, or start afresh.")
    if step > total_steps:
        raise UserError(f"{checkpoint} is past the {total_steps} steps of this run: give more --max_train_steps.")
    # A flag that is newer than the checkpoint has not been changed.
    changed = [f"{name} {was[name]} -> {now[name]}" for name in TOLD if was.get(name, now[name]) != now[name]]
    return [f"Warning: the checkpoint had other flags, so this run is a new one: {', '.join(changed)}."] * bool(
        changed
    )


@contextlib.contextmanager
def reading(checkpoint: Path):
    """Turn the several errors of a damaged file into one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint} is damaged ({reason}): remove it and take an earlier one.") from error


def load_checkpoint(accelerator, checkpoint: Path, ema) -> TrainState:
    """Put weights, optimizer and EMA back to where they were and return the counters. Every process calls this."""
    with reading(checkpoint):
        accelerator.load_state(str(checkpoint))
        saved = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    if not accelerator.is_main_process:
        saved["pending"] = [torch.zeros_like(row) for row in saved["pending"]]
    state = TrainState(**saved)
    state.pending = [row.to(accelerator.device) for row in state.pending]
    if ema is not None:
        ema.module.load_state_dict(safetensors.torch.load_file(checkpoint / "ema.safetensors"))
        ema.n_averaged.fill_(state.step)
    return state


def keep_metrics_up_to(output_dir, step: int):
    """Drop the lines of metrics.jsonl after `step`: the resumed run writes them again."""
    path = Path(output_dir) / "metrics.jsonl"
    if path.is_file():
        lines = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        partial = path.with_suffix(".tmp")
        with writing("metrics.jsonl", path):
            partial.write_text("".join(line + "\n" for line in lines))
            partial.replace(path)
