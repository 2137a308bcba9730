"""--rescale_betas_zero_snr: the last timestep is pure noise, in training, in sampling and in stock pipelines."""

import numpy as np
import pytest
import torch
from conftest import TINY, model_of, untrained_unet
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.diffusion.likelihood import prior_term
from ddpm_hf.diffusion.losses import OBJECTIVES
from ddpm_hf.diffusion.scheduler import make_scheduler
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.sampling.guidance import guide
from ddpm_hf.sampling.samplers import SAMPLERS, draw, image_generators
from ddpm_hf.training.figures import schedule_figure
from ddpm_hf.training.loop import train


def zero_snr(prediction_type="v_prediction", variance_type="fixed_small"):
    settings = {"prediction_type": prediction_type, "variance_type": variance_type}
    return make_scheduler("linear", 20, rescale_betas_zero_snr=True, **settings)


def test_the_schedule_ends_in_noise_as_the_paper_says():
    """Lin et al., Algorithm 1: sqrt(abar) is shifted to end at 0 and scaled to begin where it began."""
    plain, scheduler = make_scheduler("linear", 20).alphas_cumprod64.sqrt(), zero_snr()
    root = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    assert torch.allclose(scheduler.alphas_cumprod64.sqrt(), root, atol=1e-6)
    assert scheduler.alphas_cumprod64[-1] == 0 and scheduler.stock().alphas_cumprod[-1] == 0
    noise = torch.randn(1, 1, 4, 4)
    assert torch.equal(scheduler.q_sample(torch.randn(1, 1, 4, 4), noise, 19), noise)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_losses_weights_and_bound_are_finite_at_the_last_timestep(prediction_type):
    images, t = torch.rand(4, 1, 8, 8) * 2 - 1, torch.full((4,), 19)
    batch = {"images": images, "noise": torch.randn(4, 1, 8, 8), "timesteps": t}
    for objective, settings in {"simple": {}, "simple ": {"snr_gamma": 5.0}, "vlb": {}, "hybrid": {}}.items():
        variance = "learned_range" if objective == "hybrid" else "fixed_small"
        unet = untrained_unet(8, variance)
        scheduler = zero_snr(prediction_type, variance)
        losses = OBJECTIVES[objective.strip()](scheduler, **settings)(unet, batch)
        losses.sum().backward()
        assert losses.isfinite().all() and unet.conv_in.weight.grad.isfinite().all()
    assert torch.equal(prior_term(zero_snr(), images), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_every_sampler_starts_in_pure_noise(sampler, variance_type):
    scheduler = zero_snr(variance_type=variance_type)
    for steps in (4, 20):
        options = dict(sampler=sampler, num_inference_steps=steps, spacing="trailing")
        images = draw(untrained_unet(8).eval(), scheduler, image_generators(0, range(2)), **options)
        assert images.isfinite().all() and images.std() > 0.01


def test_a_classifier_does_not_guide_pure_noise():
    scheduler = zero_snr()
    classifier = NoisyClassifier(
        num_classes=2, sample_size=8, in_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), num_train_timesteps=20,
    ).eval()  # fmt: skip
    unet = untrained_unet(8).eval()
    guided = guide(unet, scheduler, model_of(unet, scheduler).classes, 3.0, classifier)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([19, 19])
    output = guided(x, t, torch.tensor([0, 1])).sample
    with torch.no_grad():
        expected = scheduler.predict_original_sample(unet(x, t).sample, x, t).clamp(-1, 1)
    assert torch.allclose(scheduler.predict_original_sample(output, x, t), expected, atol=1e-5)


def test_stock_pipelines_draw_the_same_images(tmp_path):
    """A run is trained, saved, and drawn from by stock DDPM with all steps and by stock DDIM with fewer."""
    words = [*TINY, "--rescale_betas_zero_snr", "--prediction_type=v_prediction", "--max_train_steps=2"]
    train(parse_config([*words, f"--output_dir={tmp_path}", "--ddpm_num_steps=20"]))
    model = load_pretrained(tmp_path)
    stock = DDPMPipeline.from_pretrained(tmp_path)
    assert type(stock.scheduler) is DDPMScheduler and stock.scheduler.config.timestep_spacing == "trailing"
    assert stock.scheduler.config.rescale_betas_zero_snr and stock.scheduler.alphas_cumprod[-1] == 0
    assert load_pretrained(tmp_path / "checkpoint-2").scheduler.alphas_cumprod[-1] == 0
    ddim = DDIMPipeline(stock.unet, DDIMScheduler.from_config(stock.scheduler.config))
    for pipeline, sampler, steps in ((stock, "ddpm", 20), (ddim, "ddim", 5)):
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            batch_size=2, generator=image_generators(0, range(2)), num_inference_steps=steps, output_type="np"
        ).images
        options = dict(sampler=sampler, num_inference_steps=steps, spacing="trailing")
        ours = draw(model.unet, model.scheduler.in_stock_precision(), image_generators(0, range(2)), **options)
        ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert np.abs(images - ours).max() < 1e-4
    schedule_figure(model.scheduler, tmp_path / "schedule.png")


def test_predicting_the_noise_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_config([*TINY, "--rescale_betas_zero_snr"])
    assert "give --prediction_type v_prediction" in capsys.readouterr().err


def test_weights_that_leave_out_the_last_timestep_are_refused():
    for prediction_type in ("v_prediction", "sample"):
        with pytest.raises(UserError, match="the first step of sampling would not be trained"):
            TrainingConfig(rescale_betas_zero_snr=True, prediction_type=prediction_type, snr_gamma=5.0)
