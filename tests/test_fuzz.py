"""Mutated models, checkpoints, samples, records and images end in exit code 0, or in 2 with one sentence.

Each case is a copy of a whole file set with one to three mutations, drawn from a seed. A case must end within SECONDS
and BYTES, and a refused one must not have written anything. DDPM_FUZZ_SEED=1 tries other cases, and DDPM_FUZZ_TIMES=10
tries ten times as many.
"""

import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from space_server import save_model

from ddpm_hf.__main__ import main
from ddpm_hf.evaluation import inputs


SEED = int(os.environ.get("DDPM_FUZZ_SEED", "0"))
TIMES = int(os.environ.get("DDPM_FUZZ_TIMES", "1"))
SECONDS = 20
BYTES = 4 * 2**30
DEEP = functools.reduce(lambda inner, _: [inner], range(200), [])
ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    64,
    1000,
    10**5,
    10**6,
    10**9,
    2**63,
    10**30,
    0.5,
    -0.5,
    2.5,
    1e-30,
    1e308,
]
ODD += [
    float("nan"),
    float("inf"),
    "",
    "0",
    "text",
    "²",
    "../../x",
    "\ud800",
    "x" * 3000,
    "None",
    [],
    [[]],
    [0],
    [1, 2],
]
ODD += [["a", "b"], [1] * 300, {}, {"a": {}}, {"0": 1}, {"0": "cat"}, DEEP, "epsilon", "DownBlock2D", "nan", "\n"]
CHECKPOINT = ROOT / "tests" / "fixtures" / "run_5c3000a" / "run" / "checkpoint-4"


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Let a case raise an error that fails its test if it takes too long, or more memory than is there now."""

    def too_long(*signal):
        raise TimeoutError(f"this took more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    handler = signal.signal(signal.SIGALRM, too_long)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def cases(kind, count):
    """Yield (name, generator) of each case of a kind. The name tells how to repeat the case."""
    for k in range(count * TIMES):
        yield f"{kind}, DDPM_FUZZ_SEED={SEED}, case {k}", random.Random(f"{kind} {SEED} {k}")


def try_command(case, words, folder, capsys):
    """Run a command in this process. It must end well, or refuse in one sentence and leave `folder` as it is."""
    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    code = 0
    signal.alarm(SECONDS)
    try:
        main([str(word) for word in words])
    except SystemExit as stopped:
        code = stopped.code
    except BaseException as error:
        raise AssertionError(f"{case}: {words[0]} raised {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
    said = capsys.readouterr().err
    assert code in (0, 2), (case, code, said)
    if code == 2:
        assert said.startswith(f"ddpm_hf {words[0]}: error: ") and said.count("\n") == 1, (case, said)
        assert said.rstrip().endswith((".", "?")) and len(said) < 2000 and "Traceback" not in said, (case, said)
        after = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
        assert after == before, (case, said)
    return code


def mutate_json(path, draw):
    """Replace, remove or add a value anywhere in a JSON file, or break its text."""
    content = json.loads(path.read_text())
    if draw.random() < 0.1:
        path.write_bytes(draw.choice([b"", b"[]", b"3", b"null", b'"a"', b"\xff\xfe", b"[" * 10**5, b"{}"]))
        return
    places, ahead = [], [content]
    while ahead:
        inner = ahead.pop()
        keys = inner if isinstance(inner, dict) else range(len(inner))
        places += [(inner, key) for key in keys]
        ahead += [inner[key] for key in keys if isinstance(inner[key], (dict, list))]
    inner, key = draw.choice(places)
    if draw.random() < 0.2:
        del inner[key]
    else:
        inner[key] = draw.choice(ODD)
    path.write_text(json.dumps(content))


def mutate_bytes(path, draw):
    """Cut a file, or change some of its bytes, mostly near its start, where headers are."""
    data = bytearray(path.read_bytes())
    if draw.random() < 0.2:
        data = data[: draw.randrange(len(data))]
    for _ in range(draw.randint(1, 8) if data else 0):
        near = draw.choice([16, 64, 512, len(data)])
        data[draw.randrange(min(near, len(data)))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
    path.write_bytes(data)


def mutate(files, draw):
    """Mutate one to three of the files."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        path = draw.choice(files)
        if path.suffix == ".json" and draw.random() < 0.95:
            try:
                mutate_json(path, draw)
            except (ValueError, IndexError, TypeError, RecursionError):  # an earlier mutation left nothing to change
                mutate_bytes(path, draw)
        elif draw.random() < 0.03:
            path.unlink()
            os.mkfifo(path)
        elif path.is_file() and path.stat().st_size:
            mutate_bytes(path, draw)


DRAW = ["--num_images=1", "--num_inference_steps=1", "--batch_size=1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a plain model and of one with classes, each with a train_config.json."""
    root = tmp_path_factory.mktemp("models")
    run = {"flags": json.loads((CHECKPOINT / "train_config.json").read_text())["flags"], "git_commit": None}
    for name, classes in {"plain": (), "classes": ("cat", "dog")}.items():
        save_model(root / name, 10, classes)
        (root / name / "train_config.json").write_text(json.dumps(run | {"class_names": list(classes)}))
    return root


def test_models(models, tmp_path, capsys):
    codes = []
    for case, draw in cases("models", 200):
        model = shutil.copytree(models / draw.choice(["plain", "classes"]), tmp_path / "model")
        configs = sorted(model.rglob("*.json"))
        mutate(configs if draw.random() < 0.9 else sorted(model.rglob("*.safetensors")), draw)
        codes.append(try_command(case, ["sample", model, *DRAW, f"--output={tmp_path / 'out'}"], tmp_path, capsys))
        clean(tmp_path)
    assert {0, 2} == set(codes)


def test_checkpoints(tmp_path, capsys):
    codes = []
    for case, draw in cases("checkpoints", 100):
        checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint-4")
        read = [checkpoint / "train_config.json"] * 3 + [checkpoint / "ema.safetensors", checkpoint / "state.pt"]
        mutate(read, draw)
        weights = draw.choice(["raw", "published"])
        words = ["sample", checkpoint, *DRAW, f"--weights={weights}", f"--output={tmp_path / 'out'}"]
        codes.append(try_command(case, words, tmp_path, capsys))
        clean(tmp_path)
    assert {0, 2} == set(codes)


def clean(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def known_images(monkeypatch):
    """Let `evaluate` read the digits only once in a test: they are not what is mutated."""
    read, original = {}, inputs.load_images

    def load_images(config, channels):
        if config.resolution not in read:
            read[config.resolution] = original(config, 1)
        return read[config.resolution]

    monkeypatch.setattr(inputs, "load_images", load_images)


def write_set(folder, record):
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    for k in range(4):
        Image.fromarray(noise[k]).save(folder / f"{k:06d}.png")
    (folder / "samples.json").write_text(json.dumps(record))
    np.savez(folder.with_suffix(".npz"), arr_0=noise[..., None], meta=json.dumps(record))


def mutate_npz(path, draw):
    """Change the record in an .npz, or its bytes."""
    if draw.random() < 0.5:
        return mutate_bytes(path, draw)
    with np.load(path) as arrays:
        array, meta = arrays["arr_0"], path.with_suffix(".json")
        meta.write_text(str(arrays["meta"]))
    mutate_json(meta, draw)
    odd = [
        array,
        array[..., 0],
        array.astype(float),
        array[:0],
        array.repeat(2, axis=-1),
        np.array("a"),
        array[0, 0, 0],
    ]
    np.savez(path, arr_0=draw.choice(odd), meta=meta.read_bytes().decode(errors="replace"))
    meta.unlink()


def test_samples_and_records(models, tmp_path, capsys, known_images):
    main(["sample", str(models / "plain"), "--num_images=4", "--num_inference_steps=1", f"--output={tmp_path / 'a'}"])
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    scored = json.loads((CHECKPOINT.parent / "evaluations" / "finished.json").read_text())
    clean(tmp_path)
    capsys.readouterr()
    codes = []
    for case, draw in cases("samples", 100):
        write_set(tmp_path / "set", record)
        (tmp_path / "scores.json").write_text(json.dumps(scored))
        measure = ["--metrics=memorization", "--dataset_name=digits", f"--output={tmp_path / 'new' / 'scores.json'}"]
        kind = draw.choice(["folder", "npz", "more", "scores"])
        if kind == "folder":
            mutate(sorted((tmp_path / "set").iterdir()), draw)
            words = ["evaluate", tmp_path / "set", *measure]
        elif kind == "npz":
            mutate_npz(tmp_path / "set.npz", draw)
            words = ["evaluate", tmp_path / "set.npz", *measure]
        elif kind == "more":
            mutate_json(tmp_path / "set" / "samples.json", draw)
            words = ["sample", models / "plain", "--num_images=5", "--num_inference_steps=1"]
            words += [f"--output={tmp_path / 'set'}"]
        else:
            mutate_json(tmp_path / "scores.json", draw)
            words = ["compare", tmp_path / "scores.json", CHECKPOINT.parent / "evaluations" / "finished.json"]
        codes.append(try_command(case, words, tmp_path, capsys))
        clean(tmp_path)
    assert {0, 2} == set(codes)


def write_image(path, draw):
    """Write a small image in a random mode and format, under a name that ends in .png."""
    mode, format = draw.choice(
        [("L", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("F", "TIFF")]
        + [
            ("CMYK", "TIFF"),
            ("L", "JPEG"),
            ("RGB", "JPEG"),
            ("P", "GIF"),
            ("L", "BMP"),
            ("RGB", "WEBP"),
            ("I", "TIFF"),
        ]
    )
    size = draw.choice([(8, 8), (8, 8), (8, 8), (1, 1), (7, 9), (16, 8), (64, 2)])
    file = io.BytesIO()
    Image.new(mode, size, draw.choice([0, 1, 100])).save(file, format)
    path.write_bytes(file.getvalue())


def lie_about_the_size(path, draw):
    """Give the header of a PNG another size, with a right checksum."""
    data = path.read_bytes()
    if data[12:16] == b"IHDR":
        sizes = [draw.choice([0, 1, 9, 60_000, 2**31 - 1]) for _ in range(2)]
        head = b"IHDR" + struct.pack(">II", *sizes) + data[24:29]
        path.write_bytes(data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:])


def test_images(models, tmp_path, capsys, known_images):
    codes = []
    for case, draw in cases("images", 100):
        (tmp_path / "in").mkdir()
        for name in ("a.png", "b.png"):
            write_image(tmp_path / "in" / name, draw)
        path = tmp_path / "in" / "a.png"
        draw.choice([mutate_bytes, mutate_bytes, lie_about_the_size, lambda path, draw: None])(path, draw)
        task = draw.choice(["denoise", "super_resolution", "deblur", "inpaint"])
        words = ["restore", models / "plain", path, tmp_path / "out.png", f"--task={task}", "--num_inference_steps=1"]
        words += ["--num_samples=1"] + [f"--mask={tmp_path / 'in' / 'b.png'}"] * (task == "inpaint")
        if draw.random() < 0.4:
            words = ["evaluate", tmp_path / "in", "--metrics=memorization", "--dataset_name=digits"]
            words += [f"--output={tmp_path / 'new' / 'scores.json'}"]
        codes.append(try_command(case, words, tmp_path, capsys))
        clean(tmp_path)
    assert {0, 2} == set(codes)
