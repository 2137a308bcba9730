"""Measure whether a model copies: compare generated images with the nearest training images, in pixels.

Distances are root-mean-square differences of pixels in grey levels, from 0 (a copy) to 255. Each measure is also
computed for held-out images. A model that does not copy reaches about the same value.
"""

import math
from collections import Counter
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UserError
from ..output import PASSING_BAR
from ..pictures import GAP, evenly, resize, save_picture, side_by_side, tile
from .features import images_at
from .metric_input import Look, has_floor


CHUNK = 2**23  # how many distances are in memory at a time: 64 MB
EXACT = 1023  # float32 can add up this many products of two numbers from -128 to 127 without rounding


def memorization(look: Look) -> list[dict]:
    """Return how close the generated images are to training images, and draw the closest pairs.

    The floor of a score is its value for held-out images. For exact copies and duplicates, the floor is 0.
    """
    if not PartialState().is_main_process:
        return []
    evaluation = look.evaluation
    images = look.images
    train = images_at(evaluation.train, range(len(evaluation.train)))
    held_out = None
    if has_floor(evaluation):
        held_out = images_at(evaluation.held_out, range(len(evaluation.held_out)))
    report, pairs = memorization_report(images, train, held_out)
    floors = {name: report[f"{name}_held_out"] for name in ("share_below_threshold", "authpct", "median_ratio")}
    floors |= {"exact_copies": 0, "duplicates": 0}
    higher_is_better = ("authpct", "median_ratio")
    entries = [
        look.entry(
            f"memorization_{name}",
            report[name],
            lower_is_better=name not in higher_is_better,
            floor=floor,
            n_ref=len(train),
        )
        for name, floor in floors.items()
        if report[name] is not None
    ]
    if evaluation.pairs_path is not None:
        entries[0]["extra"] = {"pairs": [list(pair) for pair in pairs]}
        try:
            pairs_sheet(images, train, pairs, evaluation.pairs_path)
            entries[0]["extra"]["sheet"] = evaluation.pairs_path.name
        except UserError as error:  # keep the scores even if the picture cannot be written
            PartialState().print(f"Warning: {error}", flush=True)
    return entries


def memorization_report(
    generated: Tensor,
    train: Tensor,
    held_out: Tensor | None,
    *,
    num_pairs: int = 16,
    num_held_out: int = 2000,
    progress: bool = True,
) -> tuple[dict, list[tuple[int, int, float]]]:
    """Return measures of memorization, and the `num_pairs` closest pairs.

    A pair is (index of a generated image, index of its nearest training image, distance). At most `num_held_out`
    held-out images are used, evenly spaced. They are split into two halves, A and B. The measures are:
    - threshold: a distance. For 1 % of the images in A, the nearest training image is nearer than this.
    - share_below_threshold: the share of generated images that are nearer to a training image than the threshold.
      This measure finds a few close copies.
    - authpct: the percentage of generated images that are authentic (Alaa et al. 2022). Image x is authentic if its
      nearest training image is nearer to another training image than to x. The percentage falls if many images are
      a bit too close to training images.
    - median_ratio: the median distance to the nearest training image, divided by the same median for A. It also
      falls if many images are a bit too close.
    - the last three names with `_held_out`: the values for the images in B, instead of the generated images.
    - exact_copies: the number of generated images that are equal to a training image.
    - duplicates: the number of generated images that are equal to another generated image.
    Without held-out images, only exact_copies and duplicates are measured, and the other measures are None. No measure
    finds copies that are shifted by a pixel.

    Args:
        generated, train, held_out: uint8 (N, C, H, W), all on one device.

    Raises:
        UserError: if the images are not uint8 of one shape, if there are too few images, or if most held-out images
            are training images.
    """
    _check("generated", generated, train, least=1)
    _check("training", train, train, least=2)
    distances, nearest = _nearest(generated, train, "Nearest to generated", progress)
    order = distances.argsort(stable=True)[:num_pairs].tolist()
    pairs = [(k, nearest[k].item(), distances[k].item()) for k in order]
    counts = Counter(image.numpy().tobytes() for image in generated.cpu())
    names = ("share_below_threshold", "authpct", "median_ratio")
    report = dict.fromkeys([*(name + suffix for name in names for suffix in ("", "_held_out")), "threshold"])
    report |= {
        "exact_copies": (distances == 0).sum().item(),
        "duplicates": sum(count for count in counts.values() if count > 1),
        "num_generated": len(generated),
        "num_train": len(train),
        "num_held_out": 0,
    }
    if held_out is None:
        return report, pairs

    _check("held-out", held_out, train, least=4)
    held_out = held_out[evenly(range(len(held_out)), num_held_out)]
    held_out_distances, held_out_nearest = _nearest(held_out, train, "Nearest to held-out", progress)
    neighbours = torch.cat([nearest, held_out_nearest]).unique()
    spacings = torch.full((len(train),), math.nan, dtype=torch.float64, device=distances.device)
    spacings[neighbours] = _nearest(train[neighbours], train, "Nearest to training", progress, own=neighbours)[0]
    scale = held_out_distances[::2]
    if scale.median() == 0:
        raise UserError(
            "most of the held-out images are training images too: give images that were not used in training."
        )
    threshold = scale.quantile(0.01)
    for suffix, own, near in [
        ("", distances, nearest),
        ("_held_out", held_out_distances[1::2], held_out_nearest[1::2]),
    ]:
        report["share_below_threshold" + suffix] = (own < threshold).double().mean().item()
        report["authpct" + suffix] = 100 * (own > spacings[near]).double().mean().item()
        report["median_ratio" + suffix] = (own.median() / scale.median()).item()
    return report | {"threshold": threshold.item(), "num_held_out": len(held_out)}, pairs


def pairs_sheet(generated: Tensor, train: Tensor, pairs: list[tuple[int, int, float]], path) -> Path:
    """Draw the pairs of `memorization_report` in rows, the closest pair first, and return the path of the picture.

    To the right of each generated image is its nearest training image. The distance is written below both. Images are
    uint8 (N, C, H, W).
    """
    columns = min(4, len(pairs))
    sheets = [tile(resize(side_by_side(torch.stack([generated[g], train[t]])), 128), columns=2) for g, t, _ in pairs]
    width, height = sheets[0].size
    font = ImageFont.load_default(17)
    margin, title, caption = 24, 64, 44  # pixels
    rows = math.ceil(len(pairs) / columns)
    page = (columns * (width + margin) + margin, title + rows * (height + caption))
    page = Image.new(sheets[0].mode, page, "white")
    draw = ImageDraw.Draw(page)
    for k, (sheet, (_, _, distance)) in enumerate(zip(sheets, pairs)):
        left = margin + k % columns * (width + margin)
        top = title + k // columns * (height + caption)
        page.paste(sheet, (left, top))
        text = f"{distance:.1f}" if distance else "0: a copy"
        draw.text((left + width / 2, top + height + 6), text, "black", font, "ma")
        if k < columns:
            for side, text in enumerate(["generated", "training"]):
                x = left + (width - GAP) / 4 + side * (width + GAP) / 2
                draw.text((x, title - 8), text, "black", ImageFont.load_default(13), "ms")
    draw.text((margin, 12), "distance: RMSE in grey levels", "black", font, "la")
    return save_picture(page.save, path, optimize=True)


def _check(name: str, images: Tensor, train: Tensor, least: int):
    if images.dtype != torch.uint8 or images.shape[1:] != train.shape[1:] or len(images) < least:
        given = f"the {name} images are {images.dtype} {tuple(images.shape)}"
        raise UserError(f"{given}: give at least {least}, uint8 (N, {', '.join(map(str, train.shape[1:]))}).")


def _nearest(images: Tensor, train: Tensor, title: str, progress: bool, own: Tensor | None = None):
    """Find the nearest training image of each image. Return the distances (N,), float64, and the indices (N,).

    If several training images are equally near, return the first. Squared distances are computed without rounding.

    Args:
        own: indices (N,). Image k is not compared with the training image own[k], because they are the same image.
            None: compare all images.
    """
    images, train = images.flatten(1), train.flatten(1)
    smallest = torch.full((len(images),), math.inf, dtype=torch.float64, device=train.device)
    index = torch.zeros(len(images), dtype=torch.long, device=train.device)
    rows = max(1, CHUNK // max(train.shape[1], 1024))
    at_once = max(1, min(rows, CHUNK // rows))
    options = dict(total=len(images) * len(train), desc=title, unit="pair", unit_scale=True, disable=not progress)
    with tqdm(**options, **PASSING_BAR) as bar:
        for start in range(0, len(train), rows):
            part = _centred(train[start : start + rows])
            norms = _squared_norms(part)
            for first in range(0, len(images), at_once):
                chunk = slice(first, first + at_once)
                queries = _centred(images[chunk])
                products = [x @ y.T for x, y in zip(queries.split(EXACT, 1), part.split(EXACT, 1))]
                squares = norms.sub(products[0], alpha=2)  # in float64, like norms
                for product in products[1:]:
                    squares.sub_(product, alpha=2)
                if own is not None:
                    itself = own[chunk] - start
                    row = torch.where((itself >= 0) & (itself < len(part)))[0]
                    squares[row, itself[row]] = math.inf
                values, places = squares.min(dim=1)
                values += _squared_norms(queries)
                closer = values < smallest[chunk]
                smallest[chunk] = values.where(closer, smallest[chunk])
                index[chunk] = (start + places).where(closer, index[chunk])
                bar.update(squares.numel())
    return (smallest / train.shape[1]).sqrt(), index


def _centred(images: Tensor) -> Tensor:
    return images.float() - 128


def _squared_norms(images: Tensor) -> Tensor:
    return images.double().square().sum(dim=1)
