"""Average the weights of a run, and choose after training how many steps the average covers (post-hoc EMA).

In the average after t steps, the weights of step s have a share proportional to s^gamma. The `length` of the average
(sigma_rel in the paper) is the standard deviation of s under these shares, divided by t. An average of length 0.05 is
mostly over the last tenth of the steps.

A run keeps averages of two lengths, and saves snapshots of both at regular steps. After training, a weighted sum of
snapshots is almost exactly the average of any other length, at any step. The method is from Karras et al. 2024,
https://huggingface.co/papers/2312.02696, section 3 and appendix C.
"""

import copy
import functools
import re
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from ..errors import UserError
from ..files import write_beside
from ..run_folder import files_in


LENGTHS = (0.05, 0.10)  # of the two averages that are kept during training, as in the paper
SHORTEST, LONGEST = 0.005, 0.28  # with gamma = 0, the plain mean of all steps, the length is 12^-0.5 = 0.289
FOLDER = "ema_snapshots"


@functools.cache  # each training step calls it
def gamma_of(length: float) -> float:
    """Return the exponent gamma of an average of this length.

    length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is the variance of s/t if the share of step s is proportional
    to s^gamma. So gamma is the largest root of a cubic polynomial.

    Raises:
        UserError: for a length outside SHORTEST to LONGEST.
    """
    if not SHORTEST <= length <= LONGEST:
        raise UserError(f"--length has {length:g}, but must be from {SHORTEST} to {LONGEST}: give another length.")
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


def power_decay(length: float, updates: int) -> float:
    """Return the decay of the next update of an average of this length, when `updates` updates are already done.

    Update t has the decay (1 - 1/t)^(gamma + 1). The first update copies the weights.
    """
    return (1 - 1 / (updates + 1)) ** (gamma_of(length) + 1)


def make_power_averages(network: nn.Module, is_wanted: bool) -> dict[float, nn.Module]:
    """Return a dict from each length in LENGTHS to a copy of `network`, which will hold the average of this length.

    Return {} if `is_wanted` is False.
    """
    copies = [copy.deepcopy(network).eval().requires_grad_(False) for _ in LENGTHS] if is_wanted else []
    return dict(zip(LENGTHS, copies))


def state_of(averages: dict[float, nn.Module]) -> dict[str, torch.Tensor]:
    """Return a dict of the tensors of all averages. Its keys are "<length>/<name>"."""
    return {f"{length}/{name}": each for length, ema in averages.items() for name, each in ema.state_dict().items()}


def load_state(averages: dict[float, nn.Module], tensors: dict[str, torch.Tensor]):
    """Put the averages into the state that `state_of` returned."""
    for length, ema in averages.items():
        prefix = f"{length}/"
        ema.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def snapshot_path(output_dir, step: int) -> Path:
    """Return the file with the snapshot of a step."""
    return Path(output_dir, FOLDER, f"step_{step}.safetensors")


def save_snapshot(output_dir, averages: dict[float, nn.Module], step: int):
    """Write the snapshot of a step, completely or not at all."""
    path = snapshot_path(output_dir, step)
    path.parent.mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in state_of(averages).items()}
    write_beside(path, lambda partial: safetensors.torch.save_file(tensors, partial))


def find_snapshots(output_dir) -> dict[int, Path]:
    """Return the snapshots of a run as a dict from step to file, in rising order of the steps."""
    found = files_in(output_dir, [f"{FOLDER}/step_#.safetensors"])
    return dict(sorted((int(re.findall(r"\d+", path.name)[0]), path) for path in found))


def end_of_average(output_dir, step: int | None) -> int:
    """Return the step at which an average ends: `step`, or the step of the last snapshot if `step` is None.

    Raises:
        UserError: if the run has no snapshots, or has no snapshot of `step`.
    """
    found = list(find_snapshots(output_dir))
    if not found:
        raise UserError(f"{output_dir} has no {FOLDER}: train with --ema_snapshots, e.g. 32.")
    if step not in (None, *found):
        near = min(found, key=lambda each: abs(each - step))
        raise UserError(f"{output_dir} has no snapshot of step {step}: give --step {near}, the nearest.")
    return found[-1] if step is None else step


def inner_products(steps: np.ndarray, gammas: np.ndarray, others: np.ndarray, their_gammas: np.ndarray) -> np.ndarray:
    """Return the inner products of the shares of n averages with the shares of m other averages, float64 (n, m).

    In the average at step t, the share of step s is (gamma + 1) s^gamma / t^(gamma + 1) for s < t, and 0 for s > t. An
    inner product is the integral over s of the product of two shares.
    """
    t, u, g, h = steps[:, None], others[None], gammas[:, None], their_gammas[None]
    common = np.minimum(t, u)
    return (g + 1) * (h + 1) / (g + h + 1) * (common / t) ** g * (common / u) ** h * common / (t * u)


def mixture(steps: list[int], gammas: list[float], step: int, gamma: float) -> tuple[np.ndarray, float]:
    """Return the factors of a sum of snapshots that approximates another average, and the relative error of the sum.

    `steps` and `gammas` describe the snapshots, `step` and `gamma` the wanted average. In an average, each training
    step has a share (see `inner_products`). By least squares, the factors bring the shares in the sum as close as
    possible to the wanted shares (section 3.2 of the paper). The factors must sum to 1, so that weights that never
    change stay exact. The error is the L2 norm of the difference between the shares in the sum and the wanted shares,
    divided by the L2 norm of the wanted shares.
    """
    t, g = np.array(steps, dtype=np.float64), np.array(gammas, dtype=np.float64)
    wanted = np.array([step], dtype=np.float64), np.array([gamma], dtype=np.float64)
    matrix, target = inner_products(t, g, t, g), inner_products(t, g, *wanted)[:, 0]
    own = inner_products(*wanted, *wanted)[0, 0]
    # The last row and column are the condition, with its Lagrange multiplier. They are scaled like the matrix.
    ones = np.full((1, len(t)), own)
    system = np.block([[matrix, ones.T], [ones, np.zeros((1, 1))]])
    factors = np.linalg.lstsq(system, np.append(target, own), rcond=1e-14)[0][:-1]
    squared = factors @ matrix @ factors - 2 * factors @ target + own
    return factors, float(max(squared, 0) / own) ** 0.5


def reconstruct(output_dir, length: float, step: int | None = None) -> tuple[dict[str, torch.Tensor], float]:
    """Return the average of the weights with this length, and its relative error (see `mixture`).

    Args:
        output_dir: a run with --ema_snapshots.
        step: the step at which the average ends, one of the snapshots. None: the last snapshot.

    Raises:
        UserError: if the run has no snapshot of `step`, or for a length that is not allowed.
    """
    gamma, found = gamma_of(length), find_snapshots(output_dir)
    step = end_of_average(output_dir, step)
    pairs = [(each, kept) for each in found if each <= step for kept in LENGTHS]
    factors, error = mixture([each for each, _ in pairs], [gamma_of(kept) for _, kept in pairs], step, gamma)
    total: dict[str, torch.Tensor] = {}
    for (each, kept), factor in zip(pairs, factors.tolist()):
        with safetensors.safe_open(found[each], "pt") as file:
            for name in file.keys():  # noqa: SIM118, because this object is not a dict
                if name.startswith(f"{kept}/"):
                    tensor, name = file.get_tensor(name).double(), name.removeprefix(f"{kept}/")
                    total[name] = total[name].add_(tensor, alpha=factor) if name in total else tensor * factor
    return {name: tensor.float() for name, tensor in total.items()}, error
