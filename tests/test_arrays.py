"""Images of any number of channels: arrays, pages as channels, transparency, and the files that samples go into."""

import io

import numpy as np
import pytest
import torch
from conftest import model_of, untrained_unet
from PIL import Image

from ddpm_hf import UserError
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.data.arrays import read_npy, write_npy
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.decode import open_image, read_image, to_array
from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.pictures import side_by_side
from ddpm_hf.sampling.pixels import pixel_format


def load(place, **flags):
    return load_images(TrainingConfig(train_data_dir=str(place), **{"resolution": 4, **flags}))[0]


def values(images):
    return ((images.get(range(len(images))) + 1) * 127.5).round().numpy()


@pytest.mark.parametrize(
    ("array", "white"),
    [
        (np.arange(32, dtype=np.uint8).reshape(4, 4, 2), 255),
        (np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000, 65535),
        (np.linspace(0, 1, 80, dtype=np.float32).reshape(4, 4, 5), 1),
        (np.linspace(0, 1, 16).reshape(4, 4) > 0.5, 1),
    ],
)
def test_an_array_is_an_image_of_its_own_channels(array, white, tmp_path):
    np.save(tmp_path / "a.npy", array)
    images = load(tmp_path)
    wanted = array.reshape(4, 4, -1).transpose(2, 0, 1) / white * 255
    assert images.channels == len(wanted) and np.array_equal(values(images)[0], np.rint(wanted))
    exact = load(tmp_path, preserve_input_precision=True).get([0])[0].numpy()
    assert np.allclose((exact + 1) * 127.5, wanted, atol=1e-4)


def test_an_npz_holds_many_images_and_their_classes(tmp_path):
    stack = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=stack, label=np.array([7, 3, 7, 3, 7, 7]))
    images, held_out = load_images(TrainingConfig(dataset_name=str(tmp_path / "a.npz"), resolution=4))
    assert np.array_equal(values(images), stack.transpose(0, 3, 1, 2)) and held_out is None
    assert images.class_names == ["3", "7"] and images.labels.tolist() == [1, 0, 1, 0, 1, 1]
    train, held_out = load_images(
        TrainingConfig(dataset_name=str(tmp_path / "a.npz"), resolution=4, validation_split="2")
    )
    assert (len(train), len(held_out)) == (4, 2)
    for wrong in (dict(label=np.arange(3)), dict(arr_0=stack[0, 0]), dict(arr_0=stack, label=np.arange(5))):
        np.savez(tmp_path / "b.npz", **wrong)
        with pytest.raises(UserError, match=r"b.npz holds .*: give images \(N, H, W, C\) as arr_0"):
            load(tmp_path / "b.npz")


def test_pages_are_channels_if_wanted(tmp_path):
    pages = [Image.fromarray(np.full((4, 4), 1000 * k, dtype=np.uint16)) for k in (1, 2, 3, 4, 5)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    flags = dict(pixel_range="0,5000", preserve_input_precision=True)
    images = load(tmp_path, pages="channels", **flags)
    assert images.channels == 5 and np.allclose(values(images)[0, :, 0, 0], [51, 102, 153, 204, 255])
    assert images.warnings == [] and load(tmp_path, **flags).channels == 1
    Image.new("L", (4, 4), 9).save(tmp_path / "a.tif", save_all=True, append_images=[Image.new("L", (8, 8))])
    with pytest.raises(UserError, match="its pages differ in size or type"):
        load(tmp_path, pages="channels")


def test_transparency_is_kept_with_4_channels_and_hidden_colors_stay_hidden(tmp_path):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :4] = 200, 100, 50, 255  # the right half is transparent, with a hidden green
    pixels[:, 4:] = 0, 255, 0, 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(values(load(tmp_path, resolution=8, channels=4))[0], pixels.transpose(2, 0, 1))
    small = values(load(tmp_path, channels=4))[0]
    assert (np.abs(small[:3, :, :2] - np.array([200, 100, 50])[:, None, None]) <= 2).all()  # no green bleeds in
    assert (small[3, :, 0] == 255).all() and (small[3, :, 3] <= 1).all()
    assert load(tmp_path).channels == 3 and load(tmp_path, channels=2).get([0]).shape == (1, 2, 4, 4)
    exact = load(tmp_path, channels=4, preserve_input_precision=True).get([0])[0].numpy()
    assert np.abs((exact + 1) * 127.5 - small).max() < 0.51


def test_what_does_not_fit_is_one_sentence(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4, 5), np.float32))
    with pytest.raises(UserError, match=r"an array of 5 channels .* but images of 4 are wanted: give --channels 5"):
        load(tmp_path, channels=4)
    np.save(tmp_path / "b.npy", np.zeros((4, 4, 2), np.float32))
    with pytest.raises(UserError, match=r"different numbers of channels \(2, 5\): give --channels"):
        load(tmp_path)
    np.save(tmp_path / "b.npy", np.full((4, 4, 5), 7.5))
    with pytest.raises(UserError, match=r"its values are 7.5 to 7.5, not within 0 .* e.g. --pixel_range=0,7.5"):
        load(tmp_path)
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"not numbers of height x width \(x C\)"):
        load(tmp_path)
    (tmp_path / "b.npy").write_bytes(write_npy(np.zeros((2, 2)))[:-8])  # the header claims more than there is
    with pytest.raises(UserError, match="does not have the size that its header says"):
        load(tmp_path)
    np.save(tmp_path / "b.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="b.npy.*it holds Python objects, not numbers"):
        load(tmp_path)
    assert len(load(tmp_path, on_bad_image="skip")) == 1


def test_a_file_is_known_by_its_content():
    array = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    assert np.array_equal(open_image(io.BytesIO(write_npy(array))), array)
    assert np.array_equal(read_npy(io.BytesIO(write_npy(array[..., 0]))), array[..., :1])
    assert to_array(array[..., :1], channels=3).shape == (2, 2, 3)
    item = (0, {"bytes": write_npy(array), "path": None})
    assert read_image(item, channels=2, resolution=1, exact=False).shape == (1, 1, 2)


def test_channels_are_shown_side_by_side():
    images = torch.arange(5, dtype=torch.uint8).view(1, 5, 1, 1).expand(1, 5, 2, 3)
    assert side_by_side(images[:, :3]).shape == (1, 3, 2, 3)
    assert side_by_side(images)[0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert side_by_side(images[:, :2]).shape == (1, 1, 2, 6)
    assert side_by_side(torch.arange(15).view(1, 15, 1, 1))[0, 0, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    four = side_by_side(images[:, :4])
    assert four[0, :, 0].tolist() == [[0, 0, 0, 3, 3, 3], [1, 1, 1, 3, 3, 3], [2, 2, 2, 3, 3, 3]]


@pytest.mark.parametrize(
    ("flags", "type", "dtype", "extremes", "suffix"),
    [
        ({}, None, "uint8", (0, 255), ".png"),
        ({"preserve_input_precision": True}, None, "float32", (0, 1), ".npy"),
        ({"pixel_range": [0, 4095]}, "uint16", "uint16", (0, 4095), ".png"),
        ({"pixel_range": [-1000, 3000]}, "float32", "float32", (-1000, 3000), ".npy"),
        ({}, "uint16", "uint16", (0, 65535), ".png"),
    ],
)
def test_pixels_are_stored_in_the_range_of_the_training(flags, type, dtype, extremes, suffix, tmp_path):
    model = model_of(untrained_unet(4), PaperDDPMScheduler.nichol_cosine(5))
    model.run = {"flags": flags}
    pixels = pixel_format(model, type)
    array = pixels.encode(torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2))
    assert array.dtype == dtype and array.flatten().tolist() == list(extremes) and pixels.suffix == suffix
    assert pixels.decode(array).flatten().tolist() == [0, 255]
    pixels.save(array[0], tmp_path / f"a{suffix}")
    assert np.array_equal(np.atleast_3d(to_raw(tmp_path / f"a{suffix}")), array[0])


def to_raw(path):
    return np.load(path) if path.suffix == ".npy" else np.array(Image.open(path))


def test_16_bits_cannot_hold_negative_values():
    model = model_of(untrained_unet(4), PaperDDPMScheduler.nichol_cosine(5))
    model.run = {"flags": {"pixel_range": [-1000, 3000]}}
    with pytest.raises(UserError, match="--pixel_type is uint16, .* values from -1000 to 3000: give float32"):
        pixel_format(model, "uint16")
    with pytest.raises(UserError, match="pixel_type"):
        pixel_format(model, "int8")
