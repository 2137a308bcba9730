"""Images in, tensors in [-1, 1] out: how a run finds, reads, crops and orders its images.

The n-th image that a run sees has the ordinal n, and what is drawn for it (its row, crop and mirroring) is keyed by n:
neither batch size nor processes nor workers nor the place where a run was resumed can change what it sees.
"""

import functools
import hashlib
import itertools
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from . import UserError
from .pixels import decode_all, read_batch, read_image, scale, undecoded, use_file
from .randomness import coins, epoch_order, keyed_generator, successive


MEMORY_LIMIT = 2 * 2**30  # bytes of pixels; larger sets are decoded anew whenever an image is needed
SHUFFLE_BUFFER = 1000  # successive rows of a stream that are shuffled among themselves
COINS = 4096  # tossed at once, for as many successive ordinals
GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"}


def load_images(config, channels=None):
    """Return the image sets `(train, validation)` of a `TrainingConfig`; validation is None where none is asked for.

    A set has `num_images` (None for a stream of unknown length), `channels`, `resolution`, `labels` (None, or (N,)
    int64 with -1 for no class), `class_names` (None, or a list with the name of label k at k; `config.class_names`
    leaves only those it has) and `fingerprint` (16 hex digits). `channels` is 1 or 3, or None to follow the data: 1 if
    all of 256 sampled images (of a stream, its first 64) are grey.

    Raises:
        UserError: for images, columns, classes or splits that are missing or cannot be read.
    """
    if channels not in (None, 1, 3):
        raise UserError(f"the model has {channels} channels, but images have 1 (grey) or 3 (RGB): give another model.")
    splits, held_out = _load_splits(config), config.validation_split
    if "train" not in splits:
        raise UserError(f"there is no split `train`, only {', '.join(splits)}: rename the one to train on.")
    columns, classes = _find_columns(splits["train"], config)
    rows, validation = _select_rows(splits["train"], columns, classes, config), None
    if held_out in splits:
        validation = _select_rows(splits[held_out], columns, classes, config)
        if config.streaming:  # these are needed time and again, so they are fetched
            validation = datasets.Dataset.from_list([{"row": n} | row for n, row in enumerate(validation)])
    elif held_out is not None:
        rows, validation = _set_apart(rows, held_out, splits, config)
    if config.streaming:
        sample = list(enumerate(row["image"] for row in itertools.islice(rows, 64)))
    else:
        sample = list(undecoded(rows, range(0, len(rows), -(-len(rows) // 256) or 1)))
    if not sample or validation is not None and not len(validation):
        raise UserError("no images are left to train on, or to hold out: give a dataset, or --class_names, with some.")
    modes = {use_file(lambda file: Image.open(file).mode, item) for item in sample}
    read = functools.partial(
        read_image,
        channels=channels or (1 if modes <= GREY_MODES else 3),
        resolution=config.resolution,
        exact=config.preserve_input_precision,
    )
    validation = None if validation is None else ImageSet(validation, classes, read, config)
    if config.streaming:
        return StreamedSet(rows, classes, read, config, sample), validation
    return ImageSet(rows, classes, read, config), validation


def training_batches(train_set, config, first_ordinal, process_index, num_processes):
    """Yield without end what one process sees: `{"ordinals": (B,) int64, "images": (B,C,H,W), "labels": (B,) int64}`.

    Images are float32 in [-1, 1]; without classes there are no labels. Micro-batch k of process r of P covers the
    ordinals `first_ordinal + (k * P + r) * B + [0, B)`, B = `config.train_batch_size`: an optimizer step of A
    accumulated micro-batches takes the next A * P * B images.

    Raises:
        UserError: for an image that cannot be read.
    """
    size = config.train_batch_size
    starts = itertools.count(first_ordinal + process_index * size, num_processes * size)
    streamed = isinstance(train_set, StreamedSet)
    loader = DataLoader(
        train_set if streamed else TrainingStream(train_set, config.seed, config.random_flip),
        batch_sampler=(range(start, start + size) for start in starts),
        num_workers=0 if streamed or train_set.pixels is not None else config.dataloader_num_workers,
        collate_fn=dict,  # the batches are ready
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from torch's global one
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except UserError as error:
            # Torch wraps a worker's in its traceback, and in a cycle of references that keeps the workers for seconds.
            raise UserError(str(error.with_traceback(None)).rsplit("UserError: ", 1)[-1].strip()) from None
        yield batch


class TrainingStream(Dataset):
    """The images of a run by ordinal: ordinal n is image `n % N` of the shuffled epoch `n // N`."""

    def __init__(self, images, seed, random_flip):
        self.images, self.seed, self.random_flip = images, seed, random_flip

    def __getitems__(self, ordinals):
        """Return a batch, as `training_batches` describes it, for a range of ordinals."""
        rows = successive(epoch_order, self.seed, self.images.num_images, ordinals)
        generators = _generators(self.seed, ordinals) if self.images.random_crop else None
        mirrored = successive(coins, self.seed, COINS, ordinals) if self.random_flip else None
        batch = {
            "ordinals": torch.arange(ordinals[0], ordinals[-1] + 1),
            "images": self.images.get(rows, generators, mirrored),
        }
        return batch if self.images.labels is None else batch | {"labels": self.images.labels[rows]}


def _generators(seed, ordinals):
    return [keyed_generator(seed, "augment", n) for n in ordinals]


class ImageSet:
    """Images by index: decoded once into `pixels` (N,C,H,W), or, where that is None, whenever they are asked for."""

    def __init__(self, rows, classes, read, config):
        self.rows, self.read, self.num_images, self.class_names = rows, read, len(rows), list(classes.values()) or None
        self.channels, self.resolution = read.keywords["channels"], config.resolution
        label_of = {value: label for label, value in enumerate(classes)}
        self.labels = torch.tensor([label_of.get(value, -1) for value in rows["label"][:]]) if classes else None
        shape = (len(rows), self.channels, self.resolution, self.resolution)
        dtype = np.dtype(np.float32 if config.preserve_input_precision else np.uint8)
        fits = np.prod(shape) * dtype.itemsize <= MEMORY_LIMIT
        self.pixels = decode_all(rows, read, config.center_crop, np.empty(shape, dtype)) if fits else None
        self.random_crop = self.pixels is None and not config.center_crop
        identity = repr((rows._fingerprint, read.keywords, self.random_crop)).encode()
        identity = identity if self.pixels is None else self.pixels.numpy()
        self.fingerprint = hashlib.sha256(identity).hexdigest()[:16]

    def __len__(self):
        return self.num_images

    def get(self, indices, generators=None, mirrored=None):
        """Return (B,C,H,W) float32 in [-1, 1], cropped as each generator says, or centrally; mirrored as told."""
        if self.pixels is None:
            return read_batch(undecoded(self.rows, indices), self.read, generators, mirrored)
        images = self.pixels.index_select(0, torch.as_tensor(indices))  # much faster than pixels[indices]
        if mirrored is not None:
            which = mirrored.nonzero()[:, 0]
            images[which] = images.index_select(0, which).flip(-1)
        return scale(images)


class StreamedSet(Dataset):
    """Images by ordinal from a stream, of which each `SHUFFLE_BUFFER` rows are shuffled; labels come with the images.

    (Not by `IterableDataset.shuffle`: what is in its buffer is lost when the stream is resumed.)
    """

    labels = None

    def __init__(self, rows, classes, read, config, sample):
        self.rows, self.read, self.config, self.sample = rows, read, config, sample
        self.label_of, self.class_names = {value: k for k, value in enumerate(classes)}, list(classes.values()) or None
        self.channels, self.resolution = read.keywords["channels"], config.resolution
        split = (rows.info.splits or {}).get(str(rows.split))
        self.num_images = split.num_examples if split and not config.class_names else None
        identity = (config.dataset_name, config.train_data_dir, config.dataset_config_name, classes, read.keywords)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        self.load_state_dict(None)

    def __len__(self):
        if self.num_images is None:
            raise TypeError("nobody knows how many images this stream has")
        return self.num_images

    def get(self, indices):
        """Return some of its first 64 images, (B,C,H,W) float32 in [-1, 1]."""
        return read_batch([self.sample[k] for k in indices if k < len(self.sample)], self.read)

    def state_dict(self):
        """Return the position after the last batch in dicts, lists, strings and numbers; process 0 has one for all."""
        return dict(self.state)

    def load_state_dict(self, state):
        """Go to the position of a `state_dict`, reading up to `SHUFFLE_BUFFER` rows again; None is the beginning."""
        # `block` is the ordinal that the current block starts with, `source` where the stream was before it.
        self.state = dict(state or {"epoch": 0, "block": 0, "taken": 0, "source": None})
        self.shuffled = self._shuffle()

    def _shuffle(self):
        state, seed = self.state, self.config.seed
        while True:
            files = keyed_generator(seed, "files", state["epoch"])
            self.rows.set_epoch(int(torch.randint(1, 2**31, (), generator=files)))  # seeds the order of the files
            self.rows.load_state_dict(state["source"])
            rows = iter(self.rows)
            while block := list(itertools.islice(rows, SHUFFLE_BUFFER)):
                order = torch.randperm(len(block), generator=keyed_generator(seed, "block", state["block"]))
                for row in order[state["taken"] :].tolist():
                    state["taken"] += 1
                    yield block[row]
                state.update(block=state["block"] + len(block), taken=0, source=self.rows.state_dict())
            state.update(epoch=state["epoch"] + 1, source=None)

    def __getitems__(self, ordinals):
        """Return a batch, as `training_batches` describes it, for a range of ordinals (behind: slow)."""
        if ordinals.start < self.state["block"] + self.state["taken"]:
            self.load_state_dict(None)
        skipped = ordinals.start - self.state["block"] - self.state["taken"]
        rows = list(itertools.islice(self.shuffled, skipped, skipped + len(ordinals)))
        generators = None if self.config.center_crop else _generators(self.config.seed, ordinals)
        mirrored = successive(coins, self.config.seed, COINS, ordinals) if self.config.random_flip else None
        images = read_batch(zip(ordinals, [row["image"] for row in rows]), self.read, generators, mirrored)
        batch = {"ordinals": torch.tensor(ordinals), "images": images}
        labels = [self.label_of.get(row.get("label"), -1) for row in rows]
        return batch | {"labels": torch.tensor(labels)} if self.label_of else batch


def _load_splits(config):
    name, options = config.dataset_name, {"cache_dir": config.cache_dir, "streaming": config.streaming}
    if not name and not config.train_data_dir:
        raise UserError("there is nothing to train on: give --dataset_name (Hub id or folder) or --train_data_dir.")
    if name == "digits" and not Path(name).exists():
        return {"train": _digits().to_iterable_dataset() if config.streaming else _digits()}
    try:
        if name:
            return dict(datasets.load_dataset(name, config.dataset_config_name, **options))
        return dict(datasets.load_dataset("imagefolder", data_dir=config.train_data_dir, **options))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split("Example of usage")[0].split())
        wanted = "a dataset of the Hub or a local folder, of images or in the Hub's layout"
        wanted = "one of these as --dataset_config_name" if "Config" in reason else wanted
        raise UserError(f"{name or config.train_data_dir} cannot be loaded ({reason}): give {wanted}.") from error


def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    # As PGM files: their bytes, which are hashed, are the pixels behind a constant header.
    files = [{"bytes": b"P5 8 8 255 " + image.tobytes(), "path": None} for image in pixels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    return datasets.Dataset.from_dict({"image": files, "label": digits.target.tolist()}, features=features)


def _find_columns(rows, config):
    """Return `{image column: "image", label column, if any: "label"}` and `{value of a label: name of its class}`."""
    features = rows.features or {}  # a stream of texts has none
    columns = ", ".join(features) or "none"
    first = {type(feature): name for name, feature in reversed(features.items())}
    image = config.image_column or first.get(datasets.Image)
    label = config.label_column or first.get(datasets.ClassLabel)
    kind, classes = features.get(label), {}
    if not isinstance(features.get(image), datasets.Image):
        raise UserError(f"--image_column {image or '(not given)'} is no column of images: choose from {columns}.")
    if isinstance(kind, datasets.ClassLabel):
        classes = dict(enumerate(kind.names))
    elif "int" in getattr(kind, "dtype", "") and not config.streaming:
        classes = {value: str(value) for value in sorted(set(rows[label][:]) - {None})}
    elif label:
        raise UserError(f"--label_column {label} is no column of classes: choose from {columns}.")
    wanted = config.class_names or classes.values()
    if not set(wanted) <= set(classes.values()):
        known = ", ".join(classes.values()) or f"none, unless one of the columns {columns} is a --label_column"
        raise UserError(f"--class_names {','.join(wanted)} is not all among the classes, which are {known}.")
    kept = {value: name for value, name in classes.items() if name in wanted}
    return {image: "image"} | ({label: "label"} if label else {}), kept


def _select_rows(rows, columns, classes, config):
    """Leave the wanted columns, as `image` and `label`, and the rows of the wanted classes; nothing is decoded."""
    # The cast comes first: any other step of a stream would decode the images, and encode them again.
    rows = rows.cast_column(next(iter(columns)), datasets.Image(decode=False)).select_columns(list(columns))
    rows = rows.rename_columns({column: name for column, name in columns.items() if column != name})
    if config.streaming:
        return rows.filter(lambda label: label in classes, input_columns="label") if config.class_names else rows
    rows = rows.add_column("row", np.arange(len(rows)))  # broken images are named by it
    return rows.select(np.flatnonzero(np.isin(rows["label"][:], list(classes)))) if config.class_names else rows


def _set_apart(rows, held_out, splits, config):
    """Return (rows to train on, rows held out): by hash, so that neither their order nor copies of images matter."""
    try:
        share = 0 if config.streaming else float(held_out) / (len(rows) if held_out.isdigit() else 1)
    except ValueError:
        share = 0  # refused below, like shares that leave nothing on one side
    if not 0 < share < 1:
        wanted = "" if config.streaming else f", a count below {len(rows)} or a share between 0 and 1"
        raise UserError(f"--validation_split {held_out} cannot be: name a split ({', '.join(splits)}){wanted}.")
    digest = functools.partial(use_file, lambda file: hashlib.sha256(file.read()).digest())
    digests = [digest(item) for item in undecoded(rows, range(len(rows)))]
    highest = sorted(digests)[max(1, round(share * len(rows))) - 1]
    held = np.array([digest <= highest for digest in digests])
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))
