"""Keep the images of a dataset. They are decoded once, or at each use if the set is large."""

import hashlib

import numpy as np
import torch

from ..sizes import read_size
from .decode import decode_all, item_name, read_batch, scale, undecoded
from .duplicates import near_duplicates


MEMORY_LIMIT = 2 * 2**30  # bytes of decoded pixels; the images of a larger set are decoded at each use


class ImageSet:
    """Images with row numbers. They are decoded once into `pixels` (N,C,H,W), or at each use if `pixels` is None."""

    def __init__(self, rows, *, classes, read, config):
        self.rows = rows
        self.read = read
        self.num_images = len(rows)
        self.class_names = list(classes.values()) or None
        self.channels = read.keywords["channels"]
        self.size = read_size(config.resolution)
        label_of = {value: label for label, value in enumerate(classes)}
        self.labels = torch.tensor([label_of.get(value, -1) for value in rows["label"][:]]) if classes else None
        shape = (len(rows), self.channels, *self.size)
        dtype = np.dtype(np.float32 if config.preserve_input_precision else np.uint8)
        fits = np.prod(shape) * dtype.itemsize <= MEMORY_LIMIT
        self.pixels = decode_all(rows, read, config.center_crop, np.empty(shape, dtype)) if fits else None
        self.random_crop = self.pixels is None and not config.center_crop
        if self.pixels is None:
            identity = repr((rows._fingerprint, read.keywords, self.random_crop)).encode()
        else:
            identity = self.pixels.numpy()
        self.fingerprint = hashlib.sha256(identity).hexdigest()[:16]

    def __len__(self):
        return self.num_images

    def near_duplicates(self) -> list[tuple[str, str]]:
        """Return the names of the images that are near duplicates, in pairs such as ("image 3 (x.png)", "image 7").

        A name is the row of the image in its dataset, and its file if it has one. Images that do not fit in memory are
        not compared.
        """
        pairs = [] if self.pixels is None else near_duplicates(self.pixels)
        rows = sorted({row for pair in pairs for row in pair})
        names = {row: item_name(item) for row, item in zip(rows, undecoded(self.rows, rows))}
        return [(names[first], names[second]) for first, second in pairs]

    def get(self, indices, crop_generators=None, mirrored=None):
        """Return the images at `indices`, (B,C,H,W) float32 in [-1, 1]. For the other arguments see `read_batch`."""
        if self.pixels is None:
            return read_batch(undecoded(self.rows, indices), self.read, self.size, crop_generators, mirrored)
        images = self.pixels.index_select(0, torch.as_tensor(indices))  # much faster than pixels[indices]
        if mirrored is not None:
            which = mirrored.nonzero()[:, 0]
            images[which] = images.index_select(0, which).flip(-1)
        return scale(images)
