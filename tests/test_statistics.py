"""Statistics against closed forms, scipy, torchmetrics and counts by hand."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from ddpm_hf import UserError
from ddpm_hf.evaluation import statistics as metrics
from ddpm_hf.evaluation.statistics import (
    class_report,
    frechet_at_infinity,
    frechet_distance,
    frechet_distance_of_features,
    frechet_standard_error,
    inception_score,
    kernel_distance,
    mean_and_covariance,
    precision_recall,
    standardise,
)
from ddpm_hf.randomness import keyed_generator


def gaussian(num_images, size=8, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(num_images, size, generator=generator, dtype=torch.float64)


def correlated(num_images, size, seed):
    mixing = gaussian(size, size, seed=100 + seed) / size**0.5
    return gaussian(num_images, size, seed) @ mixing + gaussian(1, size, seed=200 + seed)


def distance(a, b):
    return frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))[0]


def test_moments_equal_numpys_in_any_chunks_and_far_from_zero(monkeypatch):
    features = correlated(501, 7, seed=0)
    mean, covariance = mean_and_covariance(features)
    assert np.allclose(mean, features.numpy().mean(0), atol=1e-14)
    assert np.allclose(covariance, np.cov(features.numpy().T), atol=1e-14)
    monkeypatch.setattr(metrics, "CHUNK", 100)
    assert torch.allclose(mean_and_covariance(features)[1], covariance, atol=1e-12, rtol=0)
    whole = (features * 1024).round() / 1024  # so that adding 1e6 rounds nothing away
    difference = mean_and_covariance(whole + 1e6)[1] - mean_and_covariance(whole)[1]
    assert difference.abs().max() < 1e-10
    assert mean_and_covariance(features.float())[1].dtype == torch.float64


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    mean_a, mean_b, a, b = torch.rand(4, 50, generator=generator, dtype=torch.float64)
    value, mean_term = frechet_distance(mean_a, a.diag(), mean_b, b.diag())
    assert math.isclose(mean_term, (mean_a - mean_b).square().sum(), rel_tol=1e-14)
    assert abs(value - mean_term - (a.sqrt() - b.sqrt()).square().sum()) < 1e-10


def test_frechet_distance_equals_scipys_and_torchmetrics_formulas():
    a, b = correlated(400, 32, seed=0), correlated(300, 32, seed=1)
    (mean_a, A), (mean_b, B) = mean_and_covariance(a), mean_and_covariance(b)
    root = scipy.linalg.sqrtm((A @ B).numpy()).real
    wanted = (mean_a - mean_b).square().sum() + A.trace() + B.trace() - 2 * root.trace()
    assert abs(distance(a, b) - wanted) < 1e-9
    assert abs(frechet_distance_of_features(a, b)[0] - wanted) < 1e-9
    eigenvalues = torch.linalg.eigvals(A @ B).sqrt().real.sum()  # torchmetrics' formula, before it rounds to float32
    assert abs(distance(a, b) - (wanted - 2 * eigenvalues + 2 * root.trace())) < 1e-9


def test_frechet_distance_equals_torchmetrics_metric():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 6)).eval()
    torch.nn.init.normal_(network[1].weight, generator=torch.Generator().manual_seed(0))
    network.num_features = 6
    metric = FrechetInceptionDistance(feature=network, input_img_size=(3, 4, 4))
    features = []
    for seed, real in [(0, True), (1, False)]:
        images = gaussian(100, 48, seed, scale=1 + seed).float().view(-1, 3, 4, 4)
        metric.update(images, real=real)
        features.append(network(images).detach())
    assert math.isclose(frechet_distance_of_features(*features)[0], metric.compute(), rel_tol=1e-5)


@pytest.mark.parametrize("num_a, num_b", [(20, 20), (20, 200), (200, 20), (63, 64)])
def test_frechet_distance_is_exact_without_full_rank(num_a, num_b):
    a, b = correlated(num_a, 64, seed=0), correlated(num_b, 64, seed=1)
    X, Y = a - a.mean(0), b - b.mean(0)
    # Tr (A B)^(1/2) from the N x N matrix whose eigenvalues are those of A B
    gram = np.linalg.svd((X @ Y.T).numpy(), compute_uv=False).sum() / math.sqrt((num_a - 1) * (num_b - 1))
    traces = X.square().sum() / (num_a - 1) + Y.square().sum() / (num_b - 1)
    wanted = (a.mean(0) - b.mean(0)).square().sum() + traces - 2 * gram
    assert abs(distance(a, b) - wanted) < 1e-8
    assert abs(frechet_distance_of_features(a, b)[0] - wanted) < 1e-8


def test_frechet_distance_is_a_distance_and_does_not_see_a_common_shift():
    a, b = correlated(200, 16, seed=0), correlated(100, 16, seed=1)
    assert distance(a, a) < 1e-10
    assert abs(distance(a, b) - distance(b, a)) < 1e-10
    assert abs(distance(a, b) - distance(a + 3, b + 3)) < 1e-10
    assert abs(distance(a, b) - distance(a + 1e6, b + 1e6)) < 1e-7
    assert math.isclose(distance(a, a + 2), 4 * 16, rel_tol=1e-10)


def test_the_jackknife_leaves_out_blocks():
    features, (mean, covariance) = correlated(43, 5, seed=0), mean_and_covariance(correlated(50, 5, seed=1))
    order = torch.randperm(43, generator=keyed_generator(0, "blocks")).tolist()
    rest = [features[sorted(set(range(43)) - set(order[k::4]))] for k in range(4)]
    without = np.array([frechet_distance(*mean_and_covariance(part), mean, covariance)[0] for part in rest])
    wanted = math.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
    assert math.isclose(frechet_standard_error(features, mean, covariance, 4), wanted, rel_tol=1e-9)


@pytest.mark.parametrize("order", ["in turn", "sorted"])
def test_the_jackknife_does_not_depend_on_the_order_of_classes(order):
    """Ten classes in turn, as `sample` draws them, or one after another, as in a folder for each class."""
    centers = 5 * gaussian(10, 6, seed=99)
    mean, covariance = mean_and_covariance(gaussian(400, 6, 98) + centers.repeat(40, 1))
    draws = [gaussian(400, 6, seed) + centers.repeat(40, 1) for seed in range(40)]
    if order == "sorted":
        draws = [x.view(40, 10, 6).transpose(0, 1).reshape(400, 6) for x in draws]
    errors = np.array([frechet_standard_error(x, mean, covariance) for x in draws])
    shuffled = [x[torch.randperm(400, generator=torch.Generator().manual_seed(0))] for x in draws]
    wanted = np.array([frechet_standard_error(x, mean, covariance) for x in shuffled])
    assert 0.6 < errors.mean() / wanted.mean() < 1.7


def test_the_jackknife_is_the_true_sampling_deviation_and_infinity_is_unbiased():
    # Generated: N(0, 1.3^2 I) in 8 dimensions, against N(0, I): the true distance is 8 x 0.3^2 = 0.72.
    mean, covariance = torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    draws = [gaussian(400, 8, seed, scale=1.3) for seed in range(60)]
    plain = np.array([frechet_distance(*mean_and_covariance(x), mean, covariance)[0] for x in draws])
    errors = [frechet_standard_error(x, mean, covariance) for x in draws]
    assert 0.8 < np.mean(errors) / plain.std() < 1.3
    infinite = np.array([frechet_at_infinity(x, mean, covariance) for x in draws])
    bias, unsure = infinite.mean() - 0.72, infinite.std() / math.sqrt(60)
    assert abs(bias) < 3 * unsure and abs(bias) < 0.4 * (plain.mean() - 0.72)
    assert infinite[0] == frechet_at_infinity(draws[0], mean, covariance, seed=0)
    assert infinite[0] != frechet_at_infinity(draws[0], mean, covariance, seed=1)


def test_kernel_distance_equals_torchmetrics_whatever_the_chunk(monkeypatch):
    a, b = gaussian(60, 12, seed=0), gaussian(60, 12, seed=1, shift=0.4)
    wanted, whole = poly_mmd(a, b).item(), kernel_distance(a, b)
    assert abs(kernel_distance(a, b)[0] - wanted) < 1e-9
    monkeypatch.setattr(metrics, "CHUNK", 60 * 7)
    assert abs(kernel_distance(a, b)[0] - wanted) < 1e-9
    assert math.isclose(kernel_distance(a, b)[1], whole[1], rel_tol=1e-9)


def test_kernel_distance_is_unbiased():
    pairs = [kernel_distance(gaussian(40, 4, 2 * k), gaussian(60, 4, 2 * k + 1))[0] for k in range(200)]
    assert abs(np.mean(pairs)) < 3 * np.std(pairs) / math.sqrt(200)
    # In one dimension, the points 1, 2, 1, 2 against four points at 0, whose kernel is 1 with every other point.
    two = [torch.tensor([[1.0], [2.0]]).repeat(2, 1), torch.zeros(4, 1)]
    within = (2 * 2**3 + 2 * 5**3 + 8 * 3**3) / 12  # of the 12 ordered pairs: 2 (1,1), 2 (2,2), 8 (1,2)
    assert math.isclose(kernel_distance(*two)[0], within + 1 - 2 * 1)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5])
def test_the_error_of_the_kernel_distance_is_the_spread_of_repeated_draws(shift):
    """At shift 0 the spread comes from the pairs, which blocks or a jackknife overestimate; else from the points."""
    reference = gaussian(150, 8, seed=999)
    draws = [kernel_distance(gaussian(100, 8, seed, shift=shift), reference) for seed in range(300)]
    values, errors = map(np.array, zip(*draws))
    assert math.sqrt((errors**2).mean()) / values.std(ddof=1) == pytest.approx(1, abs=0.12)
    assert (errors > 0).mean() > 0.98


def test_the_error_of_the_kernel_distance_by_the_definition():
    """All pairs of pairs of six points: those with both points, one point and no point in common."""
    a, b = gaussian(6, 2, seed=3), gaussian(5, 2, seed=4)
    g = ((a @ b.T / 2 + 1) ** 3).mean(dim=1)
    h = (a @ a.T / 2 + 1) ** 3 - g[:, None] - g
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    products = {2: [], 1: [], 0: []}
    for p in pairs:
        for q in pairs:
            products[len({*p} & {*q})].append((h[p] * h[q]).item())
    same, shared, apart = (np.mean(products[k]) for k in (2, 1, 0))
    variance = 2 / 30 * (8 * (shared - apart) + same - apart)
    assert math.isclose(kernel_distance(a, b)[1], math.sqrt(max(variance, 0)), rel_tol=1e-9)


def test_standardised_features_do_not_depend_on_scale():
    reference, features = gaussian(200, 3, seed=0), gaussian(100, 3, seed=1)
    scale, shift = torch.tensor([1.0, 1e3, 1e-3]).double(), torch.tensor([0.0, 5.0, -2.0]).double()
    own = standardise(features, reference)
    assert torch.allclose(standardise(features * scale + shift, reference * scale + shift), own, atol=1e-9)
    assert torch.allclose(standardise(reference, reference).std(dim=0), torch.ones(3).double())
    dead = torch.full((200, 1), 0.1, dtype=torch.float64)
    assert torch.allclose(standardise(dead[:2] + 1, dead), torch.ones(2, 1).double())


def prdc_by_hand(real, generated, k):
    """The definitions, point by point."""

    def radius(points, i):
        return sorted(math.dist(points[i], other) for other in points)[k]

    real, generated = real.tolist(), generated.tolist()
    real_radii = [radius(real, i) for i in range(len(real))]
    generated_radii = [radius(generated, i) for i in range(len(generated))]
    inside = [[math.dist(g, r) <= s for r, s in zip(real, real_radii)] for g in generated]
    recalled = [any(math.dist(g, r) <= s for g, s in zip(generated, generated_radii)) for r in real]
    return {
        "precision": np.mean([any(row) for row in inside]),
        "recall": np.mean(recalled),
        "density": np.sum(inside) / k / len(generated),
        "coverage": np.mean(np.any(inside, axis=0)),
    }


def test_precision_recall_density_coverage_by_hand(monkeypatch):
    real, generated = gaussian(50, 2, seed=0), gaussian(40, 2, seed=1, shift=1.0)
    wanted = prdc_by_hand(real, generated, 3)
    assert 0 < wanted["precision"] < 1 and 0 < wanted["coverage"] < wanted["recall"] < 1
    assert precision_recall(real, generated) == pytest.approx(wanted, abs=1e-12)
    monkeypatch.setattr(metrics, "CHUNK", 50 * 7)
    assert precision_recall(real, generated) == pytest.approx(wanted, abs=1e-12)
    assert precision_recall(real + 1e4, generated + 1e4) == pytest.approx(wanted, abs=1e-12)
    swapped = precision_recall(generated, real)
    assert (swapped["recall"], swapped["precision"]) == pytest.approx((wanted["precision"], wanted["recall"]))


def test_precision_recall_at_the_extremes():
    real = gaussian(300, 8, seed=0)
    self = precision_recall(real, real)
    assert self["precision"] == self["recall"] == self["coverage"] == 1
    assert self["density"] == pytest.approx(4 / 3)  # itself and its three neighbours, the third on the surface
    collapsed = real[:1] + 1e-3 * gaussian(200, 8, seed=1)
    scores = precision_recall(real, collapsed)
    assert scores["precision"] == 1 and scores["recall"] < 0.01 and scores["coverage"] < 0.1
    far = precision_recall(real, gaussian(200, 8, seed=2, shift=50))
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_inception_score_by_hand_and_against_torchmetrics(monkeypatch):
    sure = torch.eye(4).repeat(5, 1) * 1000  # every class as often, and sure of it: the number of classes
    assert inception_score(sure, 5) == (pytest.approx(4), pytest.approx(0))
    assert inception_score(torch.zeros(20, 4), 2) == (pytest.approx(1), pytest.approx(0))
    assert inception_score(sure.sort(dim=0).values, 20)[0] == pytest.approx(1)  # an image a split: nothing to tell
    unshuffled = torch.cat([sure[:4], torch.zeros(4, 4)])
    assert inception_score(unshuffled, 2) == (pytest.approx((4 + 1) / 2), pytest.approx((4 - 1) / 2))
    logits = 3 * gaussian(120, 10, seed=0)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=6)
    metric.update(logits)
    monkeypatch.setattr(torch, "randperm", torch.arange)  # torchmetrics shuffles
    mean, std = metric.compute()  # its deviation has the divisor 5
    assert inception_score(logits, 6) == (pytest.approx(mean.item()), pytest.approx(std.item() * math.sqrt(5 / 6)))


def test_class_report_by_hand():
    logits = torch.tensor([[0.75, 0.25]] * 3 + [[0.5, 0.5 + 1e-9]], dtype=torch.float64).log()
    report = class_report(logits, torch.tensor([10, 30]))
    assert report["frequencies"] == [0.75, 0.25] and report["total_variation"] == pytest.approx(0.5)
    assert report["mean_confidence"] == pytest.approx((3 * 0.75 + 0.5) / 4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert report["mean_entropy"] == pytest.approx((3 * entropy + math.log(2)) / 4)
    assert class_report(logits, torch.tensor([0.75, 0.25]))["total_variation"] == pytest.approx(0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: mean_and_covariance(x[:1]),
        lambda x: mean_and_covariance(x.index_fill(0, torch.tensor([3]), math.inf)),
        lambda x: frechet_distance_of_features(x, x[:, :4]),
        lambda x: frechet_distance_of_features(x[:6], x[:6] / 0),
        lambda x: frechet_distance(*mean_and_covariance(x), *mean_and_covariance(x[:, :4])),
        lambda x: frechet_standard_error(x, *mean_and_covariance(x), num_blocks=16),
        lambda x: frechet_at_infinity(x[:19], *mean_and_covariance(x)),
        lambda x: kernel_distance(x[:3], x),
        lambda x: kernel_distance(x, x * math.nan),
        lambda x: precision_recall(x, x[:3]),
        lambda x: inception_score(x[:9]),
        lambda x: class_report(x, torch.ones(3)),
    ],
)
def test_what_cannot_be_scored_is_a_sentence(call):
    with pytest.raises(UserError, match=r"; (give|take|choose) .*\.$"):
        call(gaussian(30, 8))
