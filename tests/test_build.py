"""The initial weights of the UNet, and their moving average."""

import json
import time

import pytest
import torch
from conftest import steps
from diffusers.training_utils import EMAModel

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.models.build import build_unet, unet_channels
from ddpm_hf.models.ema import ema_decay, make_ema, update_ema


TINY = ["--dataset_name=digits", "--resolution=8", "--base_channels=8", "--channel_mults=1,2", "--layers_per_block=1"]


def test_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    one = build_unet(parse_config(TINY), 1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
    torch.manual_seed(7)
    same = build_unet(parse_config(TINY), 1).state_dict()
    other = build_unet(parse_config([*TINY, "--seed=1"]), 1).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_an_untrained_unet_predicts_zero():
    # Ho et al. end every branch, and the UNet, in zeros.
    unet = build_unet(parse_config(TINY), 1)
    assert unet(torch.randn(2, 1, 8, 8), torch.tensor([1, 2])).sample.abs().max() == 0
    assert unet.conv_in.weight.abs().max() > 0


@pytest.mark.parametrize(
    "flags", [[], ["--ema_inv_gamma=2"], ["--ema_power=0.5"], ["--ema_max_decay=0.6"], ["--ema_inv_gamma=0"]]
)
def test_ema_follows_its_formula(flags):
    config = parse_config([*TINY, "--use_ema", *flags])
    unet = build_unet(config, 1)
    ema = make_ema(config, unet)
    expected = None
    for updates in range(6):
        with torch.no_grad():
            unet.conv_in.bias.fill_(float(updates**2))
        decay = ema_decay(config, updates)
        update_ema(ema, unet, decay)
        expected = updates**2 if expected is None else decay * expected + (1 - decay) * updates**2
        assert torch.allclose(ema.conv_in.bias, torch.tensor(float(expected)))
    assert ema_decay(config, 0) == 0 and ema_decay(config, 10**9) == config.ema_max_decay
    if "--ema_inv_gamma=0" in flags:
        assert ema_decay(config, 1) == config.ema_max_decay


def test_ema_decays_as_upstreams():
    config = parse_config([*TINY, "--use_ema"])
    upstream = EMAModel([torch.nn.Parameter(torch.zeros(1))], use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for step in range(50):
        assert ema_decay(config, step) == pytest.approx(upstream.get_decay(step + 1))


def test_no_ema_unless_asked_for():
    config = parse_config(TINY)
    assert make_ema(config, build_unet(config, 1)) is None


def test_a_unet_config_may_come_from_a_file_or_a_folder(tmp_path):
    unet = build_unet(parse_config(TINY), 1)
    unet.save_config(tmp_path / "unet")
    for name in (tmp_path, tmp_path / "unet", tmp_path / "unet" / "config.json"):
        config = parse_config([*TINY[:2], f"--model_config_name_or_path={name}"])
        assert unet_channels(config) == 1
        assert build_unet(config, 1).config.block_out_channels == [8, 16]


def test_what_a_unet_config_leaves_out_is_the_default(tmp_path):
    levels = {"block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "norm_num_groups": 4}
    levels |= {"up_block_types": ["UpBlock2D"] * 2, "sample_size": 8, "_class_name": "UNet2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(levels))
    config = parse_config([*TINY[:2], f"--model_config_name_or_path={tmp_path}"])
    assert unet_channels(config) == 3 == build_unet(config, 3).config.out_channels


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(sample_size=16), "has sample_size 16, but this run needs 8"),
        (dict(in_channels=0), "its in_channels is 0, but must be a whole number from 1"),
        (dict(out_channels=2), "has out_channels 2, but this run needs 1"),
        (dict(_class_name="AutoencoderKL"), "holds AutoencoderKL: give the config of a UNet2DModel"),
        (dict(block_out_channels=[10**8, 8]), "block_out_channels"),
        (dict(down_block_types=["NoSuchBlock", "DownBlock2D"]), "this UNet cannot be built"),
    ],
)
def test_unet_configs_that_do_not_fit_are_refused(tmp_path, change, sentence):
    unet = build_unet(parse_config(TINY), 1)
    unet.save_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    config = parse_config([*TINY[:2], f"--model_config_name_or_path={path}"])
    with pytest.raises(UserError, match=sentence):
        build_unet(config, unet_channels(config))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"base_channels": 100_000_000}, "make a level of 200,000,000 channels, but at most 16,384"),
        ({"channel_mults": [1, 10**9]}, "at most 16,384 are possible: give smaller numbers"),
        (
            {"base_channels": 16_384, "layers_per_block": 2, "channel_mults": [1, 1, 1]},
            "give a smaller --base_channels",
        ),
    ],
)
def test_a_giant_unet_is_refused_at_once(flags, sentence):
    started = time.perf_counter()
    with pytest.raises(UserError, match=sentence):
        build_unet(TrainingConfig.from_preset("digits", **flags), 1)
    assert time.perf_counter() - started < 10


def test_a_missing_unet_config_is_refused():
    with pytest.raises(UserError, match="'nowhere' has no UNet2DModel config"):
        unet_channels(parse_config([*TINY, "--model_config_name_or_path=nowhere"]))


def test_xformers_acts_or_is_refused():
    config = parse_config([*TINY, "--enable_xformers_memory_efficient_attention"])
    with pytest.raises(UserError, match="--enable_xformers_memory_efficient_attention cannot be used here"):
        build_unet(config, 1)


@pytest.mark.parametrize("has", [True, False])
def test_auto_precision_is_bf16_where_the_processor_has_it(tmp_path, monkeypatch, has):
    monkeypatch.setattr("ddpm_hf.training.run.has_bfloat16", lambda device: has)
    run, _ = steps(2, f"--output_dir={tmp_path}", "--mixed_precision=auto")
    assert run.config.mixed_precision == ("bf16" if has else "no")
    assert f"mixed precision {run.config.mixed_precision}" in run.facts["summary"]


def test_bf16_follows_the_curve_of_float32(tmp_path):
    """The same images, noise and timesteps in both: the losses differ by rounding, far less than from step to step."""
    curves = {}
    for precision in ("no", "bf16"):
        flags = [f"--output_dir={tmp_path}/{precision}", f"--mixed_precision={precision}", "--base_channels=16"]
        _, losses = steps(60, *flags)
        curves[precision] = torch.tensor([float(loss) for loss in losses])
    differences = (curves["bf16"] - curves["no"]).abs()
    assert 0 < differences.max() < 0.03 * curves["no"].mean() < curves["no"].std()
