"""Reading pixels: unusual files are read with bounded memory and time, or refused in one sentence."""

import os
import threading
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from test_dataset import encode, make, write_hub  # noqa: F401  (`make` is a fixture)

from ddpm_hf import UserError
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.decode import read_image, use_file, use_path


def gradient(length):
    """A line whose brightness grows from 0 to 255."""
    return np.linspace(0, 255, length).astype(np.uint8)[None]


@pytest.mark.parametrize("turned", [False, True])
def test_a_thin_image_needs_little_memory_and_keeps_its_middle(turned):
    line = gradient(6000).T if turned else gradient(6000)
    tracemalloc.start()
    array = read_image((0, {"bytes": encode(line), "path": None}), channels=3, resolution=64, exact=False)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(array.shape[:2]) == 16 * 64 and min(array.shape[:2]) == 64
    assert most < 3e6  # all of it has 384,000 x 64 pixels, which is 74 MB
    assert abs(array.astype(int) - 127).max() <= 2


def test_an_image_of_common_shape_keeps_its_ends():
    array = read_image((0, {"bytes": encode(gradient(16)), "path": None}), channels=1, resolution=1, exact=False)
    assert array.shape == (1, 16, 1) and array[0, [0, -1], 0].tolist() == [0, 255]


def ends_within(seconds, call):
    """Return what a call raises, which must be soon."""
    errors = []

    def run():
        try:
            call()
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()
    return str(errors[0])


@pytest.mark.parametrize("prefix", ["", "file://", "zip://a.png::"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path, kind, prefix):
    os.mkfifo(tmp_path / "pipe.png")
    path = {"pipe": tmp_path / "pipe.png", "device": "/dev/zero", "folder": tmp_path}[kind]
    item = (3, {"bytes": None, "path": f"{prefix}{path}"})
    assert "it is not a regular file" in (said := ends_within(5, lambda: use_file(Image.open, item)))
    assert "image 3" in said
    if not prefix:
        assert "it is not a regular file" in ends_within(5, lambda: use_path(Image.Image.copy, path))


def test_a_missing_image_is_called_missing():
    with pytest.raises(UserError, match=r"image 3 \(without a name\) cannot be read \(it is missing\)"):
        use_file(Image.open, (3, None))


def test_transparent_parts_of_16_bit_images_are_white(make, tmp_path):  # noqa: F811
    values = np.array([[0, 30000], [30000, 0]], np.uint16)
    write_hub(tmp_path / "deep", [encode(values, transparency=0)])
    images, _ = load_images(make(tmp_path / "deep", resolution=2, preserve_input_precision=True))
    assert np.allclose((images.get([0])[0, 0] + 1) / 2 * 65535, [[65535, 30000], [30000, 65535]], atol=0.1)
