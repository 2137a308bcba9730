"""The presets: parameter counts and configs against their papers and the published models."""

import dataclasses
import functools

import pytest
import torch
from diffusers import UNet2DModel

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.presets import PRESETS
from ddpm_hf.config.training_config import ModelOptions, TrainingConfig
from ddpm_hf.models.build import build_classifier, build_unet, unet_kwargs


# Parameters of each preset's UNet, and of the classifier of two classes that --objective classify trains with it.
PARAMETERS = {
    "digits": (1_001_729, 439_458),
    "mnist": (1_623_169, 641_122),
    "mnist-cpu": (686_769, 291_554),
    "cifar10": (35_746_307, 13_412_738),
    "cifar10-cosine": (52_546_438, 20_407_938),  # the first: improved-diffusion's own count
    "afhq-cat-cpu": (3_950_979, 1_606_298),
    "cifar10-cpu": (4_329_443, 1_620_482),
    "afhq-cat-64": (35_746_307, 13_412_738),
    "afhq-cat-128": (85_602_691, 33_498_626),
    "afhq-cat-256": (113_673_219, 42_615_042),
    "afhq-cat-512": (111_533_955, 41_339_842),
}


def build(*argv, channels=3):
    with torch.device("meta"):
        return UNet2DModel(**unet_kwargs(parse_config(argv), channels))


def parameters(unet):
    return sum(parameter.numel() for parameter in unet.parameters())


def test_cifar10_is_the_published_ddpm():
    unet = build("--preset=cifar10")
    assert parameters(unet) == 35_746_307  # hojonathanho/diffusion scripts/run_cifar.py: "35.7M"
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
    assert parameters(unet) == 52_546_438  # as built by openai/improved-diffusion's script_util.py
    assert unet.config.out_channels == 6  # mean and variance
    heads = {m.heads for m in unet.modules() if type(m).__name__ == "Attention"}
    assert heads == {4}
    assert unet.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    config = parse_config(["--preset=cifar10-cosine"])
    assert (config.ddpm_num_steps, config.dropout, config.random_flip, config.max_grad_norm) == (4000, 0.3, False, 0)


@pytest.mark.parametrize("name", ["cifar10", "cifar10-cosine"])
def test_every_attention_has_a_group_norm(name):
    """diffusers leaves it out in the middle block if the blocks are scaled and shifted by the timestep."""
    classify = TrainingConfig.from_preset(name, objective="classify", variance_type="fixed_small")
    with torch.device("meta"):
        classifier = build_classifier(classify, 3, ["cat", "dog"])
    for network in (build(f"--preset={name}"), classifier):
        attentions = [module for module in network.modules() if type(module).__name__ == "Attention"]
        assert len(attentions) > 2 and all(one.group_norm.num_groups == 32 for one in attentions)


def test_afhq_256_has_the_size_of_hos_lsun_model():
    assert round(parameters(build("--preset=afhq-cat-256")) / 1e6) == 114


def channels_of(name):
    return 1 if name == "digits" or name.startswith("mnist") else 3


def on_meta(config):
    """Build the UNet of a config without its weights, for images of two classes."""
    with torch.device("meta"):
        return build_unet(config, channels_of(config.preset), ["cat", "dog"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_keeps_its_size(name):
    classify = dict(objective="classify", variance_type="fixed_small", class_conditional=False)
    classify = TrainingConfig.from_preset(name, **classify)
    with torch.device("meta"):
        classifier = build_classifier(classify, channels_of(name), ["cat", "dog"])
    assert (parameters(on_meta(TrainingConfig.from_preset(name))), parameters(classifier)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_the_record_of_a_run_says_all_of_its_unet(name):
    config = parse_config([f"--preset={name}"])
    record = TrainingConfig(**config.to_dict() | {"preset": None})
    assert unet_kwargs(record, 3) == unet_kwargs(config, 3)


@functools.cache
def unet_of(name):
    return on_meta(TrainingConfig.from_preset(name))


def other_values(config):
    """Return (flag, another legal value, what that changes in the UNet's config) for each flag of the architecture."""
    mults, base, size = config.channel_mults, config.base_channels, config.resolution
    attended = [level == 0 for level in range(len(mults))]
    down = tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attended)
    up = tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended))
    plain = {"down_block_types": ("DownBlock2D",) * len(mults), "up_block_types": ("UpBlock2D",) * len(mults)}
    is_scaled = config.resnet_time_scale_shift == "scale_shift"
    scale, groups = ("default", None) if is_scaled else ("scale_shift", unet_kwargs(config, 3)["norm_num_groups"])
    return [
        ("base_channels", 96, {"block_out_channels": tuple(96 * mult for mult in mults)}),
        ("channel_mults", [2 * m for m in mults], {"block_out_channels": tuple(2 * m * base for m in mults)}),
        ("layers_per_block", 4, {"layers_per_block": 4}),
        ("attention_resolutions", [size], {"down_block_types": down, "up_block_types": up}),
        ("attention_resolutions", [], plain | {"add_attention": False}),
        ("dropout", 0.45, {"dropout": 0.45}),
        ("attention_head_dim", 16, {"attention_head_dim": 16}),
        ("norm_num_groups", 4, {"norm_num_groups": 4} | ({"attn_norm_num_groups": 4} if is_scaled else {})),
        ("norm_eps", 1e-3, {"norm_eps": 1e-3}),
        ("resnet_time_scale_shift", scale, {"resnet_time_scale_shift": scale, "attn_norm_num_groups": groups}),
        ("flip_sin_to_cos", not config.flip_sin_to_cos, {"flip_sin_to_cos": not config.flip_sin_to_cos}),
        ("freq_shift", 1 - config.freq_shift, {"freq_shift": 1 - config.freq_shift}),
        ("downsample_padding", 1 - config.downsample_padding, {"downsample_padding": 1 - config.downsample_padding}),
        (
            "class_conditional",
            not config.class_conditional,
            {"num_class_embeds": None if config.class_conditional else 3},
        ),
    ]


ARCHITECTURE = [flag for flag, _, _ in other_values(TrainingConfig.from_preset("mnist"))]


@pytest.mark.parametrize("k", range(len(ARCHITECTURE)), ids=ARCHITECTURE)
@pytest.mark.parametrize("name", PRESETS)
def test_every_flag_of_the_architecture_wins_over_every_preset(name, k):
    flag, value, expected = other_values(TrainingConfig.from_preset(name))[k]
    written = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    config = parse_config([f"--preset={name}", f"--{flag}={written}"])
    assert config == TrainingConfig.from_preset(name, **{flag: value}) and getattr(config, flag) == value
    before, after = unet_of(name).config, on_meta(config).config
    assert {key: after[key] for key in after if key[0] != "_" and after[key] != before[key]} == expected


def test_no_flag_of_the_architecture_is_forgotten():
    others = {
        "model_config_name_or_path",
        "label_dropout",
        "torch_compile",
        "cudnn_benchmark",
    }  # none of them is a preset's
    others |= {"enable_xformers_memory_efficient_attention", "init_from"}
    assert {field.name for field in dataclasses.fields(ModelOptions)} == others | set(ARCHITECTURE)


def test_one_attention_head_wins_over_the_heads_of_a_preset():
    unet = build("--preset=cifar10-cosine", "--attention_head_dim=0")
    assert unet.config.attention_head_dim is None
    assert {m.heads for m in unet.modules() if type(m).__name__ == "Attention"} == {1}


def test_channels_that_eight_groups_do_not_divide_get_four():
    unet = build_unet(parse_config(["--preset=mnist-cpu", "--base_channels", "12"]), 1)
    assert (unet.config.block_out_channels, unet.config.norm_num_groups) == ((12, 24, 48), 4)
    torch.nn.init.ones_(unet.conv_out.weight)
    output = unet(torch.randn(2, 1, 28, 28), torch.tensor([1, 900])).sample
    assert output.shape == (2, 1, 28, 28) and output.isfinite().all() and output.std() > 0


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_says_what_it_is(name):
    config = parse_config([f"--preset={name}"])
    channels = channels_of(name)
    unet = build(f"--preset={name}", channels=channels)
    assert (unet.config.sample_size, unet.config.in_channels) == (config.resolution, channels)
    assert len(PRESETS[name].about) > 40


def test_without_a_preset_64_px_rgb_is_upstreams_unet():
    unet = build("--dataset_name=x")
    upstream = UNet2DModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    )
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
        (dict(attention_head_dim=64, base_channels=12), "--attention_head_dim is 64, .* has only 48 channels"),
        (
            dict(freq_shift=1, base_channels=2, attention_head_dim=0),
            "--freq_shift 1 needs at least 4 channels: give more",
        ),
    ],
)
def test_architectures_that_cannot_be_are_refused(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        unet_kwargs(TrainingConfig(dataset_name="x", **flags), 3)
