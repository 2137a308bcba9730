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
from PIL import Image

from ..errors import UserError
from .decode import read_image, undecoded, use_file
from .image_set import ImageSet
from .stream import StreamedSet


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
