"""Offline, quiet, two threads at most, and nothing written outside the test's own folder."""

import os


os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    ACCELERATE_USE_CPU="true",
    OMP_NUM_THREADS="1",  # tiny networks: a second thread costs more than it gives, tenfold on a busy machine
    TOKENIZERS_PARALLELISM="false",
)

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from ddpm_hf.config import parse_config
from ddpm_hf.data import training_batches
from ddpm_hf.losses import NUM_BANDS
from ddpm_hf.run import open_run
from ddpm_hf.training import step


ROOT = Path(__file__).parent.parent
# A run of a few seconds: the bundled digits, the smallest UNet that has all parts, ten timesteps.
TINY = [
    "--dataset_name=digits", "--resolution=8", "--base_channels=8", "--channel_mults=1,2", "--layers_per_block=1",
    "--ddpm_num_steps=10", "--ddpm_num_inference_steps=5", "--train_batch_size=8", "--eval_batch_size=2",
    "--lr_warmup_steps=2", "--learning_rate=1e-3", "--logger=none", "--logging_steps=3",
]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """HuggingFace's caches in a folder of this session."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_HOME"]) / "datasets"


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


def start_script(*arguments, processes=1, **kwargs):
    """Start train_unconditional.py as a user does, in a session of its own."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / "train_unconditional.py"), *map(str, arguments)]
    kwargs = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) | kwargs
    return subprocess.Popen(command, env=environment, **kwargs)


def script(*arguments, code=0, **kwargs):
    """Run train_unconditional.py to its end, which must have this exit code; return what it printed."""
    process = start_script(*arguments, **kwargs)
    out, error = process.communicate()
    assert process.returncode == code, out + error
    return out + error


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps precision and accumulation for the life of a process; each test begins anew."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def steps(count, *flags):
    """Open a run on `flags` and take `count` steps of it; return the Run and the losses, one tensor a step."""
    run = open_run(parse_config([*TINY, "--overwrite_output_dir", *map(str, flags)]))
    batches = training_batches(run.train_set, run.config, run.state.images_seen, 0, 1)
    run.model.train()
    for _ in range(count):
        step(run, batches)
    losses = [row[:NUM_BANDS].sum() for row in run.state.pending]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return run, losses
