"""Datasets: images are found, decoded, cropped and ordered as documented, on tiny datasets with known values."""

import io
import itertools
import json
import os
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.data.batches import training_batches
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.decode import to_array
from ddpm_hf.data.stream import StreamedSet
from ddpm_hf.training.run import open_run


def encode(image, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, options.pop("format", "PNG"), **options
    )
    return file.getvalue()


def plain(value, size=(4, 4)):
    return encode(np.full(size, value, np.uint8))


def write_hub(folder, files, labels=None, names="abc", split="train", image="image", label="label", shards=1):
    """Write encoded images as a dataset repository of the Hub has them."""
    columns = {"id": list(range(len(files))), image: [file and {"bytes": file, "path": None} for file in files]}
    features = {"id": datasets.Value("int32"), image: datasets.Image()}
    if labels is not None:
        columns[label] = labels
        features[label] = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for k in range(shards):
        path = folder / "data" / f"{split}-{k:05d}-of-{shards:05d}.parquet"
        table.shard(shards, k, contiguous=True).to_parquet(path, batch_size=8)
    return folder


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a `TrainingConfig` of the attributes that data.py reads."""

    def make_config(name=None, **changes):
        defaults = {
            "dataset_name": str(name) if name else None,
            "dataset_config_name": None,
            "train_data_dir": None,
            "cache_dir": str(tmp_path / "cache"),
            "resolution": 4,
            "center_crop": False,
            "random_flip": False,
            "preserve_input_precision": False,
            "channels": None,
            "pixel_range": None,
            "on_bad_image": "refuse",
            "pages": "first",
            "dataloader_num_workers": 0,
            "image_column": None,
            "label_column": None,
            "class_names": None,
            "validation_split": None,
            "streaming": False,
            "balance_classes": False,
            "augment_probability": 0.0,
            "seed": 0,
            "train_batch_size": 4,
            "gradient_accumulation_steps": 1,
        }
        assert set(changes) <= set(defaults)
        return SimpleNamespace(**defaults | changes)

    return make_config


@pytest.fixture
def numbered(tmp_path):
    """A dataset of 40 images of which the k-th is k all over, but 255 in the last column; its class is k % 3."""
    files = []
    for value in range(40):
        array = np.full((4, 4), value, np.uint8)
        array[:, 3] = 255
        files.append(encode(array))
    return write_hub(tmp_path / "numbered", files, [k % 3 for k in range(40)], shards=3)


def values_of(images):
    """Return the numbers on images of `numbered`, negative for mirrored ones."""
    images = ((images + 1) * 127.5).round().long()[:, 0, 0]
    return torch.where(images[:, 0] == 255, -images[:, 3], images[:, 0]).tolist()


def seen(train_set, config, count, first_ordinal=0):
    """Return the ordinals and the numbers of the first `count` images that a single process sees."""
    batches = itertools.islice(
        training_batches(train_set, config, first_ordinal, 0, 1), count // config.train_batch_size
    )
    batches = list(batches)
    return torch.cat([b["ordinals"] for b in batches]).tolist(), values_of(torch.cat([b["images"] for b in batches]))


# Decoding: every mode against values by hand.


def with_palette(mode, alpha):
    image = Image.new("P", (1, 1))
    image.putpalette([10, 20, 30])
    image.info["transparency"] = bytes([alpha])
    return image if mode == "P" else image.convert("PA")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (1, 1), 1), (255, 255, 255)),
        (Image.new("L", (1, 1), 7), (7, 7, 7)),
        (Image.new("LA", (1, 1), (100, 51)), (224, 224, 224)),  # 0.2 * 100 + 0.8 * 255
        (with_palette("P", 255), (10, 20, 30)),
        (with_palette("P", 0), (255, 255, 255)),
        (with_palette("P", 51), (206, 208, 210)),
        (with_palette("PA", 51), (206, 208, 210)),
        (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
        (Image.new("RGBA", (1, 1), (200, 100, 0, 51)), (244, 224, 204)),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (1, 1), (90, 128, 128)), (90, 90, 90)),
        (Image.new("HSV", (1, 1), (0, 255, 200)), (200, 0, 0)),
        (Image.new("LAB", (1, 1), (255, 128, 128)), (254, 255, 254)),
        (Image.new("I;16", (1, 1), 257 * 100 + 129), (101, 101, 101)),
        (Image.new("I;16B", (1, 1), 257 * 100 + 128), (100, 100, 100)),
        (Image.new("I", (1, 1), 65535), (255, 255, 255)),
        (Image.new("F", (1, 1), 0.2), (51, 51, 51)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_mode_decodes(image, expected):
    array = to_array(image, channels=3)
    assert array.dtype == np.uint8 and array.shape == (1, 1, 3)
    assert tuple(array[0, 0].tolist()) == expected
    if len(set(expected)) == 1:
        assert to_array(image, channels=1).tolist() == [[[expected[0]]]]


def test_colours_become_grey_by_luma():
    assert to_array(Image.new("RGB", (1, 1), (255, 0, 0)), channels=1).tolist() == [[[76]]]  # 0.299 * 255


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned clockwise
    file = encode(np.array([[10, 20]], np.uint8), exif=exif)
    assert to_array(Image.open(io.BytesIO(file)), channels=1)[..., 0].tolist() == [[10], [20]]


def test_exact_keeps_all_bits():
    for image, expected in [
        (Image.new("I;16", (1, 1), 1), 1 / 65535),
        (Image.new("F", (1, 1), 1e-5), 1e-5),
        (Image.new("RGB", (1, 1), (51, 51, 51)), 0.2),
    ]:
        array = to_array(image, channels=1, exact=True)
        assert array.dtype == np.float32 and array.item() == np.float32(expected)


@pytest.mark.parametrize("exact", [False, True])
def test_values_off_the_scale_are_refused(exact):
    with pytest.raises(UserError, match=r"its values are 0 to 255, not within 0 \(black\) to 1 \(white\): "):
        to_array(Image.fromarray(np.array([[0, 255]], np.float32)), channels=1, exact=exact)
    with pytest.raises(UserError, match=r"not within 0 \(black\) to 65535 \(white\)"):
        to_array(Image.new("I", (1, 1), 70000), channels=1, exact=exact)


# Image sets.


@pytest.mark.parametrize("exact", [False, True])
def test_downsampling_is_antialiased(make, tmp_path, exact):
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    write_hub(tmp_path / "board", [encode(board)])
    images, _ = load_images(make(tmp_path / "board", resolution=8, preserve_input_precision=exact))
    assert images.get([0]).abs().max() < 0.02


def test_range_dtype_channels_and_labels(make, tmp_path):
    write_hub(tmp_path / "grey", [plain(0), plain(255), encode(Image.new("I;16", (4, 4), 65535))], [2, 0, 1])
    images, validation = load_images(make(tmp_path / "grey"))
    assert validation is None and images.pixels.dtype == torch.uint8
    assert (images.channels, images.size, images.num_images, len(images)) == (1, (4, 4), 3, 3)
    assert images.labels.tolist() == [2, 0, 1] and images.labels.dtype == torch.int64
    assert images.class_names == ["a", "b", "c"] and len(int(images.fingerprint, 16).to_bytes(8)) == 8
    batch = images.get([0, 1, 2])
    assert batch.dtype == torch.float32 and batch.shape == (3, 1, 4, 4)
    assert [image.unique().tolist() for image in batch] == [[-1], [1], [1]]

    colours, _ = load_images(make(tmp_path / "grey"), channels=3)
    assert torch.equal(colours.get([0, 1, 2]), batch.expand(3, 3, 4, 4))


def test_one_colour_image_makes_the_set_coloured(make, tmp_path):
    write_hub(tmp_path / "mixed", [plain(9), encode(Image.new("RGB", (4, 4), (255, 0, 0)))])
    assert load_images(make(tmp_path / "mixed"))[0].channels == 3
    assert load_images(make(tmp_path / "mixed"), channels=1)[0].get([1]).shape == (1, 1, 4, 4)


def test_precision_is_preserved_on_request(make, tmp_path):
    write_hub(tmp_path / "deep", [encode(Image.new("I;16", (4, 4), 32768))])
    rounded, _ = load_images(make(tmp_path / "deep"))
    exact, _ = load_images(make(tmp_path / "deep", preserve_input_precision=True))
    assert rounded.get([0]).unique().item() == pytest.approx(1 / 255, abs=1e-7)
    assert exact.get([0]).unique().item() == pytest.approx(1 / 65535, abs=1e-7)


def test_crops_of_oblong_images(make, tmp_path):
    ramp = np.tile(np.arange(12, dtype=np.uint8), (4, 1))
    write_hub(tmp_path / "oblong", [encode(ramp)])
    images, _ = load_images(make(tmp_path / "oblong", center_crop=True))
    assert images.pixels is not None
    centre = images.get([0])
    assert ((centre + 1) * 127.5).round()[0, 0, 0].tolist() == [4, 5, 6, 7]

    config = make(tmp_path / "oblong", train_batch_size=32)
    images, _ = load_images(config)
    assert images.pixels is None and torch.equal(images.get([0]), centre)
    crops = next(training_batches(images, config, 0, 0, 1))["images"]
    assert set(((crops + 1) * 127.5).round()[:, 0, 0, 0].tolist()) == set(range(9))  # every offset of 0 to 12 - 4


def test_small_images_are_upsampled(make, tmp_path):
    write_hub(tmp_path / "small", [plain(9, (2, 2))])
    assert ((load_images(make(tmp_path / "small"))[0].get([0]) + 1) * 127.5).round().unique().tolist() == [9]


def test_lazy_equals_in_memory(make, numbered, monkeypatch):
    config = make(numbered, random_flip=True, resolution=3, validation_split="5")
    in_memory, held_out = load_images(config)
    monkeypatch.setattr("ddpm_hf.data.image_set.MEMORY_LIMIT", 0)
    lazy, lazy_held_out = load_images(config)
    assert in_memory.pixels is not None and lazy.pixels is None
    assert torch.equal(lazy.labels, in_memory.labels) and lazy.class_names == in_memory.class_names
    assert torch.equal(held_out.get(range(5)), lazy_held_out.get(range(5)))
    for a, b in itertools.islice(zip(*(training_batches(s, config, 0, 0, 1) for s in (in_memory, lazy))), 12):
        assert all(torch.equal(a[key], b[key]) for key in ("ordinals", "images", "labels"))
    again, _ = load_images(config)
    other, _ = load_images(make(numbered, resolution=3))
    assert lazy.fingerprint == again.fingerprint != other.fingerprint


def test_fingerprint_in_memory_is_that_of_the_pixels(make, numbered):
    first, second = load_images(make(numbered))[0], load_images(make(numbered, random_flip=True, seed=1))[0]
    assert first.fingerprint == second.fingerprint != load_images(make(numbered, resolution=3))[0].fingerprint


def test_columns_are_found_by_type(make, tmp_path):
    write_hub(tmp_path / "cifar", [plain(1), plain(2)], [1, 0], image="img", label="fine_label")
    images, _ = load_images(make(tmp_path / "cifar"))
    assert values_of(images.get([0, 1])) == [1, 2] and images.labels.tolist() == [1, 0]


def test_a_column_of_integers_can_be_the_classes(make, tmp_path):
    write_hub(tmp_path / "ints", [plain(1), plain(2), plain(3)], [30, 7, 30], names=None, label="digit")
    assert load_images(make(tmp_path / "ints"))[0].labels is None
    images, _ = load_images(make(tmp_path / "ints", label_column="digit"))
    assert images.class_names == ["7", "30"] and images.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([2**60, 5], "no classes (to use the column label, give --label_column label)"),
        ([0.5, 1.5], "no classes (the column label has float64 values, which cannot be used)"),
        ([{"id": 1}, {"id": 2}], "no classes (the column label has lists or dictionaries, which cannot be used)"),
        ([[1, 2], [2]], "no classes (the column label has lists or dictionaries, which cannot be used)"),
    ],
)
def test_a_column_of_labels_that_is_not_used_is_mentioned(make, tmp_path, capsys, values, said):
    files = [{"bytes": plain(k), "path": None} for k in (1, 2)]
    (tmp_path / "odd").mkdir()
    datasets.Dataset.from_dict({"image": files, "label": values}).to_parquet(tmp_path / "odd" / "train.parquet")
    assert load_images(make(tmp_path / "odd"))[0].labels is None
    assert f"; {said}." in capsys.readouterr().out


def test_unlabelled_images_have_label_minus_one(make, tmp_path):
    write_hub(tmp_path / "test", [plain(1), plain(2)], [-1, None])
    assert load_images(make(tmp_path / "test"))[0].labels.tolist() == [-1, -1]


def test_classes_are_filtered_by_name(make, numbered):
    images, _ = load_images(make(numbered, class_names=["c", "a"]))
    assert images.class_names == ["a", "c"]
    assert values_of(images.get(range(27))) == [k for k in range(40) if k % 3 != 1]
    assert images.labels.tolist() == [k % 3 // 2 for k in range(40) if k % 3 != 1]


def test_folders_of_images(make, tmp_path):
    for value, name in enumerate(["cat/1.png", "cat/[2]*.png", "dog/3.png"]):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).write_bytes(plain(value))
    for config in (make(train_data_dir=str(tmp_path / "pets")), make(tmp_path / "pets")):
        images, _ = load_images(config)
        assert images.class_names == ["cat", "dog"] and sorted(images.labels.tolist()) == [0, 0, 1]
        assert sorted(values_of(images.get(range(3)))) == [0, 1, 2]


def test_digits_are_bundled(make, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    images, validation = load_images(make("digits", resolution=8, validation_split="200"))
    assert (images.channels, images.num_images, validation.num_images) == (1, 1597, 200)
    assert images.class_names == list("0123456789")
    assert images.get(range(1597)).min() == -1 and images.get(range(1597)).max() == 1
    zeros, _ = load_images(make("digits", resolution=16, class_names=["0"]))
    assert zeros.get([0]).shape == (1, 1, 16, 16) and zeros.num_images == 178


# Folders of images.


def write_images(folder, names):
    """Write an image for each name, all of the value k for the k-th; return the folder."""
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plain(value))
    return folder


def found(images):
    """Return `{value of an image: its class, or None}`."""
    labels = [None] * len(images) if images.labels is None else images.labels.tolist()
    names = [None if label in (None, -1) else images.class_names[label] for label in labels]
    return dict(zip(values_of(images.get(range(len(images)))), names, strict=True))


@pytest.fixture(params=["train_data_dir", "dataset_name"])
def open_folder(make, request):
    """Return a function that loads a folder by each of the two flags."""
    return lambda folder, **changes: load_images(make(**{request.param: str(folder)} | changes))


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "train.png", "2.png"],
        ["1.png", "my_test_9.png", "x-val.png", "dev.PNG", "eval.jpg"],
        ["test.png"],
        ["cat/validation 3.png", "dog/test.png"],
        ["cat/1.png", "test/2.png", "train-cars/3.png"],
        ["cat/train/1.png", "cat/test/2.png", "dog/train/3.png"],
        ["train/1.png", "2.png"],  # an image outside of the folders named as splits
        ["train/1.png", "test/2.png", "extra/3.png"],
    ],
    ids="|".join,
)
def test_words_in_names_drop_and_split_nothing(open_folder, tmp_path, names, capsys):
    images, _ = open_folder(write_images(tmp_path / "some test data", names))
    tops = sorted({name.split("/")[0] for name in names if "/" in name})
    assert images.class_names == (tops if len(tops) > 1 else None)
    classes = [name.split("/")[0] if images.class_names and "/" in name else None for name in names]
    assert found(images) == dict(enumerate(classes))
    assert f"Data: {len(names)} image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("held_out", "train", "validation"),
    [("test", {0: "a", 1: "b"}, {2: "b"}), ("val", {0: "a", 1: "b"}, {3: "a"}), ("validation", None, {3: "a"})],
)
def test_top_folders_named_as_splits_are_splits(open_folder, tmp_path, held_out, train, validation, capsys):
    folder = write_images(tmp_path / "x", ["Train/a/1.png", "Train/b/t/2.png", "test/b/3.png", "val/a/deep/er/4.png"])
    (folder / "notes.txt").write_text("beside the splits")
    images, held = open_folder(folder, validation_split=held_out)
    assert train is None or found(images) == train
    assert found(held) == validation
    line = capsys.readouterr().out
    assert "Data: 4 images of 5 files: 1 is not an image (notes.txt); classes: a 1, b 1; splits: " in line
    assert "train 2 (used)" in line and line.count("(held out)") == line.count("(not used)") == 1


def test_the_class_is_the_first_folder(open_folder, tmp_path):
    names = ["tumour/patient17/1.png", "tumour/patient2/2.png", "healthy/patient17/3.png", "healthy/4.png", "5.png"]
    images, _ = open_folder(write_images(tmp_path / "scans", names))
    assert images.class_names == ["healthy", "tumour"]
    assert found(images) == {0: "tumour", 1: "tumour", 2: "healthy", 3: "healthy", 4: None}


def test_a_run_says_which_files_it_takes(open_folder, tmp_path, capsys):
    folder = write_images(tmp_path / "x", ["cat/1.png", "cat/2.JPG", "dog/3.png", "loose.png"])
    for name in ["a.npy", "b.txt", "cat/c.json", "dog/\x1b[2J.md", ".hidden.png", ".git/4.png"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(plain(99))
    open_folder(folder)
    expected = (
        "4 images of 8 files: 4 are not images (a.npy, b.txt, cat/c.json, ...); classes: cat 2, dog 1; 1 without"
    )
    assert capsys.readouterr().out == f"Data: {expected} a class.\n"


def test_the_run_inside_the_data_folder_is_not_data(open_folder, tmp_path, capsys):
    folder = write_images(tmp_path / "x", ["1.png", "2.png", "runs/a/samples/epoch_0001.png"])
    (folder / "runs" / "a" / "train_config.json").write_text("{}")
    assert len(open_folder(folder)[0]) == 2
    assert capsys.readouterr().out == "Data: 2 images of 3 files: 1 is not an image (runs/a/).\n"


def test_the_picture_of_a_dry_run_is_not_data(open_folder, tmp_path, capsys):
    # As after `cd x; ddpm_hf train --train_data_dir . --output_dir model --dry_run`
    folder = write_images(tmp_path / "x", ["cat/1.png", "dog/2.png", "model.dry_run.png"])
    assert len(open_folder(folder)[0]) == 2
    expected = "2 images of 3 files: 1 is not an image (model.dry_run.png); classes: cat 1, dog 1."
    assert capsys.readouterr().out == f"Data: {expected}\n"


def test_many_classes_are_said_in_short(open_folder, tmp_path, capsys):
    open_folder(write_images(tmp_path / "x", [f"{k:02d}/{n}.png" for k in range(12) for n in range(1 + k % 2)]))
    assert capsys.readouterr().out == "Data: 18 images of 18 files; 12 classes with 1 to 2 images each.\n"


def test_one_process_says_it(open_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    open_folder(write_images(tmp_path / "x", ["1.png"]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["[raw] photos", "a*b?", "é ü", "~", "x[!a-z]", "train"])
def test_folders_may_have_any_name(open_folder, tmp_path, name):
    images, _ = open_folder(write_images(tmp_path / name, ["cat/[2]*.png", "dog/~3.png"]))
    assert found(images) == {0: "cat", 1: "dog"}
    write_hub(tmp_path / name / "copy [2]", [plain(7), plain(8)], [0, 1])
    images, _ = open_folder(tmp_path / name / "copy [2]")
    assert found(images) == {7: "a", 8: "b"}


def test_the_home_folder_may_be_written_as_a_tilde(open_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "photos", ["1.png", "2.png"])
    assert found(open_folder("~/photos")[0]) == {0: None, 1: None}


def test_a_folder_of_other_files_is_refused(open_folder, tmp_path):
    (tmp_path / "arrays").mkdir()
    for k in range(4):
        (tmp_path / "arrays" / f"{k}.mat").touch()
    with pytest.raises(
        UserError, match=r"no images, only 4 other files: 0.mat, 1.mat, 2.mat, ...\): give a folder of"
    ):
        open_folder(tmp_path / "arrays")


def test_links_do_not_lead_out_of_a_folder(open_folder, tmp_path):
    private = write_images(tmp_path / "private", ["1.png", "2.png"])
    folder = write_images(tmp_path / "x", ["a/1.png", "b/2.png"])
    (folder / "b" / "inside.png").symlink_to(folder / "a" / "1.png")
    (folder / "b" / "again").symlink_to(folder)  # would never end
    (folder / "readme").symlink_to(private / "1.png")  # not an image by its name, so that nothing reads it
    os.mkfifo(folder / "pipe.png")
    (tmp_path / "link").symlink_to(folder)
    images, _ = open_folder(tmp_path / "link")
    assert images.num_images == 3 and found(images) == {0: "b", 1: "b"}  # 0 twice: as a/1.png, then b/inside.png
    for name, target in [("a/2.png", private / "2.png"), ("c", private), ("metadata.csv", private / "1.png")]:
        (folder / name).symlink_to(target)
        with pytest.raises(UserError, match=rf"{name} is a link to {target}, outside of the dataset's folder: put"):
            open_folder(folder)
        (folder / name).unlink()


def test_the_links_in_the_cache_of_the_hub_are_followed(open_folder, tmp_path):
    blobs = write_images(tmp_path / "datasets--me--x" / "blobs", ["0a"])
    snapshot = blobs.parent / "snapshots" / "1b"
    snapshot.mkdir(parents=True)
    (snapshot / "1.png").symlink_to("../../blobs/0a")
    assert found(open_folder(snapshot)[0]) == {0: None}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_name_the_classes(open_folder, tmp_path, kind, streaming, capsys):
    folder = write_images(tmp_path / "x", ["1.png", "sub/2.png", "3.png", "4.png", "5.png"])
    table = {
        "file_name": ["4.png", "sub/2.png", "1.png", "3.png"],
        "label": ["fox", "cat", None, "fox"],
        "age": [3, 11, 3, 4],
        "weight": [0.5, 1.0, 2.0, 2.5],
        "wild": [True, False, False, True],
    }
    rows = datasets.Dataset.from_dict(table)
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind](folder / f"metadata.{kind}")
    images, _ = open_folder(folder, streaming=streaming)
    note = "Data: 4 images of 5 files: 1 has no row in the metadata (5.png); "
    assert images.class_names == ["cat", "fox"]
    if streaming:
        assert note + "2 classes: cat, fox." in capsys.readouterr().out
        return
    assert found(images) == {3: "fox", 1: "cat", 0: None, 2: "fox"}
    assert note + "classes: cat 1, fox 2; 1 without a class." in capsys.readouterr().out
    assert list(found(images)) == [3, 1, 0, 2]  # the rows have the order of the metadata, as `datasets` has it
    assert found(open_folder(folder, class_names=["cat"])[0]) == {1: "cat"}
    assert found(open_folder(folder, label_column="age")[0]) == {3: "3", 1: "11", 0: "3", 2: "4"}
    assert open_folder(folder, label_column="age")[0].class_names == ["3", "4", "11"]
    assert open_folder(folder, label_column="wild")[0].class_names == ["False", "True"]
    with pytest.raises(UserError, match=r"weight is not a class column \(its float64 values are neither words nor"):
        open_folder(folder, label_column="weight")


def test_metadata_and_splits(open_folder, tmp_path):
    folder = write_images(tmp_path / "x", ["train/a/1.png", "train/b/2.png", "test/a/3.png"])
    (folder / "metadata.csv").write_text("file_name,age\ntrain/a/1.png,1\ntest/a/3.png,2\ntrain/b/2.png,3\n")
    train, test = open_folder(folder, validation_split="test")
    assert found(train) == {0: "a", 1: "b"} and found(test) == {2: "a"}
    (folder / "metadata.csv").rename(folder / "train" / "metadata.csv")
    (folder / "train" / "metadata.csv").write_text("file_name,label\na/1.png,x\nb/2.png,y\n")
    train, test = open_folder(folder, validation_split="test")
    assert found(train) == {0: "x", 1: "y"} and found(test) == {2: None}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file_name,label\n1.png,a\n2.png,b\n", "metadata.csv names 2.png in row 1, but there is no such image"),
        ("file_name,label\n../secret.png,a\n", r"names \.\./secret.png in row 0, but there is no such image"),
        ("file_name\n/etc/passwd\n", "names /etc/passwd in row 0, but there is no such image"),
        ("name,label\n1.png,a\n", "has no column file_name with text, only name, label: add the path"),
        ("file_name,label\n1.png\n", "metadata.csv cannot be read .*: correct or remove it"),
        ("file_name,label,label\n1.png,a,b\n", "has several columns named label: give each column its own name"),
    ],
)
def test_odd_metadata_are_refused(open_folder, tmp_path, text, sentence):
    folder = write_images(tmp_path / "x", ["1.png", "../secret.png"])
    (folder / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=sentence):
        open_folder(folder)


def test_a_folder_keeps_the_order_and_the_fingerprint_of_earlier_runs(open_folder, tmp_path):
    names = ["Dog/x.png", "cat-b/3.png", "cat.b/q.png", "cat/1.png", "cat/10.png", "cat/2.png", "dog/B.PNG"]
    images, _ = open_folder(write_images(tmp_path / "pets", names))
    assert values_of(images.get(range(7))) == list(range(7))
    assert images.fingerprint == "88a8654c0a0b99e0"  # computed at commit 88ab078


def test_the_fingerprint_of_a_large_folder_is_that_of_its_files(open_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_hf.data.image_set.MEMORY_LIMIT", 0)
    folder = write_images(tmp_path / "x", ["1.png", "2.png"])
    before = open_folder(folder)[0].fingerprint
    assert open_folder(shutil.copytree(folder, tmp_path / "y"))[0].fingerprint == before  # times are copied, too
    (folder / "2.png").write_bytes(plain(9))
    assert open_folder(folder)[0].fingerprint != before


def test_a_streamed_folder_resumes_earlier_runs(open_folder, tmp_path):
    folder = write_images(tmp_path / "x", [f"{'ab'[k % 2]}/{k:02d}.png" for k in range(20)])
    stream, _ = open_folder(folder, streaming=True)
    position = {"shard_idx": 0, "shard_example_idx": 7, "type": "ExamplesIterable"}  # as `datasets` streams folders
    position = {
        "examples_iterable": position,
        "previous_state": None,
        "num_examples_since_previous_state": 0,
        "previous_state_example_idx": 7,
        "type": "MappedExamplesIterable",
    }
    rows = iter(stream.rows)
    first = [next(rows) for _ in range(8)]
    stream.rows.load_state_dict({"examples_iterable": position, "epoch": 0})
    assert next(iter(stream.rows)) == first[7]


# Datasets from code.


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets_are_loaded(open_folder, tmp_path, streaming, numbered):
    saved = datasets.load_dataset(str(numbered), cache_dir=str(tmp_path / "c"))["train"].with_format("numpy")
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, test=saved.select([5, 6])).save_to_disk(tmp_path / "two")
    for name, held_out in [("one", None), ("two", "test")]:
        images, validation = open_folder(tmp_path / name, streaming=streaming, validation_split=held_out)
        assert images.class_names == ["a", "b", "c"]
        if not streaming:
            assert values_of(images.get(range(40))) == list(range(40))
            assert images.labels.tolist() == [k % 3 for k in range(40)]
        else:
            assert values_of(images.get(range(3))) == [0, 1, 2]
        assert held_out is None or values_of(validation.get([0, 1])) == [5, 6]


@pytest.mark.parametrize("place", ["/etc", "../one", "..", 7])
def test_saved_datasets_name_only_their_own_files(open_folder, tmp_path, place):
    rows = datasets.Dataset.from_dict({"image": [{"bytes": plain(1), "path": None}]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "two")
    (tmp_path / "two" / "dataset_dict.json").write_text(json.dumps({"splits": [place]}))
    with pytest.raises(UserError, match="save the dataset again"):
        open_folder(tmp_path / "two")
    (tmp_path / "one" / "state.json").write_text(json.dumps({"_data_files": [{"filename": place}]}))
    with pytest.raises(UserError, match="state.json does not list files of its folder: save the dataset again"):
        open_folder(tmp_path / "one")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})]
)
def test_tables_without_the_types_of_datasets(open_folder, tmp_path, kind, streaming):
    (tmp_path / "x").mkdir()
    files = [plain(1), plain(2), plain(3)]
    files = [{"bytes": file, "path": None} for file in files] if pa.types.is_struct(kind) else files
    table = pa.table({"name": ["u", "v", "w"], "image": pa.array(files, kind), "label": ["dog", None, "cat"]})
    pyarrow.parquet.write_table(table, tmp_path / "x" / "train.parquet")
    images, _ = open_folder(tmp_path / "x", streaming=streaming)
    if streaming:
        assert values_of(images.get(range(3))) == [1, 2, 3]
        return
    assert found(images) == {1: "dog", 2: None, 3: "cat"}
    assert open_folder(tmp_path / "x", image_column="image", label_column="name")[0].class_names == ["u", "v", "w"]
    with pytest.raises(UserError, match="--image_column name is not an image column: choose from name, image, label"):
        open_folder(tmp_path / "x", image_column="name")


def test_tables_that_are_not_used_are_named(open_folder, tmp_path, capsys):
    folder = write_hub(tmp_path / "x", [plain(1)])
    shutil.copy(folder / "data" / "train-00000-of-00001.parquet", folder / "more.parquet")
    open_folder(folder)
    assert capsys.readouterr().out == "Data: 1 of 2 tables, without more.parquet.\n"


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_images_are_said_to_be_missing(open_folder, tmp_path, streaming):
    write_hub(tmp_path / "x", [plain(0), plain(1), None])
    with pytest.raises(UserError, match=r"^image 2 \(without a name\) cannot be read \(it is missing in this row\): "):
        open_folder(tmp_path / "x", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["file", "pipe", "inside"])
def test_a_dataset_names_no_files_outside_of_it(open_folder, tmp_path, streaming, kind):
    (tmp_path / "x").mkdir()
    path = tmp_path / ("x/1.dat" if kind == "inside" else "1.png")
    os.mkfifo(path) if kind == "pipe" else path.write_bytes(plain(5))
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(path)}]}, features=features)
    pyarrow.parquet.write_table(table.data.table, tmp_path / "x" / "train.parquet")
    if kind == "inside":
        assert values_of(open_folder(tmp_path / "x", streaming=streaming)[0].get([0])) == [5]
        return
    with pytest.raises(UserError, match=r"png\) cannot be read \(it is not a file of the dataset\): store the images"):
        open_folder(tmp_path / "x", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_reason_why_a_dataset_cannot_be_loaded_is_said(open_folder, tmp_path, streaming):
    folder = write_hub(tmp_path / "x", [plain(k) for k in range(40)], shards=2)
    (folder / "data" / "train-00001-of-00002.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"cannot be loaded \((?!An error).*Parquet") as caught:
        open_folder(folder, streaming=streaming)
    assert "\n" not in str(caught.value)


# Held-out images.


def test_validation_by_split(make, numbered):
    write_hub(numbered, [plain(100), plain(101)], [1, 2], split="test")
    train, validation = load_images(make(numbered, validation_split="test", class_names=["b"]))
    assert train.num_images == 13 and values_of(validation.get([0])) == [100] and validation.labels.tolist() == [0]


@pytest.mark.parametrize(("held_out", "count"), [("12", 12), ("0.05", 2), ("0.001", 1)])
def test_validation_is_fixed_under_reordering(make, tmp_path, held_out, count):
    held = []
    for order in (range(40), range(39, -1, -1)):
        folder = write_hub(tmp_path / f"from{order[0]}", [plain(k) for k in order], list(order), names=None)
        train, validation = load_images(make(folder, validation_split=held_out))
        held.append(set(values_of(validation.get(range(len(validation))))))
        assert held[-1] | set(values_of(train.get(range(len(train))))) == set(range(40))
        assert len(validation) == count and len(train) == 40 - count
    assert held[0] == held[1]


@pytest.mark.parametrize("held_out", ["0.1", "1", "test", None])
@pytest.mark.parametrize("more", [{}, {"pages": "all"}, {"on_bad_image": "skip"}])
def test_a_class_without_training_images_is_one_sentence(make, tmp_path, held_out, more):
    for name in ("train/dog/1.png", "test/cat/1.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(plain(1))
    config = make(train_data_dir=str(tmp_path / "data"), class_names=["cat"], validation_split=held_out, **more)
    with pytest.raises(UserError, match="^no images are left for training or for validation: give a larger dataset"):
        load_images(config)


def test_identical_images_stay_together(make, tmp_path):
    folder = write_hub(tmp_path / "twins", [plain(k // 4) for k in range(40)])
    train, validation = load_images(make(folder, validation_split="10"))
    train, validation = values_of(train.get(range(len(train)))), values_of(validation.get(range(len(validation))))
    assert len(validation) == 12 and not set(train) & set(validation)


# The order of a run.


def test_every_image_once_per_epoch(make, numbered):
    config = make(numbered)
    ordinals, values = seen(load_images(config)[0], config, 80)
    assert ordinals == list(range(80))
    assert sorted(values[:40]) == sorted(values[40:]) == list(range(40)) and values[:40] != values[40:]
    assert seen(load_images(make(numbered, seed=1))[0], make(numbered, seed=1), 40)[1] != values[:40]


@pytest.mark.parametrize("workers", [None, 0, 2], ids=["memory", "lazy", "lazy-workers"])
def test_an_ordinal_has_one_image_however_it_is_dealt(make, numbered, workers, monkeypatch):
    if workers is not None:
        monkeypatch.setattr("ddpm_hf.data.image_set.MEMORY_LIMIT", 0)
    config = make(numbered, random_flip=True, dataloader_num_workers=workers or 0)
    images, _ = load_images(config)
    _, expected = seen(images, make(numbered, random_flip=True, train_batch_size=120), 120)
    assert 40 < sum(value < 0 for value in expected) < 80  # mirrored; one mirrored 0 cannot be told
    before = torch.get_rng_state()
    for size, processes, accumulation, first in [(4, 1, 1, 0), (3, 2, 2, 24), (6, 3, 1, 30)]:
        config.train_batch_size, config.gradient_accumulation_steps = size, accumulation
        streams = [training_batches(images, config, first, rank, processes) for rank in range(processes)]
        step = accumulation * processes * size
        for s, m in itertools.product(range((90 - first) // step), range(accumulation)):
            for rank, stream in enumerate(streams):
                batch = next(stream)
                start = first + s * step + (m * processes + rank) * size
                assert batch["ordinals"].tolist() == list(range(start, start + size))
                assert values_of(batch["images"]) == expected[start : start + size]
                assert batch["labels"].tolist() == [abs(v) % 3 for v in expected[start : start + size]]
    assert torch.equal(before, torch.get_rng_state())


# Streams.


def test_a_stream_is_like_a_set(make, numbered, monkeypatch):
    monkeypatch.setattr("ddpm_hf.data.stream.SHUFFLE_BUFFER", 16)
    write_hub(numbered, [plain(100), plain(101)], [1, 2], split="test")
    config = make(numbered, streaming=True, validation_split="test", train_batch_size=4)
    stream, validation = load_images(config)
    assert isinstance(stream, StreamedSet) and validation.pixels is not None
    assert (stream.channels, stream.size, stream.class_names) == (1, (4, 4), ["a", "b", "c"])
    assert stream.num_images is None and len(stream.fingerprint) == 16
    with pytest.raises(TypeError, match="number of images in this stream is unknown"):
        len(stream)
    assert values_of(validation.get([0, 1])) == [100, 101] and validation.labels.tolist() == [1, 2]
    batches = list(itertools.islice(training_batches(stream, config, 0, 0, 1), 20))
    values = values_of(torch.cat([batch["images"] for batch in batches]))
    assert sorted(values[:40]) == sorted(values[40:]) == list(range(40))
    assert values[:40] != values[40:] != list(range(40))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [value % 3 for value in values]


def test_a_stream_knows_its_length_from_the_card(make, numbered):
    card = """---
dataset_info:
  features:
  - {name: id, dtype: int32}
  - {name: image, dtype: image}
  - {name: label, dtype: {class_label: {names: {'0': a, '1': b, '2': c}}}}
  splits:
  - {name: train, num_examples: 40, num_bytes: 4000}
---
"""
    (numbered / "README.md").write_text(card)
    stream, _ = load_images(make(numbered, streaming=True))
    assert stream.num_images == len(stream) == 40
    assert load_images(make(numbered, streaming=True, class_names=["a"]))[0].num_images is None


def test_a_stream_filters_classes(make, numbered):
    config = make(numbered, streaming=True, class_names=["b"], train_batch_size=13)
    stream, _ = load_images(config)
    batch = next(training_batches(stream, config, 0, 0, 1))
    assert sorted(values_of(batch["images"])) == list(range(1, 40, 3)) and batch["labels"].unique().tolist() == [0]


def test_a_stream_resumes_exactly(make, numbered, monkeypatch):
    monkeypatch.setattr("ddpm_hf.data.stream.SHUFFLE_BUFFER", 16)
    config = make(numbered, streaming=True, random_flip=True, train_batch_size=3)
    stream, _ = load_images(config)
    unbroken, states = [], []
    for batch in itertools.islice(training_batches(stream, config, 0, 0, 1), 40):
        unbroken.append(batch)
        states.append(batch["position"])
    for k in (1, 5, 6, 13, 14, 30):  # inside a first, at the end of a block, in a later pass
        file = io.BytesIO()
        torch.save(states[k - 1], file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert json.loads(json.dumps(state)) == state
        for loaded in (True, False):  # without the state it is slower but just as exact
            stream, _ = load_images(config)
            if loaded:
                stream.load_state_dict(state)
            for batch, expected in zip(training_batches(stream, config, 3 * k, 0, 1), unbroken[k:]):
                assert torch.equal(batch["ordinals"], expected["ordinals"])
                assert torch.equal(batch["images"], expected["images"])


def test_a_stream_starts_over_for_ordinals_that_lie_behind(make, numbered):
    config = make(numbered, streaming=True, train_batch_size=8)
    stream, _ = load_images(config)
    (first, _, _), (again, _, _) = (list(itertools.islice(training_batches(stream, config, 0, 0, 1), 3)) for _ in "ab")
    assert torch.equal(first["images"], again["images"])
    assert values_of(stream.get([0, 5])) == [0, 5]


def test_a_stream_is_dealt_to_processes(make, numbered):
    config = make(numbered, streaming=True, random_flip=True, train_batch_size=30)
    expected = next(training_batches(load_images(config)[0], config, 0, 0, 1))["images"]
    config.train_batch_size = 5
    sets = [load_images(config)[0] for _ in range(2)]
    for k, batches in enumerate(zip(*(training_batches(s, config, 0, rank, 2) for rank, s in enumerate(sets)))):
        assert torch.equal(torch.cat([b["images"] for b in batches]), expected[10 * k : 10 * k + 10])
        if k == 2:
            break


# Refusals, each by its sentence.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset_name": None}, "nothing to train on: give --dataset_name"),
        (
            {"dataset_name": "./nowhere"},
            r"\./nowhere cannot be loaded .*: give --dataset_name a Hub dataset",
        ),
        ({"dataset_name": "no/such"}, "no/such cannot be loaded .*: give --dataset_name a Hub dataset"),
        ({"dataset_name": None, "train_data_dir": "nowhere"}, "nowhere cannot be loaded .*: give"),
        (
            {"dataset_config_name": "nope"},
            r"'nope' not found. Available: \['default'\]\): give one of these as --data",
        ),
        ({"image_column": "id"}, "--image_column id is not an image column: choose from id, image, label"),
        ({"image_column": "nope"}, "--image_column nope is not an image column"),
        ({"image_column": "imgae"}, "--image_column imgae is not an image column: did you mean image?"),
        ({"label_column": "image"}, "--label_column image is not a class column: choose from id, image, label"),
        ({"label_column": "nope"}, "--label_column nope is not a class column"),
        ({"label_column": "id", "streaming": True}, "--label_column id is not a class column"),
        (
            {"class_names": ["a", "lion"]},
            "--class_names has lion, which is not a class of this dataset: choose from a, b, c",
        ),
        (
            {"validation_split": "dev"},
            r"dev is impossible: give a split \(train\), a count below 40 or a share between 0",
        ),
        ({"validation_split": "40"}, "--validation_split 40 is impossible"),
        ({"validation_split": "0"}, "--validation_split 0 is impossible"),
        ({"validation_split": "1.5"}, "--validation_split 1.5 is impossible"),
        ({"validation_split": "-0.1"}, "--validation_split -0.1 is impossible"),
        ({"validation_split": "5", "streaming": True}, r"split 5 is impossible: give a split \(train\)\.$"),
    ],
)
def test_refusals(make, numbered, changes, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence) as caught:
        load_images(make(**{"dataset_name": str(numbered)} | changes))
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_odd_models_are_refused(make, numbered):
    with pytest.raises(
        UserError, match="is a picture of mode L, but images of 5 channels are wanted: give .npy files"
    ):
        load_images(make(numbered), channels=5)


@pytest.mark.parametrize(
    "typed, end",
    [
        ([], "and 1; --validation_split test comes from --preset mnist-cpu, and flags that you give override it."),
        (["--validation_split=test"], "and 1."),
    ],
)
def test_an_error_says_where_a_flag_comes_from_that_was_not_typed(tmp_path, typed, end):
    flags = ["--preset=mnist-cpu", "--dataset_name=digits", f"--output_dir={tmp_path / 'run'}", *typed]
    with pytest.raises(UserError, match="--validation_split test is impossible") as refused:
        open_run(parse_config(flags))
    assert str(refused.value).endswith(end)


def test_datasets_of_several_configurations_are_refused(make, numbered):
    configs = "- {config_name: small, data_files: data/*0-of*}\n- {config_name: big, data_files: data/*}\n"
    (numbered / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(UserError, match=r"\['small', 'big'\]\): give one of these as --dataset_config_name"):
        load_images(make(numbered))
    assert load_images(make(numbered, dataset_config_name="small"))[0].num_images == 14


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_without_images_are_refused(make, tmp_path, streaming):
    (tmp_path / "empty").mkdir()
    for flags in ({"train_data_dir": str(tmp_path / "empty")}, {"dataset_name": str(tmp_path / "empty")}):
        (tmp_path / "empty" / "notes.txt").unlink(missing_ok=True)
        with pytest.raises(
            UserError, match=r"empty cannot be loaded \(it has no files\): give a folder of image files"
        ):
            load_images(make(streaming=streaming, **flags))
        (tmp_path / "empty" / "notes.txt").write_text("no image\n")
        with pytest.raises(UserError, match=r"\(it has no images, only 1 other file: notes.txt\): give a folder of"):
            load_images(make(streaming=streaming, **flags))
    write_hub(tmp_path / "columns", [plain(0)])
    with pytest.raises(UserError, match="--image_column text is not an image column: choose from id, image"):
        load_images(make(tmp_path / "columns", streaming=streaming, image_column="text"))
    write_hub(tmp_path / "other", [plain(0)], [0], split="test")
    with pytest.raises(UserError, match="there is no split named `train`, only test: rename the split"):
        load_images(make(tmp_path / "other", streaming=streaming))
    write_hub(tmp_path / "lone", [plain(0)], [0])
    with pytest.raises(UserError, match="no images are left for training or for validation"):
        load_images(make(tmp_path / "lone", class_names=["b"], streaming=streaming))


@pytest.mark.parametrize("broken", [b"junk", encode(np.zeros((64, 64), np.uint8))[:60], None])
@pytest.mark.parametrize("option", ["streaming", "dataloader_num_workers", "validation_split", None])
def test_broken_images_are_named(make, tmp_path, broken, option, monkeypatch):
    files = [plain(k % 256) for k in range(600)]
    files[301] = broken  # not among the sampled ones
    write_hub(tmp_path / "broken", files)
    config = make(tmp_path / "broken", train_batch_size=600)
    if option:
        setattr(config, option, {"streaming": True, "dataloader_num_workers": 1, "validation_split": "1"}[option])
    if option == "dataloader_num_workers":
        monkeypatch.setattr("ddpm_hf.data.image_set.MEMORY_LIMIT", 0)
    with pytest.raises(
        UserError, match=r"^image \d+ \(without a name\) cannot be read \(.*\): repair or remove it, or skip"
    ):
        next(training_batches(load_images(config)[0], config, 0, 0, 1))


def test_broken_files_are_named(make, tmp_path):
    (tmp_path / "pets").mkdir()
    for k in range(3):
        (tmp_path / "pets" / f"{k}.png").write_bytes(plain(k))
    (tmp_path / "pets" / "1.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"image 1 \(.*1\.png\) cannot be read \(cannot identify image file\): repair"):
        load_images(make(train_data_dir=str(tmp_path / "pets")))


def test_a_run_called_digits_does_not_hide_the_bundled_digits(tmp_path, monkeypatch):
    """`cd runs; ddpm_hf evaluate digits` compares with the bundled digits, although a folder of that name is here."""
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "train_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    train, _ = load_images(TrainingConfig(dataset_name="digits", resolution=8))
    assert train.num_images == 1797


def test_two_colons_in_the_name_of_a_folder_mean_nothing(tmp_path):
    """fsspec would read x::/0.png as a file inside of x, here a link to a private picture."""
    for folder, grey in [("private", 200), ("data/x::", 0)]:
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (8, 8), grey).save(tmp_path / folder / "0.png")
    (tmp_path / "data" / "x").symlink_to(tmp_path / "private" / "0.png")
    train, _ = load_images(TrainingConfig(train_data_dir=str(tmp_path / "data"), resolution=8))
    assert (train.get([0]) == -1).all()
