"""The recipes: parameter counts and configs against what their papers and published models have."""

import pytest
import torch
from diffusers import UNet2DModel

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.presets import PRESETS
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.models.build import unet_kwargs


def build(*argv, channels=3):
    with torch.device("meta"):
        return UNet2DModel(**unet_kwargs(parse_config(argv), channels))


def parameters(unet):
    return sum(parameter.numel() for parameter in unet.parameters())


def test_cifar10_is_the_published_ddpm():
    unet = build("--preset=cifar10")
    assert round(parameters(unet) / 1e6, 1) == 35.7  # hojonathanho/diffusion scripts/run_cifar.py: "35.7M"
    # unet/config.json of google/ddpm-cifar10-32, as diffusers writes it today; dropout belongs to training.
    published = dict(
        act_fn="silu", add_attention=True, attention_head_dim=None, block_out_channels=(128, 256, 256, 256),
        center_input_sample=False, class_embed_type=None, downsample_padding=0, downsample_type="conv",
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"), flip_sin_to_cos=False,
        freq_shift=1, in_channels=3, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-6, norm_num_groups=32,
        num_class_embeds=None, num_train_timesteps=None, out_channels=3, resnet_time_scale_shift="default",
        sample_size=32, time_embedding_type="positional", upsample_type="conv",
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    assert {name: unet.config[name] for name in published} == published
    config = parse_config(["--preset=cifar10"])
    assert config.random_flip and config.dropout == 0.1 and config.learning_rate == 2e-4
    assert (config.ddpm_beta_schedule, config.variance_type, config.max_grad_norm) == ("ho_linear", "fixed_large", 1.0)


def test_cifar10_cosine_is_nichol_and_dhariwals():
    unet = build("--preset=cifar10-cosine")
    assert round(parameters(unet) / 1e6) in (52, 53)  # the release calls it cifar10_uncond_50M
    assert unet.config.out_channels == 6  # mean and variance
    heads = {m.heads for m in unet.modules() if type(m).__name__ == "Attention"}
    assert heads == {4}
    assert unet.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    config = parse_config(["--preset=cifar10-cosine"])
    assert (config.ddpm_num_steps, config.dropout, config.random_flip, config.max_grad_norm) == (4000, 0.3, False, 0)


def test_afhq_256_has_the_size_of_hos_lsun_model():
    assert round(parameters(build("--preset=afhq-cat-256")) / 1e6) == 114


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_says_what_it_is(name):
    config = parse_config([f"--preset={name}"])
    channels = 1 if name == "digits" or name.startswith("mnist") else 3
    unet = build(f"--preset={name}", channels=channels)
    assert (unet.config.sample_size, unet.config.in_channels) == (config.resolution, channels)
    assert len(PRESETS[name].about) > 40


def test_without_a_preset_64_px_rgb_is_upstreams_unet():
    unet = build("--dataset_name=x")
    upstream = UNet2DModel(
        sample_size=64, in_channels=3, out_channels=3, layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    )  # fmt: skip
    ours, theirs = dict(unet.config), dict(upstream.config)
    for config in (ours, theirs):
        del config["_use_default_values"]
    assert ours == theirs and round(parameters(unet) / 1e6, 1) == 113.7


@pytest.mark.parametrize(("resolution", "levels"), [(8, 3), (28, 3), (32, 5), (64, 6), (96, 6), (7, 1), (512, 6)])
def test_without_a_preset_the_levels_fit_the_resolution(resolution, levels):
    unet = build("--dataset_name=x", f"--resolution={resolution}", channels=1)
    assert len(unet.config.block_out_channels) == levels and unet.config.in_channels == 1


@pytest.mark.parametrize(
    ("flag", "attribute", "value"),
    [
        ("--base_channels=64", "block_out_channels", (64, 128, 128)),
        ("--channel_mults=1,3", "block_out_channels", (32, 96)),
        ("--layers_per_block=3", "layers_per_block", 3),
        ("--attention_resolutions=7", "down_block_types", ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")),
        ("--attention_resolutions=", "add_attention", False),
        ("--dropout=0.2", "dropout", 0.2),
        ("--resolution=32", "sample_size", 32),
        ("--variance_type=learned_range", "out_channels", 2),
    ],
)
def test_architecture_flags_act(flag, attribute, value):
    # 28 and 14 px have no level in a UNet of 32 px
    extra = ["--attention_resolutions=8"] if "resolution=32" in flag else []
    extra += ["--attention_resolutions=14"] if "mults" in flag else []
    assert build("--preset=mnist", flag, *extra, channels=1).config[attribute] == value


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (dict(resolution=28, channel_mults=["1,2,2,2"]), "--resolution 28 cannot be halved 3 times"),
        (dict(resolution=32, attention_resolutions=["14"]), "--attention_resolutions has 14, but the levels of this"),
        (dict(channel_mults=["0,1"]), "needs one positive number per level"),
        (dict(channel_mults=[""]), "needs one positive number per level"),
    ],
)
def test_architectures_that_cannot_be_are_refused(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        unet_kwargs(TrainingConfig(dataset_name="x", **flags), 3)
