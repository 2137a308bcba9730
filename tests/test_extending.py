"""What others may want to add: each is one function or file and one row in a table, and works end to end."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import ddpm_hf
from ddpm_hf import commands
from ddpm_hf.__main__ import main
from ddpm_hf.community_pipelines import pipeline_module
from ddpm_hf.config.presets import PRESETS, Preset
from ddpm_hf.diffusion.losses import OBJECTIVES
from ddpm_hf.evaluation.metrics import METRICS, Metric
from ddpm_hf.sampling.samplers import SAMPLERS


def records(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_a_sampler(tiny_run, tmp_path, monkeypatch):
    """Euler's method for the probability flow, which is what DDIM does without noise."""

    def euler_step(scheduler, step):
        alpha_bar = float(scheduler.alphas_cumprod_at(step.prev_timestep))
        return alpha_bar**0.5 * step.pred_original_sample + (1 - alpha_bar) ** 0.5 * step.pred_epsilon, None

    monkeypatch.setitem(SAMPLERS, "euler", euler_step)
    ours = ddpm_hf.sample(tiny_run, 2, "euler", num_inference_steps=5)
    ddim = ddpm_hf.sample(tiny_run, 2, "ddim", num_inference_steps=5)
    for one, other in zip(ours, ddim):
        assert np.abs(np.array(one, dtype=int) - np.array(other, dtype=int)).max() <= 1
    output = tmp_path / "drawn"
    main(f"sample {tiny_run} --sampler euler --num_images 2 --num_inference_steps 5 --output {output}".split())
    assert json.loads((output / "samples.json").read_text())["sampler"]["method"] == "euler"
    assert np.array_equal(np.array(Image.open(output / "000001.png")), np.array(ours[1]))


def test_a_metric(tiny_run, digit_folder, tmp_path, monkeypatch):
    """It is scored by the command, and while a run trains, where it chooses the best pipeline."""

    def brightness(look):
        return [look.entry("brightness", look.images.double().mean().item(), lower_is_better=False)]

    monkeypatch.setitem(METRICS, "brightness", Metric(brightness))
    few = ["--num_images", "40", "--num_inference_steps", "2", "--samples_dir", str(tmp_path / "samples")]
    main(["evaluate", str(tiny_run), "--metrics", "brightness", *few, "--output", str(tmp_path / "one.json")])
    (entry,) = json.loads((tmp_path / "one.json").read_text())["metrics"]
    drawn = torch.stack([torch.tensor(np.array(Image.open(path))) for path in (tmp_path / "samples").glob("*.png")])
    assert entry["id"] == "brightness" and entry["value"] == pytest.approx(drawn.double().mean().item())

    flags = [*TINY, "--max_train_steps=2", "--eval_metrics=brightness", "--eval_num_images=40", "--save_best"]
    main(["train", *flags, "--best_by=brightness", f"--output_dir={tmp_path / 'run'}"])
    (record,) = records(tmp_path / "run" / "evaluations")
    assert record["metrics"][0]["id"] == "brightness" and (tmp_path / "run" / "best" / "unet").is_dir()


def test_an_objective(tmp_path, monkeypatch):
    """A constant loss: the log shows it, and the weights stay where they were."""

    def constant_loss(scheduler, *, loss_type, snr_gamma):
        def loss(model, batch):
            noisy = scheduler.q_sample(batch["images"], batch["noise"], batch["timesteps"])
            return 0 * model(noisy, batch["timesteps"]).sample.mean(dim=(1, 2, 3)) + 7

        return loss

    monkeypatch.setitem(OBJECTIVES, "constant", constant_loss)
    config = ddpm_hf.TrainingConfig.from_preset(
        dataset_name="digits", resolution=8, base_channels=8, channel_mults=[1, 2], objective="constant",
        ddpm_num_steps=10, ddpm_num_inference_steps=2, max_train_steps=2, eval_batch_size=2, logger="none",
        train_batch_size=8, logging_steps=1, adam_weight_decay=0.0, output_dir=tmp_path / "run",
    )  # fmt: skip
    run = ddpm_hf.train(config)
    assert run.finished and run.losses["loss"] == 7
    assert (run.load().unet.conv_out.weight == 0).all()  # as it was initialised


def test_a_restoration_task(tiny_run, tmp_path, monkeypatch):
    """Images that are too dark by half: y = x / 2 on [-1, 1] around grey."""

    def dim(keep, shape, **_):
        return lambda x: x / 2, lambda residual, variance: residual / 2 / (1 / 4 + variance)

    monkeypatch.setitem(pipeline_module("restoration").OPERATORS, "dim", dim)
    pixels = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0))
    degraded = (pixels - 0.5) / 2 + 0.5
    Image.fromarray((degraded[0] * 255).round().byte().numpy()).save(tmp_path / "dim.png")
    files = f"{tmp_path / 'dim.png'} {tmp_path / 'bright.png'}"
    main(f"restore {tiny_run} {files} --task dim".split())
    restored = torch.tensor(np.array(Image.open(tmp_path / "bright.png")))
    # A x = y holds up to the rounding of y to 8 bits, whatever the model.
    assert (restored / 255 - pixels[0]).abs().max() < 0.02


def test_a_preset(tmp_path, monkeypatch, capsys):
    names = [flag.removeprefix("--").partition("=") for flag in TINY]
    given = {name: value for name, _, value in names if name in ("dataset_name", "logger")}
    numbers = {name: int(value) for name, _, value in names if value.isdigit()}
    monkeypatch.setitem(PRESETS, "mine", Preset("Two steps on digits", given | numbers | {"max_train_steps": 2}))
    main(["presets"])
    assert "mine" in capsys.readouterr().out
    main(["train", "--preset", "mine", "--channel_mults", "1,2", "--output_dir", str(tmp_path / "run")])
    saved = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert saved["flags"]["preset"] == "mine" and saved["total_steps"] == 2
    assert "Two steps on digits" in (tmp_path / "run" / "README.md").read_text()


def test_a_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "count_parameters.py").write_text(
        '''"""Count the parameters of a model."""


def add_flags(parser):
    parser.add_argument("model", help="folder or Hub id")


def run(arguments):
    from ddpm_hf.models.pretrained import load_pretrained

    print(load_pretrained(arguments.model).facts["parameters"], "parameters")
'''
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setattr(commands, "COMMANDS", commands.COMMANDS)
    commands.COMMANDS.append("count-parameters")
    try:
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "count-parameters Count the parameters of a model." in capsys.readouterr().out
        with pytest.raises(SystemExit) as refused:
            main(["count-parameters", "nobody/nothing"])
        assert refused.value.code == 2 and "count-parameters: error: nobody/nothing" in capsys.readouterr().err
    finally:
        commands.COMMANDS.remove("count-parameters")
