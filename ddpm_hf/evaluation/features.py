"""What a score looks at: extractors by name, and the features of many images, drawn out by all processes together.

An extractor is a module in eval mode: uint8 images (B, C, H, W) -> (features float32 (B, num_features), logits or
None), with `name`, `pipeline` (how it resizes and scales), `sha256` (of its weights) and `num_features`.
"""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes
from torch import nn
from tqdm.auto import tqdm

from ..pictures import to_uint8


CHUNK = 256  # images decoded at a time


@dataclass
class Features:
    """Features (N, d) and logits (N, k) or None, float32 on the CPU, in the order of the images."""

    features: torch.Tensor
    logits: torch.Tensor | None


def images_at(source, indices) -> torch.Tensor:
    """Return uint8 images (B, C, H, W) of a tensor of them or of an ImageSet."""
    if isinstance(source, torch.Tensor):
        return source[indices]
    if source.pixels is not None and source.pixels.dtype == torch.uint8:
        return source.pixels[indices]
    rows = list(indices)
    images = torch.empty(len(rows), source.channels, source.resolution, source.resolution, dtype=torch.uint8)
    for start in range(0, len(rows), CHUNK):  # of a set too large to be held as floats
        images[start : start + CHUNK] = to_uint8(source.get(rows[start : start + CHUNK]))
    return images


@torch.no_grad()
def extract(extractor: nn.Module, source, indices=None, batch_size: int = 64, what: str = "images") -> Features:
    """Return the features of images `indices` (None: all) of a uint8 tensor or an ImageSet, on every process.

    Every process must call this with the same arguments and takes its share of the batches, possibly none. Every batch
    has the same images for any number of processes, so that number changes no feature by itself. Another `batch_size`,
    number of threads or make of processor rounds float32 differently, by up to 1e-6 of the largest feature.
    """
    state = PartialState()
    indices = range(len(source)) if indices is None else indices
    batches = [range(start, min(start + batch_size, len(indices))) for start in range(0, len(indices), batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    kept = [torch.zeros(0, extractor.num_features)], [], [torch.zeros(0, dtype=torch.int64)]
    hide = not state.is_main_process or len(indices) < 1000
    for batch in tqdm(mine, desc=f"{extractor.name} features of {what}", unit="batch", disable=hide):
        images = images_at(source, [indices[k] for k in batch]).to(state.device)
        features, logits = extractor(images)
        kept[0].append(features.float().cpu())
        kept[1].append(None if logits is None else logits.float().cpu())
        kept[2].append(torch.tensor(batch))
    numbers = torch.cat(kept[2])
    has_logits = bool(kept[1]) and kept[1][0] is not None
    if state.num_processes == 1:
        return Features(torch.cat(kept[0]), torch.cat(kept[1]) if has_logits else None)
    # A process without a share knows nothing of logits: the first process has a batch whenever there is one.
    width = torch.tensor([kept[1][0].shape[1] if has_logits else 0], device=state.device)
    width = int(gather(width).max())
    logits = torch.cat(kept[1]) if has_logits else torch.zeros(len(numbers), width)
    table = torch.cat([torch.cat(kept[0]), logits], dim=1)
    numbers, table = _gathered(numbers, state.device, -1), _gathered(table, state.device, 0)
    order = numbers[numbers >= 0].argsort()
    table = table[numbers >= 0][order]
    d = extractor.num_features
    return Features(table[:, :d].contiguous(), table[:, d:].contiguous() if width else None)


def _gathered(tensor: torch.Tensor, device, pad) -> torch.Tensor:
    return gather(pad_across_processes(tensor.to(device), dim=0, pad_index=pad)).cpu()
