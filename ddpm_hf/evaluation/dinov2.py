"""The extractor of FD-DINOv2 (Stein et al. 2023, https://huggingface.co/papers/2306.04675), through transformers.

The protocol of Stein et al. resizes whole 8-bit images to a square of 224x224 with Pillow's bicubic filter. The
features are the CLS token after the last LayerNorm of DINOv2 ViT-L/14. The image processor of transformers is not
used, because it crops.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Model

from ..errors import UserError
from ..files import read_json
from ..hub_requests import HUB_ERRORS, download
from ..models.pretrained import opening
from .features import Extractor, check_images, full_precision
from .inception import MissingWeights


RESOLUTION = 224
# The mean and the standard deviation of ImageNet's pixels in [0, 1], by channel.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class DINOv2(Extractor):
    """A `Dinov2Model` with the preprocessing of Stein et al.

    Attributes:
        pipeline: the name of the preprocessing.
        sha256: the hash that `cat config.json *.safetensors | sha256sum` prints in the folder of the model.
    """

    name = "dinov2"

    def __init__(self, model: Dinov2Model, pipeline: str, sha256: str):
        super().__init__()
        self.model = model
        self.pipeline = pipeline
        self.sha256 = sha256
        self.num_features = model.config.hidden_size

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Return float32 features (B, num_features) of uint8 images (B, 1 or 3, H, W). The logits are None.

        Raises:
            UserError: for images of another type or shape.
        """
        device = self.model.device
        with full_precision(device):
            return self.model(preprocess(images).to(device)).pooler_output, None


def preprocess(images: Tensor) -> Tensor:
    """Return uint8 images (B, 1 or 3, H, W) resized and normalised: float32 (B, 3, 224, 224) on the CPU.

    Raises:
        UserError: for images of another type or shape.
    """
    check_images("DINOv2", images)
    rgb = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    size = (RESOLUTION, RESOLUTION)
    resized = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in rgb])
    pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def load_dinov2(source: str = "facebook/dinov2-large") -> DINOv2:
    """Return a DINOv2 in float32 and in eval mode, on the CPU.

    The published models have a 37x37 grid of position embeddings, but an image of 224 pixels has 16x16 patches. The
    grid is interpolated as in the code of DINOv2, because the published values of FD-DINOv2 were computed with that
    code. Interpolation in transformers gives slightly different values. A grid of 16x16 is not changed.

    Args:
        source: a folder or a Hub id, with config.json and safetensors.

    Raises:
        MissingWeights: if there is no such folder, and the model cannot be downloaded from the Hub.
        UserError: for a folder that does not hold a DINOv2.
    """
    folder = Path(source) if Path(source).exists() else _from_hub(source)
    wanted = "give a folder or Hub id with config.json and safetensors of a Dinov2Model"
    with opening(source, wanted):
        kind = read_json(folder / "config.json", missing={}).get("model_type")
        if kind != "dinov2":
            raise UserError(f"{source} holds a model of type {kind}, but dinov2 is needed: {wanted}.")
        model, loading = Dinov2Model.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    if loading["missing_keys"]:  # transformers would fill in random numbers for missing weights
        raise UserError(f"{source} lacks weights, such as {min(loading['missing_keys'])}: {wanted}.")
    embeddings = model.embeddings
    side = RESOLUTION // model.config.patch_size
    # Replace the grid by one that fits 224 pixels. Transformers then does not interpolate it again.
    embeddings.position_embeddings = nn.Parameter(hub_position_embeddings(embeddings.position_embeddings, side))
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.read_bytes())
    return DINOv2(model, f"pil-bicubic-{RESOLUTION}", digest.hexdigest()).requires_grad_(False).eval()


def _from_hub(source: str) -> Path:
    try:
        return download(source, ["config.json", "*.safetensors", "*.safetensors.index.json"])
    except (HFValidationError, *HUB_ERRORS) as error:
        raise MissingWeights(
            f"{source} is not a folder here, and it cannot be downloaded from the Hub: give --dinov2 FOLDER_OR_ID, "
            "with config.json and model.safetensors."
        ) from error


@torch.no_grad()
def hub_position_embeddings(position_embeddings: Tensor, side: int) -> Tensor:
    """Interpolate position embeddings (1, 1 + grid^2, d) to (1, 1 + side^2, d), as the code of DINOv2 does.

    The first embedding, of the CLS token, is not changed. The code of DINOv2 (Oquab et al. 2023,
    https://huggingface.co/papers/2304.07193, `interpolate_pos_encoding` in their vision_transformer.py) uses the scale
    (side + 0.1) / grid. Without the 0.1, rounding could give a row too few. The 0.1 also changes the values, because
    output k is read at the position (k + 1/2) / scale - 1/2 of the grid.
    """
    token, patches = position_embeddings[:, :1], position_embeddings[:, 1:]
    grid = math.isqrt(patches.shape[1])
    if grid == side:
        return position_embeddings
    patches = patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / grid
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([token, patches.flatten(2).transpose(1, 2)], dim=1)
