"""Losses against numbers one can do by hand, and the noise that is keyed by image."""

import math

import pytest
import torch

from ddpm_hf.losses import (
    by_band,
    denoising_loss,
    discretized_log_likelihood,
    draw_noise,
    min_snr_weights,
    normal_cdf,
    variational_term,
)
from ddpm_hf.scheduler import PaperDDPMScheduler, make_scheduler


class Answer(torch.nn.Module):
    """A "UNet" that knows what to say."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, sample, timesteps):
        return type("Output", (), {"sample": self.answer})


def a_batch(T=100, size=6):
    generator = torch.Generator().manual_seed(0)
    images = (torch.randint(0, 256, (size, 1, 4, 4), generator=generator) / 127.5) - 1
    return {
        "images": images,
        "noise": torch.randn(images.shape, generator=generator),
        "timesteps": torch.arange(size) * (T - 1) // (size - 1),
    }


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_true_target_costs_nothing_and_an_offset_what_it_should(loss_type, prediction_type):
    scheduler = make_scheduler("ho_linear", 100, prediction_type=prediction_type)
    batch = a_batch()
    target = scheduler.training_target(batch["images"], batch["noise"], batch["timesteps"])
    loss = denoising_loss(scheduler, loss_type)
    assert loss(Answer(target), batch).abs().max() < 1e-6
    cost = {"l2": 9.0, "l1": 3.0, "huber": 2.5}[loss_type]  # of an error of 3: 3^2, 3, 3 - 1/2
    assert torch.allclose(loss(Answer(target + 3), batch), torch.full((6,), cost), rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_is_one_weight_in_the_space_of_x0(prediction_type):
    # The same error in x_0 must cost the same however the model speaks: min(SNR, 5) times its square.
    scheduler = make_scheduler("ho_linear", 100, prediction_type=prediction_type)
    batch = a_batch()
    noisy = scheduler.q_sample(batch["images"], batch["noise"], batch["timesteps"])
    target = scheduler.training_target(batch["images"], batch["noise"], batch["timesteps"])
    output = target + 0.01
    x0_error = scheduler.predict_original_sample(output, noisy, batch["timesteps"]) - batch["images"]
    wanted = scheduler.snr(batch["timesteps"]).clamp(max=5) * x0_error.square().mean(dim=(1, 2, 3))
    assert torch.allclose(denoising_loss(scheduler, "l2", 5.0)(Answer(output), batch), wanted.float(), rtol=2e-3)
    assert (min_snr_weights(scheduler, batch["timesteps"], 5.0) > 0).all()


def test_the_discretised_likelihood_is_a_distribution():
    # Over all 256 levels the probabilities add up to 1, wherever the Gaussian lies.
    levels = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
    for mean, std in [(0.0, 0.5), (0.9, 0.3), (-1.0, 0.02)]:
        log_p = discretized_log_likelihood(levels, torch.full_like(levels, mean), torch.tensor(2 * math.log(std)))
        assert abs(float(log_p.exp().sum()) - 1) < 1e-4
    z = torch.linspace(-3, 3, 61)
    assert (normal_cdf(z) - torch.distributions.Normal(0, 1).cdf(z)).abs().max() < 1e-3


def test_variational_term_is_the_kl_between_two_gaussians():
    scheduler = PaperDDPMScheduler.ho_linear(100, variance_type="learned_range")
    batch = a_batch()
    images, t = batch["images"], batch["timesteps"]
    noisy = scheduler.q_sample(images, batch["noise"], t)
    prediction, v = batch["noise"] + 0.1, torch.full_like(noisy, 0.3)
    terms = variational_term(scheduler, images, noisy, t, prediction, v)
    true_mean, variance, _ = scheduler.q_posterior(images, noisy, t)
    mean = scheduler.q_posterior(scheduler.predict_original_sample(prediction, noisy, t), noisy, t)[0]
    log_variance = scheduler.reverse_log_variance(noisy, t, None, "learned_range", v)
    for k in range(1, 6):
        q = torch.distributions.Normal(true_mean[k], variance[k].sqrt().expand_as(true_mean[k]))
        p = torch.distributions.Normal(mean[k], (0.5 * log_variance[k]).exp())
        assert math.isclose(terms[k], torch.distributions.kl_divergence(q, p).mean() / math.log(2), rel_tol=1e-3)
    assert t[0] == 0 and terms[0] > 0


def test_the_hybrid_loss_teaches_the_variance_and_leaves_the_mean_to_the_simple_loss():
    scheduler = PaperDDPMScheduler.nichol_cosine(100, variance_type="learned_range")
    batch = a_batch()
    output = torch.cat([batch["noise"] + 0.1, torch.zeros_like(batch["noise"])], dim=1).requires_grad_()
    denoising_loss(scheduler)(Answer(output), batch).sum().backward()
    mean_gradient, variance_gradient = output.grad.chunk(2, dim=1)
    # d/d eps of the pixels' mean of (eps - target)^2
    assert torch.allclose(mean_gradient, torch.full_like(mean_gradient, 2 * 0.1 / 16), rtol=1e-4)
    assert (variance_gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_noise_belongs_to_the_image_not_to_the_batch():
    noise, timesteps = draw_noise(torch.arange(40), (1, 4, 4), 1000, seed=3)
    again, t_again = draw_noise(torch.tensor([7, 31]), (1, 4, 4), 1000, seed=3)
    assert torch.equal(again, noise[[7, 31]]) and torch.equal(t_again, timesteps[[7, 31]])
    other, _ = draw_noise(torch.arange(40), (1, 4, 4), 1000, seed=4)
    assert not torch.equal(noise, other) and noise.unique().numel() == noise.numel()


def test_noise_and_timesteps_have_their_distributions():
    noise, timesteps = draw_noise(torch.arange(4000), (1, 4, 4), 10, seed=0)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    counts = torch.bincount(timesteps, minlength=10)
    assert len(counts) == 10 and (counts - 400).abs().max() < 4 * math.sqrt(400 * 0.9)


def test_bands_are_quarters_of_the_timesteps():
    sums = by_band(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([0, 24, 25, 99, 75]), 100)
    assert sums.tolist() == [[3.0, 3.0, 0.0, 9.0], [2.0, 1.0, 0.0, 2.0]]
