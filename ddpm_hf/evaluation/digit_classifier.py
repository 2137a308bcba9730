"""A small digit classifier that scores models of MNIST. Its weights come with the package.

The metric `fd_mnist-<first 8 digits of SHA256>` is the Fréchet distance in the features of this classifier. It is not
FID. With another classifier, even with this one trained from another seed, values differ by up to a factor of two.
The weights are therefore fixed. They were made by this command, in about two minutes on one core:

    python -m ddpm_hf.evaluation.digit_classifier --dataset_name ylecun/mnist --output digit_classifier.safetensors
"""

import argparse
import hashlib
import sys
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..errors import UserError
from ..randomness import keyed_generator
from .features import Extractor, full_precision


WEIGHTS = Path(__file__).with_suffix(".safetensors")
SHA256 = "9ea1c6a65057eaf7d37a7d4706d3be706c1929b6a02af9fc87513e19e2fd9b0d"  # of the file WEIGHTS
MAX_SHIFT = 2  # pixels; training images are shifted, because models draw digits a little off the center


class DigitClassifier(Extractor):
    """Two convolutions of 5x5 and two linear layers, with 114,314 parameters. The features are the last layer's input.

    The activations are GELU. A ReLU that is 0 for all images would make the covariance of the features singular.
    """

    name = "digits"
    pipeline = "28px"
    num_features = 64
    sha256 = None  # the hash of the file of weights

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, padding=2), nn.GELU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 5, padding=2), nn.GELU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, self.num_features), nn.GELU()),
        )
        self.head = nn.Linear(self.num_features, 10)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, 64) and logits (B, 10), float32, for uint8 images (B, 1, 28, 28) or (B, 1, 32, 32).

        Images of 32x32 are taken to be MNIST's 28x28 with a border of 2 pixels. The border is cut off.

        Raises:
            UserError: for images of another type or size.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) not in [(1, 28, 28), (1, 32, 32)]:
            given = f"{str(images.dtype).removeprefix('torch.')} images of {'x'.join(map(str, images.shape[1:]))}"
            raise UserError(
                f"fd_mnist was given {given}, but its digit classifier takes only uint8 images of 1x28x28, or of "
                "1x32x32 with a border: leave fd_mnist out."
            )
        border = (images.shape[-1] - 28) // 2
        with full_precision(images.device):
            features = self.body(scale(images[..., border : border + 28, border : border + 28]))
            return features, self.head(features)


def scale(images: Tensor) -> Tensor:
    """Return uint8 images as float32 of the same shape, scaled so that MNIST's pixels have mean 0 and deviation 1."""
    return (images.float() / 255 - 0.1307) / 0.3081


def load_digit_classifier(weights: str | Path | None = None) -> DigitClassifier:
    """Return the classifier in eval mode on the CPU.

    Args:
        weights: a safetensors file. None: the weights that come with the package.

    Raises:
        UserError: if the file does not hold weights of this classifier.
    """
    path = Path(weights or WEIGHTS)
    with torch.device("meta"):
        classifier = DigitClassifier()
    try:
        content = path.read_bytes()
        classifier.load_state_dict(safetensors.torch.load(content), assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} does not hold weights of the digit classifier ({reason}): leave the file out, to use the weights "
            "that come with the package."
        ) from error
    classifier.sha256 = hashlib.sha256(content).hexdigest()
    return classifier.requires_grad_(False).eval()


def train_digit_classifier(
    images: Tensor, labels: Tensor, *, num_epochs: int = 4, batch_size: int = 128, seed: int = 0, progress: bool = True
) -> DigitClassifier:
    """Return a classifier trained on uint8 images (N, 1, 28, 28) with labels (N,) in 0..9.

    Each image is shifted at random by up to 2 pixels. The optimizer is AdamW with a one-cycle learning rate (Smith &
    Topin 2018, https://huggingface.co/papers/1708.07120). The loss has label smoothing 0.05 (Szegedy et al. 2016). On
    one machine and with one thread, the same seed gives exactly the same weights.
    """
    with torch.device("meta"):
        classifier = DigitClassifier()
    classifier.to_empty(device="cpu")
    for name, parameter in classifier.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=keyed_generator(seed, "init", name))
        else:
            nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    num_steps = num_epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=num_steps)
    bar = tqdm(total=num_steps, unit="step", disable=not progress)
    for epoch in range(num_epochs):
        generator = keyed_generator(seed, "epoch", epoch)
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            features = classifier.body(scale(shift_randomly(images[rows], generator)))
            loss = F.cross_entropy(classifier.head(features), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    return classifier.requires_grad_(False).eval()


def shift_randomly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (B, 1, H, W), each shifted at random by -2 to 2 pixels along both axes. New pixels are black."""
    height, width = images.shape[-2:]
    windows = F.pad(images, [MAX_SHIFT] * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, 1, 5, 5, H, W)
    dy, dx = torch.randint(2 * MAX_SHIFT + 1, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, dy, dx]


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_hf.evaluation.digit_classifier", description="Train the classifier."
    )
    parser.add_argument("--dataset_name", required=True, help="MNIST: a Hub id, or a folder in the Hub's layout")
    parser.add_argument("--output", required=True, type=Path, help="the safetensors file to write the weights to")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    parser.add_argument("--num_epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        _train_command(arguments)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        sys.exit(2)


def _train_command(arguments):
    from ..config.training_config import TrainingConfig
    from ..data.dataset import load_images

    if arguments.output.exists() and not arguments.overwrite:
        raise UserError(f"{arguments.output} exists: give another --output, or add --overwrite to replace it.")
    config = TrainingConfig(dataset_name=arguments.dataset_name, resolution=28, validation_split="test")
    train, test = load_images(config, channels=1)
    if len(train.class_names or []) != 10:
        raise UserError(f"{arguments.dataset_name} does not have ten classes: give MNIST.")
    torch.set_num_threads(1)  # otherwise round-off, and so the weights, depend on the number of cores
    classifier = train_digit_classifier(
        train.pixels, train.labels, num_epochs=arguments.num_epochs, seed=arguments.seed
    )
    safetensors.torch.save_file(classifier.state_dict(), arguments.output)
    classifier = load_digit_classifier(arguments.output)
    guesses = torch.cat([classifier(images)[1].argmax(dim=1) for images in test.pixels.split(1000)])
    accuracy = (guesses == test.labels).double().mean()
    print(f"accuracy on {len(test)} test images: {accuracy:.2%}, sha256 of {arguments.output}: {classifier.sha256}")


if __name__ == "__main__":
    main()
