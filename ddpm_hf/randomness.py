"""Random generators with keys, so that no draw depends on the draws before it.

Resuming, batch size and the number of processes therefore cannot change a draw: image k of a run has the same noise
in every process and at any time.
"""

import functools
import hashlib

import torch


FLIP_BLOCK = 4096  # flips are drawn in blocks of this many consecutive images


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """Return a CPU generator seeded by a hash of `(seed, *key)`.

    The same arguments give the same random bits on every machine, and different keys give independent streams.
    Integers, permutations and uniform numbers drawn from them are equal everywhere. Normal numbers in float32 differ
    by up to 2e-6, because processors round the logarithm and the cosine in them differently. The first key names the
    purpose of the draw, e.g. `keyed_generator(config.seed, "noise", image_ordinal)`.
    """
    digest = hashlib.blake2b("/".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draws_for(ordinals: range, draw, seed: int, block_size: int) -> torch.Tensor:
    """Return one value of `draw` for each of the consecutive `ordinals`.

    `draw(seed, block, block_size)` returns the values of a whole block of ordinals, the block number being its key.
    Drawing a block at once is fast, and a value still depends on its ordinal alone.
    """
    first, end = ordinals[0], ordinals[-1] + 1
    blocks = range(first // block_size, -(-end // block_size))
    return torch.cat(
        [
            draw(seed, block, block_size)[max(first - block * block_size, 0) : end - block * block_size]
            for block in blocks
        ]
    )


@functools.lru_cache(maxsize=2)  # a batch can span two epochs
def epoch_order(seed: int, epoch: int, num_images: int) -> torch.Tensor:
    """Return the order (num_images,) in which an epoch takes the images."""
    return torch.randperm(num_images, generator=keyed_generator(seed, "order", epoch))


@functools.lru_cache(maxsize=2)
def flips(seed: int, block: int, count: int) -> torch.Tensor:
    """Return (count,) bool: whether to mirror each of the images of a block."""
    return torch.randint(2, (count,), generator=keyed_generator(seed, "flip", block)).bool()
