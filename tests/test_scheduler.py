"""The schedule against the papers' formulas and stock diffusers, the posterior against Gaussian conditioning."""

import copy
import inspect
import json
import math
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler

from ddpm_hf import UserError
from ddpm_hf.diffusion.scheduler import BETA_SCHEDULES, PaperDDPMScheduler, make_scheduler


STOCK_KEYS = set(inspect.signature(DDPMScheduler.__init__).parameters) - {"self"}
SCHEDULES = [(name, T) for name in ("ho_linear", "nichol_cosine") for T in (50, 200, 1000, 4000)]
ONE_PIXEL = torch.zeros(1, 1, 1, 1, dtype=torch.float64)


def paper_betas(name, T):
    """Ho et al.'s linear betas as scaled in Nichol & Dhariwal's code, and the latter's eq. 17; float64."""
    if name == "ho_linear":
        return np.linspace(0.1 / T, 20 / T, T)
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    return np.array([min(1 - f[t + 1] / f[t], 0.999) for t in range(T)])


@pytest.mark.parametrize("name, T", SCHEDULES)
def test_betas_are_the_papers(name, T):
    scheduler = make_scheduler(name, T)
    expected = paper_betas(name, T)
    np.testing.assert_allclose(scheduler.betas.numpy(), expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(scheduler.betas64.numpy(), expected, rtol=0, atol=1e-15)
    np.testing.assert_allclose(scheduler.alphas_cumprod64.numpy(), np.cumprod(1 - expected), rtol=1e-10)
    if name == "nichol_cosine":
        assert torch.equal(scheduler.betas64.float(), scheduler.betas)
    assert scheduler.alphas_cumprod64[-1] < 1e-4


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Heun and NumPy 2
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_every_schedule_survives_every_conversion(name, tmp_path):
    ours = make_scheduler(name, 100, prediction_type="v_prediction")
    stock_betas = ours.betas if name.startswith(("ho", "nichol")) else DDPMScheduler(100, beta_schedule=name).betas
    assert torch.equal(ours.betas, stock_betas)
    assert set(ours.config) - {"_use_default_values"} == STOCK_KEYS

    ours.save_pretrained(tmp_path / "ours")
    ours.stock().save_pretrained(tmp_path / "stock")
    saved = json.loads((tmp_path / "stock" / "scheduler_config.json").read_text())
    assert saved.pop("_class_name") == "DDPMScheduler" and saved.pop("_diffusers_version")
    assert set(saved) == STOCK_KEYS
    others = [
        PaperDDPMScheduler.from_pretrained(tmp_path / "ours"),
        PaperDDPMScheduler.from_pretrained(tmp_path / "stock"),
        DDPMScheduler.from_pretrained(tmp_path / "ours"),
        DDPMScheduler.from_pretrained(tmp_path / "stock"),
        ours.stock(),
        PaperDDPMScheduler.from_config(ours.stock().config),
    ]
    if name not in ("sigmoid", "laplace"):  # which only DDPMScheduler knows
        others += [
            DDIMScheduler.from_pretrained(tmp_path / "ours"),
            DDIMScheduler.from_pretrained(tmp_path / "stock"),
            DDIMScheduler.from_config(ours.config),
            HeunDiscreteScheduler.from_config(ours.config),
            PaperDDPMScheduler.from_config(DDIMScheduler.from_config(ours.config).config),
        ]
    for other in others:
        assert torch.equal(other.betas, ours.betas), type(other)
        assert other.config.num_train_timesteps == 100
        assert other.config.prediction_type == "v_prediction"
    for other in (others[0], others[1], others[5]):
        assert torch.equal(other.alphas_cumprod64, ours.alphas_cumprod64)


def test_stock_keeps_arguments_given_by_position():
    ours = PaperDDPMScheduler(100, 0.001, 0.2)  # which diffusers files under _use_default_values
    assert type(ours.stock()) is DDPMScheduler
    assert torch.equal(ours.stock().betas, ours.betas)


def test_pickle_and_deepcopy():
    ours = make_scheduler("ho_linear", 100)
    expected = ours.alphas_cumprod64
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert torch.equal(twin.alphas_cumprod64, expected) and torch.equal(twin.betas, ours.betas)


@pytest.mark.parametrize(
    "scheduler",
    [
        make_scheduler("linear", 100),
        make_scheduler("linear", 100, beta_end=0.1),
        make_scheduler("scaled_linear", 100),
        make_scheduler("sigmoid", 100),
        make_scheduler("laplace", 100),
        make_scheduler("linear", 100, rescale_betas_zero_snr=True),
        make_scheduler("linear", 3, trained_betas=[0.1, 0.2, 0.3]),
    ],
    ids=["linear", "beta_end", "scaled_linear", "sigmoid", "laplace", "zero_snr", "trained_betas"],
)
def test_float64_tables_follow_the_stock_betas(scheduler):
    assert scheduler.betas64.dtype == torch.float64
    torch.testing.assert_close(scheduler.betas64.float(), scheduler.betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.alphas_cumprod64.float(), scheduler.alphas_cumprod, rtol=1e-5, atol=1e-12)


def test_snr_and_the_clean_end():
    scheduler = make_scheduler("linear", 3, trained_betas=[0.1, 0.2, 0.3])
    expected = torch.tensor([0.9 / 0.1, 0.504 / 0.496])
    torch.testing.assert_close(scheduler.snr(torch.tensor([0, 2])), expected)
    torch.testing.assert_close(scheduler.snr(2), expected[1])
    torch.testing.assert_close(
        scheduler.alphas_cumprod_at(torch.tensor([[-1, 0], [1, 2]])).numpy(),
        np.array([[1, 0.9], [0.72, 0.504]]),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ho_linear", "nichol_cosine"])
def test_q_sample_has_the_right_noise_level_at_every_t(name, dtype):
    scheduler, t = make_scheduler(name), torch.arange(1000)
    alpha_bar = np.cumprod(1 - paper_betas(name, 1000))
    x_0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).expand(1000, -1, -1, -1).to(dtype)
    noise = torch.ones(64)
    noise[::2] = -1  # mean 0 and standard deviation 1, exactly, in any dtype
    with torch.autocast("cpu", torch.bfloat16):
        x_t = scheduler.q_sample(x_0, noise.reshape(1, 1, 8, 8).expand_as(x_0).to(dtype), t)
    assert x_t.dtype == torch.float32
    residual = x_t.double().numpy() - np.sqrt(alpha_bar).reshape(-1, 1, 1, 1) * x_0.double().numpy()
    np.testing.assert_allclose(residual.std(axis=(1, 2, 3)), np.sqrt(1 - alpha_bar), rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_training_target_gives_back_image_and_noise(prediction_type):
    scheduler = make_scheduler("nichol_cosine", 100, prediction_type=prediction_type)
    x_0, noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 50, 99])
    x_t, target = scheduler.q_sample(x_0, noise, t), scheduler.training_target(x_0, noise, t)
    torch.testing.assert_close(scheduler.predict_original_sample(target, x_t, t), x_0)
    torch.testing.assert_close(scheduler.predict_epsilon(target, x_t, t), noise)
    stock = {"epsilon": noise, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, noise, t)}
    torch.testing.assert_close(target, stock[prediction_type], rtol=0, atol=1e-5)


def test_posterior_by_hand():
    scheduler = make_scheduler("linear", 3, trained_betas=[0.1, 0.2, 0.3])  # abar: 0.9, 0.72, 0.504
    x_0, x_t = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), -0.25)
    mean, variance, log_variance = scheduler.q_posterior(x_0, x_t, torch.tensor([2]))
    assert mean.shape == x_t.shape and variance.shape == log_variance.shape == (1, 1, 1, 1)
    expected = (math.sqrt(0.72) * 0.3 * 0.5 + math.sqrt(0.7) * 0.28 * -0.25) / 0.496  # eq. 7
    torch.testing.assert_close(mean, torch.full_like(x_t, expected))
    assert variance.item() == pytest.approx(0.28 / 0.496 * 0.3, rel=1e-6)
    assert log_variance.item() == pytest.approx(math.log(0.28 / 0.496 * 0.3), rel=1e-6)

    mean, variance, log_variance = scheduler.q_posterior(x_0, x_t, 0)
    assert torch.equal(mean, x_0) and variance.item() == 0
    assert log_variance.item() == pytest.approx(math.log(0.1 / 0.28 * 0.2), rel=1e-6)  # that of t = 1


@pytest.mark.parametrize("t, prev_t", [(1, 0), (49, 48), (30, 10), (49, 0), (20, -1)])
def test_posterior_is_gaussian_conditioning(t, prev_t):
    """x_s as a linear map of (x_0, eps_0, ..., eps_{T-1}), step by step; then condition x_t' on x_t and x_0."""
    scheduler, betas = make_scheduler("ho_linear", 50), paper_betas("ho_linear", 50)
    maps = [np.eye(51)[0]]
    for s, beta in enumerate(betas):
        maps.append(math.sqrt(1 - beta) * maps[-1] + math.sqrt(beta) * np.eye(51)[s + 1])
    past, now = maps[prev_t + 1], maps[t + 1]
    gain = past[1:] @ now[1:] / (now[1:] @ now[1:])
    expected = past[0] - gain * now[0], gain, past[1:] @ past[1:] - gain * (past[1:] @ now[1:])
    np.testing.assert_allclose(scheduler.posterior_coefficients(t, prev_t), expected, rtol=1e-9, atol=1e-15)
    batch = scheduler.posterior_coefficients(torch.tensor([t, t]), torch.tensor([prev_t, prev_t]))
    np.testing.assert_allclose(torch.stack(batch)[:, 1], expected, rtol=1e-9, atol=1e-15)


def test_respaced_posterior_is_the_composition_of_its_steps():
    scheduler = make_scheduler("nichol_cosine", 100)
    a_0, a_t, a_variance = scheduler.posterior_coefficients(60)
    b_0, b_t, b_variance = scheduler.posterior_coefficients(59)
    composed = torch.stack([b_0 + b_t * a_0, b_t * a_t, b_variance + b_t**2 * a_variance])
    torch.testing.assert_close(torch.stack(scheduler.posterior_coefficients(60, 58)), composed)


@pytest.mark.parametrize("name", ["ho_linear", "nichol_cosine"])
def test_reverse_log_variances_are_those_of_the_papers_code(name):
    scheduler, t = make_scheduler(name, 100), torch.arange(100)
    betas = paper_betas(name, 100)
    alpha_bar = np.cumprod(1 - betas)
    beta_tilde = betas * (1 - np.append(1, alpha_bar[:-1])) / (1 - alpha_bar)
    log_small = np.log(np.append(beta_tilde[1], beta_tilde[1:]))
    log_large = np.log(np.append(beta_tilde[1], betas[1:]))
    sample = ONE_PIXEL.expand(100, -1, -1, -1)

    def log_variance(variance_type, v=None):
        return scheduler.reverse_log_variance(sample, t, None, variance_type, predicted_variance=v).flatten().numpy()

    np.testing.assert_allclose(log_variance("fixed_small"), log_small)
    np.testing.assert_allclose(log_variance("fixed_small_log"), log_small)
    np.testing.assert_allclose(log_variance("fixed_large"), log_large)
    np.testing.assert_allclose(log_variance("fixed_large_log"), log_large)
    np.testing.assert_allclose(log_variance("learned_range", sample - 1), log_small)
    np.testing.assert_allclose(log_variance("learned_range", sample + 1), np.log(betas))
    np.testing.assert_allclose(log_variance("learned_range", sample), (log_small + np.log(betas)) / 2)
    # A respaced step, one timestep for all: alpha is abar_40 / abar_20.
    large = scheduler.reverse_log_variance(ONE_PIXEL.float(), 40, 20, "fixed_large")
    assert large.dtype == torch.float32 and large.shape == (1, 1, 1, 1)
    assert large.item() == pytest.approx(math.log(1 - alpha_bar[40] / alpha_bar[20]), rel=1e-6)


def test_the_shortest_chain_has_a_posterior():
    mean, variance, _ = make_scheduler("nichol_cosine", 1).q_posterior(ONE_PIXEL, ONE_PIXEL + 1, 0)
    assert mean.item() == 0 and variance.item() == 0


def paper_subsequence(T, S, skip_type):
    """The pairs that the loop of the DDIM paper's code goes through."""
    if skip_type == "uniform":
        seq = list(range(0, T, T // S))
    else:
        seq = [int(s) for s in list(np.linspace(0, np.sqrt(T * 0.8), S) ** 2)]
    seq_next = [-1] + list(seq[:-1])
    return list(zip(reversed(seq), reversed(seq_next)))


@pytest.mark.parametrize("skip_type", ["quad", "uniform"])
@pytest.mark.parametrize("T, S", [(1000, 10), (1000, 20), (1000, 30), (1000, 50), (1000, 100), (50, 7), (100, 100)])
def test_quad_and_uniform_are_the_ddim_papers(T, S, skip_type):
    assert make_scheduler("linear", T).subsequence(S, skip_type) == paper_subsequence(T, S, skip_type)


def test_subsequences_by_hand():
    scheduler = make_scheduler("linear", 1000)
    quad = [800, 632, 483, 355, 246, 158, 88, 39, 9, 0]
    assert scheduler.subsequence(10, "quad") == list(zip(quad, [*quad[1:], -1]))
    assert scheduler.subsequence(4, "leading") == [(750, 500), (500, 250), (250, 0), (0, -1)]
    assert scheduler.subsequence(4, "trailing") == [(999, 749), (749, 499), (499, 249), (249, -1)]
    assert scheduler.subsequence(4, "linspace") == [(999, 666), (666, 333), (333, 0), (0, -1)]
    assert len(scheduler.subsequence(30, "uniform")) == 31 and len(scheduler.subsequence(30, "leading")) == 30
    assert (0, 0) in scheduler.subsequence(100, "quad")
    assert scheduler.subsequence() == [(t, t - 1) for t in range(999, -1, -1)]
    for given in ([5, 20, 900], (900, 20, 5), np.array([5, 20, 900])):
        assert scheduler.subsequence(spacing=given) == [(900, 20), (20, 5), (5, -1)]
    assert scheduler.subsequence(3, [5, 20, 900]) == [(900, 20), (20, 5), (5, -1)]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("T, S", [(50, 1), (50, 7), (50, 50), (1000, 10), (1000, 30), (1000, 61), (1000, 1000)])
def test_diffusers_spacings_are_diffusers(T, S, spacing):
    scheduler = make_scheduler("linear", T, timestep_spacing=spacing)
    scheduler.set_timesteps(S)
    timesteps = scheduler.timesteps.tolist()[:S]  # diffusers has a 62nd at S=61, trailing: t = -1
    assert scheduler.subsequence(S, spacing) == list(zip(timesteps, [*timesteps[1:], -1]))


@pytest.mark.parametrize(
    "make, sentence",
    [
        (
            lambda: PaperDDPMScheduler.ho_linear(20),
            "ho_linear with num_train_timesteps=20 has beta_end = 20/T >= 1; ",
        ),
        (lambda: make_scheduler("ho_linear", 20), "20/T >= 1; take at least 21 timesteps, or nichol_cosine."),
        (
            lambda: PaperDDPMScheduler.nichol_cosine(0),
            "num_train_timesteps is 0; a schedule needs at least 1 timestep.",
        ),
        (lambda: make_scheduler("linear", -3), "num_train_timesteps is -3; a schedule needs at least 1 timestep."),
        (
            lambda: make_scheduler("cosine", 100),
            "there is no --ddpm_beta_schedule 'cosine': did you mean nichol_cosine?",
        ),
        (
            lambda: make_scheduler("linear", prediction_type="flow").predict_epsilon(ONE_PIXEL, ONE_PIXEL, 0),
            "prediction_type is 'flow'; choose epsilon, sample or v_prediction.",
        ),
        (
            lambda: make_scheduler("linear").reverse_log_variance(ONE_PIXEL, 5, 4, "learned"),
            "variance_type is 'learned'; choose fixed_small, fixed_large or learned_range.",
        ),
        (
            lambda: make_scheduler("linear").reverse_log_variance(ONE_PIXEL, 5, 4, "learned_range"),
            "variance_type is learned_range, but the UNet predicts no variance: give fixed_small or fixed_large.",
        ),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(UserError) as error:
        make()
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((0, "leading"), "num_inference_steps is 0; it must be from 1 to the model's 100 timesteps."),
        ((101, "quad"), "num_inference_steps is 101; it must be from 1 to the model's 100 timesteps."),
        ((10, "even"), "spacing is 'even'; choose quad, uniform, leading, trailing or linspace, or list timesteps."),
        ((None, []), "timesteps are []; give whole numbers from 0 to 99, strictly rising or falling."),
        ((None, [0, 100]), "timesteps are [0, 100]; give whole numbers from 0 to 99, strictly rising or falling."),
        ((None, [-1, 5]), "timesteps are [-1, 5]; give whole numbers from 0 to 99, strictly rising or falling."),
        ((None, [5, 5]), "timesteps are [5, 5]; give whole numbers from 0 to 99, strictly rising or falling."),
        ((None, [5, 1, 9]), "timesteps are [5, 1, 9]; give whole numbers from 0 to 99, strictly rising or falling."),
        ((None, [0.5, 1]), "timesteps are [0.5, 1]; give whole numbers from 0 to 99, strictly rising or falling."),
        ((10, [0, 50]), "num_inference_steps is 10, but 2 timesteps are listed: leave num_inference_steps out."),
    ],
)
def test_subsequence_refusals(arguments, sentence):
    with pytest.raises(UserError) as error:
        make_scheduler("linear", 100).subsequence(*arguments)
    assert str(error.value) == sentence


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_a_single_timestep_has_a_finite_variance(variance_type):
    """Without a step 1, whose variance is used at the end of longer chains, it is beta."""
    scheduler, image = make_scheduler("linear", 1), torch.zeros(1, 1, 2, 2)
    given = {"variance_type": variance_type, "predicted_variance": image}
    log_variance = scheduler.reverse_log_variance(image, 0, None, **given)
    torch.testing.assert_close(log_variance.exp(), torch.full_like(log_variance, 1e-4))
