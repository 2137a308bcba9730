"""Write and read the pixels of samples: as 8-bit images, or as 16-bit or float values in the range of the data."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.arrays import write_npy
from ..errors import UserError, no_such
from ..files import write_beside
from ..models.pretrained import Pretrained
from ..pictures import save_picture, to_uint8


PIXEL_TYPES = ("uint8", "uint16", "float32")


@dataclass(frozen=True)
class PixelFormat:
    """How the pixels of samples are stored.

    Attributes:
        channels: the number of channels of an image.
        type: a name of PIXEL_TYPES.
        low, high: the values of black and white, i.e. of -1 and 1 in the images of the model.
    """

    channels: int
    type: str = "uint8"
    low: float = 0
    high: float = 255

    @property
    def suffix(self) -> str:
        """The ending of a file with one image: .png if PNG can store it, else .npy."""
        is_png = self.type == "uint8" and self.channels <= 4 or self.type == "uint16" and self.channels == 1
        return ".png" if is_png else ".npy"

    @property
    def record(self) -> dict:
        """A dict with the entry "pixels" for samples.json. It is empty for 8-bit images that are grey or RGB."""
        if self.type == "uint8" and self.channels in (1, 3):
            return {}
        return {"pixels": {"channels": self.channels, "type": self.type, "range": [self.low, self.high]}}

    def encode(self, images: torch.Tensor) -> np.ndarray:
        """Return images (N, C, H, W) in [-1, 1] as an array (N, H, W, C) of this format."""
        if self.type == "uint8":
            return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        values = images.permute(0, 2, 3, 1).cpu().double().clamp(-1, 1).numpy()
        values = (values + 1) / 2 * (self.high - self.low) + self.low
        return values.astype(np.float32) if self.type == "float32" else np.rint(values).astype(np.uint16)

    def decode(self, arrays: np.ndarray) -> torch.Tensor:
        """Return an array (N, H, W, C) of this format as uint8 (N, C, H, W), for pictures and scores."""
        if self.type != "uint8":
            share = (arrays.astype(np.float64) - self.low) / (self.high - self.low)
            arrays = np.rint(share * 255).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()

    def save(self, array: np.ndarray, path: Path):
        """Write one image (H, W, C) of this format. A kill leaves no half-written file."""
        if self.suffix == ".npy":
            write_beside(path, lambda partial: partial.write_bytes(write_npy(array)))
        else:
            save_picture(Image.fromarray(array[..., 0] if self.channels == 1 else array).save, path)


def pixel_format(model: Pretrained, type: str | None) -> PixelFormat:
    """Return the format of the samples of a model.

    uint8 values are from 0 to 255. uint16 and float32 values are in the --pixel_range of the training. If training did
    not have this flag, they are from 0 to 65535 (uint16) or from 0 to 1 (float32).

    Args:
        type: a name of PIXEL_TYPES. None: float32 if the model was trained with --preserve_input_precision, else
            uint8.

    Raises:
        UserError: for an unknown type, or if uint16 cannot hold the values.
    """
    flags = model.run.get("flags")
    if type is None:
        type = "float32" if isinstance(flags, dict) and flags.get("preserve_input_precision") is True else "uint8"
    if type not in PIXEL_TYPES:
        raise UserError(no_such("pixel_type", type, PIXEL_TYPES))
    channels = model.unet.config.in_channels
    if type == "uint8":
        return PixelFormat(channels)
    low, high = trained_range(model) or ((0, 65535) if type == "uint16" else (0, 1))
    if type == "uint16" and not (low >= 0 and 1 < high <= 65535):
        raise UserError(
            f"--pixel_type is uint16, but this model was trained with values from {low:.10g} to {high:.10g}: give "
            "float32."
        )
    return PixelFormat(channels, type, low, high)


def trained_range(model: Pretrained) -> tuple[float, float] | None:
    """Return the --pixel_range that a model was trained with, or None."""
    flags = model.run.get("flags")
    found = flags.get("pixel_range") if isinstance(flags, dict) else None
    return tuple(found) if _is_range(found) else None


def recorded_format(record: dict | None) -> PixelFormat | None:
    """Return the format that a record of samples states, or None, which means 8-bit images, grey or RGB."""
    if not record or "pixels" not in record:
        return None
    pixels = record["pixels"]
    return PixelFormat(pixels["channels"], pixels["type"], *pixels["range"])


def is_format(pixels) -> bool:
    """Return whether the entry `pixels` of a record is valid."""
    if not isinstance(pixels, dict) or pixels.get("type") not in PIXEL_TYPES or not _is_range(pixels.get("range")):
        return False
    return type(pixels.get("channels")) is int and pixels["channels"] >= 1


def _is_range(found) -> bool:
    if not isinstance(found, list) or len(found) != 2 or not all(type(value) in (int, float) for value in found):
        return False
    return all(map(math.isfinite, found)) and found[0] < found[1]
