"""A run that is killed and resumed equals an uninterrupted run, bit for bit.

The runs are real ones in processes of their own (see processes.py); what several tests begin with is run once.
"""

import os
import shutil
import signal
import time
from pathlib import Path

import processes
import pytest
import safetensors.torch
import torch
from kills import RUN, assert_equal, everything

from ddpm_hf.run_folder import checkpoints


def start(folder, *flags, **kwargs):
    return processes.start(f"{folder}.log", *RUN, f"--output_dir={folder}", *flags, **kwargs)


def finish(folder, *flags, **kwargs):
    return processes.finish(f"{folder}.log", *RUN, f"--output_dir={folder}", *flags, **kwargs)


def start_two(folder, *flags):
    return processes.start_together(f"{folder}.log", *RUN, f"--output_dir={folder}", *flags, processes=2)


def finish_two(folder, *flags):
    return processes.ended(start_two(folder, *flags), f"{folder}.log")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run from its beginning to its end, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    finish(folder, "--checkpoints_total_limit=9")
    return folder


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four") / "run"
    finish(folder, "--max_train_steps=4")
    return folder


@pytest.fixture
def short(four_steps, tmp_path):
    """A finished run of four steps, to go on with."""
    return shutil.copytree(four_steps, tmp_path / "run")


def test_resumed_from_a_checkpoint_in_the_middle_of_an_epoch_and_of_a_log_line(unbroken, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    # Step 8 is neither a multiple of logging_steps (3) nor the end of an epoch (images 163, 326).
    finish(folder, f"--resume_from_checkpoint={folder / 'checkpoint-8'}")
    assert_equal(everything(folder), everything(unbroken))
    # Rotation keeps the newest.
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-20", "checkpoint-24"]


IMPORTANCE = [
    "--objective=vlb", "--timestep_sampling=loss_second_moment", "--ddpm_num_steps=5", "--dropout=0",
    "--checkpoints_total_limit=9",
]  # fmt: skip


def loss_history(checkpoint):
    return torch.load(checkpoint / "state.pt", weights_only=True)["loss_history"]


def test_timesteps_drawn_by_the_losses_after_a_resume_and_of_two_processes(tmp_path):
    whole, broken, two = tmp_path / "whole", tmp_path / "broken", tmp_path / "two"
    finish(whole, *IMPORTANCE)
    shutil.copytree(whole / "checkpoint-12", broken / "checkpoint-12")
    finish(broken, *IMPORTANCE, f"--resume_from_checkpoint={broken / 'checkpoint-12'}")
    one, other = everything(whole), everything(broken)
    one["metrics"] = [line for line in one["metrics"] if line["step"] > 12]
    assert_equal(other, one)
    assert torch.equal(loss_history(broken / "checkpoint-24"), loss_history(whole / "checkpoint-24"))
    assert not loss_history(whole / "checkpoint-12").isnan().any()  # it is in use where the run goes on
    assert not torch.equal(loss_history(whole / "checkpoint-12"), loss_history(whole / "checkpoint-24"))

    finish_two(two, *IMPORTANCE, "--gradient_accumulation_steps=1")
    histories = [loss_history(folder / "checkpoint-24") for folder in (whole, two)]
    # Were one loss missing or another timestep drawn, a row would be shifted.
    assert torch.allclose(*histories, rtol=0.01) and not histories[0].isnan().any()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_leaves_a_checkpoint_a_pipeline_and_a_message(unbroken, tmp_path, number, code):
    folder = tmp_path / "run"
    child = start(folder)
    deadline = time.time() + 60
    while not (folder / "metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, number)
    child.join(60)
    log = Path(f"{folder}.log").read_text()
    assert child.exitcode == code, log
    step = int(checkpoints(folder)[-1].name.split("-")[1])
    assert f"Stopped after step {step} of 24" in log and "--resume_from_checkpoint latest" in log
    assert "Traceback" not in log and 3 <= step < 24
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    finish(folder, "--resume_from_checkpoint=latest")
    assert_equal(everything(folder), everything(unbroken))


def test_a_signal_ends_a_sheet_that_takes_long(tmp_path):
    folder = tmp_path / "run"
    child = start(folder, "--save_images_epochs=1", "--ddpm_num_steps=4000", "--ddpm_num_inference_steps=4000")
    deadline = time.time() + 60
    while "Sampling" not in Path(f"{folder}.log").read_text() and time.time() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    log = Path(f"{folder}.log").read_text()
    # The first epoch ends with step 11. The sheet of this step is left to the resumed run, so no more steps are taken.
    assert child.exitcode == 143 and "Stopped after step 11 of 24" in log, log
    assert checkpoints(folder)[-1].name == "checkpoint-11" and not (folder / "samples").exists()


def test_a_signal_in_the_last_figures_leaves_them_to_the_next_run(tmp_path):
    folder = tmp_path / "run"
    flags = ["--ddpm_num_steps=1000", "--max_train_steps=4"]
    child = start(folder, *flags, "--ddpm_num_inference_steps=200")
    deadline = time.time() + 60
    while "Figures" not in Path(f"{folder}.log").read_text() and time.time() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 143, Path(f"{folder}.log").read_text()
    assert checkpoints(folder)[-1].name == "checkpoint-4" and not (folder / "figures" / "reverse.gif").exists()
    shutil.rmtree(folder / "unet")  # as if it had come before the pipeline
    finish(folder, *flags, "--resume_from_checkpoint=latest")
    assert (folder / "figures" / "reverse.gif").exists() and (folder / "unet").exists()


def test_changed_flags_are_told(short):
    log = finish(short, "--max_train_steps=8", "--resume_from_checkpoint=latest", "--seed=5", "--no_use_ema")
    assert "one unbroken run: seed 0 -> 5, use_ema True -> False, total_steps 4 -> 8." in log
    assert f"Resuming from {short / 'checkpoint-4'} (step 4 of 8)." in log


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9])
def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_is_good(short, share):
    # The optimizer is larger than the weights; share 0 is too small for these already.
    weights, optimizer = (
        (short / "checkpoint-4" / name).stat().st_size for name in ("model.safetensors", "optimizer.bin")
    )
    size = int(weights + share * (optimizer - weights)) if share else 20_000
    assert 20_000 < weights < optimizer
    log = finish(short, "--resume_from_checkpoint=latest", code=2, file_size=size)
    assert "could not be written" in log and "free some space" in log and "Traceback" not in log
    assert [path.name for path in checkpoints(short)] == ["checkpoint-4"] and not list(short.glob("*.tmp"))
    finish(short, "--resume_from_checkpoint=latest", "--max_train_steps=6")
    assert [path.name for path in checkpoints(short)] == ["checkpoint-4", "checkpoint-6"]


def test_a_nan_loss_stops_with_step_and_cause_and_the_last_checkpoint_is_good(short):
    flags = ["--lr_scheduler=constant", "--learning_rate=1e25", "--max_grad_norm=0", "--logging_steps=10"]
    log = finish(short, "--resume_from_checkpoint=latest", *flags, code=2)
    assert "became nan or infinite at step" in log and "learning rate 1e+25" in log and "Traceback" not in log
    assert f"the last good checkpoint is {short / 'checkpoint-4'}" in log
    saved = safetensors.torch.load_file(short / "checkpoint-4" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    assert [path.name for path in checkpoints(short)] == ["checkpoint-4"]


def test_a_streamed_run_resumes_exactly(tmp_path, image_folder):
    flags = [
        f"--dataset_name={image_folder}", "--streaming", "--resolution=8", "--train_batch_size=2",
        "--max_train_steps=9", "--class_names=", "--validation_split=", "--random_flip", "--checkpointing_steps=2",
    ]  # fmt: skip
    one = tmp_path / "one"
    log = finish(one, *flags, "--checkpoints_total_limit=9")
    assert "9 steps of 4 images, on 1 x" in log  # without epochs, because the length of the stream is unknown
    other = shutil.copytree(one, tmp_path / "other")
    finish(other, *flags, f"--resume_from_checkpoint={other / 'checkpoint-4'}")
    assert_equal(everything(other), everything(one))


def test_two_processes_killed_and_resumed_and_counting_as_one_does(unbroken, tmp_path):
    # Two processes of 8 images are one process that accumulates two batches of 8.
    flags = ["--gradient_accumulation_steps=1", "--checkpoints_total_limit=9", "--mixed_precision=auto"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish_two(whole, *flags)
    children = start_two(broken, *flags)
    while not (broken / "checkpoint-8").exists():
        assert all(child.is_alive() for child in children)
        time.sleep(0.01)
    for child in children:
        child.kill()
        child.join()
    assert not (broken / "unet").exists()  # it was not at its end
    finish_two(broken, *flags, "--resume_from_checkpoint=latest")
    two, again, one = everything(whole), everything(broken), everything(unbroken)
    assert_equal(again, two)
    for mine, other in zip(two["metrics"], one["metrics"], strict=True):
        for name in ("step", "epoch", "images_seen", "lr", "ema_decay"):
            assert mine[name] == other[name]
        # The same images with the same noise: only the order of summation, and the dropout, differ.
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.05)
