"""The stage of gpu.py that trains: run the training command until the time is over, and pack the model."""

import json
import lzma
import os
import signal
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import safetensors.torch
import torch
from gpu import stack_pictures
from PIL import Image

from ddpm_hf.__main__ import main as run_command
from ddpm_hf.files import remove
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.pictures import image_sheet
from ddpm_hf.run_folder import PIPELINE, WEIGHTS, files_in
from ddpm_hf.sampling.generate import sample_images
from ddpm_hf.sampling.settings import Sampler
from ddpm_hf.training.figures import loss_figure


PART_BYTES = 15_000_000  # of a packed model
CHUNK = 2**23  # the bytes that one thread compresses at a time
# A bfloat16 number has two bytes. Only the one with the exponent compresses well, and lp=1 and pb=1 keep them apart.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 0, "lc": 3, "lp": 1, "pb": 1}]


def train(stage, preset: str, smaller: list[str]):
    """Train `preset` until shortly before the stage's end, then add figures and write the picture and the model.

    A run that is already in the work folder goes on, so a second call trains the same model further.

    Args:
        stage: a `Stage` of gpu_stages.py.
        smaller: flags that override those of the preset.
    """
    folder, packed = stage.work / "runs" / preset, stage.work / f"{preset}.packed"
    remove(packed)
    # A short run needs a short moving average: one of 0.9999 would still hold the initial weights.
    words = ["train", "--preset", preset, "--ema_inv_gamma=1", "--ema_max_decay=0.999", "--logging_steps=50"]
    words += ["--logger=none", f"--output_dir={folder}", "--resume_from_checkpoint=latest"]
    words += [f"--dataset_name={stage.data[preset]}"] if preset in stage.data else []
    words += [*smaller, *stage.flags]
    sys.argv = ["ddpm_hf", *words]  # the run records this command
    stop_after(stage.left() - min(45, 0.4 * stage.left()))
    try:
        run_command(words)
    except SystemExit as stopped:
        if stopped.code != 128 + signal.SIGTERM:
            raise
    metrics = folder / "metrics.jsonl"  # missing if not even one line was due
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    for line in lines[-10:]:
        values = {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}
        stage.found(f"Training {preset}, last lines of metrics.jsonl", f"step {line['step']}", **values)
    if torch.cuda.is_available():
        stage.found("Machine", f"peak GiB of training {preset}", value=torch.cuda.max_memory_allocated() / 2**30)
    parts = pack(folder, preset, packed)
    stage.found("Machine", f"MB of the packed model {preset}", value=sum(each.stat().st_size for each in parts) / 1e6)
    draw_picture(stage, preset, folder)


def stop_after(seconds: float):
    """Send this process a SIGTERM after `seconds`. Training then takes a checkpoint, saves its pipeline and ends.

    If training has not begun by then, wait until it can catch the signal.
    """
    trains = signal.getsignal(signal.SIGTERM)

    def stop():
        time.sleep(max(0.0, seconds))
        while signal.getsignal(signal.SIGTERM) is trains:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()


def draw_picture(stage, preset: str, folder: Path):
    """Draw images from the trained model, and write them above the loss curve as the picture of the stage."""
    model = load_pretrained(folder)
    model.unet.to("cuda" if torch.cuda.is_available() else "cpu")
    steps, count = (2, 4) if stage.toy else (50, 64)
    sampler = Sampler(name="ddim", num_inference_steps=steps).resolve(model)
    images = sample_images(model, sampler, range(count), batch_size=count, progress=False)
    with tempfile.TemporaryDirectory() as place:
        paths = [image_sheet(images, Path(place, "sheet.png"))]
        if (folder / "metrics.jsonl").is_file():
            paths.append(loss_figure(folder / "metrics.jsonl", Path(place, "loss.png")))
        page = stack_pictures([Image.open(path).convert("RGB") for path in paths])
    page.save(stage.work / f"train-{preset}.png")


def pack(folder: Path, name: str, place: Path) -> list[Path]:
    """Pack the pipeline of a run, with weights in bfloat16, and return the parts: name.tar.xz.01, ...

    `cat name.tar.xz.* | tar xJ` gives a folder that `load_pretrained` and stock diffusers read. The new folder `place`
    appears only when all parts are written.
    """
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for path in files_in(folder, [*PIPELINE, "train_config.json", "metrics.jsonl", "README.md"]):
            data = path.read_bytes()
            if path.name in WEIGHTS and path.suffix == ".safetensors":
                weights = safetensors.torch.load(data)
                data = safetensors.torch.save({key: value.bfloat16() for key, value in weights.items()})
            entry = tarfile.TarInfo(f"{name}/{path.relative_to(folder)}")
            entry.size = len(data)
            archive.addfile(entry, BytesIO(data))
    content = content.getvalue()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        chunks = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
        # An .xz file may be several .xz files, one after another.
        content = b"".join(threads.map(lambda chunk: lzma.compress(chunk, filters=FILTERS), chunks))
    partial = place.with_name(f"{place.name}.tmp")
    remove(partial)
    partial.mkdir()
    for number, start in enumerate(range(0, len(content), PART_BYTES), start=1):
        (partial / f"{name}.tar.xz.{number:02}").write_bytes(content[start : start + PART_BYTES])
    partial.rename(place)
    return sorted(place.iterdir())
