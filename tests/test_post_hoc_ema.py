"""Averages of the weights of any length, reconstructed after training (post-hoc EMA)."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TWO_DIGITS
from diffusers import DDPMPipeline
from safetensors.torch import load_file

import ddpm_hf
from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.models.ema import update_ema
from ddpm_hf.models.post_hoc_ema import (
    LENGTHS,
    find_snapshots,
    gamma_of,
    make_power_averages,
    mixture,
    power_decay,
    reconstruct,
)
from ddpm_hf.training.loop import train


def shares(steps: int, gamma: float, at: int) -> np.ndarray:
    """The share of each step in an average at step `at`: the integral of (gamma + 1) s^gamma / at^(gamma + 1)."""
    s = np.arange(1, steps + 1)
    return np.where(s <= at, (s / at) ** (gamma + 1) - ((s - 1) / at) ** (gamma + 1), 0)


@pytest.mark.parametrize("length", [0.005, 0.05, 0.1, 0.28])
def test_the_length_is_the_standard_deviation_of_the_shares(length):
    weights = shares(100_000, gamma_of(length), 100_000)
    s = np.arange(1, 100_001) - 0.5
    mean = (weights * s).sum()
    assert math.sqrt((weights * (s - mean) ** 2).sum()) / 100_000 == pytest.approx(length, rel=1e-4)


def test_the_average_of_training_has_these_shares():
    """After t updates with the weights e_1, e_2, ... the average is the list of the shares."""
    network = torch.nn.Linear(12, 1, bias=False)
    averages = make_power_averages(network, is_wanted=True)
    for step in range(12):
        with torch.no_grad():
            network.weight.copy_(torch.eye(12)[step : step + 1])
        for length, average in averages.items():
            update_ema(average, network, power_decay(length, step))
    for length, average in averages.items():
        wanted = torch.tensor(shares(12, gamma_of(length), 12), dtype=torch.float32)
        torch.testing.assert_close(average.weight[0], wanted, atol=1e-6, rtol=0)
    assert make_power_averages(network, is_wanted=False) == {}


@pytest.mark.parametrize("length,at", [(0.03, 400), (0.075, 400), (0.15, 400), (0.05, 325)])
def test_a_mixture_of_snapshots_is_the_average(length, at):
    """The weights do a random walk of 400 steps. Thirty-two snapshots give another average to 1e-3."""
    walk = np.random.default_rng(0).normal(size=(400, 20)).cumsum(axis=0)
    pairs = [(step, gamma_of(kept)) for step in np.arange(1, 33) * 400 // 32 if step <= at for kept in LENGTHS]
    factors, error = mixture([step for step, _ in pairs], [gamma for _, gamma in pairs], at, gamma_of(length))
    found = sum(factor * shares(400, gamma, step) for factor, (step, gamma) in zip(factors, pairs)) @ walk
    exact = shares(400, gamma_of(length), at) @ walk
    assert np.linalg.norm(found - exact) < 1e-3 * np.linalg.norm(exact)
    assert sum(factors) == pytest.approx(1, abs=1e-9) and error < 0.05


FLAGS = ["--max_train_steps=8", "--ema_snapshots=4", "--checkpointing_steps=3", "--validation_split=0.1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with snapshots at the steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    train(parse_config([*TWO_DIGITS, *FLAGS, f"--output_dir={folder}"]))
    return folder


def test_a_resumed_run_has_the_same_snapshots(trained, tmp_path):
    assert list(find_snapshots(trained)) == [2, 4, 6, 8]
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    later = find_snapshots(tmp_path / "run")
    later[6].write_bytes(b"of another future")
    resume = f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-3'}"
    train(parse_config([*TWO_DIGITS, *FLAGS, f"--output_dir={tmp_path / 'run'}", resume]))
    assert list(find_snapshots(tmp_path / "run")) == [2, 4, 6, 8]
    for step, path in find_snapshots(trained).items():
        tensors, again = load_file(path), load_file(find_snapshots(tmp_path / "run")[step])
        assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)
    # The reconstruction of a length that was kept is that average.
    kept, error = reconstruct(trained, 0.1)
    last = load_file(find_snapshots(trained)[8])
    assert error < 1e-6
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, last[f"0.1/{name}"], atol=1e-6, rtol=1e-5)


def test_the_command_writes_a_pipeline_and_a_sweep_the_best(trained, tmp_path, capsys):
    main(["ema", str(trained), str(tmp_path / "one"), "--length=0.1"])
    unet = DDPMPipeline.from_pretrained(tmp_path / "one").unet
    wanted, _ = reconstruct(trained, 0.1)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in unet.state_dict().items())
    assert not (tmp_path / "one" / "ema_sweep.png").exists()
    main(["ema", str(trained), str(tmp_path / "best"), "--length=0.05,0.1,0.2"])
    facts = json.loads((tmp_path / "best" / "ema.json").read_text())
    values = {row["length"]: row["value"] for row in facts["lengths"]}
    assert list(values) == [0.05, 0.1, 0.2] and facts["length"] == min(values, key=values.get) and facts["step"] == 8
    unet = DDPMPipeline.from_pretrained(tmp_path / "best").unet
    wanted, _ = reconstruct(trained, facts["length"])
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in unet.state_dict().items())
    assert (tmp_path / "best" / "ema_sweep.png").stat().st_size > 5_000


def test_a_metric_of_evaluate_chooses_the_length(trained, tmp_path):
    """The value of each length is that which `evaluate` finds for the pipeline that is written."""
    main(["ema", str(trained), str(tmp_path / "best"), "--length=0.05,0.2", "--by=bits_per_dim", "--num_images=8"])
    facts = json.loads((tmp_path / "best" / "ema.json").read_text())
    values = {row["length"]: row["value"] for row in facts["lengths"]}
    assert facts["by"] == "bits_per_dim" and facts["length"] == min(values, key=values.get)
    result = ddpm_hf.evaluate(
        tmp_path / "best", metrics=["bits_per_dim"], num_images=8, output=tmp_path / "record.json"
    )
    assert result.record["metrics"][0]["value"] == values[facts["length"]]


def test_what_cannot_be_averaged_is_refused(trained, tiny_run, tmp_path, capsys):
    cut = shutil.copytree(trained, tmp_path / "cut", ignore=shutil.ignore_patterns("checkpoint-*"))
    find_snapshots(cut)[4].write_bytes(b"cut off")
    for words, sentence in {
        f"{trained} {tmp_path}/new --length=0.5": "--length has 0.5, but must be from 0.005 to 0.28",
        f"{trained} {tmp_path}/new --length=short": "is not a list of numbers: write --length 0.05,0.1",
        f"{trained} {tmp_path}/new --length=,": "--length is empty",
        f"{trained} {tmp_path}/new --step=1": "has no snapshot of step 1: give --step 2, the nearest",
        f"{trained} {tmp_path}/new --by=validation_los": "did you mean validation_loss?",
        f"{trained} {trained}": "already exists",
        f"{cut} {tmp_path}/new --length=0.1": "ema_snapshots cannot be loaded",
        f"{tiny_run} {tmp_path}/new --length=0.1": "has no ema_snapshots: train with --ema_snapshots",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(["ema", *words.split()])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and sentence in said, said
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="--objective classify cannot use --ema_snapshots"):
        TrainingConfig.from_preset("digits", objective="classify", ema_snapshots=4)
    old = shutil.copytree(trained / "checkpoint-3", tmp_path / "old" / "checkpoint-3")
    for name in ("power_averages.safetensors", "manifest.json"):  # as of a version without manifests
        (old / name).unlink()
    with pytest.raises(UserError, match="was trained without --ema_snapshots"):
        train(
            parse_config([*TWO_DIGITS, *FLAGS, f"--output_dir={tmp_path / 'run'}", f"--resume_from_checkpoint={old}"])
        )
