"""A run before its first step: everything that can be refused is refused here, before anything is written."""

import json
import math
import os
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, TorchDynamoPlugin
from diffusers import UNet2DModel
from diffusers.optimization import SchedulerType, get_scheduler
from torch.optim.swa_utils import AveragedModel

from . import UserError, checkpoints
from .checkpoints import TrainState
from .classifier import NoisyClassifier
from .config import TrainingConfig
from .data import load_images
from .drawing import check_processes
from .hub import create_repository
from .losses import classification_loss, denoising_loss
from .model import build_classifier, build_unet, ema_decay, has_bfloat16, make_ema, unet_channels
from .record import describe, write_record
from .run_scores import open_evaluation
from .scheduler import PaperDDPMScheduler, make_scheduler
from .timestep_sampling import new_history


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
    run.evaluation, skipped = open_evaluation(config, network, scheduler, train_set, validation_set)
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


def count_steps(config, num_images: int | None, global_batch: int) -> tuple[int, int]:
    """Return images per epoch and optimizer steps of the whole run.

    The last step may reach into the epoch after: every step has exactly `global_batch` images.

    Raises:
        UserError: if a batch is larger than the set, or if the length of a stream is not known and none is given.
    """
    if num_images is None:
        if config.max_train_steps is None:
            raise UserError("the length of this stream is not known: give --max_train_steps instead of --num_epochs.")
        return config.max_train_steps * global_batch, config.max_train_steps
    if global_batch > num_images:
        raise UserError(
            f"one step takes {global_batch} images (batch x accumulation x processes), but there are only "
            f"{num_images}: lower --train_batch_size or --gradient_accumulation_steps."
        )
    return num_images, config.max_train_steps or math.ceil(config.num_epochs * num_images / global_batch)


def learning_rate_schedule(config, optimizer, total_steps: int):
    """Return the function from optimizer step (0-based) to learning rate: diffusers' schedules, stateless.

    Raises:
        UserError: for a name that diffusers has not, or whose schedule needs more than a warm-up and a length.
    """
    names = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
    if config.lr_scheduler not in names:
        raise UserError(f"--lr_scheduler {config.lr_scheduler} is not known: choose from {', '.join(names)}.")
    # The schedule would set the rate of the optimizer it is given.
    throwaway = torch.optim.SGD(optimizer.param_groups[0]["params"][:1], lr=config.learning_rate)
    try:
        schedule = get_scheduler(
            config.lr_scheduler, throwaway, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total_steps
        )
    except ValueError as error:
        raise UserError(f"--lr_scheduler {config.lr_scheduler} cannot be ({error}): raise --learning_rate.") from error
    factor = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * factor(step)


def ema_warning(config, total_steps: int) -> list[str]:
    """Return a sentence to print if the average would still hold a good part of the initial weights at the end."""
    if not config.use_ema or ema_decay(config, 1) == 0:
        return []
    left = math.exp(sum(math.log(ema_decay(config, step)) for step in range(1, min(total_steps, 100_000))))
    if left < 0.05:
        return []
    return [
        f"Warning: after {total_steps} steps the EMA still is {left:.0%} the weights of the first step, and its "
        "samples are mostly noise: give --ema_inv_gamma 1 for a warm-up, or a lower --ema_max_decay."
    ]
