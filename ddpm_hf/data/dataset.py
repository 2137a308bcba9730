"""Find the images of a run and split them into training and validation images.

The n-th image that a run trains on has the ordinal n. Its row, its crop and whether it is mirrored are drawn with n as
the key. They therefore do not depend on the batch size, on the number of processes and workers, or on the step at
which a run was resumed.
"""

import functools
import hashlib
import itertools
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub.errors import HTTPError
from PIL import Image

from ..errors import UserError
from .decode import read_image, undecoded, use_file
from .image_set import ImageSet
from .stream import StreamedSet


GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"}


def load_images(config, channels=None):
    """Return the image sets `(train, validation)` of a run; validation is None without --validation_split.

    Both sets have these attributes:
        num_images: the number of images; None for a stream of unknown length.
        channels, resolution: the shape of the images is (channels, resolution, resolution).
        labels: (N,) int64, -1 for "no class"; None if there are no classes, or for a stream.
        class_names: the list of the class names, in the order of the labels; None if there are no classes. Only the
            classes in `config.class_names` are kept, if that is given.
        fingerprint: 16 hex digits.

    Args:
        channels: 1 or 3. None looks at up to 256 images (in a stream, at the first 64): 1 if all of them are grey,
            else 3.

    Raises:
        UserError: if images, columns, classes or splits are missing or cannot be read.
    """
    if channels not in (None, 1, 3):
        raise UserError(f"the model has {channels} channels, but images have 1 (grey) or 3 (RGB): give another model.")
    splits = _load_splits(config)
    held_out = config.validation_split
    if "train" not in splits:
        raise UserError(
            f"there is no split named `train`, only {', '.join(splits)}: rename the split that you want to train on "
            "to `train`."
        )
    columns, classes = _find_columns(splits["train"], config)
    rows = _select_rows(splits["train"], columns, classes, config)
    validation = None
    if held_out in splits:
        validation = _select_rows(splits[held_out], columns, classes, config)
        if config.streaming:  # fetch the rows now, because they are used many times
            validation = datasets.Dataset.from_list([{"row": n} | row for n, row in enumerate(validation)])
    elif held_out is not None:
        rows, validation = _split_by_hash(rows, held_out, splits, config)
    if config.streaming:
        sample = list(enumerate(row["image"] for row in itertools.islice(rows, 64)))
    else:
        sample = list(undecoded(rows, range(0, len(rows), -(-len(rows) // 256) or 1)))
    if not sample or validation is not None and not len(validation):
        raise UserError("no images are left for training or for validation: give a larger dataset or more classes.")
    modes = {use_file(lambda file: Image.open(file).mode, item) for item in sample}
    read = functools.partial(
        read_image,
        channels=channels or (1 if modes <= GREY_MODES else 3),
        resolution=config.resolution,
        exact=config.preserve_input_precision,
    )
    parts = dict(classes=classes, read=read, config=config)
    validation = None if validation is None else ImageSet(validation, **parts)
    return StreamedSet(rows, **parts, sample=sample) if config.streaming else ImageSet(rows, **parts), validation


def _load_splits(config):
    """Return the dataset that the flags name, as a dict `{split: rows}`."""
    name = config.dataset_name
    if not name and not config.train_data_dir:
        raise UserError("there is nothing to train on: give --dataset_name (Hub id or folder) or --train_data_dir.")
    if name == "digits" and not Path(name).exists():
        return {"train": _digits().to_iterable_dataset() if config.streaming else _digits()}
    options = {"cache_dir": config.cache_dir, "streaming": config.streaming}
    try:
        if name:
            return dict(datasets.load_dataset(name, config.dataset_config_name, **options))
        return dict(datasets.load_dataset("imagefolder", data_dir=config.train_data_dir, **options))
    except (
        HTTPError,
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        reason = " ".join(str(error).split("Example of usage")[0].split())
        advice = "give a dataset of the Hub or a local folder, either with images or a copy of a Hub dataset"
        if "Config" in reason:
            advice = "give one of these as --dataset_config_name"
        raise UserError(f"{name or config.train_data_dir} cannot be loaded ({reason}): {advice}.") from error


def _digits():
    """Return scikit-learn's 1,797 handwritten digits, 8x8, as rows with an image and a label."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    # Encode as PGM, because --validation_split hashes the bytes. In PGM these are a constant header and the pixels.
    files = [{"bytes": b"P5 8 8 255 " + image.tobytes(), "path": None} for image in pixels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    return datasets.Dataset.from_dict({"image": files, "label": digits.target.tolist()}, features=features)


def _find_columns(rows, config):
    """Return two dicts: `{image column: "image", label column: "label"}` and `{label value: class name}`.

    Data without classes has no label column in the first dict, and its second dict is empty.
    """
    features = rows.features or {}  # a stream of texts has None
    columns = ", ".join(features) or "none"
    first = {type(feature): name for name, feature in reversed(features.items())}
    image = config.image_column or first.get(datasets.Image)
    label = config.label_column or first.get(datasets.ClassLabel)
    kind = features.get(label)
    classes = {}
    if not isinstance(features.get(image), datasets.Image):
        raise UserError(f"--image_column {image or '(not given)'} is not an image column: choose from {columns}.")
    if isinstance(kind, datasets.ClassLabel):
        classes = dict(enumerate(kind.names))
    elif "int" in getattr(kind, "dtype", "") and not config.streaming:
        classes = {value: str(value) for value in sorted(set(rows[label][:]) - {None})}
    elif label:
        raise UserError(f"--label_column {label} is not a class column: choose from {columns}.")
    if unknown := set(config.class_names or []) - set(classes.values()):
        known = f"choose from {', '.join(classes.values())}" if classes else f"give --label_column, one of {columns}"
        raise UserError(f"--class_names has {min(unknown)}, which is not a class of this dataset: {known}.")
    if config.class_names:
        classes = {value: name for value, name in classes.items() if name in config.class_names}
    return {image: "image"} | ({label: "label"} if label else {}), classes


def _select_rows(rows, columns, classes, config):
    """Return the rows of the wanted classes, with columns `image` (not decoded), `label` and `row` (row number)."""
    # Cast first. Otherwise each later step of a stream would decode the images and encode them again.
    rows = rows.cast_column(next(iter(columns)), datasets.Image(decode=False)).select_columns(list(columns))
    rows = rows.rename_columns({column: name for column, name in columns.items() if column != name})
    if config.streaming:
        return rows.filter(lambda label: label in classes, input_columns="label") if config.class_names else rows
    rows = rows.add_column("row", np.arange(len(rows)))
    return rows.select(np.flatnonzero(np.isin(rows["label"][:], list(classes)))) if config.class_names else rows


def _split_by_hash(rows, held_out, splits, config):
    """Return (training rows, validation rows). The images with the lowest hashes are held out.

    Identical files have the same hash, so copies never end up on both sides.
    """
    try:
        share = 0 if config.streaming else float(held_out) / (len(rows) if held_out.isdigit() else 1)
    except ValueError:
        share = 0  # refused below
    if not 0 < share < 1:
        wanted = "" if config.streaming else f", a count below {len(rows)} or a share between 0 and 1"
        raise UserError(f"--validation_split {held_out} is impossible: give a split ({', '.join(splits)}){wanted}.")
    digest = functools.partial(use_file, lambda file: hashlib.sha256(file.read()).digest())
    digests = [digest(item) for item in undecoded(rows, range(len(rows)))]
    highest = sorted(digests)[max(1, round(share * len(rows))) - 1]
    held = np.array([digest <= highest for digest in digests])
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))
