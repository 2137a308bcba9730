"""The metric bits_per_dim: choose its images, compute it, and count the network evaluations that it needs."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..diffusion import likelihood
from ..processes import gather_in_order, or_fail_together
from .features import images_at
from .metric_input import Look


def bits_per_dim(look: Look) -> list[dict]:
    """Return the variational bound (Ho et al. 2020) on the held-out images, in bits per dimension.

    Without held-out images, the training images are used. Every process computes the bound of a share of the images.
    The noise of an image depends only on the index of the image.
    """
    evaluation = look.evaluation
    state = PartialState()
    model = evaluation.model
    timesteps = evaluation.bound_timesteps
    split = "train" if evaluation.held_out is None else "held_out"
    source, rows, few = bound_rows(evaluation)
    unet = model.unet.to(state.device)
    mode = "full" if few is None else f"{timesteps} of T terms"

    def bound(function, numbers, **more):
        labels = source.labels[numbers] if model.classes else None
        options = {"batch_size": evaluation.batch_size, "progress": state.is_main_process, "class_labels": labels}
        return function(unet, model.scheduler, images_at(source, numbers), numbers, **options, **more)

    pilot = None
    if few is not None:
        on_main = state.is_main_process
        pilot = or_fail_together(lambda: bound(likelihood.pilot_probabilities, few) if on_main else None)
        pilot = broadcast_object_list([pilot])[0]
    share = rows[state.process_index :: state.num_processes]
    bounds = []
    terms = {"num_timesteps": None if few is None else timesteps, "pilot": pilot}
    result = or_fail_together(lambda: bound(likelihood.bits_per_dim, share, **terms) if share else None)
    if share:
        columns = {name: values.tolist() for name, values in result.items()}
        bounds = [{name: values[k] for name, values in columns.items()} for k in range(len(share))]
    bounds = gather_in_order(share, bounds)  # numbers, because a pickled element of a tensor brings the whole tensor
    columns = {name: torch.tensor([one[name] for one in bounds], dtype=torch.float64) for name in bounds[0]}
    summary = likelihood.summarise(columns)
    error = {"se": summary["standard_error"], "se_method": "over images"}
    entry = look.entry("bits_per_dim", summary["bits_per_dim"], lower_is_better=True, **error, n_ref=len(rows))
    extra = {
        **{name: summary[name] for name in ("L0", "L1_to_last", "prior")},
        "floored_share": summary["floored"],
        "split": split,
        "mode": mode,
        "variance_type": model.scheduler.config.variance_type,
        "decoder": "tanh",
        "bound": "upper" if summary["floored"] == 0 else "none: some pixels are at the decoder's floor",
    }
    return [entry | {"n_gen": None, "unit": "bits/dim", "extra": extra}]


def bound_rows(evaluation) -> tuple[Any, list[int], list[int] | None]:
    """Return the ImageSet for bits_per_dim, the indices of the images to use, and the indices of the pilot images.

    The pilot images are a few of the images to use. All T terms of their bounds are computed first, to decide how
    often each timestep is drawn. If all T terms of every image are computed anyway, there are no pilot images, and
    the third value is None.
    """
    source = evaluation.train if evaluation.held_out is None else evaluation.held_out
    count = min(evaluation.bound_images or len(source), len(source))
    rows = torch.linspace(0, len(source) - 1, count).round().long().tolist()
    T, timesteps = len(evaluation.model.scheduler), evaluation.bound_timesteps
    if timesteps is None or timesteps >= T:
        return source, rows, None
    most = likelihood.num_pilot_images(T, count * timesteps)
    return source, rows, rows[:: -(-len(rows) // most)]


def bound_evaluations(evaluation) -> int:
    """Return how many images bits_per_dim gives to the network. An image counts once for each timestep."""
    _, rows, few = bound_rows(evaluation)
    T = len(evaluation.model.scheduler)
    return len(rows) * T if few is None else len(rows) * evaluation.bound_timesteps + len(few) * T
