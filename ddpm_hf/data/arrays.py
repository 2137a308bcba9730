"""Read images as arrays: .npy files, .npz files with many images, and files whose pages are channels of one image.

An array is (H,W) or (H,W,C). It holds 8-bit integers, longer integers, or floats.
"""

import io

import datasets
import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import UserError
from ..files import check_npy, read_npz


MAGIC = b"\x93NUMPY"  # the first bytes of a .npy file
# Formats of which only the first frame is an image. In the MPO of a camera the other frames are previews, and in a PSD
# they are layers.
ONE_PICTURE = {"MPO", "PSD"}
SUBFILE_TYPE = 254  # a tag of TIFF: bit 0 is set for a small copy of another page, bit 2 for a mask
NOT_A_PICTURE = 0b101
LABELS = ("label", "labels", "arr_1")  # names of the array with the classes, in an .npz


def read_npy(file) -> np.ndarray:
    """Return the array (H,W,C) in a .npy file. Pickles are not read.

    Raises:
        ValueError: if the file is damaged, or if the array is not numbers of shape (H,W) or (H,W,C).
    """
    check_npy(file, file.seek(0, io.SEEK_END))
    file.seek(0)
    return as_image(np.load(file, allow_pickle=False))


def as_image(array: np.ndarray) -> np.ndarray:
    """Return an array (H,W) or (H,W,C) as (H,W,C). Raise a ValueError for another shape, or if it has no numbers."""
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size or array.dtype.kind not in "buif":
        raise ValueError(
            f"it is an array of {array.dtype} and shape {array.shape}, not numbers of height x width (x C)"
        )
    return array


def page_numbers(image) -> list[int]:
    """Return the indices of the pages or frames of a Pillow image. Small copies and masks in a TIFF are left out."""
    if image.format in ONE_PICTURE:
        return [0]
    numbers = range(getattr(image, "n_frames", 1))
    if image.format != "TIFF":
        return list(numbers)
    found = []
    for number in numbers:
        image.seek(number)
        if not image.tag_v2.get(SUBFILE_TYPE, 0) & NOT_A_PICTURE:
            found.append(number)
    return found or [0]


def upright(image):
    """Return a Pillow image, turned as its EXIF orientation says."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def page_of(image, number: int):
    """Return a page of a Pillow image, upright. Raise a ValueError if it has too many pixels."""
    image.seek(number)
    if image.width * image.height > 2 * Image.MAX_IMAGE_PIXELS:  # Pillow itself checks only the first page
        raise ValueError("the page is too large")
    return upright(image)


def pages_as_channels(image) -> np.ndarray:
    """Return all pages of a Pillow image as one array (H,W,C), the channels of the first page first.

    Raises:
        ValueError: if the pages differ in size or type.
    """
    pages = []
    for number in page_numbers(image):
        page = page_of(image, number)
        page = page.convert("RGB") if page.mode in ("P", "CMYK", "YCbCr", "LAB") else page
        pages.append(as_image(np.asarray(page)))
    if len({(page.shape[:2], page.dtype) for page in pages}) > 1:
        raise ValueError("its pages differ in size or type")
    return np.concatenate(pages, axis=-1)


def white_of(dtype: np.dtype) -> int:
    """Return the value of white in an array of this type: 1 for floats and booleans, 255 or 65535 for integers."""
    if dtype.kind in "bf":
        return 1
    return 255 if dtype.itemsize == 1 else 65535


def open_npz(path) -> datasets.Dataset:
    """Return a dataset of the images in an .npz file. A row has an image (as .npy), and a label if there are labels.

    The labels are an array of whole numbers (N,), named label, labels or arr_1. The images are the array `arr_0`, of
    shape (N,H,W) or (N,H,W,C). If there is no `arr_0`, they are the first array whose name is not one for labels.

    Raises:
        UserError: if the file cannot be read, or if the arrays have other shapes or types.
    """

    def choose(names: list[str]) -> list[str]:
        images = "arr_0" if "arr_0" in names else next((name for name in names if name not in LABELS), None)
        return [*([images] if images else []), *[name for name in LABELS if name in names and name != images][:1]]

    advice = "give images (N, H, W, C) as arr_0, and class numbers (N,), if there are classes, as label"
    arrays = list(read_npz(path, choose, advice).values())
    images, labels = (arrays + [None, None])[:2]
    is_stack = images is not None and images.ndim in (3, 4) and images.size and images.dtype.kind in "buif"
    if not is_stack or labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "ui"):
        found = ", ".join(f"{array.dtype} {array.shape}" for array in arrays) or "nothing"
        raise UserError(f"{path} holds {found}: {advice}.")
    columns = {"image": [{"bytes": write_npy(image), "path": None} for image in images]}
    features = {"image": datasets.Image()}
    if labels is not None:
        names, columns["label"] = np.unique(labels, return_inverse=True)
        features["label"] = datasets.ClassLabel(names=list(map(str, names.tolist())))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_npy(array: np.ndarray) -> bytes:
    """Return the content of a .npy file with this array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
