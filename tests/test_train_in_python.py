"""`train` called from Python, as in a notebook: its result, two calls in one process, threads, and a stop."""

import dataclasses
import os
import signal
import threading

import pytest
import torch
from accelerate import notebook_launcher
from conftest import TWO_DIGITS

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.diffusion.losses import OBJECTIVES, simple_loss
from ddpm_hf.models.pretrained import load_classifier
from ddpm_hf.run_folder import checkpoints
from ddpm_hf.training import loop
from ddpm_hf.training.checkpoints import TrainState
from ddpm_hf.training.loop import FinishedRun, train
from ddpm_hf.training.run import open_run


def config(folder, *flags):
    return parse_config([*TWO_DIGITS, "--max_train_steps=3", f"--output_dir={folder}", *flags])


def test_the_finished_run_has_its_losses_and_loads_its_model(tmp_path):
    run = train(config(tmp_path / "run", "--use_ema", "--validation_split=0.05"))
    assert (run.folder, run.step, run.finished, run.signal) == (tmp_path / "run", 3, True, None)
    assert set(run.losses) == {
        "loss",
        "loss_by_band",
        "validation_loss",
        "validation_loss_by_band",
        "validation_loss_ema",
        "validation_loss_ema_by_band",
    }
    assert 0.5 < run.losses["loss"] < 2
    model = run.load()
    assert model.unet.config.sample_size == 8 and not model.unet.training and len(model.scheduler) == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.step = 4
    assert train(config(tmp_path / "other", "--dry_run")) is None


def test_a_finished_classifier_is_no_model_and_is_resumed_at_its_end(tmp_path):
    folder = tmp_path / "run"
    run = train(config(folder, "--objective=classify"))
    with pytest.raises(UserError, match="is the run of a classifier, not of a model: give a model, and --classifier"):
        run.load()
    (folder / "figures" / "loss.png").unlink()  # as if the run had been killed before its figures
    again = train(config(folder, "--objective=classify", "--resume_from_checkpoint=latest"))
    assert again == run and (folder / "figures" / "loss.png").is_file() and not (folder / "samples").exists()
    load_classifier(str(folder))


def test_train_twice_in_a_process_with_other_precision_and_accumulation(tmp_path):
    first = train(config(tmp_path / "first"))
    other = train(config(tmp_path / "other", "--mixed_precision=bf16", "--gradient_accumulation_steps=2"))
    second = train(config(tmp_path / "second"))
    assert first.losses == second.losses != other.losses
    unets = [run.load().unet.state_dict() for run in (first, second)]
    assert all(torch.equal(unets[0][name], unets[1][name]) for name in unets[0])


def test_train_in_a_thread_that_is_not_the_main_one(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(train(config(tmp_path / "run"))))
    thread.start()
    thread.join()
    assert done[0].finished and done[0].step == 3


def test_train_under_the_notebook_launcher(tmp_path, capsys):
    notebook_launcher(train, (config(tmp_path / "run"),), num_processes=1)
    assert "Trained 3 steps" in capsys.readouterr().out
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3"]


def test_a_signal_returns_an_unfinished_run_that_can_be_resumed(tmp_path, monkeypatch, capsys):
    take_step = loop.step

    def step(run, batches):
        take_step(run, batches)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "step", step)
    stopped = train(config(tmp_path / "run"))
    assert stopped == FinishedRun(folder=tmp_path / "run", step=1, finished=False, signal=signal.SIGTERM, losses={})
    assert "Stopped after step 1 of 3" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    resumed = train(config(tmp_path / "run", "--resume_from_checkpoint=latest"))
    assert resumed.finished and resumed.losses == train(config(tmp_path / "whole")).losses


def test_the_parts_of_a_run_are_frozen_and_checkpoints_keep_their_keys(tmp_path):
    train(config(tmp_path / "run"))
    saved = torch.load(tmp_path / "run" / "checkpoint-3" / "state.pt", weights_only=True)
    # Those of version 0.1.0: an earlier version can read new checkpoints, and this one theirs.
    keys = ["step", "images_seen", "seconds", "best_score", "best_measure", "pending", "stream", "loss_history"]
    assert list(saved) == keys
    run = open_run(config(tmp_path / "run", "--resume_from_checkpoint=latest"))
    assert run.state == TrainState(**saved) and run.state.step == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.state = TrainState()


def test_an_objective_is_a_function_and_a_row(tmp_path, monkeypatch):
    def halved(scheduler, *, loss_type, snr_gamma):
        loss = simple_loss(scheduler, loss_type=loss_type, snr_gamma=snr_gamma)
        return lambda model, batch: loss(model, batch) / 2

    monkeypatch.setitem(OBJECTIVES, "halved", halved)
    flags = ["--max_train_steps=1", "--logging_steps=1"]
    whole, half = (train(config(tmp_path / name, *flags, f"--objective={name}")) for name in ("simple", "halved"))
    assert half.losses["loss"] == pytest.approx(whole.losses["loss"] / 2)
