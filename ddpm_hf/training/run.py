"""A run before its first step: everything that can be refused is refused here, before anything is written."""

import json
import os
import platform
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, TorchDynamoPlugin
from diffusers import UNet2DModel
from torch.optim.swa_utils import AveragedModel

from ..config.training_config import TrainingConfig
from ..data.dataset import load_images
from ..diffusion.losses import classification_loss, denoising_loss
from ..diffusion.scheduler import PaperDDPMScheduler, make_scheduler
from ..diffusion.timestep_sampling import new_history
from ..errors import UserError
from ..files import writing
from ..models.build import build_classifier, build_unet, unet_channels
from ..models.classes import Classes
from ..models.classifier import NoisyClassifier
from ..models.ema import make_ema
from ..models.pretrained import Pretrained
from ..processes import check_processes, has_bfloat16
from ..provenance import PACKAGES, command, git_commit, version
from ..sharing.hub import create_repository
from . import checkpoints
from .checkpoints import TrainState
from .schedule import count_steps, ema_warning, learning_rate_schedule
from .scoring import open_evaluation


@dataclass
class Run:
    """All that the loop works with.

    `network` holds the raw weights of the UNet, or of the classifier with --objective classify; `model` is it as
    accelerate prepared it.
    """

    config: TrainingConfig
    accelerator: Accelerator
    train_set: Any
    validation_set: Any
    network: UNet2DModel | NoisyClassifier
    scheduler: PaperDDPMScheduler
    optimizer: torch.optim.Optimizer
    learning_rate: Any  # optimizer step -> learning rate
    loss: Any
    num_images: int  # in an epoch
    global_batch: int  # images per optimizer step, over all processes
    total_steps: int
    state: TrainState
    facts: dict
    model: Any = None
    ema: AveragedModel | None = None
    repo_id: str | None = None
    evaluation: Any = None  # what --eval_metrics are computed from
    sheet_images: int | None = None  # on a sample sheet, as many as this machine draws in bearable time
    unfinished: bool = False  # a signal came while the last figures were drawn
    pushing: Any = None  # the last push, under way in the background

    @property
    def published(self) -> UNet2DModel | NoisyClassifier:
        """The weights that are sampled from and saved: the EMA's where there is one."""
        return self.network if self.ema is None else self.ema.module

    @property
    def classes(self) -> Classes:
        """The classes that the UNet is told; none of an unconditional one or of a classifier."""
        if not self.config.class_conditional:
            return Classes()
        return Classes(tuple(self.train_set.class_names), self.network.config.num_class_embeds)

    @property
    def pretrained(self) -> Pretrained:
        """The published weights as samplers and scores take them."""
        facts = {
            "name": Path(self.config.output_dir).resolve().name,
            "revision": None,
            "weights": "published",
            "parameters": self.facts["parameters"],
            "commit": self.facts["git_commit"],
        }
        return Pretrained(self.published, self.scheduler, facts, {}, Path(self.config.output_dir), self.classes)

    @property
    def told_names(self) -> list[str] | None:
        """The names of the classes that a conditional UNet is told; None of others."""
        return self.train_set.class_names if self.config.class_conditional else None

    def class_labels(self, indices) -> list[int] | None:
        """Return the labels of sampled images: all classes in turn; None of an unconditional UNet."""
        return [k % len(self.told_names) for k in indices] if self.told_names else None

    def epochs(self, step: int) -> int:
        """Return how many epochs are over after `step` steps, by images seen."""
        return step * self.global_batch // self.num_images


def open_run(config: TrainingConfig) -> Run | None:
    """Build all of a run and put it where its checkpoint left it; None after a --dry_run, which writes nothing.

    Raises:
        UserError: for whatever cannot be trained on, with nothing written.
    """
    checkpoint = checkpoints.find_checkpoint(config)
    accelerator = make_accelerator(config)
    with accelerator.local_main_process_first():
        train_set, validation_set = load_images(config, unet_channels(config))
    check_classes(config, train_set)
    classify = config.objective == "classify"
    network = (build_classifier if classify else build_unet)(config, train_set.channels, train_set.class_names)
    scheduler = make_scheduler(
        config.ddpm_beta_schedule,
        config.ddpm_num_steps,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
    )
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=accelerator.device.type in ("cpu", "cuda"),  # a quarter of the time of the default on a CPU
    )
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    num_images, total_steps = count_steps(config, train_set.num_images, global_batch)
    run = Run(
        config=config,
        accelerator=accelerator,
        train_set=train_set,
        validation_set=validation_set,
        network=network,
        scheduler=scheduler,
        optimizer=optimizer,
        learning_rate=learning_rate_schedule(config, optimizer, total_steps),
        loss=classification_loss(scheduler)
        if classify
        else denoising_loss(scheduler, config.loss_type, config.snr_gamma, config.objective),
        num_images=num_images,
        global_batch=global_batch,
        total_steps=total_steps,
        state=TrainState(),
        facts={},
    )
    run.facts = describe(run)
    run.evaluation, skipped = open_evaluation(config, run.pretrained, train_set, validation_set)
    said = [run.facts["summary"], *ema_warning(config, total_steps), *skipped]
    if checkpoint is not None:
        said += checkpoints.check_same_run(checkpoint, config, dict(network.config), total_steps)
    if accelerator.is_main_process:
        print(*said, sep="\n", flush=True)
    if config.dry_run:
        if accelerator.is_main_process:
            print(json.dumps(config.to_dict() | {"network": dict(network.config)}, indent=2))
        return None
    if config.push_to_hub and accelerator.is_main_process:
        run.repo_id = create_repository(
            config.hub_model_id or Path(config.output_dir).resolve().name, config.hub_private_repo, config.hub_token
        )

    # From here on the folder is ours.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoints.prepare_output_dir(config, checkpoint)
        start_tracker(config, accelerator)
        write_record(run)
    accelerator.wait_for_everyone()
    run.model, run.optimizer = accelerator.prepare(network, optimizer)
    run.ema = make_ema(config, network)
    if checkpoint is not None:
        run.state = checkpoints.load_checkpoint(accelerator, checkpoint, run.ema)
        if accelerator.is_main_process:
            checkpoints.keep_metrics_up_to(config.output_dir, run.state.step)
        if run.state.stream is not None:
            train_set.load_state_dict(run.state.stream)
    if config.timestep_sampling == "uniform":
        run.state.loss_history = None
    elif run.state.loss_history is None:
        run.state.loss_history = new_history(config.ddpm_num_steps)
    return run


def check_classes(config, train_set):
    """Refuse, with a UserError, images without the classes that a conditional UNet or a classifier is taught."""
    wanted = "--class_conditional" if config.class_conditional else "--objective classify"
    if not config.class_conditional and config.objective != "classify":
        return
    if train_set.class_names is None:
        raise UserError(
            f"{wanted} needs images with classes, and these have none: name their --label_column, or give a folder "
            "with a subfolder for each class."
        )
    if (
        config.class_conditional
        and not config.label_dropout
        and (train_set.labels is None or train_set.labels.min() < 0)
    ):
        raise UserError(
            "--label_dropout 0 leaves no place for images without a class, which these may have: give 0.1."
        )


def make_accelerator(config) -> Accelerator:
    """Return the Accelerator of a run; it alone knows of devices, processes and precision.

    Raises:
        UserError: if the precision or the tracker asked for is not to be had here.
    """
    if config.logger in ("wandb", "trackio") and find_spec(config.logger) is None:
        raise UserError(
            f"--logger {config.logger} is not installed: pip install {config.logger}, or take tensorboard or none."
        )
    if config.local_rank != -1 and "WORLD_SIZE" in os.environ:
        # Launchers before torchrun pass this rank as a flag and the others as variables; accelerate reads variables.
        os.environ.setdefault("LOCAL_RANK", str(config.local_rank))
    # Whoever waits while the figures are drawn must not give up: two hours, as upstream.
    patience = timedelta(hours=2)
    if config.mixed_precision == "auto":
        config.mixed_precision = "bf16" if has_bfloat16(PartialState(timeout=patience).device) else "no"
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.logger == "none" else config.logger,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
            ),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
            dynamo_plugin=TorchDynamoPlugin(backend="inductor") if config.torch_compile else None,
        )
    except ValueError as error:
        if config.mixed_precision == "no":
            raise UserError(f"accelerate cannot start ({error}): check the launcher's settings.") from error
        raise UserError(f"--mixed_precision {config.mixed_precision} cannot act here ({error}): take no.") from error
    check_processes()
    # A variable in the environment would win over the flag.
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate lets it pass, without the gradient scaler that fp16 needs.
        raise UserError("--mixed_precision fp16 cannot act here (it needs a GPU): take bf16 or no.")
    return accelerator


def start_tracker(config, accelerator):
    """Start --logger, if any, with the flags of the run in it.

    Raises:
        UserError: if it cannot start, e.g. for want of a login.
    """
    if config.logger == "none":
        return
    folder = Path(config.output_dir) / config.logging_dir
    folder.mkdir(parents=True, exist_ok=True)  # wandb takes another where this is missing
    # Trackers take numbers and text only.
    flags = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.to_dict().items()}
    try:
        accelerator.init_trackers("ddpm_hf", config=flags, init_kwargs={"wandb": {"dir": str(folder)}})
    except Exception as error:  # each has errors of its own
        raise UserError(f"--logger {config.logger} cannot start ({error}): set it up, or take none.") from error


def describe(run) -> dict:
    """Return the facts of a Run before its first step, with a "summary" for people."""
    config, accelerator, data = run.config, run.accelerator, run.train_set
    parameters = sum(parameter.numel() for parameter in run.network.parameters())
    held_out = 0 if run.validation_set is None else run.validation_set.num_images
    images = "a stream of" if data.num_images is None else f"{data.num_images:,}"
    summary = (
        f"{images} images of {data.resolution}x{data.resolution}x{data.channels} ({held_out:,} held out), "
        f"{parameters / 1e6:.1f} M parameters, {run.total_steps:,} steps of {run.global_batch} images = "
        f"{run.total_steps * run.global_batch / run.num_images:.1f} epochs, on {accelerator.num_processes} x "
        f"{accelerator.device.type}, mixed precision {config.mixed_precision}"
    )
    return {
        "summary": summary,
        "command": command(),
        "parameters": parameters,
        "num_images": data.num_images,
        "num_validation_images": held_out,
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


def write_record(run):
    """Write train_config.json: {"flags": ..., and the facts}. The token is in neither."""
    path = Path(run.config.output_dir) / "train_config.json"
    with writing("train_config.json", path):
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps({"flags": run.config.to_dict(), **run.facts}, indent=2) + "\n")
        partial.replace(path)
