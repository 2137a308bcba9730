"""Make each page of an image file an image of its own."""

import io

import datasets
from PIL import Image

from ..errors import UserError
from .arrays import page_numbers, page_of
from .decode import CHUNK, use_file, use_items


IN_PNG = {"1", "L", "LA", "I;16", "I;16B", "P", "RGB", "RGBA"}  # the modes that Pillow writes to PNG without a loss


def split_pages(rows, cache_dir) -> tuple[datasets.Dataset, int]:
    """Return rows with one row for each page, and the number of files that have several pages.

    All pages of a file keep its row number and its label. The pages are stored without a loss in the cache of
    `datasets`. Reading pages from the file each time would be slow: to reach the last frame of a GIF, all frames
    before it must be decoded. If no file has several pages, `rows` itself is returned.

    Args:
        rows: a `datasets.Dataset` with undecoded images.
        cache_dir: the cache of `datasets`; None: its default.
    """
    numbers = use_items(_pages_of, rows, "pages", " files")
    if all(pages == [0] for pages in numbers):
        return rows, 0
    split = datasets.Dataset.from_generator(
        _each_page,
        features=rows.features,
        cache_dir=cache_dir,
        gen_kwargs={"rows": rows, "numbers": tuple(numbers)},  # a tuple, because `datasets` splits lists into shards
        fingerprint=f"pages-{rows._fingerprint}",
    )
    return split, sum(len(pages) > 1 for pages in numbers)


def _pages_of(item) -> list[int]:
    """Return the indices of an item's pages; [0] for a file that cannot be read, which is refused or skipped later."""
    try:
        return use_file(lambda file: page_numbers(Image.open(file)), item)
    except UserError:
        return [0]


def _each_page(rows, numbers):
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        for k, pages in enumerate(numbers[start : start + len(chunk["row"])]):
            row = {name: values[k] for name, values in chunk.items()}
            images = [row["image"]] if pages == [0] else _encoded_pages(row["row"], row["image"], pages)
            for image in images:
                yield row | {"image": image}


def _encoded_pages(row, encoded, pages):
    """Yield each page as an encoded image. A page that cannot be decoded gets no bytes, and is refused later."""
    name = encoded["path"] or f"image {row}"
    opened = Image.open(io.BytesIO(use_file(lambda file: file.read(), (row, encoded))))
    for number in pages:
        try:
            yield {"bytes": _encode(opened, number), "path": f"{name} (page {number + 1})"}
        except Exception:  # Pillow's decoders raise anything for a broken file
            yield {"bytes": b"", "path": f"{name} (page {number + 1})"}


def _encode(image, number) -> bytes:
    """Return a page of a Pillow image as PNG or TIFF, upright and without a loss."""
    file, page = io.BytesIO(), page_of(image, number)
    page.save(file, "PNG" if page.mode in IN_PNG else "TIFF")
    return file.getvalue()
