"""Scores during training: written, logged, equal after a resume, and used to choose best/."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import TINY
from diffusers import DDPMPipeline

from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.evaluation.records import read_record
from ddpm_hf.training import periodic
from ddpm_hf.training.loop import train
from ddpm_hf.training.run import open_run
from ddpm_hf.training.scoring import DTYPES


@pytest.fixture(scope="module")
def flags(digit_folder):
    return [
        f"--dataset_name={digit_folder}", "--validation_split=test", "--resolution=28", "--base_channels=8",
        "--channel_mults=1,1", "--layers_per_block=1", "--ddpm_num_steps=5", "--ddpm_num_inference_steps=2",
        "--ddpm_beta_schedule=nichol_cosine", "--train_batch_size=20", "--eval_batch_size=2", "--logger=none",
        "--learning_rate=1e-3", "--lr_warmup_steps=0", "--max_train_steps=12", "--checkpointing_steps=6",
        "--eval_metrics=bits_per_dim,fd_mnist", "--eval_epochs=1", "--eval_num_images=40", "--save_best",
        "--best_by=fd_mnist",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    """A run of two epochs that was scored after each."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    train(parse_config([*flags, f"--output_dir={folder}"]))
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_scores_are_logged_and_each_has_its_record(run):
    scored = [line for line in lines(run) if "scores" in line]
    assert [line["step"] for line in scored] == [6, 12]
    for line in scored:
        record = read_record(run / "evaluations" / f"step_{line['step']:07d}.json")
        values = {entry["id"]: entry["value"] for entry in record["metrics"]}
        assert values == line["scores"] and "fd_mnist-9ea1c6a6_40_full" in values and values["bits_per_dim"] > 0
        assert record["model"]["train_step"] == line["step"] and record["sampler"]["seed"] == 1_000_000_000
    assert scored[0]["scores"]["bits_per_dim"] != scored[1]["scores"]["bits_per_dim"]


def test_best_is_the_pipeline_of_the_best_score(run, tmp_path, capsys):
    scored = [line for line in lines(run) if "scores" in line]
    best = min(scored, key=lambda line: line["scores"]["fd_mnist-9ea1c6a6_40_full"])
    wanted = read_record(run / "evaluations" / f"step_{best['step']:07d}.json")["model"]["unet_sha256"]
    flags = ["--metrics=memorization", "--num_images=2", "--num_inference_steps=2", f"--output={tmp_path / 'b.json'}"]
    main(["evaluate", str(run / "best"), *flags, f"--samples_dir={tmp_path / 's'}"])
    assert "memorization_exact_copies" in capsys.readouterr().out
    assert read_record(tmp_path / "b.json")["model"]["unet_sha256"] == wanted
    DDPMPipeline.from_pretrained(run / "best")


@pytest.mark.parametrize("seed", [1_000_000_000, 0])
def test_a_record_of_the_training_compares_with_one_of_evaluate(run, seed, tmp_path, capsys):
    """The same model and sampler: the same numbers from the same seed, and the same protocol from another."""
    while_training, later = run / "evaluations" / "step_0000012.json", tmp_path / "later.json"
    how = ["--sampler=ddim", "--num_inference_steps=5", "--num_images=40", "--bound_images=512"]
    how += ["--bound_timesteps=5", "--metrics=fd_mnist,bits_per_dim", f"--seed={seed}", "--batch_size=20"]
    main(["evaluate", str(run), *how, f"--output={later}", f"--samples_dir={tmp_path / 'samples'}"])
    main(["compare", str(while_training), str(later)])
    assert "fd_mnist" in capsys.readouterr().out
    ours, theirs = read_record(while_training), read_record(later)
    assert ours["model"]["unet_sha256"] == theirs["model"]["unet_sha256"]
    differing = {key for key in ours["sampler"] if ours["sampler"][key] != theirs["sampler"].get(key)}
    assert differing == (set() if seed else {"seed"}) and ours["sampler"].keys() == theirs["sampler"].keys()
    if seed:
        # Weights at another place in memory change round-off, which may change a few pixels by one grey level.
        for one, other in zip(ours["metrics"], theirs["metrics"]):
            assert one["id"] == other["id"] and one["value"] == pytest.approx(other["value"], rel=1e-4)


def test_a_resumed_run_scores_the_same(run, flags, tmp_path):
    train(parse_config([*flags, f"--output_dir={tmp_path / 'r'}", f"--resume_from_checkpoint={run / 'checkpoint-6'}"]))
    assert lines(tmp_path / "r")[-1]["scores"] == lines(run)[-1]["scores"]


# Epochs of five steps. Each ends with a score and a sheet.
SHORT = [
    *TINY, "--class_names=3", "--validation_split=143", "--max_train_steps=10", "--checkpointing_steps=5",
    "--eval_metrics=memorization", "--eval_epochs=1", "--eval_num_images=40", "--save_images_epochs=1", "--save_best",
    "--logging_steps=2", "--validation_epochs=1", "--ddpm_num_steps=3", "--ddpm_num_inference_steps=2",
]  # fmt: skip


def short_run(folder, *more):
    return train(parse_config([*SHORT, f"--output_dir={folder}", *more]))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    assert short_run(folder).finished
    return folder


def written(folder):
    """Return what an interruption must not change: every logged number but the speed, pictures and weights."""
    log = [line | {"seconds": 0, "images_per_second": 0} for line in lines(folder)]
    paths = [path for path in folder.rglob("*") if path.suffix in (".png", ".gif", ".safetensors", ".npz")]
    return log, {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(("task", "step"), [("score_run", 5), ("sample_together", 5), ("score_run", 10)])
def test_what_a_signal_interrupts_is_done_by_the_resumed_run(short, tmp_path, monkeypatch, task, step):
    folder, resume = tmp_path / "run", "latest"
    if step == 10:  # go back to the checkpoint in the middle
        shutil.copytree(short, folder)
        resume = "checkpoint-5"
    work, calls = getattr(periodic, task), []

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        calls.append(task)
        return work(*arguments, **options)

    monkeypatch.setattr(periodic, task, interrupted)
    for _ in range(1 + (step == 5)):  # the second time, before the first step of the resumed run
        stopped = short_run(folder, f"--resume_from_checkpoint={resume}")
        resume = "latest"
        assert (stopped.step, stopped.finished, stopped.signal) == (step, False, signal.SIGTERM)
    assert calls and not (folder / "samples" / f"epoch_{step // 5:04d}.png").exists()
    monkeypatch.undo()
    assert short_run(folder, "--resume_from_checkpoint=latest").finished
    assert written(folder) == written(short)


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (dict(eval_metrics=["fid"], streaming=True), "--streaming"),
        (dict(best_by="fid"), "--best_by fid is not measured"),
        (dict(eval_epochs=0), "--eval_epochs is 0"),
        (dict(eval_num_images=5), "--eval_num_images is 5"),
    ],
)
def test_what_cannot_be_scored_is_refused(flags, wanted):
    with pytest.raises(UserError, match=wanted):
        TrainingConfig(dataset_name="digits", **flags)


def test_an_unknown_metric_is_refused_before_anything_is_written(tmp_path):
    flags = [*TINY, "--eval_metrics=memorisation", f"--output_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="there is no metric 'memorisation': did you mean memorization"):
        train(parse_config(flags))
    assert not (tmp_path / "run").exists()


def test_missing_weights_are_told_before_training(flags, tmp_path, capsys):
    def dry_run(*more):
        few = ["--train_batch_size=1", "--dry_run"]  # it measures steps
        train(parse_config([*flags, *more, *few, "--output_dir", str(tmp_path / "r")]))

    dry_run("--eval_metrics=fid,fd_mnist")
    assert "Warning: fid will be skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="--best_by fid is not available"):
        dry_run("--eval_metrics=fid", "--best_by=fid")
    (tmp_path / "broken.pth").write_bytes(b"not weights")
    with pytest.raises(UserError, match="broken.pth"):
        dry_run("--eval_metrics=fid", "--best_by=validation_loss", f"--eval_inception={tmp_path / 'broken.pth'}")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_precision_that_records_tell_is_that_of_the_drawn_images(flags, tmp_path, precision):
    """accelerate puts the autocast into the forward() of a network, and so of its average's copy."""
    flags = [*flags, f"--mixed_precision={precision}", "--use_ema", f"--output_dir={tmp_path}/run"]
    run = open_run(parse_config(flags))
    seen = []
    run.published.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        run.published(torch.zeros(1, 1, 28, 28), torch.tensor([3]))
    assert str(seen[0]) == f"torch.{DTYPES[precision]}"
