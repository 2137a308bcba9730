"""No command writes a picture of pixels that are not finite: it stops with one sentence."""

import math

import pytest
import torch
from conftest import steps
from PIL import Image

import ddpm_hf
from ddpm_hf import UserError
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.pictures import to_pil, to_uint8
from ddpm_hf.sampling.samplers import draw, image_generators
from ddpm_hf.training.figures import ddim_sheet
from ddpm_hf.training.periodic import add_sheet


@pytest.fixture
def model(tiny_run):
    """A model that draws nan."""
    model = load_pretrained(tiny_run)
    model.unet.conv_out.bias.data.fill_(math.nan)
    return model


@pytest.mark.parametrize("pixel", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("write", [to_uint8, to_pil])
def test_one_pixel_is_enough(write, pixel):
    images = torch.zeros(2, 1, 4, 4)
    images[1, 0, 2, 2] = pixel
    with pytest.raises(UserError, match="pixels that are nan or infinite"):
        write(images)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_in_memory(model, sampler):
    with pytest.raises(UserError, match="image 0 has pixels that are not finite"):
        ddpm_hf.sample(model, 2, sampler, num_inference_steps=2)


def test_restored_images_in_memory_and_in_a_folder(model, tmp_path):
    Image.new("L", (28, 28), 99).save(tmp_path / "given.png")
    with pytest.raises(UserError, match="pixels that are nan or infinite"):
        ddpm_hf.restore(model, Image.new("L", (28, 28), 99), task="denoise", noise_level=0.1)
    with pytest.raises(UserError, match="pixels that are nan or infinite"):
        ddpm_hf.restore(model, tmp_path / "given.png", tmp_path / "out.png", task="denoise", noise_level=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["given.png"]


def test_previews_and_figures_of_a_training(model, tmp_path):
    run, _ = steps(1, f"--output_dir={tmp_path}/run")
    run.network.conv_out.bias.data.fill_(math.nan)
    with pytest.raises(UserError, match="image 0 has pixels that are not finite"):
        add_sheet(run, {"sheet"}, {})
    with pytest.raises(UserError, match="image 0 has pixels that are not finite"):
        ddim_sheet(run.pretrained, tmp_path / "run" / "ddim.png", 0, num_images=1)
    assert not list((tmp_path / "run").rglob("*.png"))


def test_an_infinite_pixel_is_not_clamped_to_white(tiny_run):
    model = load_pretrained(tiny_run)
    model.scheduler.register_to_config(clip_sample=False)
    model.unet.conv_out.bias.data.fill_(-math.inf)
    images = draw(model.unet, model.scheduler, image_generators(0, [0]), num_inference_steps=1, spacing="trailing")
    assert images.isnan().all()
