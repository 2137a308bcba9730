"""Prepare the run folder; save, find, check and load its checkpoints.

A checkpoint is either complete or absent, and saving one never changes the earlier ones. accelerate writes the
weights, the optimizer and the gradient scaler. We add the EMA as safetensors, and the counters as plain tensors and
numbers that `weights_only` can read. All files are written to the folder `checkpoint-<step>.tmp`. It is renamed when
every process is done. If a kill leaves this folder, the next run removes it.
"""

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..errors import UserError
from ..files import remove, writing
from ..run_folder import HALF_WRITTEN, RUN_FILES, checkpoints, step_of


# A run can only be resumed with the same values of these flags, because they decide what the weights mean.
FIXED = ["prediction_type", "variance_type", "ddpm_num_steps", "ddpm_beta_schedule"]
# A resumed run may change these flags, but a warning names each change.
WARNED = ["seed", "dataset_name", "class_names", "label_dropout", "random_flip", "objective", "timestep_sampling"]
WARNED += ["loss_type", "snr_gamma", "train_batch_size", "gradient_accumulation_steps", "learning_rate"]
WARNED += ["lr_scheduler", "use_ema", "ema_max_decay", "mixed_precision"]
# The fields of TrainState in state.pt. Checkpoints of earlier versions have exactly these.
SAVED = ["step", "images_seen", "seconds", "best_score", "best_measure", "pending", "stream", "loss_history"]


@dataclass
class TrainState:
    """Everything that changes during a run. Progress is counted in optimizer steps and images seen.

    Saved in state.pt (the fields in SAVED):
        seconds: time spent training so far, without the interruptions.
        best_score, best_measure: the score of the model in best/ (lower is better), and the name of this score.
        pending: one row for each optimizer step that is not yet averaged in metrics.jsonl.
        stream: the position in a streamed dataset.
        loss_history: for --timestep_sampling loss_second_moment, equal in every process; see timestep_sampling.py.

    Not saved, because these fields belong to the current process:
        signals: the numbers of the signals caught so far.
        figures_missing: True if a signal stopped the last sheet or the figures, so that the run is not finished.
        push: the last push to the Hub, which runs in the background.
    """

    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    best_score: float = float("inf")
    best_measure: str = ""
    pending: list = field(default_factory=list)
    stream: dict | None = None
    loss_history: torch.Tensor | None = None

    signals: list[int] = field(default_factory=list)
    figures_missing: bool = False
    push: Any = None


def find_checkpoint(config) -> Path | None:
    """Return the checkpoint to resume from, or None to start a new run. Nothing is written.

    Raises:
        UserError: if the run folder is not empty and the flags neither resume nor overwrite its run. Also if the
            checkpoint to resume from does not exist or is not complete.
    """
    output_dir = Path(config.output_dir)
    with writing("the run", output_dir):  # a name that is too long raises an error here
        is_file = output_dir.exists() and not output_dir.is_dir()
    if is_file:
        raise UserError(f"--output_dir {output_dir} is a file: give the name of a folder.")
    if config.resume_from_checkpoint not in (None, "latest"):
        checkpoint = Path(config.resume_from_checkpoint)
        if not checkpoint.exists() and checkpoint.name == config.resume_from_checkpoint:
            checkpoint = output_dir / checkpoint  # a name without a folder, as in diffusers' script
        if not (checkpoint / "state.pt").is_file() or not re.fullmatch(r"checkpoint-\d+", checkpoint.name):
            raise UserError(
                f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint: give a folder named "
                f"checkpoint-<step>, or `latest`."
            )
        elsewhere = checkpoint.parent.resolve() != output_dir.resolve()
        if elsewhere and output_dir.is_dir() and any(output_dir.iterdir()):
            raise UserError(
                f"{checkpoint} is from another run folder, and --output_dir {output_dir} is not empty: give a new or "
                "empty --output_dir."
            )
        return checkpoint
    if config.resume_from_checkpoint == "latest" and (found := checkpoints(output_dir)):
        return found[-1]
    in_use = output_dir.is_dir() and any(output_dir.iterdir())
    if in_use and config.resume_from_checkpoint == "latest" and (output_dir / "train_config.json").exists():
        # A run killed before its first checkpoint leaves no pipeline; `latest` starts it again.
        in_use = (output_dir / "model_index.json").exists()
    if in_use and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} is not empty: give --resume_from_checkpoint latest to go on with its run "
            "(if it has a checkpoint), --overwrite_output_dir to replace it, or another folder."
        )
    return None


def prepare_output_dir(config, checkpoint: Path | None):
    """Create the run folder, or remove from it the files of the run that is overwritten or abandoned.

    Raises:
        UserError: if the folder cannot be written to.
    """
    output_dir = Path(config.output_dir)
    with writing("the run", output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".writable.tmp").touch()
        for pattern in HALF_WRITTEN:
            for stale in output_dir.glob(pattern):
                remove(stale)
        if checkpoint is None and (output_dir / "train_config.json").exists():
            # Remove only files that a run writes, because all other files belong to the user.
            for pattern in [*RUN_FILES, config.logging_dir, "train_config.json"]:
                for old in output_dir.glob(pattern):
                    remove(old)
            for old in checkpoints(output_dir):
                remove(old)
        elif checkpoint is not None and checkpoint.parent.resolve() == output_dir.resolve():
            # Resuming from an earlier checkpoint abandons the later checkpoints, so remove them.
            for later in checkpoints(output_dir):
                if step_of(later) > step_of(checkpoint):
                    remove(later)


def save_checkpoint(accelerator, config, state: TrainState, *, network: dict, ema, rows: list):
    """Write `checkpoint-<step>`, then remove the oldest beyond --checkpoints_total_limit. Every process calls this.

    Args:
        network: a dict with "unet", the config of the network, and "class_names", the classes of a conditional UNet
            or None.
        rows: the rows of `state.pending`, each summed over the processes.

    Raises:
        UserError: if the checkpoint cannot be written. The earlier checkpoints are then unchanged.
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
                saved = {name: getattr(state, name) for name in SAVED} | {"pending": rows}
                torch.save(saved, partial / "state.pt")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                partial.rename(final)
                if config.checkpoints_total_limit is not None:
                    for old in checkpoints(config.output_dir)[: -config.checkpoints_total_limit]:
                        remove(old)
    finally:
        if accelerator.is_main_process:
            remove(partial)  # a full disk can leave part of this folder
    accelerator.wait_for_everyone()


def check_same_run(checkpoint: Path, config, network_config: dict, total_steps: int) -> list[str]:
    """Refuse a checkpoint that this run cannot continue. Return a list of one warning if flags changed, else [].

    Raises:
        UserError: if the checkpoint is of another model or diffusion process, if it has no EMA although --use_ema is
            given, if it is past the end of this run, or if it cannot be read.
    """
    with reading(checkpoint):
        saved = json.loads((checkpoint / "train_config.json").read_text())
        was, network = saved["flags"], saved["unet"]
        step = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)["step"]
    check_same_network(checkpoint, network, network_config)
    now = config.to_dict()
    for name in FIXED:
        if was[name] != now[name]:
            raise UserError(
                f"{checkpoint} was trained with --{name} {was[name]}, not {now[name]}: give --{name} {was[name]}."
            )
    if config.use_ema and not (checkpoint / "ema.safetensors").is_file():
        raise UserError(f"{checkpoint} was trained without --use_ema: leave --use_ema out, or start a new run.")
    if step > total_steps:
        raise UserError(f"{checkpoint} is past the {total_steps} steps of this run: give a larger --max_train_steps.")
    # A flag that is newer than the checkpoint counts as unchanged.
    changed = [f"{name} {was[name]} -> {now[name]}" for name in WARNED if was.get(name, now[name]) != now[name]]
    if not changed:
        return []
    return [f"Warning: the checkpoint had other flags, so this run is a new one: {', '.join(changed)}."]


def check_same_network(checkpoint: Path, saved: dict, network_config: dict):
    """Raise a UserError if the network of a checkpoint and the network of this run have different configs."""
    for name, value in json.loads(json.dumps(network_config)).items():
        # Skip names with an underscore: diffusers keeps notes there, and their order differs between processes.
        if not name.startswith("_") and saved.get(name) != value:
            raise UserError(
                f"{checkpoint} is of another model: its network has {name} {saved.get(name)}, this run's has "
                f"{value}: give the flags it was trained with, or another --output_dir."
            )


@contextlib.contextmanager
def reading(checkpoint: Path):
    """Turn the errors of reading a damaged file into a UserError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint} is damaged ({reason}): remove it and resume from an earlier one.") from error


def load_checkpoint(accelerator, checkpoint: Path, state: TrainState, ema):
    """Restore the weights, the optimizer, the EMA and `state`, in place. Every process calls this.

    Raises:
        UserError: if a file is damaged.
    """
    with reading(checkpoint):
        accelerator.load_state(str(checkpoint))
        saved = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        for name in SAVED:
            setattr(state, name, saved[name])
    # Each row is already a sum over all processes, so only the main process keeps it. The others keep zeros.
    device, keep = accelerator.device, accelerator.is_main_process
    state.pending = [(row if keep else torch.zeros_like(row)).to(device) for row in state.pending]
    if ema is not None:
        with reading(checkpoint):
            ema.module.load_state_dict(safetensors.torch.load_file(checkpoint / "ema.safetensors"))
        ema.n_averaged.fill_(state.step)


def keep_metrics_up_to(output_dir, step: int):
    """Remove the lines after `step` from metrics.jsonl, because the resumed run writes them again."""
    path = Path(output_dir) / "metrics.jsonl"
    if path.is_file():
        lines = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        partial = path.with_suffix(".tmp")
        with writing("metrics.jsonl", path):
            partial.write_text("".join(line + "\n" for line in lines))
            partial.replace(path)
