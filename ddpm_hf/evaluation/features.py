"""Extract the features of many images. All processes of a launch share the work."""

import contextlib
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..memory import in_batches, ranges
from ..output import PASSING_BAR
from ..pictures import to_uint8
from ..processes import gather_in_order


CHUNK = 256  # images decoded at a time


class Extractor(nn.Module):
    """A network that turns images into features. It is always in eval mode.

    It takes uint8 images (B, C, H, W). It returns features, float32 (B, num_features), and logits (B, k) or None.

    Attributes:
        name: the name of the extractor in EXTRACTORS.
        pipeline: the name of its preprocessing, i.e. how images are resized and scaled.
        sha256: the hash of its weights.
        num_features: how many features it returns for each image.
    """

    def train(self, mode: bool = True) -> "Extractor":
        """Stay in eval mode, even if this extractor is part of a model that changes to train mode."""
        return super().train(False)


@contextlib.contextmanager
def full_precision(device: torch.device):
    """During a `with` block, compute in true float32. Autocast and TF32 would change a Fréchet distance."""
    convolutions = torch.backends.cudnn.allow_tf32
    products = torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def check_images(network: str, images: torch.Tensor):
    """Raise a UserError if images are not uint8 (B, 1 or 3, H, W). `network` is the name that the message gives."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        given = f"{str(images.dtype).removeprefix('torch.')} images of shape {tuple(images.shape)}"
        raise UserError(
            f"{network} was given {given}: round the pixels to 256 levels, and give uint8 images (B, 1 or 3, H, W)."
        )


@dataclass
class Features:
    """The features (N, d) and logits (N, k) of N images, float32 on the CPU. `logits` can be None."""

    features: torch.Tensor
    logits: torch.Tensor | None


def images_at(source, indices) -> torch.Tensor:
    """Return the images at `indices`, uint8 (B, C, H, W). `source` is a uint8 tensor (N, C, H, W) or an ImageSet."""
    if isinstance(source, torch.Tensor):
        return source[indices]
    if source.pixels is not None and source.pixels.dtype == torch.uint8:
        return source.pixels[indices]
    rows = list(indices)
    images = torch.empty(len(rows), source.channels, *source.size, dtype=torch.uint8)
    for start in range(0, len(rows), CHUNK):  # all images as floats might not fit into memory
        images[start : start + CHUNK] = to_uint8(source.get(rows[start : start + CHUNK]))
    return images


@torch.no_grad()
def extract(extractor: Extractor, source, batch_size: int = 64, what: str = "images") -> Features:
    """Return the features of the images in `source`, a uint8 tensor or an ImageSet, on every process.

    Every process must call this function with the same arguments. Each process takes a share of the batches, and this
    share may be empty. The batches are the same for any number of processes, so the number of processes does not
    change the features. Another `batch_size`, number of threads or type of processor changes them by rounding, at most
    by 1e-6 of the largest feature.

    Args:
        what: the name of the images in the progress bar.
    """
    state = PartialState()
    mine = ranges(len(source), batch_size)[state.process_index :: state.num_processes]

    def features_of(batch: range) -> tuple[torch.Tensor, torch.Tensor | None]:
        features, logits = extractor(images_at(source, list(batch)).to(state.device))
        return features.float().cpu(), None if logits is None else logits.float().cpu()

    found = {}
    bar_options = dict(desc=f"{extractor.name} features of {what}", unit="image", disable=not state.is_main_process)
    with tqdm(total=sum(map(len, mine)), **bar_options, **PASSING_BAR) as bar:
        for batch, features in in_batches(features_of, mine):
            found[batch.start] = features
            bar.update(len(batch))
    features, logits = zip(*gather_in_order(found.keys(), found.values()))
    return Features(torch.cat(features), None if logits[0] is None else torch.cat(logits))
