"""Start and check the processes of this launch."""

import contextlib
import os
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env

from .errors import UserError


PROCESS_TIMEOUT = timedelta(hours=2)  # for processes that wait while one draws or scores; as in diffusers' script


def start_processes():
    """Connect the processes of this launch, so that PartialState knows about all of them.

    Raises:
        UserError: for the same reasons as in `check_processes`.
    """
    process_state()
    check_processes()


def process_state() -> PartialState:
    """Return accelerate's PartialState, which connects the processes when it is created first.

    PartialState alone does not read ACCELERATE_USE_CPU, as an Accelerator does.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PROCESS_TIMEOUT)


def check_processes():
    """Refuse a launch that would silently go wrong.

    Raises:
        UserError: if the processes are not connected, because each would then do all the work. Also if the model is
            sharded, because we save, average and sample whole networks.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    kind = PartialState().distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"sharded models ({kind.value}) are not supported: launch with --multi_gpu instead.")
    if launched > 1 and PartialState().num_processes == 1:
        raise UserError(
            f"{launched} processes were launched without a GPU each: set ACCELERATE_USE_CPU=true to run on CPUs."
        )


def gather_in_order(numbers: Iterable[int], values: Iterable) -> list:
    """Return the values of all processes, sorted by `numbers`. All processes must call this function.

    Each process passes its own `values`, and `numbers` with one number for each value. Each gets the same full list.
    """
    return [value for _, value in sorted(gather_object(list(zip(numbers, values))), key=lambda pair: pair[0])]


def or_fail_together(compute: Callable):
    """Return `compute()`. If it fails on one process, raise an error on every process. All must call this function.

    Otherwise the process that failed would go on to another exchange than the one that the others wait in.
    """
    result, failure = None, None
    try:
        result = compute()
    except Exception as error:
        failure = error
    if any(gather_object([failure is not None])):
        raise failure or UserError("another process could not compute its share: see its error.")
    return result


@contextlib.contextmanager
def tuned_convolutions(is_wanted: bool = True):
    """During a `with` block, let cuDNN try its kernels for each new shape of a convolution, and take the fastest.

    If `is_wanted` is False, cuDNN chooses by fixed rules. The measured times vary, so two processes can choose
    different kernels, and their results can differ by round-off. On a CPU this function has no effect.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = is_wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices in hardware. If not, autocast to bfloat16 is slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The public torch.cpu.get_capabilities() is missing in the oldest torch that we support.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
