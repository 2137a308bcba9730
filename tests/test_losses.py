"""Losses against numbers computed by hand, and the noise of each image."""

import math

import pytest
import torch
from conftest import steps

from ddpm_hf.config.command_line import parse_config
from ddpm_hf.diffusion.losses import (
    accuracy,
    by_band,
    classification_loss,
    draw_noise,
    hybrid_loss,
    min_snr_weights,
    simple_loss,
    training_labels,
    vlb_loss,
)
from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler, make_scheduler
from ddpm_hf.diffusion.timestep_sampling import (
    draw_timesteps,
    draw_uniform,
    new_history,
    spread_timesteps,
    timestep_probabilities,
    update_history,
)
from ddpm_hf.randomness import keyed_generator
from ddpm_hf.training.batches_ahead import add_draws


class Answer(torch.nn.Module):
    """A "UNet" that knows what to say."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, sample, timesteps, class_labels=None):
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
    loss = simple_loss(scheduler, loss_type=loss_type)
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
    assert torch.allclose(simple_loss(scheduler, snr_gamma=5.0)(Answer(output), batch), wanted.float(), rtol=2e-3)
    assert (min_snr_weights(scheduler, batch["timesteps"], 5.0) > 0).all()


def test_a_large_gamma_restores_upstreams_weight_of_x0():
    """diffusers' script weights the error of x_0 by the SNR; without a gamma its weight here is 1."""
    scheduler = make_scheduler("nichol_cosine", 1000, prediction_type="sample")
    batch = a_batch()
    error = torch.full_like(batch["images"], 0.1)
    answer = Answer(batch["images"] + error)
    assert torch.allclose(simple_loss(scheduler)(answer, batch), torch.tensor(0.01), rtol=1e-4)
    alpha_bar = scheduler.alphas_cumprod[batch["timesteps"]]
    upstream = alpha_bar / (1 - alpha_bar) * 0.01
    assert torch.allclose(simple_loss(scheduler, snr_gamma=1e9)(answer, batch), upstream, rtol=1e-2)


def test_keys_share_a_stream_only_as_torchs_32_bits_of_a_seed_do():
    draws = [torch.randn(4, generator=keyed_generator(0, "noise", ordinal)) for ordinal in (418_906, 625_568, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_hybrid_loss_teaches_the_variance_and_leaves_the_mean_to_the_simple_loss():
    scheduler = PaperDDPMScheduler.nichol_cosine(100, variance_type="learned_range")
    batch = a_batch()
    output = torch.cat([batch["noise"] + 0.1, torch.zeros_like(batch["noise"])], dim=1).requires_grad_()
    hybrid_loss(scheduler)(Answer(output), batch).sum().backward()
    mean_gradient, variance_gradient = output.grad.chunk(2, dim=1)
    # d/d eps of the pixels' mean of (eps - target)^2
    assert torch.allclose(mean_gradient, torch.full_like(mean_gradient, 2 * 0.1 / 16), rtol=1e-4)
    assert (variance_gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_the_bound_as_a_loss_is_hos_weight_times_the_error_and_teaches_the_mean(variance_type):
    # Ho et al. eq. 12: an error d in epsilon costs beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t)) d^2 nats, here with
    # sigma_t^2 = beta_t, which v = 1 of a learned range is too. What does not depend on d is taken away.
    scheduler, batch = PaperDDPMScheduler.ho_linear(100, variance_type=variance_type), a_batch()

    def costs(d):
        answer = batch["noise"] + d
        if variance_type == "learned_range":
            answer = torch.cat([answer, torch.ones_like(answer)], dim=1)
        return vlb_loss(scheduler)(Answer(answer), batch)[1:]

    t = batch["timesteps"][1:]
    beta, abar = scheduler.betas64[t], scheduler.alphas_cumprod64[t]
    weight = 100 / math.log(2) * beta / (2 * (1 - beta) * (1 - abar))
    d = torch.tensor(0.1, requires_grad=True)
    assert torch.allclose(costs(d) - costs(0), (0.01 * weight).float(), rtol=1e-3)
    costs(d).sum().backward()
    assert d.grad.item() == pytest.approx(0.2 * weight.sum().item(), rel=1e-3)


def test_timesteps_are_drawn_in_proportion_to_the_root_of_their_mean_squared_loss():
    history = new_history(4)
    assert timestep_probabilities(history).tolist() == [0.25] * 4
    for _ in range(9):
        update_history(history, torch.arange(4), torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 0.0]))
    # The order is that of the ordinals: of t = 3 there are first five more zeros, then five of 4 sqrt(2).
    ordinals, losses = torch.tensor([45, 44, 43, 42, 41, 40, 39, 38, 37, 36]), torch.tensor([32**0.5] * 5 + [0.0] * 5)
    update_history(history, ordinals, torch.full((10,), 3), losses)
    assert timestep_probabilities(history).tolist() == [0.25] * 4  # each t needs ten
    update_history(history, torch.arange(3), torch.arange(3), torch.tensor([1.0, 2.0, 3.0]))
    assert history[3].tolist() == pytest.approx([0.0] * 5 + [32**0.5] * 5)
    wanted = [0.999 * share + 0.001 / 4 for share in (0.1, 0.2, 0.3, 0.4)]  # rms of 1, 2, 3, 4
    assert timestep_probabilities(history).tolist() == pytest.approx(wanted)


def test_importance_weights_leave_the_mean_loss_as_it_is():
    costs = torch.tensor([1.0, 2.0, 30.0, 4.0])  # per timestep
    history = costs.double()[:, None].expand(4, 10) * torch.linspace(0.5, 1.5, 10)
    timesteps, weights = draw_timesteps(history, draw_uniform(torch.arange(4000), seed=0))
    probabilities = timestep_probabilities(history)
    drawn = torch.bincount(timesteps, minlength=4) / 4000
    assert ((drawn - probabilities).abs() < 4 * (probabilities / 4000).sqrt()).all()
    losses = weights * costs[timesteps]
    assert abs(losses.mean() - costs.mean()) < 4 * losses.std() / math.sqrt(4000)
    assert losses.std() < 0.05 * costs.std()  # what it is for
    some = torch.tensor([7, 31])
    assert torch.equal(draw_timesteps(history, draw_uniform(some, seed=0))[0], timesteps[some])  # whatever the batch
    assert not torch.equal(draw_timesteps(history, draw_uniform(torch.arange(4000), seed=1))[0], timesteps)


def test_accumulation_does_not_change_which_timesteps_are_drawn(monkeypatch, tmp_path):
    def record(history, ordinals, timesteps, losses):
        drawn[-1].append((ordinals, timesteps))
        update_history(history, ordinals, timesteps, losses)

    drawn, histories = [], []
    monkeypatch.setattr("ddpm_hf.training.loop.update_history", record)
    for batch, accumulation in ((8, 1), (4, 2)):
        drawn.append([])
        flags = [f"--train_batch_size={batch}", f"--gradient_accumulation_steps={accumulation}"]
        flags += ["--ddpm_num_steps=5", "--objective=vlb", "--timestep_sampling=loss_second_moment"]
        run, _ = steps(30, *flags, "--output_dir", tmp_path)
        histories.append(run.state.loss_history)
    for (ordinals, timesteps), (again, t_again) in zip(*drawn, strict=True):
        assert torch.equal(ordinals, again) and torch.equal(timesteps, t_again)
    assert torch.allclose(*histories, rtol=1e-3)
    p = timestep_probabilities(histories[0])
    assert p.max() > 2 * p.min()  # no longer uniform


def test_timesteps_of_low_discrepancy():
    """Each range of a tenth of the timesteps gets a tenth of any 40 consecutive images, give or take one."""
    ordinals = torch.arange(12_345, 12_345 + 20_000)
    timesteps = spread_timesteps(ordinals, 1000, seed=0)
    assert torch.equal(timesteps[4000:4040], spread_timesteps(ordinals[4000:4040], 1000, seed=0))
    assert not torch.equal(timesteps, spread_timesteps(ordinals, 1000, seed=1))
    counts = torch.bincount(timesteps, minlength=1000)
    assert counts.sum() == 20_000 and counts.min() >= 18 and counts.max() <= 22
    for batch in timesteps.split(40):
        shares = torch.bincount(batch // 100, minlength=10)
        assert shares.min() >= 2 and shares.max() <= 6
    config = parse_config(["--preset=digits", "--timestep_sampling=low_discrepancy", "--seed=3"])
    batch = add_draws({"ordinals": ordinals[:8], "images": torch.zeros(8, 1, 8, 8)}, config, None, None)
    assert torch.equal(batch["timesteps"], spread_timesteps(ordinals[:8], 1000, seed=3))
    # Over many runs, the timestep of one image is uniform: its mean is 499.5, with an error of 289 / sqrt(2000).
    of_one = [spread_timesteps(torch.tensor([7]), 1000, seed=seed).item() for seed in range(2000)]
    assert abs(sum(of_one) / 2000 - 499.5) < 4 * 289 / 2000**0.5


def test_an_image_of_no_weight_teaches_nothing_and_counts_for_nothing(monkeypatch, tmp_path):
    def weightless(history, uniform):
        return torch.arange(len(uniform)), torch.zeros(len(uniform))

    monkeypatch.setattr("ddpm_hf.training.loop.draw_timesteps", weightless)
    flags = ["--timestep_sampling=loss_second_moment", "--adam_weight_decay=0", "--output_dir", tmp_path]
    before, after = steps(0, *flags)[0], steps(2, *flags)
    for one, other in zip(before.network.parameters(), after[0].network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(loss == 0 for loss in after[1])
    assert after[0].state.loss_history.isfinite().sum(dim=1).tolist() == [2] * 8 + [0] * 2


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


def test_logged_losses_of_importance_sampling_compare_with_uniform_ones():
    losses, timesteps = torch.tensor([4.0, 4.0, 4.0, 1.0]), torch.tensor([0, 0, 0, 1])  # t = 0 three times as often
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])
    sums, counts = by_band(losses, timesteps, 2 * 4, weights)
    assert float(sums.sum() / counts.sum()) == pytest.approx((4 + 1) / 2)


def test_bands_are_quarters_of_the_timesteps():
    sums = by_band(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([0, 24, 25, 99, 75]), 100)
    assert sums.tolist() == [[3.0, 3.0, 0.0, 9.0], [2.0, 1.0, 0.0, 2.0]]


def test_a_classifier_pays_its_cross_entropy_and_is_right_or_wrong():
    scheduler = make_scheduler("ho_linear", 100)
    logits = torch.tensor([[0.0, math.log(3)]]).expand(6, -1)  # probabilities 1/4 and 3/4
    batch = a_batch() | {"labels": torch.tensor([0, 1, -1, 1, 0, -1])}

    def classifier(noisy, timesteps):
        torch.testing.assert_close(noisy, scheduler.q_sample(batch["images"], batch["noise"], batch["timesteps"]))
        return logits

    losses = classification_loss(scheduler)(classifier, batch)
    expected = [math.log(4), math.log(4 / 3), 0, math.log(4 / 3), math.log(4), 0]
    torch.testing.assert_close(losses, torch.tensor(expected))
    assert accuracy(scheduler)(classifier, batch).tolist() == [0, 1, 0, 1, 0, 0]


def test_a_share_of_the_labels_is_dropped_each_by_its_ordinal():
    labels, ordinals = torch.arange(2000) % 10, torch.arange(2000)
    trained_with = training_labels(labels, ordinals, 10, 0.2, seed=3)
    dropped = trained_with == 10
    assert torch.equal(trained_with[~dropped], labels[~dropped])
    assert 0.2 * 2000 - 3 * 18 < int(dropped.sum()) < 0.2 * 2000 + 3 * 18  # deviation sqrt(2000 * 0.2 * 0.8) = 18
    assert torch.equal(training_labels(labels[500:600], ordinals[500:600], 10, 0.2, seed=3), trained_with[500:600])
    assert not torch.equal(training_labels(labels, ordinals, 10, 0.2, seed=4), trained_with)
    assert torch.equal(training_labels(labels, ordinals, 10, 0.0, seed=3), labels)
    assert training_labels(torch.tensor([-1]), torch.tensor([0]), 10, 0.0, seed=3).item() == 10  # an image of no class
