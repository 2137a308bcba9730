"""A tracker that fails costs its own log and nothing else."""

import os

import pytest
from accelerate import Accelerator
from conftest import TINY

from ddpm_hf.config.command_line import parse_config
from ddpm_hf.training.run import reset_accelerate
from ddpm_hf.training.trackers import end_trackers, log, start_tracker


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_full_disk_under_tensorboard_is_one_warning(tmp_path, capfd):
    config = parse_config([*TINY, "--logger=tensorboard", f"--output_dir={tmp_path}"])
    reset_accelerate()
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path / "logs"))
    start_tracker(config, accelerator)
    log(accelerator, lambda tracker: tracker.log({"loss": 1.0}, step=0))
    assert capfd.readouterr() == ("", "")
    for events in (tmp_path / "logs").rglob("events.out.*"):
        events.unlink()
        events.symlink_to("/dev/full")
    for step in range(3):
        log(accelerator, lambda tracker, step=step: tracker.log({"loss": 1.0}, step=step))
    end_trackers(accelerator)
    accelerator.end_training()
    printed = "".join(capfd.readouterr())
    assert printed.count("Warning: --logger tensorboard failed ([Errno 28] No space left on device), so nothing") == 1
    assert "Traceback" not in printed and printed.count("\n") == 1
