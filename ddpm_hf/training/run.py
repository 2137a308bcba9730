"""Do everything before the first step: build the parts of a run, refuse bad input, then prepare the run folder."""

import contextlib
import functools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
    gather_object,
)
from diffusers import UNet2DModel
from torch import nn

from ..config.presets import PRESETS
from ..config.training_config import TrainingConfig
from ..data.dataset import load_images
from ..data.duplicates import LISTED, describe_duplicates
from ..data.origins import naming_origin
from ..diffusion.losses import OBJECTIVES
from ..diffusion.scheduler import PaperDDPMScheduler
from ..diffusion.timestep_sampling import new_history
from ..errors import UserError, suggestion
from ..files import write_json, writing
from ..locks import check_unlocked
from ..models.augmented import without_augmentation
from ..models.base_model import BaseModel, copy_weights, describe_start, follow, open_base_model, run_scheduler
from ..models.build import build_classifier, build_unet, ignored_weights_warning, unet_channels
from ..models.classes import Classes
from ..models.classifier import NoisyClassifier
from ..models.ema import make_ema
from ..models.post_hoc_ema import make_power_averages
from ..models.pretrained import Pretrained, schedule_hash
from ..processes import PROCESS_TIMEOUT, check_processes, has_bfloat16, process_state
from ..provenance import PACKAGES, command, git_commit, version
from ..run_folder import keep_metrics_up_to
from ..sharing.hub import create_repository
from . import checkpoints
from .checkpoints import SECOND_RUN, TrainState
from .schedule import count_steps, ema_warning, learning_rate_schedule, warmup_warning
from .scoring import open_evaluation
from .trackers import start_tracker


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run. Only `state` changes between the first step and the last."""

    config: TrainingConfig
    accelerator: Accelerator
    train_set: Any
    validation_set: Any  # None without --validation_split
    scheduler: PaperDDPMScheduler
    network: UNet2DModel | NoisyClassifier  # the raw weights; a classifier with --objective classify
    model: Any  # `network` as prepared by accelerate; a training step calls it
    ema: UNet2DModel | NoisyClassifier | None  # the moving average of the weights
    power_averages: dict[float, UNet2DModel | NoisyClassifier]  # by length; {} without --ema_snapshots
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]  # optimizer step (from 0) -> learning rate
    loss: Callable[[Any, dict], torch.Tensor]  # (model, batch) -> (B,), see OBJECTIVES
    evaluation: Any  # the inputs of --eval_metrics, or None
    num_images: int  # in an epoch
    global_batch: int  # images per optimizer step, over all processes
    total_steps: int
    facts: dict  # for train_config.json, with a "summary" to print
    state: TrainState
    repo_id: str | None = None  # of the Hub repository; None without --push_to_hub, and outside the main process
    # A context manager that keeps other runs out of the folder, until it is closed.
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def published(self) -> UNet2DModel | NoisyClassifier:
        """The weights to sample from and to save: the EMA if there is one, else the raw weights.

        With --augment_probability this is a copy that draws no augmented images.
        """
        network = self.network if self.ema is None else self.ema
        if self.config.augment_probability:
            return without_augmentation(network, self.config.class_conditional)
        return network

    @property
    def pretrained(self) -> Pretrained:
        """The published weights as a `Pretrained`, which samplers and metrics take."""
        facts = {
            "name": Path(self.config.output_dir).resolve().name,
            "revision": None,
            "weights": "published",
            "schedule": schedule_hash(self.scheduler),
            "parameters": self.facts["parameters"],
            "commit": self.facts["git_commit"],
        }
        return Pretrained(self.published, self.scheduler, facts, {}, Path(self.config.output_dir), self.classes)

    @property
    def classes(self) -> Classes:
        """The classes of a conditional UNet; for other networks, an empty `Classes()`."""
        return Classes.of_run(self.config, self.train_set.class_names)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes of a conditional UNet; None for other networks."""
        return self.train_set.class_names if self.config.class_conditional else None

    def epochs(self, step: int) -> int:
        """Return how many epochs are complete after `step` steps, counted by images seen.

        The batch size may have changed when the run was resumed, so count from the images seen so far.
        """
        return (self.state.images_seen + (step - self.state.step) * self.global_batch) // self.num_images


def open_run(config: TrainingConfig) -> Run:
    """Return a run that is ready for its next step.

    The run keeps other runs out of its folder until `run.lock` is closed.

    Raises:
        UserError: if the input cannot be trained on, or if another run is writing to the folder. Nothing is written
            then.
    """
    check_unlocked(Path(config.output_dir), SECOND_RUN)
    # First do everything that may still fail: read the checkpoint, create the repository, start the tracker. Only then
    # change the folder.
    run, checkpoint = check_run(config)
    is_main = run.accelerator.is_main_process
    if config.push_to_hub and is_main:
        name = config.hub_model_id or Path(config.output_dir).resolve().name
        run = replace(run, repo_id=create_repository(name, config.hub_private_repo, config.hub_token))
    with contextlib.ExitStack() as lock:
        if is_main:
            lock.enter_context(checkpoints.output_dir_locked(config, checkpoint))
        prepare_folder(run, checkpoint)
        return replace(run, lock=lock.pop_all())


def check_run(config: TrainingConfig) -> tuple[Run, Path | None]:
    """Return a run in the state before its next step, and its checkpoint (None for a new run). Print a summary.

    Nothing is written, so the run cannot be trained yet: `open_run` prepares its folder.

    Raises:
        UserError: if the input cannot be trained on, or if the checkpoint is damaged.
    """
    checkpoints.check_data_is_elsewhere(config)
    checkpoint = checkpoints.find_checkpoint(config)
    run, warnings = build_run(config, checkpoint)
    if checkpoint is not None:
        warnings += checkpoints.check_same_run(checkpoint, run)
    if run.accelerator.is_main_process:
        copies = [] if run.config.streaming else run.train_set.near_duplicates()
        run = replace(run, facts=run.facts | {"near_duplicates": copies[:LISTED]})
        print(run.facts["summary"], *warnings, *describe_duplicates(copies), sep="\n", flush=True)
    restore_state(run, checkpoint)
    return run, checkpoint


def build_run(config: TrainingConfig, checkpoint: Path | None) -> tuple[Run, list[str]]:
    """Return the parts of a run, and warnings to print. Nothing is written.

    Raises:
        UserError: for input that cannot be trained on, or if the config of the checkpoint cannot be read.
    """
    if config.objective not in OBJECTIVES:
        raise UserError(f"--objective {config.objective} is not known: {suggestion(config.objective, OBJECTIVES)}")
    accelerator = make_accelerator(config)
    saved = None if checkpoint is None else checkpoints.saved_config(checkpoint)
    with accelerator.local_main_process_first():
        base = open_base_model(config, saved)
        config = follow(config, base, saved)
        with naming_origin(flags_of_preset(config), f"--preset {config.preset}"):
            train_set, validation_set = load_images(config, unet_channels(config))
    check_skipped(config, train_set)
    check_classes(config, train_set)
    network, start = build_network(config, train_set, base, saved)
    scheduler = run_scheduler(config, base, saved)
    optimizer = make_optimizer(config, network, accelerator.device)
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    num_images, total_steps = count_steps(config, train_set.num_images, global_batch)
    learning_rate = learning_rate_schedule(config, optimizer, total_steps)
    model, optimizer = accelerator.prepare(network, optimizer)
    run = Run(
        config=config,
        accelerator=accelerator,
        train_set=train_set,
        validation_set=validation_set,
        scheduler=scheduler,
        network=network,
        model=model,
        ema=make_ema(config, network),
        power_averages=make_power_averages(network, config.ema_snapshots > 0),
        optimizer=optimizer,
        learning_rate=learning_rate,
        loss=OBJECTIVES[config.objective](scheduler, loss_type=config.loss_type, snr_gamma=config.snr_gamma),
        evaluation=None,
        num_images=num_images,
        global_batch=global_batch,
        total_steps=total_steps,
        facts={},
        state=TrainState(),
    )
    run = replace(run, facts=describe(run) | {"base_model": None if base is None else base.facts | start})
    evaluation, skipped = open_evaluation(config, run.pretrained, train_set, validation_set)
    warnings = [describe_start(base, start)] if start else []
    warnings += ignored_folder_warning(config) + ignored_weights_warning(config)
    warnings += [*train_set.warnings, *warmup_warning(config, total_steps), *ema_warning(config, total_steps)]
    return replace(run, evaluation=evaluation), warnings + skipped


def flags_of_preset(config) -> dict:
    """Return the flags of the preset as {name: value}, without the flags that the user gave."""
    if config.preset is None:
        return {}
    return {name: value for name, value in PRESETS[config.preset].flags.items() if name not in config.given_flags}


def ignored_folder_warning(config) -> list[str]:
    """Return [] or a warning that --train_data_dir is not used."""
    if not (config.dataset_name and config.train_data_dir):
        return []
    return [
        f"Warning: --train_data_dir {config.train_data_dir} is not used, because --dataset_name is "
        f"{config.dataset_name}: to train on the folder, give it as --dataset_name."
    ]


def build_network(config, train_set, base: BaseModel | None, saved: dict | None) -> tuple[nn.Module, dict]:
    """Return the network of a run, and the result of `copy_weights`, or {} if no weights are copied.

    Weights are copied when a new run starts from another model.

    Args:
        base: the model of --init_from, or None.
        saved: the train_config.json of the checkpoint to resume, or None.
    """
    build = build_classifier if config.objective == "classify" else functools.partial(build_unet, base=base)
    network = build(config, train_set.channels, train_set.class_names, None if saved is None else saved["unet"])
    if base is None or saved is not None:
        return network, {}
    return network, copy_weights(network, base, Classes.of_run(config, train_set.class_names))


def make_optimizer(config, network, device: torch.device) -> torch.optim.AdamW:
    """Return the AdamW optimizer of a network."""
    fused = device.type in ("cpu", "cuda")  # on a CPU, fused takes a quarter of the time
    return torch.optim.AdamW(network.parameters(), lr=config.learning_rate, fused=fused, **adam_settings(config))


def adam_settings(config) -> dict:
    """Return the settings of AdamW that stay the same during a run."""
    return {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }


def prepare_folder(run: Run, checkpoint: Path | None):
    """Start the tracker, remove what this run replaces, and write train_config.json. Every process calls this.

    Raises:
        UserError: if the folder cannot be written to, or the tracker cannot start.
    """
    accelerator, config = run.accelerator, run.config
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output_dir = Path(config.output_dir)
        replaced = checkpoints.replaced_by(config, checkpoint)  # listed before the tracker adds its new files
        start_tracker(config, accelerator)
        for sentence in checkpoints.describe_replaced(output_dir, replaced):
            print(sentence, flush=True)
        checkpoints.remove_replaced(output_dir, replaced)
        if checkpoint is not None:
            for sentence in checkpoints.set_damaged_aside(output_dir, checkpoint):
                print(sentence, flush=True)
            # The resumed run writes the later lines again, and the line of the checkpoint's own step if a signal
            # interrupted its scores.
            keep_metrics_up_to(output_dir, run.state.step - ("log" in run.state.interrupted))
        write_train_config(run)
    accelerator.wait_for_everyone()


def restore_state(run: Run, checkpoint: Path | None):
    """Put the run into the state of its checkpoint. If `checkpoint` is None, the run starts from the beginning.

    Every process calls this. Nothing is written.

    Raises:
        UserError: if the checkpoint is damaged.
    """
    config, state = run.config, run.state
    if checkpoint is not None:
        checkpoints.load_checkpoint(run, checkpoint)
        for group in run.optimizer.param_groups:
            group.update(adam_settings(config))  # replace those of the checkpoint
        if state.stream is not None:
            run.train_set.load_state_dict(state.stream)
        if not checkpoints.has_best(Path(config.output_dir), state.step):
            # The first model that is measured is then the best one in this folder.
            state.best_score, state.best_measure = float("inf"), ""
    if config.timestep_sampling != "loss_second_moment":
        state.loss_history = None
    elif state.loss_history is None:
        state.loss_history = new_history(config.ddpm_num_steps)
    if state.loss_history is not None and run.accelerator.device.type != "mps":  # MPS has no float64
        state.loss_history = state.loss_history.to(run.accelerator.device)


def check_skipped(config, train_set):
    """Raise a UserError if the processes skipped different images, because each would then train in another order."""
    if config.on_bad_image == "skip" and len(set(gather_object([train_set.fingerprint]))) > 1:
        raise UserError(
            "--on_bad_image skip left out different images in different processes: check that every process can read "
            "all files."
        )


def check_classes(config, train_set):
    """Raise a UserError if a flag needs images with classes, but the images have none."""
    needs = {"--class_conditional": config.class_conditional, "--objective classify": config.objective == "classify"}
    needs["--balance_classes"] = config.balance_classes
    flag = next((flag for flag, is_given in needs.items() if is_given), None)
    if flag is not None and train_set.class_names is None:
        if flag == "--class_conditional" and config.init_from and "class_conditional" not in config.given_flags:
            flag = "--class_conditional (set by --init_from; --no_class_conditional turns it off)"
        raise UserError(
            f"{flag} needs images with classes, but these images have none: give --label_column, or a folder "
            "with a subfolder for each class."
        )
    if (
        config.class_conditional
        and not config.label_dropout
        and (train_set.labels is None or train_set.labels.min() < 0)
    ):
        raise UserError(
            "some of these images may have no class, but with --label_dropout 0 the network has no embedding for "
            "them: give e.g. --label_dropout 0.1."
        )


def make_accelerator(config) -> Accelerator:
    """Return the Accelerator of a run. It knows the device, the processes and the precision.

    Raises:
        UserError: if this machine does not support the precision, or the tracker is not installed.
    """
    if config.logger in ("wandb", "trackio") and find_spec(config.logger) is None:
        raise UserError(
            f"--logger {config.logger} is not installed: pip install {config.logger}, or give tensorboard or none."
        )
    if config.local_rank != -1 and "WORLD_SIZE" in os.environ:
        # Launchers older than torchrun pass the local rank as a flag, but accelerate reads it from the environment.
        os.environ.setdefault("LOCAL_RANK", str(config.local_rank))
    reset_accelerate()
    if config.mixed_precision == "auto":
        config.mixed_precision = "bf16" if has_bfloat16(process_state().device) else "no"
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.logger == "none" else config.logger,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
            ),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # saves a copy of all gradients
            ],
            dynamo_plugin=TorchDynamoPlugin(backend="inductor") if config.torch_compile else None,
        )
    except ValueError as error:
        if config.mixed_precision == "no":
            raise UserError(f"accelerate cannot start ({error}): check the launcher's settings.") from error
        raise UserError(
            f"--mixed_precision {config.mixed_precision} is not possible here ({error}): give --mixed_precision no."
        ) from error
    check_processes()
    # Set this again, because accelerate prefers an environment variable to its argument.
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate accepts this, but without the gradient scaler that fp16 needs.
        raise UserError("--mixed_precision fp16 is not possible here (it needs a GPU): give bf16 or no.")
    return accelerator


def reset_accelerate():
    """Forget the settings of earlier Accelerators, so that a process can train twice with different flags.

    accelerate keeps precision, accumulation and processes until the Python process ends, and offers no public way to
    change them. Its own tests use the methods below. If a process group is still open, it is used again.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def describe(run: Run) -> dict:
    """Return the facts of a run for train_config.json, among them the "summary" that is printed."""
    config, accelerator, data = run.config, run.accelerator, run.train_set
    parameters = sum(parameter.numel() for parameter in run.network.parameters())
    held_out = 0 if run.validation_set is None else run.validation_set.num_images
    skipped = f", {len(data.skipped):,} skipped" if data.skipped else ""
    height, width = data.size
    images = "a stream of" if data.num_images is None else f"{data.num_images:,}"
    classes = f"{len(data.class_names)} classes, " if data.class_names else ""
    epochs = f" = {run.total_steps * run.global_batch / data.num_images:.1f} epochs" if data.num_images else ""
    summary = (
        f"{images} images of {height}x{width}x{data.channels} ({held_out:,} held out{skipped}), "
        f"{classes}{parameters / 1e6:.1f} M parameters, {run.total_steps:,} steps of {run.global_batch} images"
        f"{epochs}, on {accelerator.num_processes} x "
        f"{accelerator.device.type}, mixed precision {config.mixed_precision}"
    )
    return {
        "summary": summary,
        "command": command(),
        "parameters": parameters,
        "num_images": data.num_images,
        "num_validation_images": held_out,
        "skipped_images": data.skipped,
        "channels": data.channels,
        "class_names": data.class_names,
        "data_fingerprint": data.fingerprint,
        "global_batch_size": run.global_batch,
        "total_steps": run.total_steps,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "git_commit": git_commit(),
    }


def write_train_config(run: Run):
    """Write train_config.json with the "flags" and the facts of the run. The Hub token is left out."""
    path = Path(run.config.output_dir) / "train_config.json"
    with writing("train_config.json", path):
        write_json(path, {"flags": run.config.to_dict(), **run.facts})
