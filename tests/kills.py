"""Kill one run again and again, resume it each time, and compare its end with that of an unbroken run, bit for bit.

    PYTHONPATH=. python tests/kills.py --kills 100

Every second kill comes at a random file operation in the run folder: between any two renames, removals and new files
of a checkpoint, of its deletion, of the pipeline or of the figures. The others come after a random time, so that they
also fall into the code of torch and safetensors that writes files. A run that has ended is compared, and a new one
begins.
"""

import argparse
import collections
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import processes
import safetensors.torch
import torch
from conftest import TINY

from ddpm_hf.run_folder import checkpoints


# 24 steps of 2 x 8 images from a set of 163: two epochs end within the run.
RUN = [
    *TINY, "--class_names=3", "--validation_split=20", "--gradient_accumulation_steps=2", "--max_train_steps=24",
    "--checkpointing_steps=4", "--use_ema", "--dropout=0.1", "--validation_epochs=1", "--save_images_epochs=100",
    "--save_model_epochs=100", "--checkpoints_total_limit=2",
]  # fmt: skip
# A run whose time is spent writing, removing and drawing.
BUSY = [
    *RUN,
    "--max_train_steps=6",
    "--checkpointing_steps=1",
    "--checkpoints_total_limit=1",
    "--save_model_epochs=1",
]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}


def main(arguments):
    """Train, and be killed by SIGKILL at the file operation in the run folder that KILL_AT counts to."""
    folder = next(word.partition("=")[2] for word in arguments if word.startswith("--output_dir="))
    left = int(os.environ["KILL_AT"])

    def hook(event, details):
        nonlocal left
        is_change = event in CHANGES or event == "open" and (details[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        # `shutil.rmtree` gives names relative to the folder it removes.
        if is_change and (str(details[0]).startswith(folder) or event in CHANGES and "/" not in str(details[0])):
            left -= 1
            if left == 0:
                os.write(1, f"\nkilled at {event} {details[0]}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    from ddpm_hf.__main__ import main as command

    command(["train", *arguments])


def everything(folder):
    """Return what must be equal: weights, average, optimizer, every logged number but the speed, the pictures."""
    last = checkpoints(folder)[-1]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["images_per_second"], line["seconds"]
    return {
        "step": last.name,
        "weights": safetensors.torch.load_file(last / "model.safetensors"),
        "ema": safetensors.torch.load_file(last / "ema.safetensors"),
        "published": safetensors.torch.load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"),
        "optimizer": torch.load(last / "optimizer.bin", weights_only=True)["state"],
        "metrics": lines,
    }


def files(folder):
    """Return the names of all files of a run, and the content of its pictures."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    pictures = (".png", ".gif")
    return {str(path.relative_to(folder)): path.read_bytes() if path.suffix in pictures else None for path in paths}


def assert_equal(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), one.keys() ^ other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    else:
        assert one == other


def kill_many(root: Path, kills: int, seed: int = 0, most_operations: int = 150) -> collections.Counter:
    """Kill runs `kills` times in all, and compare each that ends with an unbroken one. Return where the kills fell."""
    whole, places, draw, started = root / "whole", collections.Counter(), random.Random(seed), time.time()
    processes.finish(f"{whole}.log", *BUSY, f"--output_dir={whole}")
    duration, done, ended, folder = time.time() - started, 0, 0, root / "run-0"
    while True:
        timed, last = done % 2 == 1, done == kills
        number = 10**9 if timed or last else draw.randint(1, most_operations)
        log = Path(f"{folder}.log")
        log.unlink(missing_ok=True)
        words = [*BUSY, f"--output_dir={folder}", "--resume_from_checkpoint=latest"]
        started = time.time()
        child = processes.start(log, *words, program="kills", environment={"KILL_AT": str(number)})
        child.join(draw.uniform(0, duration) if timed and not last else 240)
        child.kill()
        child.join()
        said = log.read_text()
        assert "Traceback" not in said and child.exitcode in (0, -signal.SIGKILL), said
        if child.exitcode == 0:
            assert_equal(everything(folder), everything(whole))
            assert_equal(files(folder), files(whole))
            if last:
                return places
            duration = time.time() - started  # the first run also waited for the imports
            ended += 1
            folder = root / f"run-{ended}"
        else:
            done += 1
            places[place_of(said)] += 1


def place_of(said: str) -> str:
    """Return the file operation at which a run was killed, without numbers, from the end of what it printed."""
    at = re.findall(r"killed at (\S+) (\S+)\n", said)
    return f"{at[-1][0]} {re.sub('[0-9]+', '#', Path(at[-1][1]).name)}" if at else "after a random time"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for place, count in sorted(kill_many(Path(folder), given.kills, given.seed).items()):
            print(f"{count:4} {place}")
    print(f"{given.kills} kills: every run that ended is the unbroken one, bit for bit.")
