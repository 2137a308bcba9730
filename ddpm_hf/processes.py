"""The processes of this launch, and what their device can do."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from .errors import UserError


def start_processes():
    """Join the processes of this launch, if there are several; PartialState knows of them from here on.

    Raises:
        UserError: as `check_processes`.
    """
    # Accelerator, not PartialState alone, reads ACCELERATE_USE_CPU. Who waits for scores waits up to two hours.
    Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))])
    check_processes()


def check_processes():
    """Refuse a launch that would go wrong without a word.

    Raises:
        UserError: if each process would take itself for the only one and do all the work, or if the model is to be
            split among them: a network is saved, averaged and drawn from whole here.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    kind = PartialState().distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"{kind.value} splits the model, which this cannot: launch with --multi_gpu, a GPU holds it.")
    if launched > 1 and PartialState().num_processes == 1:
        raise UserError(
            f"{launched} processes were launched without a GPU each: set ACCELERATE_USE_CPU=true for CPUs."
        )


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices in hardware; where it does not, autocast only costs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The public torch.cpu.get_capabilities() is younger than the oldest torch that this is for.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
