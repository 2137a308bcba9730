"""--init_from: a run starts from the weights, the schedule and the architecture of another model."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, untrained_unet
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.models.saving import save_pipeline
from ddpm_hf.training.batches_ahead import draw_batches
from ddpm_hf.training.loop import step, train
from ddpm_hf.training.resume_changes import check_fixed_flags
from ddpm_hf.training.run import check_run, open_run


# unet/config.json and scheduler_config.json of google/ddpm-cifar10-32, with fewer channels and blocks.
CIFAR10 = dict(
    act_fn="silu", attention_head_dim=None, block_out_channels=(8, 16, 16, 16), center_input_sample=False,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"), downsample_padding=0,
    flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=1, mid_block_scale_factor=1, norm_eps=1e-6,
    norm_num_groups=4, out_channels=3, sample_size=32, time_embedding_type="positional",
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
LOGGED = ["--logger=none", "--train_batch_size=4", "--lr_warmup_steps=0"]


def random_unet(**changes):
    torch.manual_seed(3)
    return UNet2DModel(**CIFAR10 | changes).eval()


@pytest.fixture(scope="module")
def sources(tmp_path_factory, image_folder):
    """A pipeline, a bare UNet, a checkpoint of diffusers' script, and a pipeline with classes, of random weights."""
    root = tmp_path_factory.mktemp("sources")
    (root / "images").symlink_to(image_folder)
    scheduler = DDPMScheduler(variance_type="fixed_large", clip_sample=True)
    DDPMPipeline(random_unet(), scheduler).save_pretrained(root / "cifar10")
    random_unet().save_pretrained(root / "bare")
    random_unet().save_pretrained(root / "checkpoint-7" / "unet_ema")
    untrained_unet(8).save_pretrained(root / "checkpoint-7" / "unet")
    unet = untrained_unet(8, num_class_embeds=4)
    save_pipeline(root / "classes", unet, PaperDDPMScheduler.nichol_cosine(20), ["5", "3", "x"])
    own = DDPMScheduler(12, beta_schedule="scaled_linear", beta_end=0.5, prediction_type="v_prediction")
    DDPMPipeline(untrained_unet(8), own).save_pretrained(root / "own-betas")
    return root


def opened(source, tmp_path, *flags):
    """Open a run that starts from a model, and close it before its first step."""
    words = [f"--train_data_dir={source.parent / 'images'}", f"--output_dir={tmp_path / 'run'}", *LOGGED, *flags]
    run = open_run(parse_config([*words, f"--init_from={source}", "--overwrite_output_dir"]))
    run.lock.close()
    return run


def outputs(unet, channels, size, labels=None):
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet.eval()(x, torch.tensor([3, 700]), labels).sample


@pytest.mark.parametrize("kind", ["cifar10", "bare", "checkpoint-7"])
def test_a_run_begins_at_exactly_the_output_of_the_model(kind, sources, tmp_path, capsys):
    run = opened(sources / kind, tmp_path, "--use_ema")
    expected = outputs(UNet2DModel.from_pretrained(sources / "cifar10" / "unet"), 3, 32)
    assert expected.std() > 0.01
    assert torch.equal(outputs(run.network, 3, 32), expected)
    assert torch.equal(outputs(run.published, 3, 32), expected)  # the moving average
    config = run.config
    assert (config.resolution, config.channels, run.train_set.channels) == (32, 3, 3)
    assert (config.ddpm_beta_schedule, config.prediction_type) == ("linear", "epsilon")
    assert config.variance_type == ("fixed_large" if kind == "cifar10" else "fixed_small")
    recorded = json.loads((tmp_path / "run" / "train_config.json").read_text())["base_model"]
    assert recorded["name"] == kind and recorded["random_layers"] == recorded["unused_layers"] == []
    assert f"Starting from the weights of {kind}.\n" in capsys.readouterr().out


def test_added_classes_are_equal_before_the_first_step(sources, tmp_path, capsys):
    run = opened(sources / "cifar10", tmp_path, "--class_conditional")
    expected = outputs(UNet2DModel.from_pretrained(sources / "cifar10" / "unet"), 3, 32)
    for label in range(3):
        assert torch.equal(outputs(run.network, 3, 32, torch.tensor([label, label])), expected)
    assert "The class embeddings are new and start as zeros" in capsys.readouterr().out


def test_classes_are_taken_by_name(sources, tmp_path):
    run = opened(sources / "classes", tmp_path, *TINY[:1], "--class_names=3,4,5")
    table = UNet2DModel.from_pretrained(sources / "classes" / "unet").class_embedding.weight
    assert run.config.class_conditional and run.classes.names == ("3", "4", "5")
    assert torch.equal(run.network.class_embedding.weight, table[[1, 3, 0, 3]])  # 3, no class, 5, no class
    assert run.facts["base_model"]["new_classes"] == ["4"]


@pytest.mark.parametrize(("known", "new"), [(2, ["5"]), (3, []), (6, [])])
def test_classes_without_names_are_taken_by_number(known, new, tmp_path, image_folder, capsys):
    (tmp_path / "images").symlink_to(image_folder)
    unet = untrained_unet(8, num_class_embeds=known)
    unet.save_pretrained(tmp_path / "unnamed")
    run = opened(tmp_path / "unnamed", tmp_path, *TINY[:1], "--class_names=3,4,5")  # and "no class"
    table, rows = unet.class_embedding.weight, run.network.class_embedding.weight
    kept = min(known, 3)
    assert torch.equal(rows[:kept], table[:kept]) and torch.equal(rows[3], table.mean(dim=0))
    assert run.facts["base_model"]["new_classes"] == new
    assert ("does not have these classes: 5." in capsys.readouterr().out) == bool(new)


def test_without_classes_the_model_is_that_of_no_class(sources, tmp_path):
    run = opened(sources / "classes", tmp_path, *TINY[:1], "--no_class_conditional")
    source = UNet2DModel.from_pretrained(sources / "classes" / "unet")
    expected = outputs(source, 1, 8, torch.tensor([3, 3]))
    assert torch.allclose(outputs(run.network, 1, 8), expected, atol=1e-6)
    assert run.facts["base_model"]["unused_layers"] == []


def test_layers_that_do_not_fit_are_named(sources, tmp_path, capsys):
    flags = ["--resolution=16", "--channels=1", "--layers_per_block=2", "--variance_type=learned_range"]
    run = opened(sources / "cifar10", tmp_path, *flags)
    facts, said = run.facts["base_model"], capsys.readouterr().out
    assert facts["random_layers"][:1] == ["conv_in"] and facts["random_layers"][-1:] == ["conv_out"]
    assert "down_blocks.0.resnets.1.conv1" in facts["random_layers"]
    assert facts["unused_layers"] == [] and all(name in said for name in facts["random_layers"])
    source = UNet2DModel.from_pretrained(sources / "cifar10" / "unet").state_dict()
    own = run.network.state_dict()
    assert all(
        torch.equal(own[name], source[name]) for name in own if name.rpartition(".")[0] not in facts["random_layers"]
    )
    assert run.network.config.sample_size == 16 and run.config.objective == "hybrid"


def test_flags_win_over_the_model_and_the_model_over_a_preset(sources, tmp_path):
    flags = ["--preset=mnist-cpu", "--prediction_type=sample", "--dropout=0.3", "--ddpm_num_steps=50"]
    flags += ["--ddpm_num_inference_steps=5", "--validation_split=0.1", "--max_train_steps=3", "--norm_eps=0.5"]
    flags += [*TINY[:1]]
    run = opened(sources / "cifar10", tmp_path, *flags)
    assert tuple(run.network.config.block_out_channels) == CIFAR10["block_out_channels"]
    assert (run.network.config.dropout, run.network.config.norm_eps) == (0.3, 0.5)
    assert (run.config.ddpm_beta_schedule, run.config.ddpm_num_steps) == ("linear", 50)
    assert run.scheduler.config.prediction_type == "sample" and run.config.learning_rate == 3e-3


def test_betas_without_a_name_are_kept_and_resumed_without_the_model(sources, tmp_path):
    """The model is gone when the run goes on after its first half, and the weights are those of one whole run."""
    words = [*TINY[:1], *LOGGED, "--ddpm_num_inference_steps=2", "--eval_batch_size=2", "--use_ema"]
    words += ["--max_train_steps=2", "--checkpointing_steps=1"]
    model = shutil.copytree(sources / "own-betas", tmp_path / "model")
    words += [f"--init_from={model}", f"--output_dir={tmp_path / 'run'}"]
    train(parse_config(words))
    betas = DDPMScheduler.from_pretrained(model / "scheduler").betas
    shutil.rmtree(model)
    whole = load_file(tmp_path / "run" / "checkpoint-2" / "ema.safetensors")
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "checkpoint-1")
    again = [f"--output_dir={tmp_path / 'again'}", f"--resume_from_checkpoint={tmp_path / 'checkpoint-1'}"]
    run = open_run(parse_config([*words, *again]))
    run.model.train()
    with run.lock, contextlib.closing(draw_batches(run)) as batches:
        step(run, batches)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in run.ema.state_dict().items())
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        scheduler = load_pretrained(place).scheduler
        assert torch.equal(scheduler.betas, betas) and scheduler.config.prediction_type == "v_prediction"
    record = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert record["base_model"]["name"] == "model" and record["flags"]["prediction_type"] == "v_prediction"
    assert "Its training began with the weights of `model`" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(UserError, match="was trained with --init_from .*model, not elsewhere: give"):
        train(parse_config([*words, "--init_from=elsewhere", "--resume_from_checkpoint=latest"]))
    flags = parse_config(words).to_dict() | {"init_from": None}
    with pytest.raises(UserError, match="was trained without --init_from: leave it out"):
        check_fixed_flags("it", flags, SimpleNamespace(config=parse_config(words)))


def test_a_unet_of_another_kind_or_shape_is_refused(sources, tmp_path):
    for flags, sentence in {
        ("--channel_mults=1,2",): "sets the levels of the UNet: leave --channel_mults out",
        ("--resolution=12",): "cannot be used with these flags .*: change --resolution",
    }.items():
        with pytest.raises(UserError, match=sentence):
            opened(sources / "cifar10", tmp_path, *flags)
    with pytest.raises(UserError, match="--objective classify cannot use --init_from"):
        TrainingConfig(dataset_name="digits", objective="classify", init_from="x")
    with pytest.raises(UserError, match="has no name, so it exists only for its 12 timesteps"):
        opened(sources / "own-betas", tmp_path, "--ddpm_num_steps=30", "--ddpm_num_inference_steps=5")
    with pytest.raises(UserError, match="cannot be used with these flags: --ddpm_num_inference_steps is 100, but"):
        opened(sources / "own-betas", tmp_path, "--ddpm_num_inference_steps=100")
    random_unet(block_out_channels=(4, 4, 4, 4)).save_config(tmp_path / "narrow")
    flags = [f"--model_config_name_or_path={tmp_path / 'narrow'}", "--resolution=32", "--channels=3"]
    with pytest.raises(UserError, match="no layer of --init_from cifar10 has the name and the shape"):
        opened(sources / "cifar10", tmp_path, *flags)
    with pytest.raises(UserError, match="because a pickle can run code"):
        DDPMPipeline(untrained_unet(8), DDPMScheduler()).save_pretrained(tmp_path / "old", safe_serialization=False)
        opened(tmp_path / "old", tmp_path)
    with pytest.raises(UserError, match="nowhere is not a folder here"):
        opened(Path("nowhere"), tmp_path)
    assert not (tmp_path / "run").exists()


def test_naming_the_length_of_the_schedule_keeps_its_betas(sources, tmp_path):
    run = opened(sources / "own-betas", tmp_path, "--ddpm_num_steps=12", "--ddpm_num_inference_steps=2")
    betas = DDPMScheduler.from_pretrained(sources / "own-betas" / "scheduler").betas
    assert torch.equal(run.scheduler.betas, betas)


def test_a_config_with_weights_says_that_it_ignores_them(sources, tmp_path, capsys):
    """Bug report F6."""
    data = f"--train_data_dir={sources / 'images'}"
    for name in ("cifar10", "cifar10/unet", "bare"):
        flags = [
            "--train_batch_size=4",
            f"--model_config_name_or_path={sources / name}",
            "--resolution=32",
            "--channels=3",
        ]
        check_run(parse_config([data, *flags]))
        said = capsys.readouterr().out
        assert f"its weights are ignored: to start from them, give --init_from {sources / name}." in said
    random_unet().save_config(tmp_path)
    check_run(parse_config([data, *flags[:1], f"--model_config_name_or_path={tmp_path}", *flags[2:]]))
    assert "ignored" not in capsys.readouterr().out


def test_python_gives_flags_in_two_ways(sources):
    whole = TrainingConfig(dataset_name="digits", resolution=64, ddpm_num_steps=20, ddpm_num_inference_steps=20)
    assert whole.given_flags == {"dataset_name", "ddpm_num_steps", "ddpm_num_inference_steps"}
    preset = TrainingConfig.from_preset("digits", resolution=64)
    assert preset.given_flags == {"resolution"}


@pytest.mark.parametrize("flags", [[], ["--class_conditional"]])
def test_with_augmentation_a_run_begins_at_the_output_of_the_model_too(flags, sources, tmp_path):
    run = opened(sources / "cifar10", tmp_path, "--augment_probability=0.2", *flags)
    expected = outputs(UNet2DModel.from_pretrained(sources / "cifar10" / "unet"), 3, 32)
    for label in range(6 if flags else 2):
        assert torch.equal(outputs(run.network, 3, 32, torch.tensor([label, label])), expected)
    assert torch.equal(outputs(run.published, 3, 32, torch.tensor([2, 0]) if flags else None), expected)
    assert run.facts["base_model"]["random_layers"] == []
