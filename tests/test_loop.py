"""One short run: its folder, its record, its log, and its pipeline in stock diffusers."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import TINY, steps
from diffusers import DDPMPipeline
from PIL import Image

from ddpm_hf.__main__ import main as command
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.presets import PRESETS
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.errors import UserError
from ddpm_hf.models.ema import ema_decay
from ddpm_hf.provenance import git_commit
from ddpm_hf.sampling.samplers import draw, image_generators
from ddpm_hf.training.loop import catching_signals, train


FLAGS = [
    *TINY, "--class_names=3", "--validation_split=143", "--max_train_steps=40", "--use_ema", "--save_best",
    "--ddpm_beta_schedule=nichol_cosine", "--variance_type=fixed_large", "--ddpm_num_steps=60",
    "--validation_epochs=2", "--checkpointing_steps=20", "--save_images_epochs=4", "--save_model_epochs=8",
    "--hub_token=hf_secret",
]  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """40 steps of 8 images from a set of 40: eight epochs."""
    folder = tmp_path_factory.mktemp("training") / "run"
    argv = sys.argv
    sys.argv = ["train_unconditional.py", *FLAGS, f"--output_dir={folder}"]
    train(parse_config(sys.argv[1:]))
    sys.argv = argv
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder_is_as_the_design_says(ran):
    written = {str(path.relative_to(ran)) for path in ran.rglob("*") if path.is_file()}
    assert {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json", "README.md", "train_config.json", "metrics.jsonl",
        "samples/epoch_0004.png", "samples/epoch_0008.png", "best/model_index.json",
        "figures/loss.png", "figures/schedule.png", "figures/forward.png", "figures/reverse.png",
        "figures/reverse.gif", "figures/ddim.png",
        "checkpoint-20/model.safetensors", "checkpoint-40/model.safetensors",
    } <= written  # fmt: skip
    assert not [name for name in written if name.endswith((".tmp", ".bin")) and "checkpoint" not in name]
    for name in written:
        if name.endswith((".png", ".gif")):
            with Image.open(ran / name) as picture:
                assert min(picture.size) > 50


def test_the_record_has_every_flag_and_no_token(ran):
    record = json.loads((ran / "train_config.json").read_text())
    assert TrainingConfig(**record["flags"]) == parse_config([*FLAGS[:-1], f"--output_dir={ran}"])
    assert record["command"].startswith("python train_unconditional.py --dataset_name=digits")
    assert record["num_images"] == 40
    assert record["versions"]["torch"] == torch.__version__ and len(record["data_fingerprint"]) == 16
    for path in ran.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes()


def test_the_log_counts_steps_epochs_and_images(ran):
    log = lines(ran)
    assert [line["step"] for line in log] == [3, 6, 9, 10, 12, 15, 18, 20, 21, 24, 27, 30, 33, 36, 39, 40]
    for line in log:
        assert line["images_seen"] == 8 * line["step"] and line["epoch"] == line["images_seen"] / 40
        assert line["images_per_second"] > 0 and line["grad_norm"] > 0
        assert line["ema_decay"] == ema_decay(parse_config(FLAGS), line["step"] - 1)
        bands = [loss for loss in line["loss_by_band"] if loss is not None]
        assert min(bands) <= line["loss"] <= max(bands)
    validated = [line for line in log if "validation_loss" in line]
    assert [line["step"] for line in validated] == [10, 20, 30, 40]
    assert all(len(line["validation_loss_ema_by_band"]) == 4 for line in validated)
    assert validated[-1]["validation_loss"] < validated[0]["validation_loss"]


def test_best_is_the_pipeline_with_the_lowest_validation_loss(ran):
    validated = [line for line in lines(ran) if "validation_loss_ema" in line]
    assert min(validated, key=lambda line: line["validation_loss_ema"])["step"] == 40  # it is still learning
    best, last = (DDPMPipeline.from_pretrained(folder).unet.state_dict() for folder in (ran / "best", ran))
    assert all(torch.equal(best[name], last[name]) for name in best)


def test_stock_diffusers_loads_and_samples_it_without_us(ran, tmp_path):
    program = f"""
import sys
sys.modules["ddpm_hf"] = None  # whoever imports it fails
import torch
from diffusers import DDIMPipeline, DDPMPipeline
generators = lambda: [torch.Generator().manual_seed(7 + k) for k in range(3)]
ddpm, ddim = DDPMPipeline.from_pretrained({str(ran)!r}), DDIMPipeline.from_pretrained({str(ran)!r})
assert torch.equal(ddpm.scheduler.alphas_cumprod, ddim.scheduler.alphas_cumprod)
images = [
    ddpm(3, generators(), num_inference_steps=60, output_type="np").images,
    ddim(3, generators(), num_inference_steps=20, output_type="np").images,
]
torch.save([torch.from_numpy(i) for i in images] + [ddim.scheduler.alphas_cumprod], {str(tmp_path / "images.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=os.environ, cwd=tmp_path)
    ddpm, ddim, alphas_cumprod = torch.load(tmp_path / "images.pt", weights_only=True)
    scheduler = PaperDDPMScheduler.from_pretrained(ran, subfolder="scheduler")
    unet = DDPMPipeline.from_pretrained(ran).unet
    for images, how in ((ddpm, {}), (ddim, dict(sampler="ddim", num_inference_steps=20, spacing="trailing"))):
        ours = draw(unet, scheduler, image_generators(7, range(3)), **how)
        assert (ours / 2 + 0.5 - images.permute(0, 3, 1, 2)).abs().max() < 1e-5
    assert torch.equal(scheduler.alphas_cumprod, alphas_cumprod)
    assert scheduler.config.variance_type == "fixed_large"


def test_without_git_there_is_no_commit(monkeypatch):
    assert git_commit() is None or len(git_commit()) == 40
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_the_index_names_diffusers_classes_only(ran):
    index = json.loads((ran / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"] and index["scheduler"] == ["diffusers", "DDPMScheduler"]


def test_figures_are_drawn_anew_from_the_folder(ran, capsys):
    before = (ran / "figures" / "ddim.png").read_bytes()
    (ran / "figures" / "ddim.png").unlink()
    command(["figures", str(ran)])
    assert (ran / "figures" / "ddim.png").read_bytes() == before
    assert "The figures are in" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["figures", "nowhere"], ["presets", "cifar"]])
def test_commands_refuse_in_a_sentence(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(argv)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_presets_are_listed(capsys):
    command(["presets"])
    assert capsys.readouterr().out.count("\n") == len(PRESETS)
    command(["presets", "cifar10"])
    assert json.loads(capsys.readouterr().out)["flags"]["train_batch_size"] == 128


def test_a_closed_terminal_stops_a_run_in_order_but_not_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, caught in [(signal.SIG_DFL, [signal.SIGHUP, signal.SIGHUP]), (signal.SIG_IGN, [])]:
            signal.signal(signal.SIGHUP, handler)
            found = []
            with catching_signals(found):
                signal.raise_signal(signal.SIGHUP)
                signal.raise_signal(signal.SIGHUP)
            assert found == caught and signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_weights_that_diverge_in_the_last_step_are_not_saved(tmp_path):
    flags = ["--lr_scheduler=constant", "--learning_rate=1e30", "--lr_warmup_steps=0", "--max_grad_norm=0"]
    flags += ["--objective=classify", "--validation_split=4", "--max_train_steps=1", f"--output_dir={tmp_path}"]
    with pytest.raises(UserError, match="the validation loss became nan or infinite at step 1 .*no checkpoint yet"):
        train(parse_config([*TINY, "--class_names=3,7", *flags]))
    assert not {"checkpoint-1", "classifier", "metrics.jsonl"} & {path.name for path in tmp_path.iterdir()}


def test_a_run_may_be_called_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ["--max_train_steps=1"], ["--max_train_steps=2", "--resume_from_checkpoint=latest"]:
        assert train(parse_config([*TINY, "--output_dir=digits", *more])).folder.name == "digits"


def test_a_tiny_model_learns_one_image_by_heart(tmp_path):
    # The loss of 150 steps on eight digits falls far below that of the untrained model, which is E[eps^2] = 1.
    flags = ["--validation_split=1789", "--max_train_steps=150", "--lr_scheduler=constant"]
    flags += ["--ddpm_beta_schedule=nichol_cosine"]
    _, losses = steps(150, "--output_dir", tmp_path, *flags, "--learning_rate=5e-3")
    first, last = sum(losses[:2]) / 16, sum(losses[-50:]) / 400
    assert 0.8 < first < 1.2 and last < 0.35


def test_noise_level_under_autocast(tmp_path):
    """What the loop feeds the UNet under bf16 autocast is x_t to 1e-3, for every t."""
    run, _ = steps(0, "--output_dir", tmp_path, "--mixed_precision=bf16", "--ddpm_num_steps=1000")
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, noisy, timesteps, class_labels=None):
            seen["noisy"] = noisy
            return type("Output", (), {"sample": noisy})

    timesteps = torch.arange(1000)
    noise = torch.ones(1000, 1, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        run.loss(Spy(), {"images": torch.zeros_like(noise), "noise": noise, "timesteps": timesteps})
    wanted = (1 - run.scheduler.alphas_cumprod64).sqrt()
    assert seen["noisy"].dtype == torch.float32
    assert (seen["noisy"][:, 0, 0, 0].double() - wanted).abs().max() < 1e-6
