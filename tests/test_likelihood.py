"""The variational bound against a numpy version of the formulas, a known entropy, and numbers computed by hand."""

import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from ddpm_hf import UserError
from ddpm_hf.diffusion.likelihood import (
    bits_per_dim,
    bound_terms,
    discretized_log_likelihood,
    normal_cdf,
    num_pilot_images,
    pilot_probabilities,
    prior_term,
    summarise,
    variational_term,
)
from ddpm_hf.diffusion.scheduler import make_scheduler
from ddpm_hf.randomness import keyed_generator


VARIANCES = ["fixed_small", "fixed_large", "learned_range"]


class Formula(torch.nn.Module):
    """A "UNet" in closed form, `answer(x, t)`, that may say a variance too."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, sample, timesteps, class_labels=None):
        return type("Output", (), {"sample": self.answer(sample, timesteps.view(-1, 1, 1, 1).double())})


def some_answer(x, t):
    return 0.7 * x + 0.2 * torch.cos(t)


def some_answer_and_variance(x, t):
    return torch.cat([some_answer(x, t), torch.sin(3 * x + t)], dim=1)


def some_images(count=2, channels=1, size=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    images[0, 0, 0, :2] = torch.tensor([0, 255])  # the two bins without an end
    return images


def numpy_terms(beta_schedule, T, model, images, prediction_type, variance_type, clip, float32_table=False):
    """All terms (N, T) in bits/dim, from the formulas of Ho et al. and Nichol & Dhariwal; t from 0."""
    if beta_schedule == "linear":
        beta = np.linspace(1e-4, 0.02, T)
    else:
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    abar = np.cumprod(1 - beta)
    if float32_table:
        abar = np.cumprod((1 - beta).astype(np.float32)).astype(np.float64)
    previous = np.append(1.0, abar[:-1])
    posterior = beta * (1 - previous) / (1 - abar)
    small = np.log(np.append(posterior[1], posterior[1:]))
    large = np.log(np.append(posterior[1], beta[1:]))
    terms = np.empty((len(images), T))
    for i, image in enumerate(images):
        x0 = image.numpy().astype(np.float64) / 127.5 - 1
        for t in range(T):
            noise = torch.randn(image.shape, generator=keyed_generator(0, "bound", i, t)).numpy().astype(np.float64)
            x = np.sqrt(abar[t]) * x0 + np.sqrt(1 - abar[t]) * noise
            with torch.no_grad():
                said = model(torch.from_numpy(x)[None], torch.tensor([t])).sample[0].numpy()
            said, v = said[: len(x)], said[len(x) :]
            if prediction_type == "epsilon":
                predicted = (x - np.sqrt(1 - abar[t]) * said) / np.sqrt(abar[t])
            else:
                predicted = np.sqrt(abar[t]) * x - np.sqrt(1 - abar[t]) * said
            if clip:
                predicted = predicted.clip(-1, 1)
            log_variance = {"fixed_small": small[t], "fixed_large": large[t]}.get(variance_type)
            if log_variance is None:
                log_variance = (v + 1) / 2 * np.log(beta[t]) + (1 - v) / 2 * small[t]
            if t == 0:
                std = np.exp(log_variance / 2)
                ends = [(x0 + sign / 255 - predicted) / std for sign in (1, -1)]
                upper, lower = (0.5 + 0.5 * np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3)) for z in ends)
                p = np.where(x0 > 0.999, 1, upper) - np.where(x0 < -0.999, 0, lower)
                nats = -np.log(np.maximum(p, 1e-12))
            else:
                c0 = np.sqrt(previous[t]) * beta[t] / (1 - abar[t])
                ratio = np.exp(small[t] - log_variance)
                nats = 0.5 * (log_variance - small[t] - 1 + ratio) + (c0 * (x0 - predicted)) ** 2 / (
                    2 * np.exp(log_variance)
                )
            terms[i, t] = np.mean(np.broadcast_to(nats, x.shape)) / np.log(2)
    return terms


def our_terms(model, scheduler, images, **options):
    T = scheduler.config.num_train_timesteps
    terms = torch.empty(len(images), T, dtype=torch.float64)
    every = [(row, t, 1.0) for row in range(len(images)) for t in range(T)]
    for rows, timesteps, _, bits, _ in bound_terms(
        model, scheduler, images, range(len(images)), every, num_evaluations=len(every), progress=False, **options
    ):
        terms[rows, timesteps] = bits
    return terms.numpy()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("T", [10, 50, 200])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_every_term_is_that_of_the_formulas(beta_schedule, T, prediction_type, variance_type, clip):
    scheduler = make_scheduler(beta_schedule, T, prediction_type=prediction_type, variance_type=variance_type)
    model = Formula(some_answer_and_variance if variance_type == "learned_range" else some_answer)
    images = some_images()
    wanted = numpy_terms(beta_schedule, T, model, images, prediction_type, variance_type, clip)
    np.testing.assert_allclose(our_terms(model, scheduler, images, clip=clip), wanted, rtol=1e-8)
    bounds = bits_per_dim(model, scheduler, images, range(2), clip=clip, progress=False)
    prior = prior_term(scheduler, images.double() / 127.5 - 1)
    np.testing.assert_allclose(bounds["bits_per_dim"], wanted.sum(axis=1) + prior.numpy(), rtol=1e-8)
    np.testing.assert_allclose(bounds["L0"], wanted[:, 0], rtol=1e-8)


def test_a_real_unet_and_the_float32_table_that_would_be_seen():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=3,
    )
    labels = torch.tensor([2, 2])

    def labelled(x, t):
        return unet(x, t, class_labels=labels[:1])

    scheduler, images = make_scheduler("linear", 20, variance_type="learned_range"), some_images()
    single = bits_per_dim(unet, scheduler, images, range(2), class_labels=labels, progress=False)
    other = bits_per_dim(unet, scheduler, images, range(2), class_labels=1 - labels // 2, progress=False)
    unet.double().eval()
    wanted = numpy_terms("linear", 20, labelled, images, "epsilon", "learned_range", True)
    options = {"class_labels": labels}
    unet.train()
    np.testing.assert_allclose(our_terms(unet, scheduler, images, **options), wanted, rtol=1e-9)
    assert unet.training
    total = wanted.sum(axis=1) + prior_term(scheduler, images.double() / 127.5 - 1).numpy()
    np.testing.assert_allclose(single["bits_per_dim"], total, rtol=1e-5)  # in float32 only the UNet
    assert (single["bits_per_dim"] - other["bits_per_dim"]).abs().min() > 1e-3
    rough = numpy_terms("linear", 20, labelled, images, "epsilon", "learned_range", True, float32_table=True)
    assert np.abs(rough / wanted - 1).max() > 1e-6


def test_the_variance_at_t_0_is_that_of_step_1():
    # linear, T = 1000: beta~_1 = beta_1 (1 - abar_0) / (1 - abar_1) = 5.453e-5. A model that knows x_0 then has
    # L_0 = -log2 P(|z| < 1/255 / sigma), by tanh in place of the normal CDF, which differs from the exact value.
    beta_1 = 1e-4 + 0.0199 / 999
    variance = beta_1 * 1e-4 / (1 - 0.9999 * (1 - beta_1))
    assert variance == pytest.approx(5.453e-5, rel=1e-3)
    exact = -math.log2(math.erf(1 / 255 / math.sqrt(2 * variance)))
    z = 1 / 255 / math.sqrt(variance)
    wanted = -math.log2(math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    x0 = torch.full((1, 1, 2, 2), 100 / 127.5 - 1, dtype=torch.float64)
    for variance_type in ("fixed_small", "fixed_large"):
        scheduler = make_scheduler("linear", 1000, prediction_type="sample")
        t = torch.tensor([0])
        bits = variational_term(scheduler, x0, x0, t, x0, variance_type=variance_type)
        assert bits.item() == pytest.approx(wanted, rel=1e-9)
        assert 1e-6 < abs(bits.item() - exact) < 0.02


@pytest.mark.parametrize(("v", "fixed"), [(1.0, "fixed_large"), (-1.0, "fixed_small")])
def test_the_ends_of_the_learned_range_are_the_fixed_variances(v, fixed):
    scheduler, images = make_scheduler("nichol_cosine", 30), some_images()
    learned = Formula(lambda x, t: torch.cat([some_answer(x, t), torch.full_like(x, v)], dim=1))
    one = our_terms(learned, scheduler, images, variance_type="learned_range")
    other = our_terms(Formula(some_answer), scheduler, images, variance_type=fixed)
    np.testing.assert_allclose(one[:, 1:], other[:, 1:], rtol=1e-12)
    # A fixed variance can be scored with the same UNet: its other channels are left out.
    np.testing.assert_array_equal(our_terms(learned, scheduler, images, variance_type=fixed), other)


def test_the_bound_of_a_known_distribution_is_above_its_entropy_and_falls_with_t():
    # Pixels are N(0, 0.25^2) rounded to 8 bit, taken at even quantiles; the best epsilon is linear in x_t.
    edges = torch.linspace(-128, 128, 257, dtype=torch.float64) / 127.5 + 1e-300
    p = torch.special.ndtr(edges / 0.25).diff()
    levels = (torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096) * 0.25 + 1) * 127.5
    images = levels.round().clamp(0, 255).to(torch.uint8).view(1, 1, 64, 64)
    entropy = -(p[p > 0] * p[p > 0].log2()).sum().item()
    assert entropy == pytest.approx(7.0412, abs=1e-3)

    bounds = []
    for T in (250, 1000, 4000):
        scheduler = make_scheduler("nichol_cosine", T, variance_type="fixed_large")
        abar = scheduler.alphas_cumprod64
        variance = 0.25**2 + (2 / 255) ** 2 / 12

        def best(x, t, abar=abar, variance=variance):
            a = abar[t.long()]
            return (1 - a).sqrt() * x / (a * variance + 1 - a)

        bounds.append(summarise(bits_per_dim(Formula(best), scheduler, images, [0], progress=False)))
        assert bounds[-1]["floored"] == 0
    values = [bound["bits_per_dim"] for bound in bounds]
    assert entropy < values[2] < values[1] < values[0] < 7.4 and values[2] == pytest.approx(7.08, abs=0.03), values


@pytest.mark.parametrize(
    ("timesteps", "evaluations", "images"),
    [(1000, 64 * 10, 2), (1000, 1000 * 20, 16), (1000, 512 * 20, 16), (4000, 10**6, 4), (10, 30, 12), (20_000, 10, 2)],
)
def test_the_pilot_is_not_dearer_than_four_times_the_bound_unless_two_images_are(timesteps, evaluations, images):
    assert num_pilot_images(timesteps, evaluations) == images


def test_few_timesteps_are_unbiased_and_importance_sampling_is_worth_it():
    T, images = 50, some_images(300, size=2)
    scheduler = make_scheduler("ho_linear", T)
    model = Formula(lambda x, t: scheduler.alphas_cumprod64[t.long()].sqrt() * x + 0.3)
    full = bits_per_dim(model, scheduler, images, range(300), progress=False)
    n = num_pilot_images(T, 300 * 5)
    pilot = pilot_probabilities(model, scheduler, images[:n], range(n), progress=False)
    assert pilot[0] == 0 and pilot.sum() == pytest.approx(1) and pilot[1:].min() > 0
    uniform = (torch.arange(T) > 0).double() / (T - 1)
    spread = {}
    for name, probabilities in {"pilot": pilot, "uniform": uniform, "own pilot": None}.items():
        few = bits_per_dim(model, scheduler, images, range(300), num_timesteps=5, pilot=probabilities, progress=False)
        assert torch.equal(few["L0"], full["L0"]) and torch.equal(few["prior"], full["prior"])
        error = few["bits_per_dim"] - full["bits_per_dim"]
        spread[name] = error.std()
        assert abs(error.mean()) < 4 * error.std() / math.sqrt(300) and spread[name] > 0
    # As many draws as timesteps, all alike likely: each slice is one timestep, so nothing is left to chance.
    every = bits_per_dim(model, scheduler, images, range(300), num_timesteps=T, pilot=uniform, progress=False)
    assert torch.allclose(every["bits_per_dim"], full["bits_per_dim"], rtol=1e-12)
    assert spread["pilot"] < 0.5 * spread["uniform"] and spread["own pilot"] == spread["pilot"]


@pytest.mark.parametrize("few", [{}, {"num_timesteps": 6}])
def test_neither_batch_size_nor_shares_change_a_number(few):
    scheduler, images, model = make_scheduler("linear", 30), some_images(7), Formula(some_answer)
    if few:
        few = few | {"pilot": pilot_probabilities(model, scheduler, images, range(7), progress=False)}
    whole = bits_per_dim(model, scheduler, images, range(7), progress=False, **few)
    parts = [
        bits_per_dim(model, scheduler, images[k::2], range(k, 7, 2), batch_size=5 + k, progress=False, **few)
        for k in (0, 1)
    ]
    for name, values in whole.items():
        joined = torch.empty(7, dtype=torch.float64)
        joined[0::2], joined[1::2] = parts[0][name], parts[1][name]
        assert torch.allclose(joined, values, rtol=1e-12)
    reseeded = bits_per_dim(model, scheduler, images, range(7), seed=1, progress=False, **few)
    assert (reseeded["bits_per_dim"] != whole["bits_per_dim"]).all()


def test_the_prior_is_what_the_schedule_leaves():
    x = torch.full((1, 3, 2, 2), 0.5)
    abar = np.prod(1 - np.linspace(1e-4, 0.02, 1000))
    wanted = 0.5 * (abar * 0.25 + (1 - abar) - 1 - np.log(1 - abar)) / np.log(2)
    assert prior_term(make_scheduler("linear"), x).item() == pytest.approx(wanted, rel=1e-6)
    assert wanted == pytest.approx(7.3e-6, rel=0.01) and prior_term(make_scheduler("nichol_cosine"), x) < 1e-9


def test_the_discretised_likelihood_is_a_distribution():
    # Over all 256 levels the probabilities add up to 1, wherever the Gaussian lies.
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1, 1, 1)
    for mean, std in [(0.0, 0.5), (0.9, 0.3), (-1.0, 0.02)]:
        log_variance = torch.tensor(2 * math.log(std), dtype=torch.float64)
        log_p = discretized_log_likelihood(levels, torch.full_like(levels, mean), log_variance)
        assert abs(float(log_p.exp().sum()) - 1) < 1e-4
    z = torch.linspace(-3, 3, 61)
    assert (normal_cdf(z) - torch.distributions.Normal(0, 1).cdf(z)).abs().max() < 1e-3


@pytest.mark.parametrize("side", [1, -1])
def test_far_from_the_mean_a_probability_has_its_floor(side):
    std, image = 0.03, torch.zeros(1, 1, 1, 1, dtype=torch.float64) + 1 / 255
    mean, log_variance = image + side * 13 * std, torch.tensor(2 * math.log(std), dtype=torch.float64)
    near, far = ((13 * std + sign / 255) / std / math.sqrt(2) for sign in (-1, 1))
    assert math.log((math.erfc(near) - math.erfc(far)) / 2) < math.log(1e-12)
    assert discretized_log_likelihood(image, mean, log_variance).item() == pytest.approx(math.log(1e-12))


def test_the_share_of_pixels_at_the_floor_is_told():
    scheduler = make_scheduler("linear", 20, prediction_type="sample")
    images = torch.full((1, 1, 2, 2), 128, dtype=torch.uint8)
    images[0, 0, 0, 0] = 200
    model = Formula(lambda x, t: torch.full_like(x, 128 / 127.5 - 1))
    assert bits_per_dim(model, scheduler, images, [0], progress=False)["floored"].item() == 0.25


def test_variational_term_is_the_kl_between_two_gaussians():
    scheduler = make_scheduler("ho_linear", 100, variance_type="learned_range")
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.rand(5, 1, 4, 4, generator=generator) * 2 - 1, torch.randn(5, 1, 4, 4, generator=generator)
    t = torch.tensor([1, 20, 40, 60, 99])
    noisy = scheduler.q_sample(images, noise, t)
    prediction, v = noise + 0.1, torch.full_like(noisy, 0.3)
    terms = variational_term(
        scheduler, images, noisy, t, prediction, predicted_variance=v, variance_type="learned_range"
    )
    assert terms.dtype == torch.float32
    true_mean, variance, _ = scheduler.q_posterior(images, noisy, t)
    mean = scheduler.q_posterior(scheduler.predict_original_sample(prediction, noisy, t), noisy, t)[0]
    log_variance = scheduler.reverse_log_variance(noisy, t, None, "learned_range", predicted_variance=v)
    for k in range(5):
        q = torch.distributions.Normal(true_mean[k], variance[k].sqrt().expand_as(true_mean[k]))
        p = torch.distributions.Normal(mean[k], (0.5 * log_variance[k]).exp())
        assert math.isclose(terms[k], torch.distributions.kl_divergence(q, p).mean() / math.log(2), rel_tol=1e-3)


def test_the_summary_has_means_and_the_standard_error_over_images():
    bounds = {"bits_per_dim": torch.tensor([2.0, 4.0, 6.0, 8.0]), "L0": torch.tensor([1.0, 1.0, 1.0, 3.0])}
    summary = summarise(bounds)
    assert (summary["bits_per_dim"], summary["L0"], summary["num_images"]) == (5.0, 1.5, 4)
    assert summary["standard_error"] == pytest.approx(math.sqrt(20 / 3 / 4))
    assert math.isnan(summarise({name: values[:1] for name, values in bounds.items()})["standard_error"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"variance_type": "learned_range"}, "variance_type is learned_range, but the UNet predicts no variance"),
        ({"variance_type": "learned"}, "variance_type is 'learned'; choose"),
        ({"num_timesteps": 1}, "num_timesteps is 1; it must be from 2 to the model's 10 timesteps"),
        ({"num_timesteps": 11}, "num_timesteps is 11"),
        ({"images": torch.zeros(1, 1, 4, 4)}, "images are torch.float32; the bound is on 8-bit images"),
    ],
)
def test_what_cannot_be_scored_is_a_sentence(given, said):
    given = {"images": some_images(1), "unet": Formula(some_answer), "progress": False} | given
    with pytest.raises(UserError, match=said):
        bits_per_dim(scheduler=make_scheduler("linear", 10), indices=[0], **given)
