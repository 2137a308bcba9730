"""What others may want to add: each is one function or file and one row in a table, and works end to end."""

import json
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import TINY
from diffusers import DDPMPipeline
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


SHIFT = """
def shift_step(scheduler, step, *, shift=0.0, eta=0.0):
    return step.pred_original_sample + {sign}shift, None
"""


def load(file):
    """Return a script as a module, as Python has it after the script was edited and started again."""
    module = ModuleType("mine")
    exec(compile(file.read_text(), file, "exec"), module.__dict__)  # an import could use the bytecode of the old file
    return module


def load_shift_step(file, sign):
    file.write_text(SHIFT.format(sign=sign))
    return load(file).shift_step


def test_settings_of_a_sampler(tiny_run, tmp_path, monkeypatch):
    """They reach the function, are in the record, and are refused if the function does not have them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SAMPLERS, "shift", load_shift_step(tmp_path / "mine.py", "+"))
    plain, brighter = (ddpm_hf.sample(tiny_run, 1, "shift", num_inference_steps=1, shift=s)[0] for s in (0.0, 0.5))
    wanted = np.clip(np.array(plain, dtype=float) + 0.5 * 127.5, 0, 255)
    assert np.abs(wanted - np.array(brighter)).max() <= 1
    model = ddpm_hf.load(tiny_run)
    sampler = ddpm_hf.Sampler(name="shift", own_settings={"shift": 0.5}).resolve(model)
    assert sampler.record(model)["own_settings"] == {"shift": 0.5}
    assert ddpm_hf.Sampler(name="shift").resolve(model).record(model)["own_settings"] == {"shift": 0.0}
    call = ["sample", str(tiny_run), "--sampler=shift", "--num_images=1", "--num_inference_steps=1"]
    main([*call, "--own_settings", "shift=0.5", f"--output={tmp_path / 'cli'}"])
    assert np.array_equal(np.array(Image.open(tmp_path / "cli" / "000000.png")), np.array(brighter))
    assert json.loads((tmp_path / "cli" / "samples.json").read_text())["sampler"]["own_settings"] == {"shift": 0.5}
    for wrong in ("shif=1", "shift=[1]", "shift"):
        with pytest.raises(SystemExit) as refused:
            main([*call, "--own_settings", wrong, f"--output={tmp_path / 'refused'}"])
        assert refused.value.code == 2
    main(["evaluate", *call[1:3], "--own_settings=shift=0.5", *call[4:], "--num_images=40", "--metrics=memorization"])
    for wrong in ({"shif": 1}, {"shift": [1]}, {"shift": "much"}, {"shift": None}, {"shift": float("nan")}):
        with pytest.raises(ddpm_hf.UserError, match="shif"):
            ddpm_hf.sample(tiny_run, 1, "shift", num_inference_steps=1, **wrong)
    with pytest.raises(ddpm_hf.UserError, match="shift"):
        ddpm_hf.sample(tiny_run, 1, "ddim", num_inference_steps=1, shift=1)
    with pytest.raises(ddpm_hf.UserError, match="ddim has no settings of its own: leave shift out"):
        ddpm_hf.Sampler(name="ddim", own_settings={"shift": 1}).resolve(model)
    with pytest.raises(ddpm_hf.UserError, match="eta is not one of a sampler's own settings: give --eta instead"):
        ddpm_hf.Sampler(name="ddim", own_settings={"eta": 0.5}).resolve(model)


def test_samples_of_a_sampler_before_an_edit_are_not_scored_again(tiny_run, tmp_path, monkeypatch):
    """The name is the same, but the function is not: the images are drawn anew, into another folder."""
    few = {"metrics": ["memorization"], "num_images": 40, "num_inference_steps": 1, "shift": 0.5}
    monkeypatch.chdir(tmp_path)
    hashes, codes = [], []
    for sign in "+-+":
        monkeypatch.setitem(SAMPLERS, "shift", load_shift_step(tmp_path / "mine.py", sign))
        record = ddpm_hf.evaluate(tiny_run, sampler="shift", output=f"{len(hashes)}.json", **few).record
        hashes.append(record["samples"]["sha256"])
        codes.append(record["sampler"]["code"])
    assert hashes[0] == hashes[2] != hashes[1] and codes[0] == codes[2] != codes[1]
    output = tmp_path / "drawn"
    ddpm_hf.sample(tiny_run, 2, "shift", num_inference_steps=1, output=output)
    monkeypatch.setitem(SAMPLERS, "shift", load_shift_step(tmp_path / "mine.py", "-"))
    with pytest.raises(ddpm_hf.UserError, match="other samples .code"):
        ddpm_hf.sample(tiny_run, 2, "shift", num_inference_steps=1, output=output)


@pytest.mark.parametrize("result", [lambda x: x, lambda x: (x[:1], None), lambda x: [x, None], lambda x: None])
def test_a_sampler_that_returns_something_else(tiny_run, monkeypatch, result):
    monkeypatch.setitem(SAMPLERS, "wrong", lambda scheduler, step: result(step.sample))
    with pytest.raises(ddpm_hf.UserError, match="the sampler wrong returned .* but must return a tuple"):
        ddpm_hf.sample(tiny_run, 2, "wrong", num_inference_steps=2)


def test_a_beta_schedule(tmp_path, monkeypatch):
    """Stock diffusers reads its betas, and a checkpoint continues with them."""

    def squares(T, **config):
        betas = [0.1 * ((t + 1) / T) ** 2 for t in range(T)]
        return ddpm_hf.PaperDDPMScheduler(num_train_timesteps=T, trained_betas=betas, **config)

    monkeypatch.setitem(ddpm_hf.BETA_SCHEDULES, "squares", squares)
    flags = [*TINY, "--ddpm_beta_schedule=squares", f"--output_dir={tmp_path / 'run'}"]
    main(["train", *flags, "--max_train_steps=1"])
    stock = DDPMPipeline.from_pretrained(tmp_path / "run").scheduler
    T = len(stock)
    assert stock.betas.tolist() == pytest.approx([0.1 * ((t + 1) / T) ** 2 for t in range(T)])
    main(["train", *flags, "--max_train_steps=2", "--resume_from_checkpoint=latest"])
    assert ddpm_hf.load(tmp_path / "run").scheduler.betas64.tolist() == pytest.approx(stock.betas.tolist())


@pytest.mark.parametrize(
    ("betas", "said"),
    [
        (lambda T: [0.1] * (T - 1), "a scheduler of 10 timesteps and 9 betas"),
        (None, "returned list: return a PaperDDPMScheduler of 10 timesteps"),
        (lambda T: [0.1] * (T - 1) + [1.0], "leaves no signal at the end"),
    ],
    ids=["too few", "a list", "a beta of 1"],
)
def test_a_beta_schedule_that_cannot_be_trained(betas, said, tmp_path, monkeypatch, capsys):
    def mine(T, **config):
        return [0.1] * T if betas is None else ddpm_hf.PaperDDPMScheduler(T, trained_betas=betas(T), **config)

    monkeypatch.setitem(ddpm_hf.BETA_SCHEDULES, "mine", mine)
    with pytest.raises(SystemExit) as refused:
        main(["train", *TINY, "--ddpm_beta_schedule=mine", f"--output_dir={tmp_path / 'run'}"])
    assert refused.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_records_of_a_metric_that_was_edited_are_not_compared(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = []
    for factor in (1.0, 2.0):
        (tmp_path / "metric.py").write_text(
            f"def metric(look):\n    return [look.entry('mine', {factor}, lower_is_better=True)]\n"
        )
        monkeypatch.setitem(METRICS, "mine", Metric(load(tmp_path / "metric.py").metric))
        few = {"num_images": 40, "num_inference_steps": 1, "output": f"{factor}.json"}
        records.append(ddpm_hf.evaluate(tiny_run, metrics=["mine"], sampler="ddim", **few))
    with pytest.raises(ddpm_hf.UserError, match="mine.code is"):
        ddpm_hf.compare(*records)


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


WRONG = {
    "it fails": (lambda look: 1 / 0, "ZeroDivisionError: division by zero"),
    "no list": (lambda look: look.entry("wrong", 1.0, lower_is_better=True), "a list of `look.entry"),
    "a tensor": (lambda look: [look.entry("wrong", look.images.sum(), lower_is_better=True)], "ints, floats or None"),
}


@pytest.mark.parametrize(["function", "reason"], WRONG.values(), ids=WRONG)
def test_a_metric_that_fails(function, reason, tiny_run, tmp_path, monkeypatch, capsys):
    """The other scores are kept, and the exit code says that something failed."""
    monkeypatch.setitem(METRICS, "wrong", Metric(function))
    few = ["--num_images", "40", "--num_inference_steps", "2", "--samples_dir", str(tmp_path / "samples")]
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(tiny_run), "--metrics=wrong,memorization", *few, "--output", str(tmp_path / "one.json")])
    assert end.value.code == 1
    failed, *others = json.loads((tmp_path / "one.json").read_text())["metrics"]
    assert failed["id"] == "wrong" and reason in failed["reason"] and others[0]["id"].startswith("memorization")
    said = capsys.readouterr()
    assert reason in said.out and "wrong failed" in said.err


def test_a_training_goes_on_without_a_metric_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METRICS, "wrong", Metric(lambda look: 1 / 0))
    flags = [*TINY, "--max_train_steps=2", "--eval_metrics=wrong", "--eval_num_images=40", "--save_best"]
    main(["train", *flags, "--best_by=wrong", f"--output_dir={tmp_path / 'run'}"])
    assert "the metric wrong failed at step 2 and is left out: ZeroDivisionError" in "".join(capsys.readouterr())
    assert (tmp_path / "run" / "checkpoint-2" / "state.pt").is_file() and not (tmp_path / "run" / "best").exists()


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


def test_a_preset_with_a_typing_error(monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", ddpm_hf.Preset("A typing error", {"learning_rat": 1e-3}))
    with pytest.raises(ddpm_hf.UserError, match="in the preset mine, there is no flag 'learning_rat': did you mean"):
        ddpm_hf.TrainingConfig.from_preset("mine")
    monkeypatch.setitem(PRESETS, "mine", {"learning_rate": 1e-3})
    with pytest.raises(ddpm_hf.UserError, match="is a dict, but must be a Preset"):
        ddpm_hf.TrainingConfig.from_preset("mine")


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
