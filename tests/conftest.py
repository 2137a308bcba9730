"""Set up all tests: offline, quiet, at most two threads, and files only in the test's own folder."""

import os
import shutil
import tempfile


os.environ.update(
    HF_HOME=tempfile.mkdtemp(prefix="ddpm_hf-"),  # diffusers and datasets read it when they are imported
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    ACCELERATE_USE_CPU=str(os.environ.get("DDPM_HF_TEST_DEVICE", "cpu") == "cpu").lower(),
    OMP_NUM_THREADS="1",  # tiny networks: a second thread costs more than it gives, tenfold on a busy machine
    TOKENIZERS_PARALLELISM="false",
)

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from ddpm_hf.config.command_line import parse_config
from ddpm_hf.diffusion.losses import NUM_BANDS
from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler, make_scheduler
from ddpm_hf.models.classes import Classes
from ddpm_hf.models.pretrained import Pretrained
from ddpm_hf.models.saving import save_pipeline
from ddpm_hf.training.batches_ahead import draw_batches
from ddpm_hf.training.loop import step, train
from ddpm_hf.training.run import open_run, reset_accelerate


ROOT = Path(__file__).parent.parent
# A run of a few seconds: the bundled digits, the smallest UNet that has all parts, ten timesteps.
TINY = [
    "--dataset_name=digits", "--resolution=8", "--base_channels=8", "--channel_mults=1,2", "--layers_per_block=1",
    "--ddpm_num_steps=10", "--ddpm_num_inference_steps=5", "--train_batch_size=8", "--eval_batch_size=2",
    "--lr_warmup_steps=2", "--learning_rate=1e-3", "--logger=none", "--logging_steps=3",
]  # fmt: skip
# The same on two of the ten digits, because these are decoded five times as fast as all.
TWO_DIGITS = [*TINY, "--class_names=3,7"]


def pytest_unconfigure():
    """Take HuggingFace's caches of this session away after it; each of pytest-xdist's processes has its own."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Twelve 16x16 RGB images in two classes, as files."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for k in range(12):
        path = folder / "train" / ("cat", "dog")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder / "train"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its settings for the life of a process; training resets them, and so do tests without it."""
    yield
    reset_accelerate()


def steps(count, *flags):
    """Open a run on `flags` and take `count` steps of it; return the Run and the losses, one tensor a step."""
    run = open_run(parse_config([*TINY, "--overwrite_output_dir", *map(str, flags)]))
    run.model.train()
    with run.lock, contextlib.closing(draw_batches(run)) as batches:
        for _ in range(count):
            step(run, batches)
    losses = [row[:NUM_BANDS].sum() for row in run.state.pending]
    return run, losses


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory):
    """Real digits that look like MNIST: scikit-learn's, centred in 28x28, 120 to train on and 60 held out."""
    from sklearn.datasets import load_digits

    folder, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for k in range(180):
        pixels = Image.fromarray((digits.images[k] * 255 / 16).astype(np.uint8)).resize((20, 20), Image.BICUBIC)
        canvas = Image.new("L", (28, 28))
        canvas.paste(pixels, (4, 4))
        path = folder / ("train" if k < 120 else "test") / str(digits.target[k]) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(path)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, digit_folder):
    """A run folder with an untrained pipeline of 28x28 images, 20 timesteps, and its train_config.json."""
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", digit_folder)


def untrained_unet(sample_size, variance_type="fixed_small", channels=1, seed=0, **kwargs):
    """A tiny UNet without attention; one that learns its variance has twice the outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=sample_size,
            in_channels=channels,
            out_channels=channels * (2 if variance_type == "learned_range" else 1),
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
            **kwargs,
        )


def make_run(folder, data, seed=0, **scheduler):
    """Save a tiny pipeline of 28x28 grey images and the flags that evaluation reads."""
    unet = untrained_unet(28, scheduler.get("variance_type"), seed=seed)
    folder.mkdir()
    save_pipeline(folder, unet, PaperDDPMScheduler.nichol_cosine(20, **scheduler))
    flags = {"dataset_name": str(data), "resolution": 28, "validation_split": "test", "output_dir": str(folder)}
    (folder / "train_config.json").write_text(json.dumps({"flags": flags, "git_commit": None}))
    return folder


def model_of(unet, scheduler, names=None):
    """A model in memory, as `load_pretrained` returns one."""
    classes = Classes.of_model(unet.config.num_class_embeds, dict(enumerate(names)) if names else None)
    return Pretrained(
        unet, scheduler, {"name": "it", "revision": None, "unet_sha256": "0", "schedule": "0"}, {}, Path(), classes
    )


def command(*arguments, code=0, **kwargs):
    """Run `python -m ddpm_hf` to its end, which must have this exit code; return what it printed."""
    words = [sys.executable, "-m", "ddpm_hf", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, **kwargs)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def guidance_models(tmp_path_factory):
    """A conditional model, a classifier and a plain model, trained on the digits for a moment."""
    root = tmp_path_factory.mktemp("guided")
    flags = [*TINY, "--max_train_steps=6", "--validation_split=0.1", "--eval_batch_size=10"]
    for name, more in {"conditional": ["--class_conditional"], "classifier": ["--objective=classify"]}.items():
        train(parse_config([*flags, *more, f"--output_dir={root}/{name}"]))
    unet = UNet2DModel.from_pretrained(root / "conditional" / "unet")
    unet = UNet2DModel.from_config(unet.config, num_class_embeds=None)
    save_pipeline(root / "plain", unet, make_scheduler("linear", 10))
    return root
