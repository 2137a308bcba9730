"""Scores of sets of features: Fréchet distance, kernel distance, precision and recall, Inception score.

Features are float32 or float64 (N, d) on any device, with one row for each image. Statistics are float64 on the device
of the features, or on the CPU if that device has no float64. Functions of features raise a UserError for fewer than 2
images, for numbers that are not finite, and for features of different sizes d.
"""

import torch
from torch import Tensor

from ..errors import UserError
from ..randomness import keyed_generator


CHUNK = 2**23  # how many float64 numbers a temporary matrix has at most: 64 MB


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and the covariance (d, d) of features (N, d). The covariance has the divisor N - 1.

    The mean is subtracted before squaring, so that large means lose no precision.
    """
    _check(features)
    parts = features.split(_rows(features.shape[1]))
    mean = sum(_float64(part).sum(dim=0) for part in parts) / len(features)
    scatter = 0
    for part in parts:
        centred = _float64(part) - mean
        scatter = scatter + centred.T @ centred
    return mean, scatter / (len(features) - 1)


def frechet_distance(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> tuple[float, float]:
    """Return the squared Fréchet distance of two Gaussians, and its part |mean_a - mean_b|^2.

    The distance is |mean_a - mean_b|^2 + Tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017, eq. 6), where A and B are the
    covariances. The trace of (A B)^(1/2) is computed as the nuclear norm of A^(1/2) B^(1/2). This is exact even if A
    or B does not have full rank.

    Args:
        mean_a, mean_b: (d,).
        covariance_a, covariance_b: (d, d).
    """
    _check_sizes(mean_a, mean_b)
    return _frechet(_float64(mean_a), _root(covariance_a), _float64(mean_b), _root(covariance_b))


def frechet_distance_of_features(features_a: Tensor, features_b: Tensor) -> tuple[float, float]:
    """Return the `frechet_distance` of features (N, d) and (M, d).

    For N <= d, the centered features divided by sqrt(N - 1) are used as a root of the covariance. This root is exact,
    and needs no (d, d) matrix.
    """
    _check_sizes(features_a, features_b)
    return _frechet(*_mean_and_root(features_a), *_mean_and_root(features_b))


def frechet_standard_error(features: Tensor, mean: Tensor, covariance: Tensor, num_blocks: int = 20) -> float:
    """Return the standard error of the `frechet_distance` of features (N, d) to a mean (d,) and a covariance (d, d).

    The error is estimated by a jackknife over random blocks (Efron & Stein 1981): the distance is computed without
    one block at a time. The error includes the random choice of the generated images. It does not include the choice
    of the reference images or of the training seed.

    The blocks are random, because images are often ordered by class. Blocks of every 20th image would have only one
    class each if ten classes take turns. The error would then be ten times too large.

    Raises:
        UserError: for fewer than 2 blocks, or fewer than 2 images per block.
    """
    if not 2 <= num_blocks <= len(features) // 2:
        given = f"frechet_standard_error has {len(features)} images for num_blocks={num_blocks}"
        raise UserError(f"{given}; give at least 2 images per block, and at least 2 blocks.")
    _check_sizes(features, mean)
    own_mean, own_covariance = mean_and_covariance(features)
    scatter = own_covariance * (len(features) - 1)
    mean = _float64(mean).to(own_mean.device)
    root = _root(covariance)
    distances = []
    order = torch.randperm(len(features), generator=keyed_generator(0, "blocks")).to(features.device)
    for k in range(num_blocks):
        # Subtract the block from the moments of all features. This is faster than a pass over the other blocks.
        block = _float64(features[order[k::num_blocks]]) - own_mean
        left = len(features) - len(block)
        total = block.sum(dim=0)
        rest = (scatter - block.T @ block - torch.outer(total, total) / left) / (left - 1)
        # The eigenvalues of R rest R^T give the trace of the root, five times as fast as `_frechet` does. For a low
        # rank the result is off by 1e-3. This is good enough for a standard error.
        trace = torch.linalg.eigvalsh(root @ rest @ root.T).clamp(min=0).sqrt().sum()
        distances.append((own_mean - total / left - mean).square().sum() + rest.trace() - 2 * trace)
    distances = torch.stack(distances)
    return ((num_blocks - 1) * distances.var(correction=0)).sqrt().item()


def frechet_at_infinity(
    features: Tensor, mean: Tensor, covariance: Tensor, seed: int = 0, num_points: int = 15
) -> float:
    """Return the `frechet_distance` of features (N, d) to a mean and a covariance, extrapolated to N = infinity.

    This is FID_infinity of Chong & Forsyth 2020. The bias of the distance for n images is about proportional to 1/n.
    The distance is therefore computed for `num_points` random subsets of n = min(5000, N/10) to N images, and a line
    in 1/n is fitted. The result is the value of the line at 1/n = 0. It lacks this bias, but has a larger standard
    error than the distance.

    Raises:
        UserError: for fewer than 20 images, or fewer than 2 points.
    """
    if len(features) < 20 or num_points < 2:
        given = f"frechet_at_infinity has {len(features)} images and num_points={num_points}"
        raise UserError(f"{given}; give at least 20 images and 2 points.")
    _check_sizes(features, mean)
    sizes = torch.linspace(min(5000, len(features) // 10), len(features), num_points, dtype=torch.float64).long()
    reference = _float64(mean), _root(covariance)
    distances = []
    for k, size in enumerate(sizes.tolist()):
        order = torch.randperm(len(features), generator=keyed_generator(seed, "frechet_at_infinity", k))
        subset = features[order[:size].to(features.device)]
        distances.append(_frechet(*_mean_and_root(subset), *reference)[0])
    x, y = 1 / sizes.double(), torch.tensor(distances, dtype=torch.float64)
    slope = ((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()
    return (y.mean() - slope * x.mean()).item()


def standardise(features: Tensor, reference: Tensor) -> Tensor:
    """Return features (N, d) minus the mean of `reference` (M, d), divided by its standard deviation, in float64.

    The kernel of `kernel_distance` depends on the scale of the features, so features of an uncommon network must be
    standardized first. A feature that is constant in the reference keeps its scale.
    """
    _check_sizes(features, reference)
    _check(reference)
    std, mean = torch.std_mean(_float64(reference), dim=0)
    # Because of rounding, the computed deviation of a constant feature is not exactly 0.
    return (_float64(features).to(mean.device) - mean) / std.where(std > 1e-9 * mean.abs(), 1)


def kernel_distance(features_a: Tensor, features_b: Tensor) -> tuple[float, float]:
    """Return the kernel distance (KID) of features (N, d) to features (M, d), and its standard error.

    The distance is the unbiased estimate of the squared maximum mean discrepancy with the kernel (x.y / d + 1)^3
    (Binkowski et al. 2018, eq. 4), over all pairs rather than over random subsets. It can be below 0.

    For fixed `features_b`, the distance is a U-statistic: the mean of a function over all pairs of `features_a`. The
    standard error is the root of the unbiased estimate of the variance (Hoeffding 1948, eq. 5.13), or 0 if this
    estimate is below 0. As in `frechet_standard_error`, the error includes the random choice of `features_a`. It does
    not include the choice of `features_b` or of the training seed.

    Raises:
        UserError: for fewer than 4 images in `features_a`.
    """
    _check_sizes(features_a, features_b)
    for features in (features_a, features_b):
        _check(features)
    n = len(features_a)
    if n < 4:
        raise UserError(f"kernel_distance has {n} images; give at least 4, for its standard error.")
    a = _float64(features_a)
    b = _float64(features_b).to(a.device)
    within_b = _kernel_sums(b, b.new_zeros(len(b)))[0].sum() / (len(b) * (len(b) - 1))
    to_b = torch.cat([_kernel(part, b).mean(dim=1) for part in a.split(_rows(len(b)))])
    # h(x, x') = k(x, x') - g(x) - g(x') + within_b, where g(x) is the mean kernel of x and `features_b`.
    rows, squares = _kernel_sums(a, to_b - within_b / 2)
    distance = rows.sum() / (n * (n - 1))
    # The means of h(x, x') h(y, y') over pairs of pairs that have both points, one point or no point in common.
    same, shared = squares / (n * (n - 1)), (rows.square().sum() - squares) / (n * (n - 1) * (n - 2))
    apart = (rows.sum() ** 2 - 4 * rows.square().sum() + 2 * squares) / (n * (n - 1) * (n - 2) * (n - 3))
    variance = 2 / (n * (n - 1)) * (2 * (n - 2) * (shared - apart) + same - apart)
    return distance.item(), variance.clamp(min=0).sqrt().item()


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> dict[str, float]:
    """Return precision, recall, density and coverage of generated features (M, d) for real ones (N, d).

    Each feature vector is the center of a ball. The radius is the distance to the k-th nearest other vector of the
    same set. A real ball is a ball of a real image, and a generated ball is a ball of a generated image.
    - precision: the share of generated vectors inside a real ball (Kynkäänniemi et al. 2019, eq. 2);
    - recall: the share of real vectors inside a generated ball (eq. 2 too);
    - density: how many real balls a generated vector is in, on average, divided by k (Naeem et al. 2020);
    - coverage: the share of real balls with a generated vector inside.

    Raises:
        UserError: for k < 1, or if a set has k images or fewer.
    """
    _check_sizes(real, generated)
    if not 1 <= k < min(len(real), len(generated)):
        given = f"precision_recall has {len(real)} real and {len(generated)} generated images and k={k}"
        raise UserError(f"{given}; choose a k that is at least 1 and smaller than both numbers of images.")
    for features in (real, generated):
        _check(features)
    # Center the features. Distances can then be computed from products, with errors below 1e-9 of a radius. Computing
    # them from differences would be slower.
    centre = _float64(real).mean(dim=0)
    real, generated = _float64(real) - centre, _float64(generated).to(centre.device) - centre
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    in_generated = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = in_generated.clone()
    balls = []
    for part, radii in zip(generated.split(_rows(len(real))), generated_radii.split(_rows(len(real)))):
        distances = _distances(part, real)
        in_real = distances <= real_radii
        balls.append(in_real.sum(dim=1))
        covered |= in_real.any(dim=0)
        in_generated |= (distances <= radii[:, None]).any(dim=0)
    balls = torch.cat(balls).double()
    return {
        "precision": (balls > 0).double().mean().item(),
        "recall": in_generated.double().mean().item(),
        "density": balls.mean().item() / k,
        "coverage": covered.double().mean().item(),
    }


def inception_score(logits: Tensor, num_splits: int = 10) -> tuple[float, float]:
    """Return the Inception score of logits (N, classes): its mean and its standard deviation over the splits.

    The score of a split is exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016, section 4). The images are split in
    their order, without shuffling, into parts whose sizes differ by at most one image. The standard deviation has the
    divisor `num_splits`.

    Raises:
        UserError: for fewer images than splits, or no split.
    """
    if not 1 <= num_splits <= len(logits):
        given = f"inception_score has {len(logits)} images for num_splits={num_splits}"
        raise UserError(f"{given}; give at least one image per split, and at least one split.")
    scores = []
    for part in _float64(logits).softmax(dim=1).tensor_split(num_splits):
        # The mean divergence equals the entropy of the mean minus the mean entropy.
        scores.append((_entropy(part.mean(dim=0)) - _entropy(part).mean()).exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def class_report(logits: Tensor, reference_frequencies: Tensor) -> dict:
    """Return the class balance and the confidence of generated images, from a classifier's logits (N, classes).

    - frequencies: the share of images of each class, by the highest logit;
    - total_variation: half the sum of |share - reference share| over all classes. It is 0 if all shares are equal to
      those of the reference, and 1 if the generated and the reference images have no class in common;
    - mean_confidence: the mean of the highest probability;
    - mean_entropy: the mean entropy of the probabilities, in nats.

    Args:
        reference_frequencies: how many reference images each class has, or which share of them, (classes,).

    Raises:
        UserError: if there are no images, or if `reference_frequencies` has another number of classes.
    """
    if not len(logits) or logits.shape[1:] != reference_frequencies.shape:
        given = f"class_report has logits {tuple(logits.shape)} and {len(reference_frequencies)} frequencies"
        raise UserError(f"{given}; give at least one image, and one frequency per class.")
    probabilities = _float64(logits).softmax(dim=1)
    confidence, classes = probabilities.max(dim=1)
    frequencies = torch.bincount(classes, minlength=logits.shape[1]).double() / len(logits)
    reference = _float64(reference_frequencies).to(frequencies.device)
    return {
        "total_variation": (frequencies - reference / reference.sum()).abs().sum().item() / 2,
        "mean_confidence": confidence.mean().item(),
        "mean_entropy": _entropy(probabilities).mean().item(),
        "frequencies": frequencies.tolist(),
    }


def _float64(tensor: Tensor) -> Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # mps has no float64


def _rows(columns: int) -> int:
    """Return how many rows a temporary matrix with this many columns may have."""
    return max(1, CHUNK // columns)


def _check(features: Tensor):
    if len(features) < 2 or not features.isfinite().all():
        infinite = "" if features.isfinite().all() else ", and not all of their numbers are finite"
        raise UserError(f"features of {len(features)} images{infinite}; give finite features of at least 2 images.")


def _check_sizes(a: Tensor, b: Tensor):
    if a.shape[-1] != b.shape[-1]:
        given = f"features of size {a.shape[-1]} cannot be compared with features of size {b.shape[-1]}"
        raise UserError(f"{given}; take both from the same network.")


def _root(covariance: Tensor) -> Tensor:
    """Return R (d, d) with R^T R = covariance.

    Because of rounding, eigh returns about 1e-16 of the largest eigenvalue in place of 0. The root would be 1e-8 of
    the largest root, which is too much. Eigenvalues as small as the rounding are therefore set to 0.
    """
    values, vectors = torch.linalg.eigh(_float64(covariance))
    noise = values[-1] * len(values) * torch.finfo(torch.float64).eps
    return values.where(values > noise, 0).sqrt()[:, None] * vectors.T


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) of features (N, d), and R (min(N, d), d) with R^T R = covariance."""
    if len(features) > features.shape[1]:
        mean, covariance = mean_and_covariance(features)
        return mean, _root(covariance)
    _check(features)
    features = _float64(features)
    mean = features.mean(dim=0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


def _frechet(mean_a: Tensor, root_a: Tensor, mean_b: Tensor, root_b: Tensor) -> tuple[float, float]:
    mean_b, root_b = mean_b.to(mean_a.device), root_b.to(mean_a.device)
    mean_term = (mean_a - mean_b).square().sum().item()
    traces = root_a.square().sum() + root_b.square().sum()
    distance = mean_term + (traces - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()).item()
    return max(distance, 0.0), mean_term  # rounding can make it -1e-13; nan stays nan


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return the kernel of `kernel_distance` for all pairs: (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_sums(x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of h_ij over j for each i, (N,), and the sum of h_ij^2 over i and j, both without i = j.

    h_ij is the kernel of x_i and x_j, minus offset[i] and offset[j]. As h_ij = h_ji, each pair is computed once.
    """
    rows, squares = x.new_zeros(len(x)), x.new_zeros(())
    for start in range(0, len(x), _rows(len(x))):
        part = slice(start, start + _rows(len(x)))
        values = _kernel(x[part], x[start:]) - offset[part, None] - offset[start:]
        values.fill_diagonal_(0)
        rows[part] += values.sum(dim=1)
        later = values[:, len(values) :]
        rows[start + len(values) :] += later.sum(dim=0)
        squares += values.square().sum() + later.square().sum()
    return rows, squares


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def _radii(features: Tensor, k: int) -> Tensor:
    """Return the radii (N,) of the balls of `precision_recall`, times 1 + 1e-6 as a margin for rounding."""
    parts = features.split(_rows(len(features)))
    return torch.cat([_distances(part, features).kthvalue(k + 1).values for part in parts]) * (1 + 1e-6)


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(dim=-1)
