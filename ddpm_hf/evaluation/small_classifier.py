"""Define what the small classifiers share. train_classifier.py made their weights, which come with the package."""

import hashlib
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError, reason_of
from ..randomness import keyed_generator
from .features import Extractor


class SmallClassifier(Extractor):
    """A classifier of small images. The features are the input of its last linear layer.

    A subclass sets the attributes below, and the modules `body` (images to features) and `head` (features to logits).

    Attributes:
        metric: the name of the metric of this classifier, which is the beginning of the ids of its distances.
        weights: the file of weights in the package.
        class_names: the names of the classes, in the order of the logits.
        dataset: the name of the training data, for messages.
        resolution, channels: the size and the number of channels of the training images.
        recipe: the settings with which `train_classifier` trains this classifier by default.
    """

    metric: str
    weights: Path
    class_names: tuple[str, ...]
    dataset: str
    resolution: int
    channels: int
    recipe: dict
    sha256 = None  # the hash of the file of weights

    @staticmethod
    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        """Change uint8 training images at random. Return them scaled as `body` needs them."""
        raise NotImplementedError


def load_weights(kind: type[SmallClassifier], weights: str | Path | None = None) -> SmallClassifier:
    """Return a classifier in eval mode on the CPU. `weights` is a safetensors file; None: the one in the package.

    Raises:
        UserError: if the file does not hold weights of this classifier.
    """
    path = Path(weights or kind.weights)
    with torch.device("meta"):
        classifier = kind()
    try:
        content = path.read_bytes()
        classifier.load_state_dict(safetensors.torch.load(content), assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = reason_of(error, lines=20)
        raise UserError(
            f"{path} does not hold weights of the {kind.name} classifier ({reason}): leave the file out, to use the "
            "weights that come with the package."
        ) from error
    classifier.sha256 = hashlib.sha256(content).hexdigest()
    return classifier.requires_grad_(False).eval()


def initialize(classifier: SmallClassifier, seed: int):
    """Draw the weights of linear and convolutional layers (He et al. 2015). Set biases to 0, and reset batch norms."""
    for name, module in classifier.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            generator = keyed_generator(seed, "init", f"{name}.weight")
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()  # ones and zeros


def shift_randomly(images: Tensor, generator: torch.Generator, max_shift: int, mode: str = "constant") -> Tensor:
    """Return images (B, C, H, W), each shifted at random along both axes by up to `max_shift` pixels.

    `mode` says how `torch.nn.functional.pad` makes the new pixels: "constant" (0) or "reflect".
    """
    height, width = images.shape[-2:]
    windows = F.pad(images, [max_shift] * 4, mode=mode).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, y, x, H, W)
    dy, dx = torch.randint(2 * max_shift + 1, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, dy, dx]
