"""Open the data of --dataset_name or --train_data_dir: a folder, a saved dataset, a Hub dataset, or `digits`."""

import contextlib
import glob
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute
from huggingface_hub.constants import HF_HUB_CACHE

from ..errors import UserError
from ..files import read_json
from ..hub_requests import API, HUB_ERRORS, HfHubHTTPError, HFValidationError, ask_hub, short_reason
from .arrays import open_npz
from .decode import CHUNK
from .folders import examples, holds_tables, list_files, open_image_folder, printable, tables_in


# The builder of `datasets` for each kind of file.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"}
WILDCARDS = set("*?[]")
# How a general error of `datasets` begins. The reason follows this text, or is in the error's cause.
GENERATION_FAILED = "An error occurred while generating the dataset"


@dataclass(frozen=True)
class Source:
    """The data that --dataset_name or --train_data_dir names.

    Attributes:
        splits: `{split: rows}`. Rows are a `datasets.Dataset`. With --streaming, they can be an `IterableDataset`.
        note: a phrase that says which files are used, or "".
        places: the folders in which image files may be. None: any folder, because the files are checked already.
    """

    splits: dict
    note: str = ""
    places: list[Path] | None = None


def open_source(config) -> Source:
    """Return the data that the flags name.

    Raises:
        UserError: if the data does not exist or cannot be loaded.
    """
    name = config.dataset_name or config.train_data_dir
    if not name:
        raise UserError("there is nothing to train on: give --dataset_name (Hub id or folder) or --train_data_dir.")
    folder = Path(name).expanduser()
    is_run = (folder / "train_config.json").is_file()  # a run in a folder called digits is not data
    if config.dataset_name == "digits" and (is_run or not folder.exists()):
        return Source({"train": _digits().to_iterable_dataset() if config.streaming else _digits()})
    if folder.suffix == ".npz" and folder.is_file():
        return Source({"train": open_npz(folder)}, f"an .npz of images: {printable(folder.name)}")
    if not folder.is_dir():
        if not config.dataset_name:
            raise UserError(f"--train_data_dir {name} cannot be loaded (it is not a folder): give a folder of images.")
        with loading(name), offline_if_unreachable(name):
            options = {"cache_dir": config.cache_dir, "streaming": config.streaming}
            splits = dict(datasets.load_dataset(name, config.dataset_config_name, **options))
        return Source(splits, places=_caches(config))
    is_saved = _is_file(folder / "dataset_dict.json") or _is_file(folder / "state.json", folder / "dataset_info.json")
    files = {} if is_saved else list_files(folder)
    if holds_tables(folder, files) and not is_saved:
        return _load_copy(folder, tables_in(files), config)
    if config.dataset_config_name not in (None, "default"):
        raise UserError(
            f"--dataset_config_name {config.dataset_config_name} does not exist, because {folder} has no "
            "configurations: leave it out."
        )
    return _open_saved(folder, config) if is_saved else Source(*open_image_folder(folder, files))


def _digits():
    """Return scikit-learn's 1,797 handwritten digits, 8x8, as rows with an image and a label."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    # Encode as PGM, because --validation_split hashes the bytes. In PGM these are a constant header and the pixels.
    files = [{"bytes": b"P5 8 8 255 " + image.tobytes(), "path": None} for image in pixels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    return datasets.Dataset.from_dict({"image": files, "label": digits.target.tolist()}, features=features)


def _open_saved(folder, config):
    """Return the Source of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    saved = {"train": folder}
    if (folder / "dataset_dict.json").is_file():
        names = read_json(folder / "dataset_dict.json").get("splits")
        saved = {name: folder / name for name in names} if names and _are(str, names) else {}
    splits = {}
    for split, place in saved.items():
        state = read_json(place / "state.json") if _is_file(place / "state.json") else {}
        files = state.get("_data_files")
        files = [file.get("filename") for file in files] if _are(dict, files) else None
        # Refuse files outside the folder, for the reason given in `check_image`.
        if not _are(str, files) or not all(_is_inside(place / name, folder) for name in files):
            raise UserError(f"{place / 'state.json'} does not list files of its folder: save the dataset again.")
        with loading(place):
            splits[split] = datasets.load_from_disk(str(place)).with_format(None)
    if not splits:
        raise UserError(f"{folder / 'dataset_dict.json'} names no splits: save the dataset again.")
    return Source(splits, places=[folder, *_caches(config)])


def _are(kind, values):
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _is_file(*paths):
    """Return whether all paths are regular files. A pipe is not, because to read it might never end."""
    return all(Path(path).is_file() for path in paths)


def _is_inside(path, folder):
    """Return whether a path is a file inside a folder, after following links."""
    return _is_file(path) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _caches(config):
    """Return the folders that `datasets` downloads and unpacks files to."""
    return [Path(cache) for cache in (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, config.cache_dir) if cache]


def _load_copy(folder, tables, config):
    """Return the Source of a local copy of a Hub dataset. Its `note` names tables that are not used."""
    arguments = {"path": str(folder), "name": config.dataset_config_name}
    with loading(folder):
        if not WILDCARDS.isdisjoint(str(folder.resolve())):  # `datasets` would read the path as a pattern
            base = glob.escape(str(folder.resolve()))
            patterns = datasets.data_files.get_data_patterns(base)
            files = {split: [f"{base}/{pattern}" for pattern in found] for split, found in patterns.items()}
            kinds = [BUILDERS[Path(table).suffix.lower()] for table in tables] or ["imagefolder"]
            arguments = {"path": kinds[0], "data_files": files}
        builder = datasets.load_dataset_builder(**arguments, cache_dir=config.cache_dir)
        splits = datasets.load_dataset(**arguments, cache_dir=config.cache_dir, streaming=config.streaming)
    used = {os.path.realpath(file) for files in (builder.config.data_files or {}).values() for file in files}
    unused = [name for name in tables if os.path.realpath(folder / name) not in used]
    note = f"{len(tables) - len(unused)} of {len(tables)} tables, without {examples(unused)}" if unused else ""
    return Source(dict(splits), note, [folder, *_caches(config)])


@contextlib.contextmanager
def offline_if_unreachable(name):
    """In a `with` block that loads `name`: if the Hub cannot be reached, let `datasets` look only in its cache.

    Otherwise `datasets` asks six times within 23 seconds, also for what is in its cache, and prints every attempt.

    Raises:
        ConnectionError: if the Hub cannot be reached and the dataset is not in the cache.
    """
    before, reason = datasets.config.HF_HUB_OFFLINE, ""
    try:
        ask_hub(lambda: API.dataset_info(name))
    except (HFValidationError, TimeoutError):  # a slow Hub may answer `datasets`, which waits longer
        pass
    except HUB_ERRORS as error:
        # An HfHubHTTPError is an answer of the Hub, and `datasets` explains it.
        reason = "" if isinstance(error, HfHubHTTPError) else short_reason(error)
    datasets.config.HF_HUB_OFFLINE = before or bool(reason)
    try:
        yield
    except ConnectionError as error:
        if not reason:
            raise
        raise ConnectionError(f"the Hub cannot be reached, {reason}, and it is not in the cache") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def loading(source):
    """In a `with` block that loads `source`, a name or a path, turn the errors of `datasets` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a broken or odd file may raise anything
        reason = _reason_of(error)
        advice = "give --dataset_name a Hub dataset, a folder of images, or a folder with a copy of a Hub dataset"
        if "Config" in reason:
            advice = "give one of these as --dataset_config_name"
        raise UserError(f"{source} cannot be loaded ({reason}): {advice}.") from error


def _reason_of(error):
    """Return the reason of an error of `datasets` on one line. For a general error, take the reason of its cause."""
    text = " ".join(str(error).split("Example of usage")[0].split())
    if text.removeprefix(GENERATION_FAILED).strip(" .") == "" and error.__cause__ is not None:
        return _reason_of(error.__cause__)
    return textwrap.shorten(text.removeprefix(GENERATION_FAILED).strip(), 500) or type(error).__name__


def check_images(rows, check, wanted):
    """Call `check(row number, image)` for each wanted row whose image is stored as a path, not as bytes.

    Args:
        rows: a `datasets.Dataset` with an undecoded column `image`. Give all rows, because reading a selection would
            also load the images that are stored as bytes.
        wanted: the row numbers to check, as a set or a range.
    """
    rows = rows.with_format("arrow")
    for start in range(0, len(rows), CHUNK):
        images = rows[start : start + CHUNK]["image"].combine_chunks()
        elsewhere = pyarrow.compute.struct_field(images, "bytes").is_null()
        numbers = start + np.flatnonzero(elsewhere)
        for row, encoded in zip(numbers.tolist(), images.filter(elsewhere).to_pylist()):
            if row in wanted:
                check(row, encoded)


def check_image(row: int, encoded: dict | None, places: list[Path] | None, allow_missing: bool = False):
    """Refuse an image that is missing, or that is a file outside of its dataset.

    Otherwise, a downloaded dataset could name any file of this machine, and the model would learn and publish this
    file. The dataset could also name a pipe, and reading a pipe might never end.

    Args:
        encoded: an undecoded image, see decode.py.
        places: the folders that the file may be in; None: any.
        allow_missing: do not refuse a missing image, because it is skipped later.

    Raises:
        UserError: for such an image.
    """
    encoded = encoded or {"bytes": None, "path": None}
    if encoded["bytes"] is not None:
        return
    if not encoded["path"]:
        if allow_missing:
            return
        raise UserError(
            f"image {row} (without a name) cannot be read (it is missing in this row): repair or remove it, or skip "
            "it with --on_bad_image skip."
        )
    place = encoded["path"].split("::")[-1]  # for a file in an archive, the path of the archive
    if places is None or place.startswith("hf://datasets/"):
        return
    if not any(_is_inside(place, folder) for folder in places):
        raise UserError(
            f"image {row} ({encoded['path']}) cannot be read (it is not a file of the dataset): store the images in "
            "the dataset itself, as `Dataset.save_to_disk` does."
        )
