"""Find near duplicates in the training images, so that a user can remove them before training.

Copies count several times in training, so the model memorizes them first. Identical files never get onto both
sides of a split (see dataset.py), but other near duplicates may.
"""

import torch
import torch.nn.functional as F


SMALL = 8  # height and width at which images are compared first
# Two images are near duplicates if their pixels, shifted to mean 0 and scaled to length 1, differ by at most this
# length. A copy as JPEG of quality 75 differs by less. In MNIST, no two images are this close. In CIFAR-10, one pair
# is, which shows the same ship (measured on the training images, 2026-11-27).
DISTANCE = 0.1
MAX_IMAGES = 100_000  # only the first ones are compared, so that the comparison takes less than a minute
MAX_CANDIDATES = 200_000
LISTED = 100  # pairs in train_config.json
BLOCK = 512
CHUNK_VALUES = 2**24  # values of pixels that are turned into floats at once


@torch.no_grad()
def near_duplicates(pixels: torch.Tensor) -> list[tuple[int, int]]:
    """Return the pairs of indices (k, n), k < n, of images that are near duplicates, in rising order.

    Images are first averaged to at most 8x8 pixels and compared. Those that are close are then compared in full.
    Brightness and contrast do not matter. Images of one color are left out. At most the first 100,000 images are
    compared.

    Args:
        pixels: (N, C, H, W), uint8 or float.
    """
    if len(pixels) < 2:
        return []
    pixels = pixels[:MAX_IMAGES]
    chunk = max(1, CHUNK_VALUES // pixels[0].numel())
    small = torch.cat([_small(part) for part in pixels.split(chunk)])
    usable = small.norm(dim=1) > 0.5
    candidates = _close_pairs(small[usable], 2 * DISTANCE)  # twice, because averaging changes the distance
    rows = usable.nonzero()[:, 0][candidates]
    near = [_distance(pixels[pair[:, 0]], pixels[pair[:, 1]]) <= DISTANCE for pair in rows.split(chunk)]
    pairs = rows[torch.cat(near)].sort(dim=1).values.tolist()
    return sorted(map(tuple, pairs))


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Return vectors (N, D), shifted to mean 0 and scaled to length 1. Constant vectors become 0."""
    vectors = vectors.float()
    vectors = vectors - vectors.mean(dim=1, keepdim=True)
    length = vectors.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-3 * vectors.shape[1] ** 0.5, vectors / length.clamp(min=1e-12), 0.0)


def _small(pixels: torch.Tensor) -> torch.Tensor:
    """Return images (N, C, H, W) as unit vectors (N, D) of at most 8x8 pixels."""
    size = min(SMALL, pixels.shape[2]), min(SMALL, pixels.shape[3])
    return _unit(F.adaptive_avg_pool2d(pixels.float(), size).flatten(1))


def _distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the distances (N,) between the unit vectors of the images `one` and `other`, both (N, C, H, W)."""
    return (_unit(one.flatten(1)) - _unit(other.flatten(1))).norm(dim=1)


def _close_pairs(vectors: torch.Tensor, radius: float) -> torch.Tensor:
    """Return the pairs (M, 2) of vectors (N, D) that are at most `radius` apart; at most 200,000 pairs.

    Vectors that are close have close projections on any direction. All vectors are therefore sorted by their
    projection on one direction. Each vector is compared only with its neighbours in this order.
    """
    if len(vectors) < 2:
        return torch.empty(0, 2, dtype=torch.int64)
    projections, order = (vectors @ _direction(vectors)).sort()
    vectors = vectors[order]
    found, count = [], 0
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        highest = projections[min(start + BLOCK, len(vectors)) - 1] + radius
        end = int(torch.searchsorted(projections, highest, right=True))
        products = block @ vectors[start:end].T  # of unit vectors: 1 - distance^2 / 2
        one, other = (products.triu(1) > 1 - radius**2 / 2).nonzero(as_tuple=True)
        found.append(torch.stack([order[start + one], order[start + other]], dim=1))
        count += len(one)
        if count > MAX_CANDIDATES:
            break
    return torch.cat(found)[:MAX_CANDIDATES]


def _direction(vectors: torch.Tensor) -> torch.Tensor:
    """Estimate the unit vector (D,) along which vectors (N, D) differ most. Return 0 if all vectors are equal.

    Power iteration takes time proportional to N D. The eigenvectors of a covariance matrix would take D^3, which is
    minutes for images of hundreds of channels. `_close_pairs` finds the same pairs with any direction, but is fastest
    with this direction.
    """
    mean = vectors.mean(dim=0)
    direction = vectors[0] - mean
    for _ in range(10):
        direction = vectors.T @ (vectors @ direction) - len(vectors) * mean * (mean @ direction)
        direction = direction / direction.norm().clamp(min=1e-12)
    return direction


def describe_duplicates(pairs: list[tuple[str, str]]) -> list[str]:
    """Return a list with one hint that names a pair of near duplicates. If `pairs` is empty, return []."""
    if not pairs:
        return []
    copies = len({second for _, second in pairs})
    first, second = pairs[0]
    return [
        f"Hint: {copies:,} of the training images are near duplicates of others, e.g. {second} of {first}; "
        f"train_config.json lists up to {LISTED} pairs. Remove the copies that you do not want."
    ]
