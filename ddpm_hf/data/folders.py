"""List the images of a local folder with their classes and splits, by its subfolders and metadata.

Splits and classes come from folders only. A file name such as test_1.png means nothing. A folder of images looks like
this. The parts in brackets are optional::

    FOLDER/[train/][cat/][any/folders/]1.png
    FOLDER/[train/]metadata.csv

The first folder is the split, but only if all images are in folders that have the names of splits. The next folder is
the class. The metadata file can also be metadata.jsonl or metadata.parquet. It has a column `file_name`, the path of
an image relative to the metadata file, and other columns such as `label`.
"""

import hashlib
import os
import posixpath
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from PIL import Image

from ..errors import UserError
from ..run_folder import DRY_RUN


# Formats of Pillow that are not pictures, or that Pillow cannot decode by itself.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
IMAGE_SUFFIXES = {
    suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN and name not in NOT_DECODED
}
METADATA_NAMES = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
TABLE_SUFFIXES = {".parquet", ".arrow", ".tar", ".zip"}  # files of a dataset that can contain images
SHARD = re.compile(r"-\d{5}-of-\d{5}[^/]*$")  # how the Hub names the tables of a dataset
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
EXAMPLES = 3  # how many files are named in a sentence about several files


def holds_tables(folder: Path, files: dict) -> bool:
    """Return True for a copy of a Hub dataset, and False for a folder of images. `files` comes from `list_files`."""
    tables = tables_in(files)
    return _has_configs(folder) or any(map(SHARD.search, tables)) or len(tables) > len(images_in(files))


def tables_in(files: dict) -> list[str]:
    """Return the names of the tables and archives in `files` (from `list_files`). Metadata files are left out."""
    return [name for name in files if _suffix(name) in TABLE_SUFFIXES and not _is_metadata(name)]


def images_in(files: dict) -> list[str]:
    """Return the names of the images in `files` (from `list_files`): regular files with the suffix of an image format.

    If there are none, return the .npy files. If there are pictures, .npy files next to them are often not images.
    """
    regular = [name for name, facts in files.items() if facts is not None]
    pictures = [name for name in regular if _suffix(name) in IMAGE_SUFFIXES]
    return pictures or [name for name in regular if _suffix(name) == ".npy"]


def open_image_folder(folder: Path, files: dict):
    """Return `({split: rows}, note)` of a folder of images. `files` comes from `list_files`.

    Rows are a `datasets.Dataset` with a column `image`, and a column `label` if there are several classes. The note
    says how many of the files are images.

    Raises:
        UserError: if there are no images, or the metadata do not fit the images.
    """
    images = images_in(files)
    metadata = [name for name, facts in files.items() if facts is not None and _is_metadata(name)]
    others = sorted(files.keys() - set(images) - set(metadata))
    if not images:
        found = f"no images, only {_count(len(others), 'other file')}: {examples(others)}" if others else "no files"
        raise UserError(
            f"{folder} cannot be loaded (it has {found}): give a folder of image files (.png, .npy, ...), or a "
            "dataset in parquet or arrow."
        )
    splits, without_row = _rows_of_splits(folder, files, images, metadata)
    note = f"{_count(len(images) - len(without_row), 'image')} of {_count(len(images) + len(others), 'file')}"
    left_out = [
        *_left_out(others, "is not an image", "are not images"),
        *_left_out(without_row, "has no row in the metadata", "have no row in the metadata"),
    ]
    return splits, f"{note}: {', '.join(left_out)}" if left_out else note


def list_files(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Return the files below a folder, sorted by path: `{path relative to folder: (bytes, time of last change)}`.

    The value is None for a broken link, and for anything else that is not a regular file, e.g. a pipe. The folder of a
    run of ddpm_hf is one entry with the value None, and its files are not listed. The picture of a dry run has the
    value None, too. Hidden files and folders are left out. A link to a folder is not followed, because it leads to
    files of `folder` that are listed already.

    Raises:
        UserError: if a folder cannot be read, or a link to an image or a folder leads out of `folder`.
    """
    root, found, ahead = folder.resolve(), {}, [""]
    while ahead:
        parent = ahead.pop()
        try:
            entries = list(os.scandir(root / parent))
            if parent and any(entry.name == "train_config.json" for entry in entries):
                found[parent] = None  # the folder of a run, whose pictures are not data
                continue
            for entry in entries:
                name = parent + entry.name
                name.encode()
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    _check_link(root, name, entry.is_dir())
                if not entry.is_dir():
                    is_data = entry.is_file() and not entry.name.endswith(DRY_RUN)
                    stat = entry.stat() if is_data else None
                    found[name] = stat and (stat.st_size, stat.st_mtime_ns)
                elif not entry.is_symlink():
                    ahead.append(f"{name}/")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{root / parent} has a file whose name {entry.name!r} is not UTF-8: rename it."
            ) from error
        except OSError as error:
            raise UserError(f"{root / parent} cannot be read ({error.strerror}): allow reading it.") from error
    return dict(sorted(found.items()))


def _check_link(root, name, is_folder):
    """Raise a UserError for a link that leads out of `root`, to a folder or to a file that would be read.

    Otherwise, a downloaded dataset could contain links to any file of this machine. Links inside the cache of the Hub
    are allowed, because there the files of a dataset are links to a folder `blobs`.
    """
    snapshots = [parent for parent in root.parents if parent.name == "snapshots"]
    cached = [parent.parent for parent in snapshots if (parent.parent / "blobs").is_dir()]
    target = Path(os.path.realpath(root / name))
    if any(target.is_relative_to(place) for place in [root, *cached]):
        return
    if is_folder or _suffix(name) in IMAGE_SUFFIXES | TABLE_SUFFIXES or _is_metadata(name):
        raise UserError(
            f"{root / name} is a link to {target}, outside of the dataset's folder: put the files themselves there, "
            "e.g. with `cp -rL`, or give the folder that has them."
        )


def _has_configs(folder):
    """Return whether the README.md of a folder is the card of a Hub dataset that lists files under `configs:`."""
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    front = lines[: lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []
    return any(line.startswith("configs:") for line in front)


def _rows_of_splits(folder, files, images, metadata):
    """Return `{split: rows}` of a folder, and the images that have no row in the metadata."""
    split_of = split_folders(images)
    class_of = {name: _class_of(name, bool(split_of)) for name in images}
    table = _read_metadata(folder, metadata, class_of) if metadata else None
    splits, without_row = {}, []
    for top, split in split_of.items() or [("", "train")]:
        start = f"{top}/" if top else ""
        names, columns = [name for name in images if name.startswith(start)], {}
        if table is not None:
            rows = [k for k, name in enumerate(table["file_name"].to_pylist()) if name.startswith(start)]
            if rows:
                without_row += sorted(set(names) - set(table["file_name"].take(rows).to_pylist()))
                names = table["file_name"].take(rows).to_pylist()
            else:  # a split without metadata keeps its images
                rows = [None] * len(names)
            columns = {name: table[name].take(pa.array(rows, pa.int64())) for name in table.column_names}
            del columns["file_name"]
        identity = (split, [(name, files[name]) for name in [*names, *metadata]])
        fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        splits[split] = _image_rows(folder, names, columns, class_of, fingerprint)
    return splits, without_row


def _image_rows(folder, names, columns, class_of, fingerprint):
    """Return a `datasets.Dataset` of image files and more columns. It has a ClassLabel if there are several classes.

    Args:
        columns: `{name: arrow array}`, from the metadata. A column `label` replaces the classes of `class_of`.
        class_of: `{name: class, or None}`, for the images of all splits, so that all splits have the same classes.
    """
    features = datasets.Features.from_arrow_schema(pa.schema({name: values.type for name, values in columns.items()}))
    root = str(folder.resolve())
    paths = pa.array([os.path.join(root, name) for name in names], pa.string())
    images = pa.StructArray.from_arrays([pa.nulls(len(names), pa.binary()), paths], ["bytes", "path"])
    columns, features = columns | {"image": images}, datasets.Features(features | {"image": datasets.Image()})
    class_names = sorted(set(class_of.values()) - {None})
    if "label" not in columns and len(class_names) > 1:
        number = {name: k for k, name in enumerate(class_names)}
        columns["label"] = pa.array([number.get(class_of[name]) for name in names], pa.int64())
        features["label"] = datasets.ClassLabel(names=class_names)
    return datasets.Dataset(pa.table(columns), datasets.DatasetInfo(features=features), fingerprint=fingerprint)


def split_folders(images: list[str]) -> dict[str, str]:
    """Return `{top folder: split}` if all images are in top folders with the names of splits, else {}.

    A split has several names, e.g. `val` means the split `validation`. If two folders mean the same split, the second
    keeps its own name.

    Example:
        >>> split_folders(["train/cat/1.png", "val/cat/2.png"])
        {'train': 'train', 'val': 'validation'}
    """
    tops = {name.rpartition("/")[0].partition("/")[0] for name in images}
    if any(top.lower() not in SPLIT_OF for top in tops):
        return {}
    splits = {}
    for top in sorted(tops, key=lambda top: (top != SPLIT_OF[top.lower()], top)):
        split = SPLIT_OF[top.lower()]
        splits[top] = top if split in splits.values() else split
    return splits


def _class_of(name, has_splits):
    """Return the class of an image: the first folder in its path, after the split's folder. None if there is none."""
    folders = name.split("/")[has_splits:-1]
    return folders[0] if folders else None


def _read_metadata(folder, names, images):
    """Return one table of all metadata files. Its `file_name` is relative to `folder`.

    Only columns of numbers, text or booleans are kept, because other columns cannot be classes.

    Raises:
        UserError: if a file cannot be read, or names an image that does not exist.
    """
    tables = []
    for name in names:
        table = _read_table(folder / name)
        if twice := [column for column in table.column_names if table.column_names.count(column) > 1]:
            raise UserError(f"{folder / name} has several columns named {twice[0]}: give each column its own name.")
        simple = [field.name for field in table.schema if _is_simple(field.type) and field.name != "image"]
        if "file_name" not in simple or not _is_text(table["file_name"].type):
            raise UserError(
                f"{folder / name} has no column file_name with text, only {', '.join(table.column_names)}: add the "
                "path of each image, relative to this file."
            )
        paths = []
        for row, value in enumerate(table["file_name"].to_pylist()):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), (value or "").replace("\\", "/")))
            if path not in images:
                raise UserError(
                    f"{folder / name} names {value or 'no file'} in row {row}, but there is no such image in this "
                    "folder: correct or remove the row."
                )
            paths.append(path)
        kept = table.select(simple).drop_columns("file_name")
        tables.append(kept.append_column("file_name", pa.array(paths, pa.string())))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{', '.join(names)} in {folder} cannot be combined ({error}): give one file.") from error


def _read_table(path):
    """Return a metadata file as a table. In csv, an empty field means that there is no value."""
    try:
        # Read one block, because arrow guesses the types from the first block, and a line must not exceed a block.
        block = {"block_size": min(max(path.stat().st_size, 2**20), 2**31 - 1)}
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        if path.suffix == ".jsonl":
            return pyarrow.json.read_json(path, pyarrow.json.ReadOptions(**block))
        return pyarrow.csv.read_csv(
            path,
            pyarrow.csv.ReadOptions(**block),
            pyarrow.csv.ParseOptions(newlines_in_values=True),
            pyarrow.csv.ConvertOptions(null_values=[""], strings_can_be_null=True),
        )
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): correct or remove it.") from error


def _is_metadata(name):
    return posixpath.basename(name) in METADATA_NAMES


def _is_text(kind):
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_simple(kind):
    return _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _suffix(name):
    return posixpath.splitext(name)[1].lower()


def _count(number, what):
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _left_out(names, one, many):
    """Return a list with one phrase, e.g. `2 are not images (a.txt, b.txt)`, or [] if `names` is empty."""
    return [f"{len(names):,} {one if len(names) == 1 else many} ({examples(names)})"] if names else []


def examples(names: list[str]) -> str:
    """Return the first few names, e.g. `a.txt, b.txt, c.txt, ...`."""
    return ", ".join([*map(printable, names[:EXAMPLES]), *["..."] * (len(names) > EXAMPLES)])


def printable(name: str) -> str:
    """Return a name from a dataset for printing, with line breaks and control characters escaped."""
    return name if name.isprintable() else ascii(name)


def image_files(folder: Path, arrays: bool = False) -> list[Path]:
    """Return the images directly in a folder, without hidden files, in the order of their names.

    With `arrays`, .npy files are images too.
    """
    suffixes = IMAGE_SUFFIXES | ({".npy"} if arrays else set())
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(path for path in files if path.suffix.lower() in suffixes)
