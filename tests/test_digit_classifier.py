"""The bundled digit classifier recognizes digits of other writers, and training it again gives the same weights."""

import hashlib

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_hf import UserError
from ddpm_hf.evaluation.digit_classifier import (
    SHA256,
    WEIGHTS,
    load_digit_classifier,
    main,
    shift_randomly,
    train_digit_classifier,
)
from ddpm_hf.evaluation.features import full_precision


@pytest.fixture(scope="module")
def classifier():
    return load_digit_classifier()


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's 8x8 digits of other writers, as MNIST has them: 20x20 in the middle of 28x28."""
    bunch = load_digits()
    images = torch.zeros(len(bunch.images), 1, 28, 28, dtype=torch.uint8)
    for image, small in zip(images, np.rint(bunch.images * 255 / 16).astype(np.uint8)):
        resized = Image.fromarray(small).resize((20, 20), Image.Resampling.BICUBIC)
        image[0, 4:24, 4:24] = torch.from_numpy(np.array(resized))
    return images, torch.from_numpy(bunch.target)


def test_the_weights_are_the_pinned_ones(classifier):
    assert classifier.sha256 == SHA256 == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert (classifier.name, classifier.pipeline, classifier.num_features) == ("digits", "28px", 64)
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 114_314
    assert WEIGHTS.stat().st_size < 500_000


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
        UserError, match=r"was given .* images of .*, but its digit classifier takes only uint8 images of 1x28x28"
    ):
        classifier(images)


def test_other_weights_are_refused(tmp_path):
    for name, content in [("text", b"x" * 20), ("other", safetensors.torch.save({"a": torch.zeros(1)}))]:
        (tmp_path / name).write_bytes(content)
    for name in ["text", "other", "missing"]:
        with pytest.raises(UserError, match=f"{name} does not hold weights of the digit classifier"):
            load_digit_classifier(tmp_path / name)


def test_shifts_move_whole_images_by_at_most_two_pixels():
    images = torch.zeros(500, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 4] = torch.arange(1, 501) % 255 + 1
    moved = shift_randomly(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert torch.equal(moved.amax(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3)))
    places = {divmod(int(k), 9) for k in moved.flatten(1).argmax(dim=1)}
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}


def test_training_learns_and_repeats_itself_bit_by_bit(digits):
    images, labels = digits[0][:300], digits[1][:300]
    state = torch.get_rng_state()
    first, second, other = (
        train_digit_classifier(images, labels, num_epochs=2, batch_size=30, seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    saved = [safetensors.torch.save(network.state_dict()) for network in (first, second, other)]
    assert saved[0] == saved[1] != saved[2]
    assert (first(images)[1].argmax(dim=1) == labels).double().mean() > 0.5


def test_the_command_trains_and_keeps_what_is_there(digits, tmp_path, capsys):
    for k in range(40):
        path = tmp_path / "data" / ("train", "test")[k % 2] / str(int(digits[1][k])) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[0][k, 0].numpy()).save(path)
    output = tmp_path / "weights.safetensors"
    command = [f"--dataset_name={tmp_path / 'data'}", f"--output={output}", "--num_epochs=1"]
    main(command)
    assert load_digit_classifier(output).sha256 in capsys.readouterr().out
    before = output.read_bytes()
    with pytest.raises(SystemExit) as refusal:
        main([*command, "--seed=1"])
    assert refusal.value.code == 2 and "exists" in capsys.readouterr().err and output.read_bytes() == before
    main([*command, "--seed=1", "--overwrite"])
    assert output.read_bytes() != before
