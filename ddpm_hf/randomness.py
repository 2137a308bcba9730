"""Generators keyed by what they are for, so that nothing drawn depends on what was drawn before it.

Resuming, batch size and the number of processes then cannot change a draw: image k of a run has the same noise
whoever draws it, and when.
"""

import functools
import hashlib

import torch


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """Return a CPU generator seeded by a hash of `(seed, *key)`.

    The same arguments give the same random bits on every machine; different keys give independent streams. Integers,
    permutations and uniform numbers drawn from them are equal everywhere. Normal numbers in float32 are equal to 2e-6:
    processors round the logarithm and the cosine in them differently. By custom the first key says what the draw is
    for, e.g. `keyed_generator(config.seed, "noise", image_ordinal)`.
    """
    digest = hashlib.blake2b("/".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def successive(draw, seed: int, size: int, ordinals: range) -> torch.Tensor:
    """Return what `draw(seed, block, size)` has for successive ordinals, of which each `size` are drawn at once.

    That is fast, and keyed by the ordinal all the same.
    """
    first, end = ordinals[0], ordinals[-1] + 1
    blocks = range(first // size, -(-end // size))
    return torch.cat([draw(seed, block, size)[max(first - block * size, 0) : end - block * size] for block in blocks])


@functools.lru_cache(maxsize=2)  # a batch may straddle two
def epoch_order(seed: int, epoch: int, num_images: int) -> torch.Tensor:
    """Return the order (num_images,) in which an epoch takes the images."""
    return torch.randperm(num_images, generator=keyed_generator(seed, "order", epoch))


@functools.lru_cache(maxsize=2)
def coins(seed: int, block: int, count: int) -> torch.Tensor:
    """Return (count,) bool: whether each of these images is mirrored."""
    return torch.randint(2, (count,), generator=keyed_generator(seed, "flip", block)).bool()


COINS = 4096  # tossed at once, for as many successive ordinals
