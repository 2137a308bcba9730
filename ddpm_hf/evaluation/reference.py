"""The statistics and features of real images, for comparison with samples. They are computed once and cached as .npz.

A file has `mu` and `sigma` (float64), in the format of pytorch-fid, EDM, TTUR and clean-fid. Our files also have
`num_samples`, `meta` (JSON about the extractor and the data), and the `features` and `logits` of at most 10,000
images, which are evenly spaced in the set.
"""

import contextlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub.constants import HF_HOME

from ..errors import UserError
from ..files import parse_json, read_npz, write_npz, writing
from .extractor import extractor_id
from .features import extract
from .statistics import mean_and_covariance


MAX_FEATURES = 10_000  # features of at most this many images are kept, for scores that compare single images
ARRAYS = ("mu", "sigma", "num_samples", "features", "logits", "meta")


@dataclass
class Reference:
    """The statistics of a set of images, and the features of some of them.

    Attributes:
        mean, covariance: float64 (d,) and (d, d), over all images.
        num_samples: the number of images; None if the file does not state it.
        features, logits: float32 (N, d) and (N, k) of at most MAX_FEATURES images. None if they are not in the file.
        meta: facts about the extractor and the data.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    num_samples: int | None
    features: torch.Tensor | None
    logits: torch.Tensor | None
    meta: dict


def reference_of(extractor, image_set, what: str, batch_size: int = 64, cache_dir=None) -> Reference:
    """Read the Reference of an ImageSet from the cache, or compute it. Every process must call this function.

    The name of the cached file contains the id of the extractor and a hash of the pixels after resize and crop, so
    different data have different files. Images are not mirrored.

    Args:
        what: the name of the images in the progress bar.
        cache_dir: the cache. None: the folder in the environment variable DDPM_HF_CACHE. If this is not set: ddpm_hf
            in HuggingFace's cache.
    """
    name = f"{extractor_id(extractor)}-{image_set.fingerprint}-{len(image_set)}.npz"
    cache = cache_dir or os.environ.get("DDPM_HF_CACHE") or Path(HF_HOME) / "ddpm_hf"
    path = Path(cache) / "references" / name
    state = PartialState()
    state.wait_for_everyone()  # no process may look for the file while another one writes it
    cached = None
    if path.is_file():
        with contextlib.suppress(UserError):  # a damaged file is replaced
            cached = read_reference(path)
    if all(gather_object([cached is not None])):  # each machine may have a cache of its own
        return cached
    found = extract(extractor, image_set, batch_size, what)
    mean, covariance = mean_and_covariance(found.features)
    rows = kept_rows(len(image_set))
    logits = None if found.logits is None else found.logits[rows]
    meta = {
        "extractor": extractor_id(extractor),
        "pipeline": extractor.pipeline,
        "weights_sha256": extractor.sha256,
        "data_fingerprint": image_set.fingerprint,
    }
    reference = Reference(mean, covariance, len(image_set), found.features[rows], logits, meta)
    state.wait_for_everyone()
    if state.is_local_main_process:
        save_reference(reference, path)
    return reference


def kept_rows(count: int) -> torch.Tensor:
    """Return the indices of the images whose features are kept, int64 (N,): at most MAX_FEATURES of `count`."""
    return torch.linspace(0, count - 1, min(MAX_FEATURES, count)).round().long()


def save_reference(reference: Reference, path: Path):
    """Write a reference as .npz. If writing is interrupted, no incomplete file is left.

    Raises:
        UserError: if the file cannot be written.
    """
    arrays = {
        "mu": reference.mean.numpy(),
        "sigma": reference.covariance.numpy(),
        "num_samples": np.int64(reference.num_samples),
        "meta": json.dumps(reference.meta),
    }
    for name in ("features", "logits"):
        if getattr(reference, name) is not None:
            arrays[name] = getattr(reference, name).numpy()
    with writing("reference statistics", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{secrets.token_hex(4)}-{path.name}")  # two commands may compute the same reference
        write_npz(own, **arrays)
        own.replace(path)


def read_reference(path, extractor=None, pipeline: str | None = None) -> Reference:
    """Return a Reference with the statistics of a file that `evaluate`, pytorch-fid, EDM, TTUR, clean-fid or ADM made.

    Args:
        extractor: raise an error if the statistics cannot be compared with the features of this extractor. None: do
            not check.
        pipeline: how the images were resized, for a file that does not say it. Give `pytorch` for a file of
            pytorch-fid, and `tf1` for a file of EDM or TTUR.

    Raises:
        UserError: if the file cannot be read, or if its statistics cannot be used with `extractor`.
    """
    path = Path(path)
    arrays = read_npz(path, lambda names: [name for name in ARRAYS if name in names], "give statistics (mu, sigma)")
    if "mu" not in arrays or "sigma" not in arrays:
        raise UserError(f"{path} has no mu and sigma: give statistics as pytorch-fid or `evaluate` save them.")
    try:
        mean, covariance = (torch.from_numpy(np.asarray(arrays[name], dtype=np.float64)) for name in ("mu", "sigma"))
        meta = parse_json(str(arrays["meta"])) if "meta" in arrays else {"pipeline": pipeline}
        tensors = {name: torch.from_numpy(arrays[name]) if name in arrays else None for name in ("features", "logits")}
        count = int(arrays["num_samples"]) if "num_samples" in arrays else None
        if not isinstance(meta, dict):
            raise ValueError("its meta is not a JSON object")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a file of statistics ({error}): give one with mu and sigma.") from error
    if extractor is not None:
        _check_reference(path, mean, covariance, meta, extractor)
    return Reference(mean, covariance, count, **tensors, meta=meta)


def _check_reference(path, mean, covariance, meta, extractor):
    """Raise a UserError if the statistics cannot be compared with the features of `extractor`."""
    d = extractor.num_features
    if mean.shape != (d,) or covariance.shape != (d, d):
        raise UserError(
            f"{path} has statistics of {mean.numel()} features, but {extractor.name} has {d}: give another file."
        )
    if meta.get("pipeline") is None:
        raise UserError(
            f"{path} does not say how its images were resized: add --reference_pipeline pytorch (pytorch-fid) or tf1 "
            "(EDM, TTUR)."
        )
    if meta["pipeline"] != extractor.pipeline:
        raise UserError(
            f"{path} was made with the pipeline {meta['pipeline']}, but the samples use {extractor.pipeline}, so the "
            f"two cannot be compared: give --inception_pipeline {meta['pipeline']}."
        )
    if meta.get("extractor") not in (None, extractor_id(extractor)):
        raise UserError(
            f"{path} was made with {meta['extractor']}, but the samples use {extractor_id(extractor)}: give another "
            "file."
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"{path} has numbers that are not finite: give another file.")
    eigenvalues = torch.linalg.eigvalsh((covariance + covariance.T) / 2)
    skew = (covariance - covariance.T).abs().max()
    if not skew <= 1e-6 * eigenvalues[-1] or not eigenvalues[0] >= -1e-6 * eigenvalues[-1]:
        raise UserError(
            f"{path} has a sigma that is not a covariance (not symmetric, or negative): give another file."
        )
