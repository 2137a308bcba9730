"""Reading pixels: unusual files are read with bounded memory and time, or refused in one sentence."""
# ruff: noqa: F401, F811 (`make` is a fixture)

import io
import itertools
import json
import os
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from test_dataset import encode, make, plain, write_hub

from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.data.batches import training_batches
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.decode import read_image, use_file, use_path
from ddpm_hf.training.loop import train
from ddpm_hf.training.run import check_skipped, open_run


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


def test_transparent_parts_of_16_bit_images_are_white(make, tmp_path):
    values = np.array([[0, 30000], [30000, 0]], np.uint16)
    write_hub(tmp_path / "deep", [encode(values, transparency=0)])
    images, _ = load_images(make(tmp_path / "deep", resolution=2, preserve_input_precision=True))
    assert np.allclose((images.get([0])[0, 0] + 1) / 2 * 65535, [[65535, 30000], [30000, 65535]], atol=0.1)


# The survey of a sample of the images.


def deep(largest, size=(4, 4)):
    """A 16-bit PNG of a ramp from 0 to `largest`."""
    return encode(np.linspace(0, largest, size[0] * size[1]).round().astype(np.uint16).reshape(size))


@pytest.mark.parametrize(("largest", "white"), [(1000, 1023), (4071, 4095), (16000, 16383)])
def test_values_far_below_white_are_noticed_and_put_right(make, tmp_path, largest, white):
    folder = write_hub(tmp_path / "ct", [deep(largest // 2), deep(largest)])
    said = load_images(make(folder))[0].warnings
    assert len(said) == 1 and f"the largest value in the images looked at is {largest}" in said[0]
    assert f"e.g. --pixel_range=0,{white}." in said[0]
    images, _ = load_images(make(folder, pixel_range=[0.0, white], preserve_input_precision=True))
    assert images.warnings == [] and images.get([1]).min() == -1
    assert images.get([1]).max() == pytest.approx(2 * largest / white - 1)
    assert images.fingerprint != load_images(make(folder, preserve_input_precision=True))[0].fingerprint


def test_deep_images_are_noticed_among_bright_ones_of_8_bits(make, tmp_path):
    folder = write_hub(tmp_path / "mixed", [plain(255), deep(4095)])
    assert "--pixel_range=0,4095" in load_images(make(folder))[0].warnings[0]
    dark = write_hub(tmp_path / "dark", [encode(Image.new("RGB", (4, 4), (15, 0, 0)))])
    assert "brighter than 5.9% of white" in load_images(make(dark))[0].warnings[0]


@pytest.mark.parametrize("largest", [20000, 65535])
def test_values_that_fill_the_scale_are_not_talked_about(make, tmp_path, largest):
    folder = write_hub(tmp_path / "full", [deep(largest)])
    assert load_images(make(folder))[0].warnings == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0, 0, 0), "Warning: all images looked at are black everywhere"),
        ((9, 9, 9), "Warning: the 3 images looked at are all the same"),
        ((200, 200, 7), None),
        ((200,), None),
    ],
)
def test_images_that_are_all_black_or_all_the_same_are_noticed(make, tmp_path, values, said):
    folder = write_hub(tmp_path / "same", [plain(value) for value in values])
    warnings = [warning for warning in load_images(make(folder))[0].warnings if "brighter than" not in warning]
    assert [warning[: len(said or "")] for warning in warnings] == ([said] if said else [])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_get_no_advice_that_cannot_help(make, tmp_path, value):
    units = np.full((4, 4), 0.5, np.float32)
    units[1, 2] = value
    folder = write_hub(tmp_path / "nan", [encode(units, format="TIFF")])
    with pytest.raises(UserError) as error:
        load_images(make(folder))
    assert "it has values that are nan or infinite: replace them" in str(error.value)
    assert "pixel_range" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_floats_off_the_scale_are_refused_with_the_way_out(make, tmp_path, streaming):
    units = np.linspace(-1024, 3071, 16, dtype=np.float32).reshape(4, 4)
    folder = write_hub(tmp_path / "hu", [encode(units, format="TIFF")])
    with pytest.raises(UserError) as error:
        load_images(make(folder, streaming=streaming))
    said = str(error.value)
    assert "its values are -1024 to 3071, not within 0 (black) to 1 (white): rescale all images, or train" in said
    assert said.endswith("fit all of them, e.g. --pixel_range=-1024,3071.")
    images, _ = load_images(make(folder, pixel_range=[-1024.0, 3071.0], streaming=streaming))
    assert images.warnings == [] and (images.get([0]).min(), images.get([0]).max()) == (-1, 1)


def in_color(*colors):
    return encode(np.array(colors, np.uint8).reshape(1, -1, 3), format="JPEG")


def test_grey_images_stored_in_color_are_noticed(make, tmp_path):
    grey = in_color((9, 9, 9), (200, 200, 200))
    folder = write_hub(tmp_path / "grey", [grey, grey, in_color((9, 9, 9), (99, 99, 99))])
    images, _ = load_images(make(folder))
    assert images.channels == 3 and "--channels 1 trains a smaller model" in images.warnings[0]
    write_hub(tmp_path / "mixed", [grey, encode(np.full((1, 2), 9, np.uint8))])
    assert "--channels 1 trains a smaller model" in load_images(make(tmp_path / "mixed"))[0].warnings[0]
    for given, of_model in [(1, None), (3, None), (None, 1)]:
        images, _ = load_images(make(folder, channels=given), of_model)
        assert images.channels == (given or of_model) and images.warnings == []
    write_hub(tmp_path / "one", [grey, grey, in_color((200, 0, 0))])
    assert load_images(make(tmp_path / "one"))[0].warnings == []
    with pytest.raises(UserError, match="the model has 3 channels, but --channels is 1"):
        load_images(make(folder, channels=1), 3)


@pytest.mark.parametrize(("format", "several"), [("TIFF", True), ("GIF", True), ("PNG", True), ("MPO", False)])
def test_several_pages_are_mentioned(make, tmp_path, format, several):
    pages = [Image.new("L", (4, 4), value) for value in (255, 100, 50)]
    folder = write_hub(tmp_path / "pages", [encode(pages[0], format=format, save_all=True, append_images=pages[1:])])
    images, _ = load_images(make(folder))
    assert len(images) == 1 and images.get([0]).min() > 0.9
    said = "image 0. Only the first page is used: to use each page as an image, give --pages all."
    assert [said in warning for warning in images.warnings if "Hint" not in warning] == [True] * several


@pytest.mark.parametrize(("format", "mode"), [("TIFF", "I;16"), ("GIF", "L"), ("PNG", "RGBA"), ("WEBP", "RGB")])
def test_all_pages_are_images_of_the_class_of_their_file(make, tmp_path, capsys, format, mode):
    shades = (250, 160, 70, 10)
    colors = {"RGB": lambda v: (v, v, v), "RGBA": lambda v: (v, v, v, 255), "I;16": lambda v: v * 257}
    pages = [Image.new(mode, (4, 4), colors.get(mode, int)(shade)) for shade in shades]
    options = {"lossless": True} if format == "WEBP" else {}
    several = encode(pages[0], format=format, save_all=True, append_images=pages[1:], **options)
    folder = write_hub(tmp_path / "pages", [plain(200), several, plain(30)], [0, 1, 0], names="ab")
    images, _ = load_images(make(folder, pages="all", center_crop=True))
    assert images.labels.tolist() == [0, 1, 1, 1, 1, 0]
    assert ((images.get(range(6))[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [200, *shades, 30]
    said = capsys.readouterr().out
    assert "1 files with several pages, so 6 images; classes: a 2, b 4." in said
    assert not any("pages" in warning for warning in images.warnings)


def test_small_copies_and_masks_are_not_pages_and_turned_pages_are_turned(make, tmp_path):
    page, copy, mask = (Image.new("L", size, 99) for size in ((6, 4), (3, 2), (6, 4)))
    page.encoderinfo = {"tiffinfo": {274: 6}}
    copy.encoderinfo, mask.encoderinfo = {"tiffinfo": {254: 1}}, {"tiffinfo": {254: 4}}
    file = encode(page, format="TIFF", save_all=True, append_images=[copy, page, mask], tiffinfo={274: 6})
    images, _ = load_images(make(write_hub(tmp_path / "pages", [file]), pages="all", resolution=4))
    assert len(images) == 2
    assert [Image.open(io.BytesIO(each["bytes"])).size for each in images.rows["image"][:]] == [(4, 6)] * 2


def test_pages_of_one_file_are_held_out_together(make, tmp_path):
    files = []
    for k in range(10):
        pages = [Image.new("L", (4, 4), 20 * k + page) for page in range(5)]
        files.append(encode(pages[0], format="TIFF", save_all=True, append_images=pages[1:]))
    folder = write_hub(tmp_path / "pages", files)
    train, held_out = load_images(make(folder, pages="all", validation_split="0.3"))
    values = [(half.get(range(len(half)))[:, 0, 0, 0] + 1) * 127.5 for half in (train, held_out)]
    of_file = [set((half.round() // 20).tolist()) for half in values]
    assert len(held_out) == 15 and len(of_file[1]) == 3 and not of_file[0] & of_file[1]


def test_a_broken_page_and_a_huge_page_are_refused_or_skipped(make, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    pages = [Image.new("L", (4, 4), value) for value in (255, 100, 50)]
    huge = Image.new("L", (40, 40), 7)
    files = [encode(pages[0], format="TIFF", save_all=True, append_images=[huge, pages[1]])]
    whole = encode(pages[0], format="PNG", save_all=True, append_images=pages[1:])
    files += [whole[:-30], b"junk"]
    folder = write_hub(tmp_path / "pages", files)
    with pytest.raises(UserError, match=r"image 0 \(image 0 \(page 2\)\) cannot be read"):
        load_images(make(folder, pages="all"))
    images, _ = load_images(make(folder, pages="all", on_bad_image="skip"))
    assert len(images) == 4 and len(images.skipped) == 3


def test_training_and_evaluation_print_what_was_noticed(tmp_path, capsys):
    folder = write_hub(tmp_path / "ct", [deep(4095, size=(8, 8))] * 40)
    flags = [
        *TINY,
        f"--dataset_name={folder}",
        "--dry_run",
        f"--output_dir={tmp_path / 'run'}",
        "--train_data_dir=pets",
    ]
    train(parse_config(flags))
    printed = capsys.readouterr().out
    assert "e.g. --pixel_range=0,4095." in printed
    assert f"Warning: --train_data_dir pets is not used, because --dataset_name is {folder}: to train on" in printed
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((40, 8, 8, 1), np.uint8))
    measure = ["evaluate", f"{tmp_path / 'samples.npz'}", f"--dataset_name={folder}", "--metrics=memorization"]
    main([*measure, f"--output={tmp_path / 'one.json'}"])
    assert "e.g. --pixel_range=0,4095." in capsys.readouterr().out
    main([*measure, f"--output={tmp_path / 'two.json'}", "--pixel_range=0,4095"])
    assert "--pixel_range" not in capsys.readouterr().out


# Images that cannot be read.


@pytest.fixture
def damaged(tmp_path):
    """Forty images, four of which cannot be read: each in another way."""
    files = [plain(k * 6, (8, 8)) for k in range(40)]
    files[3], files[17], files[30] = b"junk", files[17][:45], None
    files[39] = encode(np.full((8, 8), 70000, np.int32), format="TIFF")
    return write_hub(tmp_path / "damaged", files, [k % 2 for k in range(40)], names="ab")


def test_images_that_cannot_be_read_are_refused_or_skipped(make, damaged):
    with pytest.raises(UserError, match="image 30? .*: repair or remove it, or skip it with --on_bad_image skip"):
        load_images(make(damaged))
    images, held_out = load_images(make(damaged, on_bad_image="skip", validation_split="6"))
    assert len(images) == 30 and len(held_out) == 6
    assert [entry.partition(":")[0] for entry in images.skipped] == ["image 3", "image 17", "image 30", "image 39"]
    assert "4 images cannot be read and are skipped: image 3: cannot identify image file; " in images.warnings[0]
    kept = {
        round(float(value + 1) * 127.5)
        for half in (images, held_out)
        for value in half.get(range(len(half)))[:, 0, 0, 0]
    }
    assert kept == {k * 6 for k in range(40) if k not in (3, 17, 30, 39)}


def test_skipping_changes_nothing_where_all_can_be_read(make, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_hf.data.image_set.MEMORY_LIMIT", 0)
    folder = write_hub(tmp_path / "whole", [plain(k) for k in range(40)])
    sets = [load_images(make(folder, on_bad_image=choice))[0] for choice in ("refuse", "skip")]
    assert sets[0].fingerprint == sets[1].fingerprint and sets[1].skipped == []


def test_a_run_that_skips_says_so_and_goes_on_in_the_same_order(damaged, tmp_path, capsys, monkeypatch):
    flags = [*TINY, f"--dataset_name={damaged}", "--on_bad_image=skip", f"--output_dir={tmp_path / 'run'}"]
    run = open_run(config := parse_config(flags))
    said = capsys.readouterr().out
    assert "36 images of 8x8x1 (0 held out, 4 skipped)" in said and "image 30: it is missing" in said
    record = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert len(record["skipped_images"]) == 4 and record["num_images"] == 36
    begun = itertools.islice(training_batches(run.train_set, config, 0, 0, 1), 5, None)
    resumed = training_batches(load_images(config)[0], config, 40, 0, 1)  # after 5 batches of 8
    for batch in itertools.islice(zip(begun, resumed), 3):
        assert all(torch.equal(batch[0][key], batch[1][key]) for key in ("ordinals", "images", "labels"))
    monkeypatch.setattr("ddpm_hf.training.run.gather_object", lambda values: [*values, "of another process"])
    with pytest.raises(UserError, match="left out different images in different processes"):
        check_skipped(config, run.train_set)


def test_names_of_skipped_files_are_listed_without_their_folders(make, tmp_path):
    for k in range(6):
        (tmp_path / "cats").mkdir(exist_ok=True)
        (tmp_path / "cats" / f"{k}.png").write_bytes(plain(k) if k < 2 else b"junk")
    images, _ = load_images(make(train_data_dir=str(tmp_path / "cats"), on_bad_image="skip"))
    assert images.skipped[0] == "image 2 (2.png): cannot identify image file"
    assert images.warnings[0].endswith("image 4 (4.png): cannot identify image file and 1 more.")
    for path in (tmp_path / "cats").iterdir():
        path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"none of the 6 images can be read \(image 0 \(0.png\): cannot identify"):
        load_images(make(train_data_dir=str(tmp_path / "cats"), on_bad_image="skip"))
