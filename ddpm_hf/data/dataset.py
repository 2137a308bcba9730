"""Find the images of a run and split them into training and validation images.

The n-th image that a run trains on has the ordinal n. Which image this is, its crop and whether it is mirrored are
drawn with n as the key. These draws therefore do not depend on the batch size, on the number of processes and
workers, or on the step at which a run was resumed.
"""

import functools
import hashlib
import itertools
import os
from collections import Counter

import datasets
import numpy as np

from ..errors import UserError, suggestion
from ..sizes import read_size
from .decode import read_image, undecoded, use_file
from .folders import SPLIT_OF, printable
from .image_set import ImageSet
from .pages import split_pages
from .sources import check_image, check_images, loading, open_source
from .stream import StreamedSet
from .survey import skip_unreadable, skipped_warning, survey


TEXTS = {"string", "large_string"}  # types of columns
LABEL_NAMES = {"label", "labels", "class", "category", "target"}
CLASSES_SHOWN = 10  # with more classes, only the range of their sizes is printed


def load_images(config, channels=None):
    """Return the image sets `(train, validation)` of a run; validation is None without --validation_split.

    Both sets have these attributes:
        num_images: the number of images; None for a stream of unknown length.
        channels, size: the shape of the images is (channels, height, width), with size = (height, width).
        labels: (N,) int64, -1 for "no class"; None if there are no classes, or for a stream.
        class_names: the list of the class names, in the order of the labels; None if there are no classes. If
            `config.class_names` is given, it contains only these classes.
        fingerprint: a hash that identifies the images, 16 hex digits.

    The training set has two more:
        warnings: sentences to print about skipped images, and about likely mistakes in a sample of the images. The
            sample is up to 256 images, or the first 64 of a stream.
        skipped: the images that --on_bad_image skip left out of both sets, each with the reason.

    Args:
        channels: the number of channels of the model. None: `config.channels`, or chosen to suit the images.

    Raises:
        UserError: if images, columns, classes or splits are missing or cannot be read.
    """
    if channels and config.channels not in (None, channels):
        raise UserError(
            f"the model has {channels} channels, but --channels is {config.channels}: leave --channels out, or give "
            "another model."
        )
    source = open_source(config)
    splits, held_out = source.splits, config.validation_split
    if held_out not in splits and SPLIT_OF.get(held_out) in splits.keys() - {"train"}:
        held_out = SPLIT_OF[held_out]  # val is validation, and so on
    if "train" not in splits:
        raise UserError(
            f"there is no split named `train`, only {', '.join(splits)}: rename the split that you want to train on "
            "to `train`."
        )
    columns, classes = _find_columns(splits["train"], config)
    check = functools.partial(check_image, places=source.places, allow_missing=config.on_bad_image == "skip")
    select = functools.partial(_select_rows, columns=columns, classes=classes, config=config, check=check)
    rows, validation = select(splits["train"]), select(splits[held_out]) if held_out in splits else None
    several = 0
    if config.pages == "all":
        rows, several = split_pages(rows, config.cache_dir)
        validation = None if validation is None else split_pages(validation, config.cache_dir)[0]
    rows, validation, skipped = _usable(rows, validation, config)
    if int(os.environ.get("RANK", 0)) == 0:  # print it once, not once per process
        print(_describe(source, held_out, rows, classes, several), flush=True)
    empty = "no images are left for training or for validation: give a larger dataset or more classes."
    if not config.streaming and not len(rows):
        raise UserError(empty)
    if validation is None and held_out is not None:
        rows, validation = _split_by_hash(rows, held_out, splits, config)
    if config.streaming:
        sample = [(row["row"], row["image"]) for row in _read_rows(rows, check, 64)]
        if validation is not None:  # fetch the rows now, because they are used many times
            validation = datasets.Dataset.from_list(_read_rows(validation, check))
    else:
        sample = list(undecoded(rows, range(0, len(rows), -(-len(rows) // 256) or 1)))
    if not sample or validation is not None and not len(validation):
        raise UserError(empty)
    channels, warnings = survey(
        sample, channels or config.channels, config.pixel_range, read_size(config.resolution), config.pages
    )
    # Pass these only if the flags are given. Otherwise the fingerprints would differ from those of older runs.
    options = {"pixel_range": tuple(config.pixel_range)} if config.pixel_range else {}
    options |= {"pages": "channels"} if config.pages == "channels" else {}
    read = functools.partial(
        read_image,
        channels=channels,
        resolution=config.resolution,
        exact=config.preserve_input_precision,
        **options,
    )
    parts = dict(classes=classes, read=read, config=config)
    validation = None if validation is None else ImageSet(validation, **parts)
    train = StreamedSet(rows, **parts, sample=sample, check=check) if config.streaming else ImageSet(rows, **parts)
    train.warnings = skipped_warning(skipped) + warnings
    train.skipped = skipped
    return train, validation


def _describe(source, held_out, rows, classes, several):
    """Return the line that says which files, classes and splits are used.

    Args:
        rows: the training rows.
        several: the number of files of which several pages are used.
    """
    is_stream = isinstance(rows, datasets.IterableDataset)
    parts = [source.note or ("a stream of images" if is_stream else f"{len(rows):,} images")]
    if several:
        parts.append(f"{several:,} files with several pages, so {len(rows):,} images")
    names = [printable(name) for name in classes.values()]
    if classes and is_stream:
        parts.append(f"{len(classes):,} classes" + f": {', '.join(names)}" * (len(classes) <= CLASSES_SHOWN))
    elif classes:
        found = Counter(rows["label"][:])
        counts = [found[value] for value in classes]
        if len(classes) <= CLASSES_SHOWN:
            parts.append("classes: " + ", ".join(f"{name} {count:,}" for name, count in zip(names, counts)))
        else:
            parts.append(f"{len(classes):,} classes with {min(counts):,} to {max(counts):,} images each")
        if without := len(rows) - sum(counts):
            parts.append(f"{without:,} without a class")
    else:
        parts += _unused_classes(source.splits["train"].features, not is_stream)
    if len(source.splits) > 1:
        use = {"train": "used", held_out: "held out"}
        sizes = {
            k: "" if isinstance(v, datasets.IterableDataset) else f" {len(v):,}" for k, v in source.splits.items()
        }
        parts.append("splits: " + ", ".join(f"{k}{size} ({use.get(k, 'not used')})" for k, size in sizes.items()))
    return f"Data: {'; '.join(parts)}."


def _unused_classes(features, is_listed):
    """Return a list with one phrase about a column of LABEL_NAMES that is not used for classes, else []."""
    for name in sorted(LABEL_NAMES & set(features or {})):
        dtype = getattr(features[name], "dtype", "")
        if is_listed and _can_be_classes(dtype):
            return [f"no classes (to use the column {name}, give --label_column {name})"]
        what = f"{dtype} values" if dtype and dtype not in ("dict", "list") else "lists or dictionaries"
        return [f"no classes (the column {name} has {what}, which cannot be used)"]
    return []


def _can_be_classes(dtype: str) -> bool:
    """Return True for the types of a column whose values can be class names: whole numbers, booleans and texts."""
    return "int" in dtype or dtype in {"bool", *TEXTS}


def _find_columns(rows, config):
    """Return two dicts: `{image column: "image", label column: "label"}` and `{label value: class name}`.

    Data without classes has no label column in the first dict, and its second dict is empty.
    """
    features = rows.features or {}  # None for a stream of text files
    columns = ", ".join(features) or "none"
    first = {type(feature): name for name, feature in reversed(features.items())}
    files = [name for name, feature in features.items() if _holds_files(feature)]
    image = config.image_column or first.get(datasets.Image) or next(iter(files), None)
    label = config.label_column or first.get(datasets.ClassLabel)
    is_listed = isinstance(rows, datasets.Dataset)  # the values of a stream's columns are unknown
    if label is None and is_listed and getattr(features.get("label"), "dtype", "") in TEXTS:
        label = "label"

    def advice(column):
        every = f"choose from {columns}."
        return every if column in features else suggestion(column or "", features, every)

    kind = features.get(label)
    dtype = getattr(kind, "dtype", "")
    classes = {}
    if not isinstance(features.get(image), datasets.Image) and image not in files:
        raise UserError(f"--image_column {image or '(not given)'} is not an image column: {advice(image)}")
    if isinstance(kind, datasets.ClassLabel):
        classes = dict(enumerate(kind.names))
    elif is_listed and _can_be_classes(dtype):
        classes = {value: str(value) for value in sorted(set(rows[label][:]) - {None, ""})}
    elif label:
        why = f" (its {dtype} values are neither words nor whole numbers)" if "float" in dtype else ""
        raise UserError(f"--label_column {label} is not a class column{why}: {advice(label)}")
    if unknown := set(config.class_names or []) - set(classes.values()):
        known = f"give --label_column, one of {columns}."
        if classes:
            known = suggestion(min(unknown), classes.values(), f"choose from {', '.join(classes.values())}.")
        raise UserError(f"--class_names has {min(unknown)}, which is not a class of this dataset: {known}")
    if config.class_names:
        classes = {value: name for value, name in classes.items() if name in config.class_names}
    return {image: "image"} | ({label: "label"} if label else {}), classes


def _holds_files(feature):
    """Return whether a column has bytes, or structs with a field `bytes`. These bytes may be image files."""
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _select_rows(rows, *, columns, classes, config, check):
    """Return the rows of the wanted classes, with columns `image` (not decoded), `label` and `row` (row number).

    Each image is checked with `check`. A stream has no column `row`, and its images are checked when they are read.
    """
    # Cast first. Otherwise each later step of a stream would decode the images and encode them again.
    rows = rows.cast_column(next(iter(columns)), datasets.Image(decode=False))
    if config.streaming and isinstance(rows, datasets.Dataset):
        # Stream from a generator, as `datasets` does for a folder, because checkpoints store its position.
        rows = datasets.IterableDataset.from_generator(_each, features=rows.features, gen_kwargs={"rows": rows})
    rows = rows.select_columns(list(columns))
    rows = rows.rename_columns({column: name for column, name in columns.items() if column != name})
    if config.streaming:
        return rows.filter(lambda label: label in classes, input_columns="label") if config.class_names else rows
    rows = rows.add_column("row", np.arange(len(rows)))
    if not config.class_names:
        check_images(rows, check, range(len(rows)))
        return rows
    wanted = [k for k, label in enumerate(rows["label"][:]) if label in classes]
    check_images(rows, check, set(wanted))
    return rows.select(wanted)


def _each(rows):
    yield from rows


def _read_rows(stream, check, count=None):
    """Return the first `count` rows of a stream (None: all rows), with their row numbers. Each image is checked."""
    with loading("the stream"):
        rows = [{"row": n} | row for n, row in enumerate(itertools.islice(stream, count))]
    for row in rows:
        check(row["row"], row["image"])
    return rows


def _usable(rows, validation, config):
    """Return both sets of rows without the images that --on_bad_image skip leaves out, and a list of these images."""
    if config.on_bad_image != "skip":
        return rows, validation, []
    rows, skipped = skip_unreadable(rows, config.pixel_range, config.pages)
    if validation is not None:
        validation, more = skip_unreadable(validation, config.pixel_range, config.pages)
        skipped += more
    return rows, validation, skipped


def _split_by_hash(rows, held_out, splits, config):
    """Return (training rows, validation rows). The images with the lowest hashes are held out.

    Identical files have the same hash, so copies never end up on both sides. Neither do the pages of one file.
    """
    try:
        share = 0 if config.streaming else float(held_out) / (len(rows) if held_out.isdigit() else 1)
    except ValueError:
        share = 0  # refused below
    if not 0 < share < 1:
        wanted = "" if config.streaming else f", a count below {len(rows)} or a share between 0 and 1"
        raise UserError(f"--validation_split {held_out} is impossible: give a split ({', '.join(splits)}){wanted}.")
    digest = functools.partial(use_file, lambda file: hashlib.sha256(file.read()).digest())
    first = {}  # the digest of the first page of each file, because all pages of a file belong to the same side
    digests = []
    for item in undecoded(rows, range(len(rows))):
        if item[0] not in first:
            first[item[0]] = digest(item)
        digests.append(first[item[0]])
    highest = sorted(digests)[max(1, round(share * len(rows))) - 1]
    held = np.array([digest <= highest for digest in digests])
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))
