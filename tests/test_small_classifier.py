"""The bundled classifiers see what they should see, and training them again gives the same weights."""

import hashlib

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from ddpm_hf import UserError
from ddpm_hf.evaluation import cifar10_classifier, digit_classifier
from ddpm_hf.evaluation.cifar10_classifier import Cifar10Classifier
from ddpm_hf.evaluation.digit_classifier import DigitClassifier
from ddpm_hf.evaluation.features import full_precision
from ddpm_hf.evaluation.small_classifier import load_weights, shift_randomly
from ddpm_hf.evaluation.statistics import frechet_distance, mean_and_covariance
from ddpm_hf.evaluation.train_classifier import main, train_classifier


@pytest.fixture(scope="module")
def classifier():
    return load_weights(DigitClassifier)


@pytest.fixture(scope="module")
def color_classifier():
    return load_weights(Cifar10Classifier)


@pytest.fixture(scope="module")
def photos():
    """520 pieces of 32x32 pixels of scikit-learn's two photos."""
    pictures = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)  # (2, 3, 427, 640)
    return pictures.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's 8x8 digits of other writers, as MNIST has them: 20x20 in the middle of 28x28."""
    bunch = load_digits()
    images = torch.zeros(len(bunch.images), 1, 28, 28, dtype=torch.uint8)
    for image, small in zip(images, np.rint(bunch.images * 255 / 16).astype(np.uint8)):
        resized = Image.fromarray(small).resize((20, 20), Image.Resampling.BICUBIC)
        image[0, 4:24, 4:24] = torch.from_numpy(np.array(resized))
    return images, torch.from_numpy(bunch.target)


@pytest.mark.parametrize(
    "module, fixture, name, pipeline, num_features, num_parameters, megabytes",
    [
        (digit_classifier, "classifier", "digits", "28px", 64, 114_314, 0.5),
        (cifar10_classifier, "color_classifier", "cifar10", "32px", 224, 1_151_746, 5),
    ],
    ids=["digits", "cifar10"],
)
def test_the_weights_are_the_pinned_ones(
    module, fixture, name, pipeline, num_features, num_parameters, megabytes, request
):
    classifier = request.getfixturevalue(fixture)
    assert classifier.sha256 == module.SHA256 == hashlib.sha256(module.WEIGHTS.read_bytes()).hexdigest()
    assert (classifier.name, classifier.pipeline, classifier.num_features) == (name, pipeline, num_features)
    assert sum(parameter.numel() for parameter in classifier.parameters()) == num_parameters
    assert module.WEIGHTS.stat().st_size < megabytes * 1e6


def test_it_reads_digits_of_another_source_and_no_feature_is_dead(classifier, digits):
    images, labels = digits
    features, logits = classifier(images)
    assert features.shape == (1797, 64) and logits.shape == (1797, 10)
    assert features.dtype == logits.dtype == torch.float32
    accuracy = (logits.argmax(dim=1) == labels).double().mean()
    assert accuracy > 0.9, accuracy
    assert torch.linalg.matrix_rank(torch.cov(features.double().T)) == 64


def test_a_border_of_two_changes_nothing_and_neither_does_train(classifier, digits):
    images = digits[0][:5]
    features, logits = classifier(images)
    padded = torch.nn.functional.pad(images, [2] * 4, value=9)
    assert torch.equal(classifier(padded)[0], features)
    metric = torch.nn.Sequential(classifier).train()
    assert not any(module.training for module in metric[0].modules())
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = classifier(images)
    assert torch.equal(again, features) and not features.requires_grad
    assert torch.allclose(logits, features @ classifier.head.weight.T + classifier.head.bias, atol=1e-5)


def test_color_features_tell_degraded_photos_apart(color_classifier, photos):
    """Noise and blur increase the Fréchet distance, and more of them increases it more. No feature is dead."""
    features, logits = color_classifier(photos)
    assert features.shape == (520, 224) and logits.shape == (520, 10) and features.dtype == torch.float32
    assert torch.linalg.matrix_rank(torch.cov(features.double().T)) == 224
    real = mean_and_covariance(features[::3])

    def distance(images):
        return frechet_distance(*mean_and_covariance(color_classifier(images)[0]), *real)[0]

    others = photos[1::6]
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(others + sigma * noise).clamp(0, 255).byte() for sigma in (10, 30)]
    coarse = [
        torch.nn.functional.avg_pool2d(others.float(), k).repeat_interleave(k, 2).repeat_interleave(k, 3).byte()
        for k in (2, 4)
    ]
    floor = distance(others)
    assert floor < distance(noisy[0]) < distance(noisy[1])
    assert floor < distance(coarse[0]) < distance(coarse[1])


def test_larger_photos_are_reduced_by_means(color_classifier, photos):
    large = photos[:3].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    for one, other in zip(color_classifier(photos[:3]), color_classifier(large)):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 48, 48), (3, 32, 64), (3, 0, 0)])
def test_photos_of_other_shapes_are_refused(color_classifier, shape):
    with pytest.raises(UserError, match="the CIFAR-10 classifier was given .* takes only uint8 images of 3x32x32"):
        color_classifier(torch.zeros(2, *shape, dtype=torch.uint8))


def test_photos_are_mirrored_and_shifted_at_random(photos):
    changed = Cifar10Classifier.augment(photos[:200], torch.Generator().manual_seed(0))
    assert changed.shape == (200, 3, 32, 32) and changed.dtype == torch.float32
    middle = cifar10_classifier.scale(photos[:200])[..., 12:20, 12:20]
    windows = changed.unfold(2, 8, 1).unfold(3, 8, 1)[:, :, 8:17, 8:17]  # all places that the middle may have moved to
    found = [
        ((windows == candidate[:, :, None, None]) | (windows == 0)).flatten(4).all(-1).all(1).flatten(1).any(1)
        for candidate in (middle, middle.flip(-1))
    ]
    assert (found[0] | found[1]).all() and 70 < found[1].sum() < 130
    assert set((changed == 0).all(1).sum((1, 2)).tolist()) <= {k * n for k in range(4, 9) for n in range(4, 9)}


def test_full_precision_restores_what_it_found():
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), full_precision(torch.device("cpu")):
            assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 28, 28), torch.zeros(2, 3, 28, 28).byte(), torch.zeros(2, 1, 64, 64).byte()],
    ids=["float", "rgb", "size"],
)
def test_other_images_are_refused(classifier, images):
    with pytest.raises(
        UserError, match=r"the digit classifier was given .* images of .*, but takes only uint8 images of 1x28x28"
    ):
        classifier(images)


@pytest.mark.parametrize("kind", [DigitClassifier, Cifar10Classifier])
def test_other_weights_are_refused(tmp_path, kind):
    for name, content in [("text", b"x" * 20), ("other", safetensors.torch.save({"a": torch.zeros(1)}))]:
        (tmp_path / name).write_bytes(content)
    for name in ["text", "other", "missing"]:
        with pytest.raises(UserError, match=f"{name} does not hold weights of the {kind.name} classifier"):
            load_weights(kind, tmp_path / name)


def test_shifts_move_whole_images_by_at_most_two_pixels():
    images = torch.zeros(500, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 4] = torch.arange(1, 501) % 255 + 1
    moved = shift_randomly(images, torch.Generator().manual_seed(0), 2)
    assert moved.shape == images.shape
    assert torch.equal(moved.amax(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3)))
    places = {divmod(int(k), 9) for k in moved.flatten(1).argmax(dim=1)}
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}


def test_training_learns_and_repeats_itself_bit_by_bit(digits):
    images, labels = digits[0][:300], digits[1][:300]
    state = torch.get_rng_state()
    first, second, other = (
        train_classifier(DigitClassifier, images, labels, num_epochs=2, batch_size=30, seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    saved = [safetensors.torch.save(network.state_dict()) for network in (first, second, other)]
    assert saved[0] == saved[1] != saved[2]
    assert (first(images)[1].argmax(dim=1) == labels).double().mean() > 0.5


def test_training_on_photos_repeats_itself_too(photos):
    """Batch normalization is in training mode while it trains, and in eval mode after that."""
    first, second = (
        train_classifier(
            Cifar10Classifier, photos[:40], torch.arange(40) % 10, num_epochs=1, batch_size=20, progress=False
        )
        for _ in range(2)
    )
    assert safetensors.torch.save(first.state_dict()) == safetensors.torch.save(second.state_dict())
    norms = [module for module in first.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 6 and all(norm.num_batches_tracked == 2 and not norm.training for norm in norms)


def test_the_command_trains_and_keeps_what_is_there(digits, tmp_path, capsys):
    for k in range(40):
        path = tmp_path / "data" / ("train", "test")[k % 2] / str(int(digits[1][k])) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[0][k, 0].numpy()).save(path)
    output = tmp_path / "weights.safetensors"
    command = ["digits", f"--dataset_name={tmp_path / 'data'}", f"--output={output}", "--num_epochs=1"]
    main(command)
    assert load_weights(DigitClassifier, output).sha256 in capsys.readouterr().out
    before = output.read_bytes()
    with pytest.raises(SystemExit) as refusal:
        main([*command, "--seed=1"])
    assert refusal.value.code == 2 and "exists" in capsys.readouterr().err and output.read_bytes() == before
    main([*command, "--seed=1", "--overwrite"])
    assert output.read_bytes() != before
