"""A small classifier of CIFAR-10 that scores models of color images. Its weights come with the package.

The metric `fd_cifar10-<first 8 digits of SHA256>` is the Fréchet distance in the features of this classifier. It is
not FID. Another classifier gives other values, so the weights are fixed. This command made them in 62 minutes on one
CPU core, from a copy of CIFAR-10 that had been compressed as JPEG:

    python -m ddpm_hf.evaluation.train_classifier cifar10 --dataset_name uoft-cs/cifar10 --output cifar10.safetensors
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .features import full_precision
from .small_classifier import SmallClassifier, shift_randomly


WEIGHTS = Path(__file__).with_suffix(".safetensors")
SHA256 = "9e3e5d08430cc00367d1263f4a499c8c5539626c75d47260e92cfcc29f135a52"  # of the file WEIGHTS
MAX_SHIFT = 4  # pixels, in training
CUT = 8  # pixels, the side of the square that is cut out of training images
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)  # of CIFAR-10's training images, with pixels from 0 to 1
DEVIATION = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


class Cifar10Classifier(SmallClassifier):
    """Seven convolutions and a linear layer, with 1.2 M parameters.

    The features are means over the 3x3 positions of the last layer, and over the image and its mirror image. The
    activations are GELU, because a ReLU that is 0 for all images makes the covariance of the features singular.
    """

    name = "cifar10"
    metric = "fd_cifar10"
    weights = WEIGHTS
    pipeline = "32px"
    num_features = 224
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    dataset = "CIFAR-10"
    resolution = 32
    channels = 3
    recipe = dict(
        num_epochs=28, batch_size=128, learning_rate=8e-3, weight_decay=0.05, label_smoothing=0.1, autocast=True
    )

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 24, 2), nn.GELU()),
            *_block(24, 64),
            *_block(64, 160),
            *_block(160, self.num_features),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Linear(self.num_features, 10)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 features (B, 224) and logits (B, 10) for square uint8 images (B, 3, H, H).

        H must be a multiple of 32. Larger images are reduced to 32x32 by averaging square blocks of pixels.

        Raises:
            UserError: for images of another type or size.
        """
        height, width = images.shape[-2:]
        if images.dtype != torch.uint8 or images.shape[1] != 3 or height != width or height % 32 or not height:
            given = f"{str(images.dtype).removeprefix('torch.')} images of {'x'.join(map(str, images.shape[1:]))}"
            raise UserError(
                f"the CIFAR-10 classifier was given {given}, but takes only uint8 images of 3x32x32, 3x64x64 and "
                "other multiples of 32: leave fd_cifar10 out, or choose other --features than cifar10."
            )
        with full_precision(images.device):
            images = F.avg_pool2d(scale(images), height // 32)
            features = (self.body(images) + self.body(images.flip(-1))) / 2
            return features, self.head(features)

    @staticmethod
    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        """Normalize the images, mirror half of them, shift each by up to 4 pixels, and erase a square in each.

        The square has 8x8 pixels and a random center (DeVries & Taylor 2017, https://huggingface.co/papers/1708.04552).
        """
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        images = shift_randomly(scale(images), generator, MAX_SHIFT, "reflect")
        center = torch.randint(32, (2, len(images), 1), generator=generator)
        rows, columns = (torch.arange(32) - center + CUT // 2).div(CUT, rounding_mode="floor") == 0
        images = images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
        return images.contiguous(memory_format=torch.channels_last)  # makes training on a CPU a quarter faster


def _block(channels_in: int, channels: int) -> list[nn.Module]:
    """Return the layers of a block that halves height and width."""
    return [
        *(nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.MaxPool2d(2)),
        *(nn.BatchNorm2d(channels), nn.GELU()),
        *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.GELU()),
    ]


def scale(images: Tensor) -> Tensor:
    """Return uint8 images as float32 of the same shape, scaled to mean 0 and deviation 1 over CIFAR-10."""
    return (images.float() / 255 - MEAN.to(images.device)) / DEVIATION.to(images.device)
