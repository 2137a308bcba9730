"""Datasets: images are found, decoded, cropped and ordered as documented, on tiny datasets with known values."""

import io
import itertools
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import UserError
from ddpm_hf.data.batches import training_batches
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.decode import to_array
from ddpm_hf.data.stream import StreamedSet


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
            "dataloader_num_workers": 0,
            "image_column": None,
            "label_column": None,
            "class_names": None,
            "validation_split": None,
            "streaming": False,
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
    assert (images.channels, images.resolution, images.num_images, len(images)) == (1, 4, 3, 3)
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
    assert (stream.channels, stream.resolution, stream.class_names) == (1, 4, ["a", "b", "c"])
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
        states.append(stream.state_dict())
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
            r"\./nowhere cannot be loaded .*: give a dataset of the Hub or a local folder",
        ),
        ({"dataset_name": "no/such"}, "no/such cannot be loaded .*: give a dataset of the Hub or a local folder"),
        ({"dataset_name": None, "train_data_dir": "nowhere"}, "nowhere cannot be loaded .*: give"),
        (
            {"dataset_config_name": "nope"},
            r"'nope' not found. Available: \['default'\]\): give one of these as --data",
        ),
        ({"image_column": "id"}, "--image_column id is not an image column: choose from id, image, label"),
        ({"image_column": "nope"}, "--image_column nope is not an image column"),
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
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_odd_models_are_refused(make, numbered):
    with pytest.raises(UserError, match="the model has 4 channels, but images have 1"):
        load_images(make(numbered), channels=4)


def test_datasets_of_several_configurations_are_refused(make, numbered):
    configs = "- {config_name: small, data_files: data/*0-of*}\n- {config_name: big, data_files: data/*}\n"
    (numbered / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(UserError, match=r"\['small', 'big'\]\): give one of these as --dataset_config_name"):
        load_images(make(numbered))
    assert load_images(make(numbered, dataset_config_name="small"))[0].num_images == 14


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_without_images_are_refused(make, tmp_path, streaming):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded .*doesn't contain any data files"):
        load_images(make(train_data_dir=str(tmp_path / "empty"), streaming=streaming))
    (tmp_path / "empty" / "notes.txt").write_text("no image\n")
    with pytest.raises(UserError, match="cannot be loaded|no images are left for training"):
        load_images(make(train_data_dir=str(tmp_path / "empty"), streaming=streaming))
    with pytest.raises(
        UserError, match=r"--image_column \(not given\) is not an image column: choose from (text|none)"
    ):
        load_images(make(tmp_path / "empty", streaming=streaming))
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
