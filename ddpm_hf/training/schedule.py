"""Compute how many steps a run has, and the learning rate at each step."""

import math

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from ..errors import UserError, suggestion
from ..models.ema import ema_decay


def count_steps(config, num_images: int | None, global_batch: int) -> tuple[int, int]:
    """Return the number of images per epoch, and the number of optimizer steps of the whole run.

    Every step has exactly `global_batch` images, so the last step may take some images of the next epoch.

    Raises:
        UserError: if one step takes more images than there are, or if the length of a stream is unknown and
            --max_train_steps is not given.
    """
    if num_images is None:
        if config.max_train_steps is None:
            raise UserError("the length of this stream is unknown: give --max_train_steps instead of --num_epochs.")
        return config.max_train_steps * global_batch, config.max_train_steps
    if global_batch > num_images:
        raise UserError(
            f"one step takes {global_batch} images (batch x accumulation x processes), but there are only "
            f"{num_images}: lower --train_batch_size or --gradient_accumulation_steps."
        )
    return num_images, config.max_train_steps or math.ceil(config.num_epochs * num_images / global_batch)


def learning_rate_schedule(config, optimizer, total_steps: int):
    """Return the schedule --lr_scheduler of diffusers as a function: optimizer step (from 0) -> learning rate.

    Raises:
        UserError: for a name that diffusers does not know, or a schedule that is impossible with these flags.
    """
    names = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
    if config.lr_scheduler not in names:
        raise UserError(f"--lr_scheduler {config.lr_scheduler} is not known: {suggestion(config.lr_scheduler, names)}")
    # The schedule sets the learning rate of its optimizer, so give it an optimizer that nothing else uses.
    throwaway = torch.optim.SGD(optimizer.param_groups[0]["params"][:1], lr=config.learning_rate)
    try:
        schedule = get_scheduler(
            config.lr_scheduler, throwaway, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total_steps
        )
    except ValueError as error:
        raise UserError(
            f"--lr_scheduler {config.lr_scheduler} cannot be used ({error}): raise --learning_rate."
        ) from error
    factor = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * factor(step)


def warmup_warning(config, total_steps: int) -> list[str]:
    """Return a list with one warning if the warm-up takes more than half of the steps, else []."""
    if config.lr_scheduler == "constant" or 2 * config.lr_warmup_steps <= total_steps:  # "constant" has no warm-up
        return []
    share = "all" if config.lr_warmup_steps >= total_steps else "most"
    return [
        f"Warning: --lr_warmup_steps {config.lr_warmup_steps} takes {share} of the {total_steps:,} steps, and until "
        f"then the learning rate is below --learning_rate: give e.g. --lr_warmup_steps {total_steps // 10}."
    ]


def ema_warning(config, total_steps: int) -> list[str]:
    """Return a list with one warning if the initial weights keep a share of 5 % or more in the final EMA, else []."""
    if not config.use_ema or config.init_from is not None or ema_decay(config, 1) == 0:
        return []
    left = math.exp(sum(math.log(ema_decay(config, step)) for step in range(1, min(total_steps, 100_000))))
    if left < 0.05:
        return []
    return [
        f"Warning: after {total_steps} steps {left:.0%} of the EMA are still the initial weights, and its samples are "
        "mostly noise: give --ema_inv_gamma 1 for a warm-up, or a lower --ema_max_decay."
    ]
