"""Generators keyed by what they are for, so that nothing drawn depends on what was drawn before it.

Resuming, batch size and the number of processes then cannot change a draw: image k of a run has the same noise
whoever draws it, and when.
"""

import hashlib

import torch


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """Return a CPU generator seeded by a hash of `(seed, *key)`.

    The same arguments give the same stream on every machine; different keys give independent streams. By custom the
    first key says what the draw is for, e.g. `keyed_generator(config.seed, "noise", image_ordinal)`.
    """
    digest = hashlib.blake2b("/".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
