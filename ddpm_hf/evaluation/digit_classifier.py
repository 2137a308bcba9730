"""A small digit classifier that scores models of MNIST. Its weights come with the package.

The metric `fd_mnist-<first 8 digits of the SHA256 of the weights>` is the Fréchet distance in the features of this
classifier. It is not FID. Another classifier gives other values. They differ by up to a factor of two even if only the
seed of its training differs. The weights are therefore fixed. This command made them in about two minutes on one CPU
core:

    python -m ddpm_hf.evaluation.train_classifier digits --dataset_name ylecun/mnist --output digits.safetensors
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from .features import full_precision
from .small_classifier import SmallClassifier, shift_randomly


WEIGHTS = Path(__file__).with_suffix(".safetensors")
SHA256 = "9ea1c6a65057eaf7d37a7d4706d3be706c1929b6a02af9fc87513e19e2fd9b0d"  # of the file WEIGHTS
MAX_SHIFT = 2  # pixels; training images are shifted, because models draw digits a little off the center


class DigitClassifier(SmallClassifier):
    """Two convolutions of 5x5 and two linear layers, with 114,314 parameters. The features are the last layer's input.

    The activations are GELU, because a ReLU that is 0 for all images makes the covariance of the features singular.
    """

    name = "digits"
    metric = "fd_mnist"
    weights = WEIGHTS
    pipeline = "28px"
    num_features = 64
    class_names = tuple("0123456789")
    dataset = "MNIST"
    resolution = 28
    channels = 1
    recipe = dict(
        num_epochs=4, batch_size=128, learning_rate=3e-3, weight_decay=0.01, label_smoothing=0.05, autocast=False
    )

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
                f"the digit classifier was given {given}, but takes only uint8 images of 1x28x28, or of "
                "1x32x32 with a border: leave fd_mnist out, or choose other --features than digits."
            )
        border = (images.shape[-1] - 28) // 2
        with full_precision(images.device):
            features = self.body(scale(images[..., border : border + 28, border : border + 28]))
            return features, self.head(features)

    @staticmethod
    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        """Shift each image by up to 2 pixels, and normalize the images. New pixels at the edge are black."""
        return scale(shift_randomly(images, generator, MAX_SHIFT))


def scale(images: Tensor) -> Tensor:
    """Return uint8 images as float32 of the same shape, scaled to mean 0 and deviation 1 over MNIST."""
    return (images.float() / 255 - 0.1307) / 0.3081
