"""Saved pipelines: stock classes, or our pipeline file next to them; after a kill there is one that loads."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import model_of
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, UNet2DModel

from ddpm_hf.community_pipelines import shipped
from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.models import saving
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.pretrained import load_classifier, load_pretrained
from ddpm_hf.models.saving import save_classifier, save_pipeline
from ddpm_hf.sampling.settings import Sampler


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def tiny_unet(out_channels=1, **kwargs):
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], block_out_channels=[8], **kwargs)
    sizes = dict(sample_size=8, in_channels=1, out_channels=out_channels, layers_per_block=1, norm_num_groups=4)
    return UNet2DModel(**sizes, **blocks)


def test_a_pipeline_is_stock_and_loads_as_ddpm_and_ddim(tmp_path, unet):
    scheduler = PaperDDPMScheduler.ho_linear(100)
    (tmp_path / "README.md").write_text("mine")
    unet.train()
    save_pipeline(tmp_path, unet, scheduler)
    save_pipeline(tmp_path, unet.to(torch.float64), scheduler)  # over the first one
    assert unet.training and unet.dtype == torch.float64
    unet.to(torch.float32)

    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("_class_name") == "DDPMPipeline" and index.pop("_diffusers_version")
    assert index == {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    for pipeline in (DDPMPipeline.from_pretrained(tmp_path), DDIMPipeline.from_pretrained(tmp_path)):
        assert torch.equal(pipeline.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
        assert pipeline.unet.dtype == torch.float32 and not pipeline.unet.training
        for name, tensor in pipeline.unet.state_dict().items():
            assert torch.equal(tensor, unet.state_dict()[name])
    assert (tmp_path / "README.md").read_text() == "mine"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "model_index.json", "scheduler", "unet"]


@pytest.mark.parametrize(
    "variance_type, steps, how",
    [
        ("fixed_small", 50, {}),
        ("fixed_small", 10, {}),
        ("fixed_large", 50, {}),
        ("learned_range", 50, {}),
        ("learned_range", 20, {"timesteps": "linspace"}),
        ("learned_range", 7, {"timesteps": "linspace"}),
    ],
)
def test_stock_ddpm_draws_what_sample_draws_without_noise_at_the_end(tmp_path, variance_type, steps, how):
    unet = tiny_unet(2 if variance_type == "learned_range" else 1)
    unet.conv_out.bias.data[1:] = 3.0  # a large variance
    scheduler = PaperDDPMScheduler.nichol_cosine(50, variance_type=variance_type)
    save_pipeline(tmp_path, unet, scheduler)
    pipeline, model = DDPMPipeline.from_pretrained(tmp_path), load_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="pt").images
    drawn = Sampler(num_inference_steps=steps, **how).resolve(model).draw(model, [0])
    torch.testing.assert_close(drawn, 2 * stock - 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("steps", [50, 12])
def test_the_published_spacing_does_not_change_our_samplers(tmp_path, variance_type, steps):
    unet = tiny_unet(2 if variance_type == "learned_range" else 1)
    scheduler = PaperDDPMScheduler.nichol_cosine(50, variance_type=variance_type)
    save_pipeline(tmp_path, unet, scheduler)
    saved, trained = load_pretrained(tmp_path), model_of(unet, scheduler)
    for name in ("ddpm", "ddim"):
        images = [
            Sampler(name=name, num_inference_steps=steps).resolve(model).draw(model, [0]) for model in (saved, trained)
        ]
        torch.testing.assert_close(*images, rtol=0, atol=1e-3)


def test_a_saved_network_does_not_say_where_it_was_loaded_from(tmp_path, unet, monkeypatch):
    """diffusers keeps the path of a loaded network in its config, as `_name_or_path`."""
    scheduler = PaperDDPMScheduler.nichol_cosine(10)
    save_pipeline(tmp_path / "one", unet, scheduler)
    blocks = {"down_block_types": ["DownBlock2D"], "block_out_channels": [4], "attention_head_dim": 4}
    save_classifier(tmp_path / "one", NoisyClassifier(in_channels=1, layers_per_block=1, norm_num_groups=4, **blocks))
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "one", "one"):
        loaded = load_pretrained(name).unet
        classifier = load_classifier(name)
        assert all("one" in str(each.config["_name_or_path"]) for each in (loaded, classifier))
        save_pipeline(tmp_path / "two", loaded, scheduler)
        save_classifier(tmp_path / "two", classifier)
        configs = sorted(tmp_path.glob("two/**/*.json"))
        assert len(configs) == 4
        for path in configs:
            assert "_name_or_path" not in json.loads(path.read_text()) and str(tmp_path) not in path.read_text()
    assert DDPMPipeline.from_pretrained(tmp_path / "two").unet.config.sample_size == 8
    assert load_classifier(tmp_path / "two").config.num_classes == 10


@pytest.mark.parametrize("kill_at", range(1, 5))
def test_a_kill_while_saving_leaves_a_pipeline_that_loads(tmp_path, unet, monkeypatch, kill_at):
    scheduler = PaperDDPMScheduler.nichol_cosine(10)
    save_pipeline(tmp_path, unet, scheduler)
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        Path(source).replace(target)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "os", SimpleNamespace(replace=replace))
        with pytest.raises(KeyboardInterrupt):
            save_pipeline(tmp_path, unet, scheduler)
    DDPMPipeline.from_pretrained(tmp_path)
    save_pipeline(tmp_path, unet, scheduler)
    assert not (tmp_path / ".saving").exists()


def test_a_conditional_pipeline_has_its_code_beside_it(tmp_path):
    save_pipeline(tmp_path, tiny_unet(num_class_embeds=3), PaperDDPMScheduler.nichol_cosine(10), ["cat", "dog"])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline="class_guided")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline="class_guided", trust_remote_code=True)
    assert type(pipeline).__name__ == "ClassGuidedPipeline"
    assert sys.modules[type(pipeline).__module__].__file__ != str(shipped("pipelines") / "class_guided.py")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(["dog"], num_inference_steps=2).images[0].size == (8, 8)
    assert load_pretrained(str(tmp_path)).classes.names == ("cat", "dog")


def test_a_pipeline_with_its_parts_beside_the_index_loads(tmp_path, unet):
    """As google/ddpm-cifar10-32 and its like have them."""
    save_pipeline(tmp_path, unet, PaperDDPMScheduler.nichol_cosine(10))
    for part in ("unet", "scheduler"):
        for path in (tmp_path / part).iterdir():
            path.rename(tmp_path / path.name)
        (tmp_path / part).rmdir()
    model = load_pretrained(str(tmp_path))
    assert model.scheduler.config.num_train_timesteps == 10 and model.unet.config.block_out_channels == [8]
