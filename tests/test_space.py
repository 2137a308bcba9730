"""The Space's endpoints, called by gradio_client and by hostile clients."""

import base64
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import space_server
from conftest import ROOT
from gradio_client import Client, handle_file
from PIL import Image
from space_server import T, pixels, png, save_model


space = space_server.space
OWN = ("The model's own", None, "")
DIGIT = np.pad(np.full((12, 4), 255, np.uint8), ((4, 4), (8, 8)))


@pytest.fixture(scope="module")
def client(space):
    return Client(space.url, verbose=False)


@pytest.fixture(scope="module")
def digit(tmp_path_factory):
    path = tmp_path_factory.mktemp("digit") / "one.png"
    path.write_bytes(png(DIGIT))
    return handle_file(path)


def test_it_has_these_endpoints(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert sorted(named) == ["/compare", "/degrade", "/forward", "/generate", "/restore"]


def test_generate_streams_then_gives_images_and_a_zip(client):
    job = client.submit(3, "DDPM", T, 5, "", 1, api_name="/generate")
    shown, status, path, sheet, gif = job.result()
    assert [one["caption"] for one in shown] == ["seed 5", "seed 6", "seed 7"] and status.startswith("Done: 3 images")
    forming = [pixels(gallery[0]) for gallery, *_ in job.outputs() if isinstance(gallery, list) and gallery]
    assert len(forming) >= 2 and not np.array_equal(forming[0], forming[-1])
    with zipfile.ZipFile(path) as archive:
        settings = json.loads(archive.read("settings.json"))
        assert sorted(archive.namelist()) == ["seed_5.png", "seed_6.png", "seed_7.png", "settings.json", "sheet.png"]
        assert settings["seeds"] == [5, 6, 7] and settings["num_inference_steps"] == T
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(archive.read("seed_6.png")))), pixels(shown[1]))
        assert archive.read("sheet.png") == Path(sheet).read_bytes()
    with Image.open(sheet) as enlarged, Image.open(gif) as formation:
        assert enlarged.size == (324, 324) and formation.size == (3 * 96 + 2 * 4, 96)
        assert formation.n_frames > 10 and formation.info["loop"] == 0


@pytest.mark.parametrize("sampler", ["DDIM", "DDPM"])
def test_the_same_seed_is_the_same_image_in_any_number(client, sampler):
    many = client.predict(3, sampler, 5, 5, "", 1, api_name="/generate")[0]
    again = client.predict(3, sampler, 5, 5, "", 1, api_name="/generate")[0]
    alone = client.predict(1, sampler, 5, 6, "", 1, api_name="/generate")[0]
    assert many == again and np.abs(pixels(many[1]).astype(int) - pixels(alone[0])).max() <= 1
    assert not np.array_equal(pixels(many[0]), pixels(many[1]))


def test_compare_has_every_sampler(client):
    shown, status = client.predict(0, "", api_name="/compare")
    names = [f"DDIM, {steps} steps" for steps in (5, 10, 20, 50)] + [f"DDPM, {T} steps"]
    assert [one["caption"].partition(", drawn in ")[0] for one in shown] == names and status.startswith("Done")
    assert len({one["image"] for one in shown}) == 5


@pytest.mark.parametrize("damage", ["Noise", "Hole", "Blur", "Low resolution"])
def test_degrade_and_restore_an_upload(client, digit, damage):
    given = ("Upload", digit, "", damage, "Strong", 3)
    original, damaged = client.predict(*given, api_name="/degrade")[0]
    shown, status = client.predict(*given, api_name="/restore")
    assert [original["image"], damaged["image"]] == [one["image"] for one in shown[:2]]  # the same damage
    assert pixels(original).shape == pixels(shown[2]).shape == (8, 8) and status.startswith("Done")
    assert pixels(original)[4].argmax() in (3, 4) and not np.array_equal(pixels(original), pixels(damaged))
    assert shown == client.predict(*given, api_name="/restore")[0]


def test_forward_goes_from_the_image_to_noise(client, digit):
    frames = [client.predict("Upload", digit, "", t, 0, api_name="/forward") for t in (0, 50, T)]
    shares, shown = [bar for *_, bar in frames], [gallery for gallery, *_ in frames]
    assert shares[0] == 100 > shares[1] > shares[2] and len(shown[0]) == 3
    distances = [np.abs(pixels(x_t).astype(int) - pixels(x_0)).mean() for x_0, x_t, _ in shown]
    assert distances[0] == 0 < distances[1] < distances[2]


def test_a_drawing_is_taken(client):
    drawing = "data:image/png;base64," + base64.b64encode(png(DIGIT)).decode()
    shown = client.predict("Draw", None, drawing, "Noise", "Light", 0, api_name="/degrade")[0]
    assert pixels(shown[0])[4].argmax() in (3, 4)


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bare_png(width, height, *more):
    """A PNG that says it is so large, with nothing in it."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


def animated(kind):
    frames = [Image.fromarray(np.roll(DIGIT, 3 * k, axis=1)) for k in range(8)]
    return png(frames[0], kind, save_all=True, append_images=frames[1:])


ramp = np.linspace(0, 1, 400).reshape(20, 20)
turned = Image.Exif()
turned[274] = 6
BAD_FILES = {
    "huge": bare_png(30_000, 30_000),
    "just too large": bare_png(5_000, 5_000),
    "no pixels": bare_png(0, 0),
    "text bomb": bare_png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
    "half": png(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))[:1500],
    "empty": b"",
    "text": b"../../etc/passwd\n" * 40,
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "html": b"<!doctype html><h1>hello</h1>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nquit\n",
    "zip": b"PK\x05\x06" + bytes(18),
}
ODD_FILES = {
    "one pixel": png(np.zeros((1, 1), np.uint8)),
    "a line": png(np.zeros((1, 20_000), np.uint8)),
    "animated gif": animated("GIF"),
    "animated png": animated("PNG"),
    "16-bit": png((65535 * ramp).astype(np.uint16)),
    "float with nan": png(Image.fromarray(np.where(ramp > 0.9, np.nan, ramp).astype(np.float32)), "TIFF"),
    "cmyk": png(Image.new("CMYK", (20, 20)), "JPEG"),
    "transparent palette": png(Image.new("P", (20, 20)), transparency=0),
    "one bit": png(Image.new("1", (20, 20))),
    "upside down": png(DIGIT, "JPEG", exif=turned),
}


def assert_sentence(message):
    assert isinstance(message, str) and len(message.split()) >= 4
    assert not re.search(r"Traceback|File \"|\.py\b|site-packages|gradio/|/tmp|/root|/home|/etc", message), message


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_image_gets_a_sentence(space, name):
    status, upload = space.upload(BAD_FILES[name], "image.svg" if name == "svg" else "image.png")
    for endpoint, more in (("degrade", ("Noise", "Light", 0)), ("forward", (1, 0))):
        kind, message = space.call(endpoint, "Upload", upload, "", *more)
        assert status == 200 and kind == "error"
        assert_sentence(message)
        assert "image" in message.lower() and re.search("give", message)


@pytest.mark.parametrize("name", ODD_FILES)
def test_an_odd_image_is_taken(space, name):
    kind, (shown, _) = space.call("degrade", "Upload", space.upload(ODD_FILES[name])[1], "", "Blur", "Light", 0)
    assert kind == "complete" and pixels(shown[0]).shape == (8, 8)
    if name == "16-bit":
        assert pixels(shown[0])[0, 0] < 30 and pixels(shown[0])[-1, -1] > 225
    if name == "animated gif":
        assert pixels(shown[0])[4].argmax() in (3, 4)  # the first frame


def test_a_large_file_is_refused_before_it_is_stored(space):
    assert space.upload(bytes(11_000_000))[0] == 413


def test_a_large_request_is_refused(space):
    size = 20_000_000
    kind, message = space.call("forward", "Draw", None, "data:image/png;base64," + "A" * size, 5, 0)
    assert kind == "error" and "larger than 12 MB: send a smaller file" in message
    body = (chunk for chunk in [b'{"data": ["'] + [b"A" * 1_000_000] * 20 + [b'"]}'])  # that does not say how large
    try:
        answer = httpx.post(f"{space.url}/gradio_api/call/forward", content=body, timeout=60).status_code
    except httpx.TransportError:
        answer = None  # hung up on
    assert answer is None or answer >= 400


GENERATE = dict(number=1, sampler="DDIM", steps=2, seed=0, class_name="", guidance=1)
BAD_VALUES = [
    {"steps": -5}, {"steps": 0}, {"steps": T + 1}, {"steps": 2.5}, {"steps": "2"}, {"steps": None}, {"steps": [2]},
    {"number": 0}, {"number": 10**9}, {"number": True}, {"number": {"path": "x"}}, {"sampler": "../../etc/passwd"},
    {"sampler": None}, {"sampler": ["DDIM"]}, {"seed": -1}, {"seed": 2**63}, {"seed": "0; import os"},
    {"guidance": 11}, {"guidance": "inf"}, {"class_name": "<script>alert(1)</script>"}, {"class_name": 7},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_VALUES, ids=str)
def test_a_bad_value_gets_a_sentence_that_names_it(space, change):
    kind, message = space.call("generate", *{**GENERATE, **change}.values())
    assert kind == "error"
    (name,) = change
    assert {"number": "number of images", "class_name": "class"}.get(name, name) in message
    assert re.search(r": (give|choose) ", message) and "<script" not in message
    assert not re.search(r"Traceback|\.py\b", message)


PASSWD = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
REMOTE = {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}
BAD_CALLS = {
    "path of the server": ("degrade", "Upload", PASSWD, "", "Noise", "Light", 0),
    "path without its mark": ("degrade", "Upload", {"path": "/etc/passwd"}, "", "Noise", "Light", 0),
    "relative path": ("degrade", "Upload", PASSWD | {"path": "../../etc/passwd"}, "", "Noise", "Light", 0),
    "url": ("degrade", "Upload", REMOTE, "", "Noise", "Light", 0),
    "text for a file": ("degrade", "Upload", "/etc/passwd", "", "Noise", "Light", 0),
    "no file": ("degrade", "Upload", None, "", "Noise", "Light", 0),
    "unknown source": ("forward", "../../etc/passwd", None, "", 5, 0),
    "unknown damage": ("restore", *OWN, "Melt", "Light", 0),
    "colour of grey": ("restore", *OWN, "No colour", "Light", 0),
    "unknown strength": ("restore", *OWN, "Blur", 3, 0),
    "t beyond the end": ("forward", *OWN, T + 1, 0),
    "t below the start": ("forward", *OWN, -1, 0),
    "empty drawing": ("forward", "Draw", None, "", 5, 0),
    "drawing of text": ("forward", "Draw", None, "data:image/png;base64,aGVsbG8=", 5, 0),
    "drawing of no base64": ("forward", "Draw", None, "data:image/png;base64,%%%", 5, 0),
    "drawing of svg": ("forward", "Draw", None, "data:image/svg+xml;base64,aGVsbG8=", 5, 0),
    "drawing too long": ("forward", "Draw", None, "data:image/png;base64," + "A" * 2_100_000, 5, 0),
    "drawing by number": ("forward", "Draw", None, 5, 5, 0),
    "too few values": ("compare",),
    "seed of no number": ("compare", {"a": 1}, ""),
}


FILE_DATA = {"meta": {"_type": "gradio.FileData"}}
# What a hostile client sends for an upload. `secret` is a readable image of the server, `mine` is an honest upload,
# and beside `mine` are a link to the secret, a FIFO and a folder.
SERVER_PATHS = {
    "path": lambda secret, mine: {"path": secret},
    "path with gradio's mark": lambda secret, mine: {"path": secret} | FILE_DATA,
    "path with another mark": lambda secret, mine: {"path": secret, "meta": {"_type": "x"}},
    "path with more keys": lambda secret, mine: {"path": secret, "url": "x", "size": 1, "is_stream": True},
    "path and an honest url": lambda secret, mine: {"path": secret, "url": f"/gradio_api/file={mine}"},
    "relative path": lambda secret, mine: {"path": os.path.relpath(secret, ROOT)},
    "up from an upload": lambda secret, mine: {"path": os.path.join(mine, os.path.relpath(secret, mine))},
    "up from the folder": lambda secret, mine: {"path": os.path.dirname(mine) + "/../" * 20 + secret},
    "into a folder and up": lambda secret, mine: {"path": f"{mine}.folder/../{os.path.basename(mine)}"},
    "doubled slashes": lambda secret, mine: {"path": "/" + secret.replace("/", "//")},
    "file url": lambda secret, mine: {"path": f"file://{secret}"},
    "gradio's file url": lambda secret, mine: {"path": f"/gradio_api/file={secret}"},
    "process's root": lambda secret, mine: {"path": f"/proc/self/root{secret}"},
    "only a url": lambda secret, mine: {"url": f"file://{secret}"},
    "nested": lambda secret, mine: {"path": {"path": secret}},
    "list": lambda secret, mine: [{"path": secret}],
    "list for a path": lambda secret, mine: {"path": [secret]},
    "text": lambda secret, mine: secret,
    "link": lambda secret, mine: {"path": f"{mine}.link"},
    "link, marked": lambda secret, mine: {"path": f"{mine}.link"} | FILE_DATA,
    "fifo": lambda secret, mine: {"path": f"{mine}.fifo"},
    "folder": lambda secret, mine: {"path": f"{mine}.folder"},
    "the upload folder": lambda secret, mine: {"path": os.path.dirname(os.path.dirname(mine))},
    "terminals": lambda secret, mine: {"path": "/dev/ptmx"},
    "zeros": lambda secret, mine: {"path": "/dev/zero"},
    "standard input": lambda secret, mine: {"path": "/dev/stdin"},
    "descriptor": lambda secret, mine: {"path": 0},
    "no number": lambda secret, mine: {"path": True},
    "nul": lambda secret, mine: {"path": f"{mine}\0.png"},
    "too long": lambda secret, mine: {"path": f"{mine}/{'a' * 5000}"},
    "empty": lambda secret, mine: {"path": ""},
    "no such upload": lambda secret, mine: {"path": f"{mine}.none"},
}


@pytest.fixture(scope="module")
def planted(space, tmp_path_factory):
    """Return the path of an image of the server, and of an upload beside which traps lie."""
    secret = tmp_path_factory.mktemp("secret") / "secret.png"
    secret.write_bytes(png(DIGIT))
    mine = space.upload(png(DIGIT))[1]["path"]
    if not os.path.isdir(f"{mine}.folder"):  # the same upload has the same path, and this may run twice
        os.symlink(secret, f"{mine}.link")
        os.mkfifo(f"{mine}.fifo")
        os.mkdir(f"{mine}.folder")
    return str(secret), mine


@pytest.mark.parametrize("name", SERVER_PATHS)
def test_no_path_of_the_server_is_opened(space, planted, name):
    upload = SERVER_PATHS[name](*planted)
    for endpoint, more in (
        ("degrade", ("Noise", "Light", 0)),
        ("restore", ("Noise", "Light", 0)),
        ("forward", (1, 0)),
    ):
        kind, message = space.call(endpoint, "Upload", upload, "", *more, timeout=15)
        assert kind == "error", f"{endpoint} read {upload}"
        assert_sentence(message)


def test_after_hostile_paths_an_upload_is_read_at_once(space, planted):
    assert space.call("degrade", "Upload", {"path": planted[1]}, "", "Noise", "Light", 0, timeout=15)[0] == "complete"


@pytest.mark.parametrize("route", ["run", "api"])
def test_the_queue_cannot_be_bypassed(space, route):
    answer = httpx.post(f"{space.url}/gradio_api/{route}/generate", json={"data": [*GENERATE.values()]}, timeout=60)
    assert answer.status_code == 404 and "join the queue" in answer.text


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_hostile_call_gets_a_sentence(space, name):
    endpoint, *data = BAD_CALLS[name]
    kind, message = space.call(endpoint, *data)
    assert kind == "error"
    if name == "unknown source":  # it is told what it sent
        message = message.replace("../../etc/passwd", "")
    assert_sentence(message)


def test_after_all_this_it_is_up(space):
    assert space.process.poll() is None and space.is_up()
    assert space.call("generate", *GENERATE.values())[0] == "complete"
    assert "The Space failed" not in space.log.read_text()  # each of them was foreseen


def test_without_a_model_it_says_what_to_set(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "DDPM_MODEL"}
    shutil.copytree(ROOT / "spaces", tmp_path / "spaces")  # without examples beside it, as on the Hub
    command = [sys.executable, str(tmp_path / "spaces" / "app.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr.strip() == "DDPM_MODEL is not set: give a model, e.g. DDPM_MODEL=runs/digits python spaces/app.py."
    )


@pytest.mark.parametrize("value", ["abc", "nan", "inf", "-inf", "", "-5", "0", "1e300", "60s"])
def test_a_bad_number_of_seconds_is_one_sentence(tmp_path, value):
    environment = os.environ | {"DDPM_MODEL": str(tmp_path), "DDPM_REQUEST_SECONDS": value}
    command = [sys.executable, str(ROOT / "spaces" / "app.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.strip() == (
        f"DDPM_REQUEST_SECONDS is {value!r}: give a number of seconds above 0 and up to 86,400, or do not set it."
    )


@pytest.mark.parametrize(
    "name, value", [("PORT", "abc"), ("PORT", "-1"), ("PORT", ""), ("PORT", "70000"), ("NAME", "203.0.113.1")]
)
def test_a_bad_address_is_one_sentence(tmp_path, name, value):
    model = save_model(tmp_path / "model")
    environment = os.environ | {"DDPM_MODEL": str(model), f"GRADIO_SERVER_{name}": value}
    command = [sys.executable, str(ROOT / "spaces" / "app.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(rf"[^\n]*GRADIO_SERVER_{name}[^\n]*{value}[^\n]*: give [^\n]*\.\n", done.stderr), done.stderr


def test_uploads_are_bounded_on_the_disk(space):
    """The oldest go first: here 500 files of 150 MB are sent, and a file that was sent last is read."""
    first = space.upload(bytes(300_000))[1]["path"]
    for k in range(20):
        files = [("files", (f"{k}.{n}.png", bytes(300_000) + bytes([k, n]))) for n in range(25)]
        answer = httpx.post(f"{space.url}/gradio_api/upload", files=files, timeout=60)
        assert answer.status_code == 200 and len(answer.json()) == 25
    mine = space.upload(png(DIGIT[:, ::-1]), "last.png")[1]
    folder = Path(mine["path"]).parent.parent
    assert bytes_in(folder) <= 100_000_000
    assert not Path(first).exists() and folder != Path(tempfile.gettempdir(), "gradio")
    assert space.call("degrade", "Upload", mine, "", "Noise", "Light", 0)[0] == "complete"


def test_uploads_that_end_together_may_delete_together(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "spaces")
    uploads = importlib.import_module("uploads")
    monkeypatch.setattr(uploads, "MAX_FILES", 1)
    for k in range(400):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "a.png").touch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(uploads.delete_oldest, [tmp_path] * 4))
    assert sum(path.is_file() for path in tmp_path.rglob("*")) <= 1


def bytes_in(folder):
    """Return the size of all files below a folder, some of which may go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):  # rglob would raise for a folder that goes
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size
    return total
