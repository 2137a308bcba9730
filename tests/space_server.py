"""Start the Space as users do: `python spaces/app.py` with a tiny model, on a free port of this machine."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from base64 import b64decode

import httpx
import numpy as np
import pytest
from conftest import ROOT, untrained_unet
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image


T = 500


def save_model(folder, timesteps=T, classes=(), has_null_class=True, channels=1, size=8, **kwargs):
    """Save a tiny untrained model of 8x8 images, or of another size."""
    embeddings = len(classes) + has_null_class if classes else None
    unet = untrained_unet(size, kwargs.get("variance_type"), channels, num_class_embeds=embeddings)
    DDPMPipeline(unet, DDPMScheduler(timesteps, **kwargs)).save_pretrained(folder)
    if classes:
        index = json.loads((folder / "model_index.json").read_text())
        index["id2label"] = dict(enumerate(classes))
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class Space:
    """A running Space: `url`, its process, and its endpoints over bare HTTP, as someone hostile would call them."""

    def __init__(self, model):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment = os.environ | {"DDPM_MODEL": str(model), "GRADIO_SERVER_PORT": str(port)}
        command = [sys.executable, str(ROOT / "spaces" / "app.py")]
        self.log = model.parent / "space.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        for _ in range(600):
            if self.is_up():
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        self.stop()
        raise TimeoutError("The Space did not start.")

    def is_up(self):
        try:
            return httpx.get(self.url, timeout=60).status_code == 200
        except httpx.ConnectError:
            return False

    def call(self, name, *data, timeout=60):
        """Call an endpoint: ("complete", its last outputs) or ("error", what it said)."""
        answer = httpx.post(f"{self.url}/gradio_api/call/{name}", json={"data": data}, timeout=timeout)
        if answer.status_code != 200:
            return "error", answer.text
        events = httpx.get(f"{self.url}/gradio_api/call/{name}/{answer.json()['event_id']}", timeout=timeout).text
        kind, message = events.strip().split("\n\n")[-1].split("\n", 1)
        message = json.loads(message.removeprefix("data: "))
        kind = kind.removeprefix("event: ")
        return kind, message if kind == "complete" else message["error"]

    def upload(self, content, name="image.png"):
        """Upload bytes as a file: (status code, what an image input takes)."""
        answer = httpx.post(f"{self.url}/gradio_api/upload", files={"files": (name, content)}, timeout=60)
        path = answer.json()[0] if answer.status_code == 200 else answer.text
        return answer.status_code, {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=30)


RUNNING = pytest.StashKey()


@pytest.fixture(scope="session")
def space(tmp_path_factory, pytestconfig):
    """A Space on a tiny unconditional model, the same one for all test files."""
    if RUNNING not in pytestconfig.stash:
        running = Space(save_model(tmp_path_factory.mktemp("space") / "tiny-digits"))
        pytestconfig.stash[RUNNING] = running
        pytestconfig.add_cleanup(running.stop)
    return pytestconfig.stash[RUNNING]


def pixels(picture):
    """The image of a gallery's entry, as an array."""
    return np.asarray(Image.open(io.BytesIO(b64decode(picture["image"].partition(",")[2]))))


def png(image, kind="PNG", **kwargs):
    """A PIL image or an array as a file."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **kwargs)
    return buffer.getvalue()
