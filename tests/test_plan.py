"""What a run will take is counted as it is done, and sheets reach every tracker."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from accelerate.tracking import TrackioTracker, WandBTracker
from conftest import TINY
from PIL import Image

from ddpm_hf import __main__ as package
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.training import plan
from ddpm_hf.training.periodic import log_sheet, what_is_due
from ddpm_hf.training.run import check_run


@pytest.mark.parametrize(
    "flags",
    [
        ["--save_images_epochs=2", "--validation_split=0.1", "--num_epochs=7", "--save_model_epochs=3"],
        ["--objective=classify", "--max_train_steps=90", "--save_model_epochs=2", "--use_ema"],
    ],
)
def test_tasks_are_counted_as_they_become_due(tmp_path, flags):
    run, _ = check_run(parse_config([*TINY, "--train_batch_size=40", f"--output_dir={tmp_path}/run", *flags]))
    for first in (0, run.total_steps // 2, run.total_steps - 1):
        run.state.step, run.state.images_seen = first, 40 * first
        told = plan.count_tasks(run)
        found = dict.fromkeys(told, 0)
        for step in range(first + 1, run.total_steps + 1):
            run.state.step, run.state.images_seen = step, 40 * step
            for name in what_is_due(run) & found.keys():
                found[name] += 1
        assert told == found and ("sheet" in told) == (run.config.objective != "classify")


def test_the_guided_sheet_takes_two_passes_for_each_of_ten_classes(tmp_path):
    flags = ["--class_conditional", "--label_dropout=0.1", "--max_train_steps=4"]
    run, _ = check_run(parse_config([*TINY, f"--output_dir={tmp_path}/run", *flags]))
    assert plan.forward_passes(run)["figures"] == 2 * (5 + 5 + 10) + 2 * 10 * 2 * 10  # two images, ten timesteps


def test_the_time_is_that_of_the_steps_and_of_all_images_that_pass_through_the_network(tmp_path):
    flags = ["--validation_split=0.1", "--max_train_steps=404", "--save_images_epochs=1", "--use_ema"]
    run, _ = check_run(parse_config([*TINY, f"--output_dir={tmp_path}/run", *flags]))
    # 1,617 images in steps of 8 are 202.1 steps an epoch, so there is one sheet after it, and one at the end.
    wanted = {"validation": 2 * 180 * 2, "sheet": 2 * 2 * 5, "scores": 0, "figures": 2 * (5 + 5 + 10)}
    assert plan.forward_passes(run) == wanted
    steps, rest = plan.seconds_left(run, 0.24)
    assert steps == pytest.approx(404 * 0.24) and rest == pytest.approx(780 * 0.01)
    run.state.step = 400
    assert plan.seconds_left(run, 0.24)[0] == pytest.approx(4 * 0.24)


def test_the_disk_space_is_that_of_real_checkpoints(guidance_models, tmp_path):
    folder = guidance_models / "conditional" / "checkpoint-6"
    real = sum(path.stat().st_size for path in folder.iterdir())
    parameters = sum(each.numel() for each in load_pretrained(str(guidance_models / "conditional")).unet.parameters())
    run, _ = check_run(parse_config([*TINY, "--class_conditional", f"--output_dir={tmp_path}/run"]))
    assert run.facts["parameters"] == parameters and 12 * parameters < real < 16 * parameters
    told = plan.format_bytes(12 * parameters)
    # Of 40 checkpoints, the oldest of two is removed after a third is written.
    flags = ["--max_train_steps=40", "--checkpointing_steps=1", "--checkpoints_total_limit=2", "--class_conditional"]
    limited, _ = check_run(parse_config([*TINY, *flags, f"--output_dir={tmp_path}/run"]))
    assert f"{plan.format_bytes((3 * 12 + 4) * parameters)}: up to 3 checkpoints" in plan.disk(limited)
    assert f"checkpoints of {told} each" in plan.disk(run)


@pytest.mark.parametrize(
    ("function", "value", "wanted"),
    [
        (plan.format_bytes, 950, "0.95 kB"),
        (plan.format_bytes, 16.2e6, "16 MB"),
        (plan.format_bytes, 2.44e9, "2.4 GB"),
        (plan.format_bytes, 3e15, "3000 TB"),
        (plan.format_seconds, 100, "100 seconds"),
        (plan.format_seconds, 130, "2.2 minutes"),
        (plan.format_seconds, 3120, "52 minutes"),
        (plan.format_seconds, 7300, "2.0 hours"),
        (plan.format_seconds, 1e6, "12 days"),
    ],
)
def test_numbers_have_a_unit_that_suits_them(function, value, wanted):
    assert function(value) == wanted


@pytest.mark.parametrize("kind", [WandBTracker, TrackioTracker])
def test_sheets_reach_wandb_and_trackio(kind, tmp_path, monkeypatch):
    """The fake has the part of the interface of wandb 0.31 and trackio 0.43 that accelerate's trackers and we use."""
    logged = []

    class FakeImage:
        def __init__(self, data_or_value, caption=None):
            path = isinstance(data_or_value, str)
            with Image.open(data_or_value) if path else data_or_value as picture:
                self.pixels = np.asarray(picture)

    fake_run = SimpleNamespace(log=lambda data, step=None: logged.append((step, data)), finish=lambda: None)
    fake = SimpleNamespace(init=lambda project, **options: fake_run, Image=FakeImage)
    monkeypatch.setitem(sys.modules, kind.name, fake)
    PartialState()
    tracker = kind("ddpm_hf")
    tracker.start()
    sheet = tmp_path / "epoch_0001.png"
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(sheet)
    log_sheet(tracker, torch.zeros(1, 1, 8, 8, dtype=torch.uint8), sheet, 7)
    ((step, data),) = logged
    (image,) = data["samples"] if isinstance(data["samples"], list) else [data["samples"]]
    assert step == 7 and np.array_equal(image.pixels, np.arange(12).reshape(3, 4))


@pytest.mark.parametrize(
    ("command", "rank", "says"), [("card x", 0, True), ("card x", 1, False), ("presets", 0, False)]
)
def test_a_command_that_loads_torch_says_so_first(command, rank, says, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(package.module_of(command.split()[0]), "run", lambda arguments: print("work"))
    monkeypatch.delitem(sys.modules, "torch")
    package.main(command.split())
    captured = capsys.readouterr()
    assert captured.out == "work\n" and ("Loading PyTorch" in captured.err) == says
