"""Make random generators from keys, so that no draw depends on the draws before it.

A draw therefore stays the same if a run is resumed, or if the batch size or the number of processes changes: image k
of a run has the same noise in every process and at any time.
"""

import hashlib

import torch


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """Return a CPU generator seeded by a hash of `(seed, *key)`.

    The same arguments give the same random bits on every machine. Integers, permutations and uniform numbers are equal
    on all machines. Normal numbers in float32 differ by up to 2e-6, because they are computed with a logarithm and a
    cosine, and processors round these differently. The first key names the purpose of the draw, e.g.
    `keyed_generator(config.seed, "noise", image_ordinal)`.

    torch's CPU generator keeps only 32 bits of a seed, so there are 2^32 streams. Two different keys share a
    stream with a probability of 2^-32. Among a million keys, about 116 pairs share one. This does not bias
    expected values.
    """
    digest = hashlib.blake2b("/".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draws_for(ordinals: range, draw, seed: int, block_size: int) -> torch.Tensor:
    """Return one random value for each of the consecutive `ordinals` (see data/dataset.py).

    `draw(seed, block, block_size)` draws the values of a whole block of `block_size` ordinals, with the number of the
    block as the key. This is faster than single draws, and a value still depends only on its ordinal.
    """
    first, end = ordinals[0], ordinals[-1] + 1
    blocks = range(first // block_size, -(-end // block_size))
    return torch.cat(
        [
            draw(seed, block, block_size)[max(first - block * block_size, 0) : end - block * block_size]
            for block in blocks
        ]
    )
