"""`ddpm_hf convert` of checkpoints of improved-diffusion and guided-diffusion.

The numbers in openai_golden.json are from OpenAI's own code, see openai_golden.py.
"""

import functools
import json
import math
import shutil

import pytest
import torch
from diffusers import DDPMPipeline

from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.models.convert import convert_checkpoint
from ddpm_hf.models.openai import PROGRAMS, PUBLISHED, read_checkpoint
from ddpm_hf.models.pretrained import load_classifier, load_pretrained
from tests.openai_golden import CASES, GOLDEN, seeded_input, seeded_weights, some


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def checkpoint(golden, tmp_path_factory):
    """Write the checkpoint of a case, with its tensors changed by `change`."""

    @functools.cache
    def write(case, change=dict):
        path = tmp_path_factory.mktemp("openai") / "model.pt"
        torch.save(change(weights(case)), path)
        return path

    @functools.cache
    def weights(case):
        return seeded_weights(golden[case]["shapes"])

    return write


@pytest.mark.parametrize("case", CASES)
def test_the_network_computes_what_the_original_code_computes(golden, checkpoint, case):
    program, flags, size = CASES[case]
    network, scheduler = read_checkpoint(checkpoint(case), program, flags)
    images, timesteps, classes = seeded_input(size)
    with torch.no_grad():
        if "classifier" in case:
            output = network(images, timesteps)
        else:
            output = network(images, timesteps, classes if "--class_cond True" in flags else None).sample
    torch.testing.assert_close(torch.tensor(some(output)), torch.tensor(golden[case]["output"]), atol=1e-5, rtol=0)
    betas = [scheduler.betas64[i].item() for i in (0, 1, 500, 998, 999)]
    assert betas == pytest.approx(golden[case]["betas"], rel=1e-9)


def test_4000_timesteps_become_every_fourth(checkpoint, tmp_path):
    """Its abar is that of the cosine (Nichol & Dhariwal, eq. 17) at the timesteps 0, 4, ..., 3996."""
    program, flags, _ = CASES["cifar10"]
    path = checkpoint("cifar10")
    main(["convert", str(path), str(tmp_path / "new"), "--original", program, "--original_flags", flags])
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "new")
    f = [math.cos((k / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(4001)]
    table = torch.tensor([f[4 * t + 1] / f[0] for t in range(1000)], dtype=torch.float64)
    torch.testing.assert_close(load_pretrained(tmp_path / "new").scheduler.alphas_cumprod64, table, rtol=1e-9, atol=0)
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod.double(), table, rtol=2e-4, atol=0)
    assert pipeline.scheduler.config.variance_type == "learned_range"


def test_a_converted_classifier_guides_a_converted_model(checkpoint, tmp_path, capsys):
    """A classifier of 64 pixels with attention pooling is saved, and loaded with the code beside it."""
    program, flags, size = CASES["classifier"]
    path = checkpoint("classifier")
    convert_checkpoint(path, tmp_path / "new", original=program, original_flags=flags)
    network, _ = read_checkpoint(path, program, flags)
    images, timesteps, _ = seeded_input(size)
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path / "new")(images, timesteps), network(images, timesteps))
    assert "AttentionPool" in (tmp_path / "new" / "classifier" / "classifier.py").read_text()


def without(*endings):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(endings)}


REFUSED = [
    ("cifar10", "--num_res_blocks 1 --num_channels 32", dict, "input_blocks.5.1 has 4 attention heads of 24 channels"),
    ("cifar10", "--image_size 32 --num_channels 32", dict, "input_blocks.2.0.op.weight has no place"),
    (
        "cifar10",
        "--image_size 32 --num_res_blocks 1 --num_channels 64",
        dict,
        "input_blocks.0.0.weight makes a conv_in",
    ),
    ("cifar10", "{} --num_channels 33", dict, "must be a multiple of 32"),
    ("cifar10", "{} --num_heads_upsample 2", dict, "output_blocks.2.1 has 2 attention heads"),
    ("cifar10", "{} --num_heads 3", dict, "does not divide the 64 channels of input_blocks.3.1"),
    ("cifar10", "{} --class_cond True", dict, "lacks label_emb.weight"),
    ("cifar10", "{} --learn_sigma False", dict, "out.2.weight makes a conv_out.weight of shape (6"),
    ("cifar10", "{} --diffusion_steps 500", dict, "time_embed.0 is given 1000 t/500"),
    ("cifar10", "{} --noise_schedule cosin", dict, "give linear or cosine"),
    ("cifar10", "{} --image_size 48", dict, "do not follow from --image_size 48"),
    ("cifar10", "{}", without("middle_block.1.qkv.bias"), "lacks middle_block.1.qkv.bias"),
    ("cifar10", "{}", lambda t: t | {"extra.weight": t["out.0.bias"]}, "its extra.weight has no place"),
    ("cifar10", "{}", lambda t: t | {"out.0.bias": t["out.0.bias"] / 0}, "not all finite"),
    ("cifar10", "{}", lambda t: {"state": {}, "param_groups": []}, "it holds other things than weights"),
    ("cifar10", "{}", lambda t: {"conv.weight": t["out.0.bias"]}, "it has no convolution input_blocks.0.0"),
    ("cifar10", "{}", lambda t: {"input_blocks.0.0.weight": torch.zeros(8, 6, 3, 3)}, "it enlarges images"),
    ("cifar10", "{} --num_head 4", dict, "did you mean num_heads?"),
    ("cifar10", "{} --dropout", dict, "--dropout without a value"),
    ("cifar10", "{} --dropout much", dict, "--dropout much: give a float"),
    ("legacy order", "{} --channel_mult 2,4", dict, "time_embed.0 takes 32 numbers"),
    ("legacy order", "{} --num_head_channels 24", dict, "24, which does not divide 64"),
    ("classifier", "{} --classifier_pool spatial", dict, "NoisyClassifier does not"),
]


@pytest.mark.parametrize("case,flags,change,sentence", REFUSED, ids=[row[3] for row in REFUSED])
def test_what_is_not_exact_is_refused_by_the_name_of_the_layer(
    checkpoint, tmp_path, capsys, case, flags, change, sentence
):
    program, own, _ = CASES[case]
    path = checkpoint(case, change)
    with pytest.raises(SystemExit) as stopped:
        words = [f"--original={program}", f"--original_flags={flags.format(own)}"]
        main(["convert", str(path), str(tmp_path / "new"), *words])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and sentence in said, said
    assert not list(tmp_path.iterdir())


def test_files_and_folders_take_their_own_flags(checkpoint, golden, tmp_path, capsys):
    program, flags, _ = CASES["cifar10"]
    path = checkpoint("cifar10")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for words, sentence in {
        f"{path} new": 'give --original improved-diffusion (or guided-diffusion) and --original_flags "--image_size',
        f"{path} new --original=improved --original_flags=--image_size=32": "did you mean improved-diffusion?",
        f"{path} new --weights=raw": "holds one set of weights",
        f"{path} new --ddpm_num_steps=5": "is a checkpoint file, which takes --original_flags instead",
        f"{tmp_path} new --original=improved-diffusion": "is not a checkpoint file: leave --original out",
        f"{tmp_path}/text.pt new": "text.pt cannot be loaded",
    }.items():
        with pytest.raises(SystemExit):
            main(["convert", *words.split()])
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and sentence in said, said
    # A published name brings its flags, and a file that has it by mistake is refused.
    shutil.copy(path, tmp_path / "256x256_diffusion_uncond.pt")
    with pytest.raises(UserError, match="input_blocks.2.0.op.weight has no place"):
        convert_checkpoint(tmp_path / "256x256_diffusion_uncond.pt", tmp_path / "new")


def test_the_flags_of_published_checkpoints_exist():
    for program, files in PUBLISHED.items():
        for flags in files.values():
            assert flags.keys() <= PROGRAMS[program].keys()
