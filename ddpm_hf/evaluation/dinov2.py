"""The extractor of FD-DINOv2 (Stein et al. 2023, https://huggingface.co/papers/2306.04675), through transformers.

Their protocol: 8-bit images to 224x224 by Pillow's bicubic filter, whole and square, then the CLS token after the last
LayerNorm of DINOv2 ViT-L/14. transformers' own image processor crops, so it is not used.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Model

from ..errors import UserError
from .digit_classifier import full_precision
from .inception import MissingWeights


RESOLUTION = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by channel, of pixels in [0, 1]


class DINOv2(nn.Module):
    """A `Dinov2Model` behind the protocol's preprocessing.

    `pipeline` names the latter; `sha256` is what `cat config.json *.safetensors | sha256sum` says in the folder.
    """

    name = "dinov2"

    def __init__(self, model: Dinov2Model, pipeline: str, sha256: str):
        super().__init__()
        self.model, self.pipeline, self.sha256 = model, pipeline, sha256
        self.num_features = model.config.hidden_size

    def train(self, mode: bool = True) -> "DINOv2":
        """Stay in eval mode: as a part of a metric or a model it is told to train, and must not."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Return features (B, num_features) float32, and no logits, of uint8 images (B, 1 or 3, H, W).

        Images of another kind are a UserError.
        """
        device = self.model.device
        with full_precision(device):
            return self.model(preprocess(images).to(device)).pooler_output, None


def preprocess(images: Tensor) -> Tensor:
    """uint8 (B, 1 or 3, H, W) to float32 (B, 3, 224, 224), normalised; on the CPU, where Pillow works.

    Images of another kind are a UserError.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        given = f"{str(images.dtype).removeprefix('torch.')} images of shape {tuple(images.shape)}"
        raise UserError(f"DINOv2 was given {given}: give uint8 images (B, 1, H, W) or (B, 3, H, W), rounded.")
    rgb = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    size = (RESOLUTION, RESOLUTION)
    resized = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in rgb])
    pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def load_dinov2(source: str = "facebook/dinov2-large") -> DINOv2:
    """Load a folder or a Hub id, config.json and safetensors, in float32 and eval mode, on the CPU.

    The position embeddings, a 37x37 grid in the published models, are brought to the 16x16 patches of 224 pixels as in
    the code of DINOv2, which published values of FD-DINOv2 were computed with. (transformers puts the samples
    elsewhere.) A grid of 16x16 stays as it is.

    Raises:
        MissingWeights: if there is no such folder and the Hub does not give it.
        UserError: for a folder that does not hold a DINOv2.
    """
    folder = Path(source) if Path(source).exists() else _from_hub(source)
    wanted = "give a folder or Hub id with the config.json and safetensors of a Dinov2Model"
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "dinov2":
            raise UserError(f"{source} holds a model of type {kind}, not dinov2: {wanted}.")
        model, loading = Dinov2Model.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, json.JSONDecodeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source} cannot be loaded ({' '.join(str(error).split())}): {wanted}.") from error
    if loading["missing_keys"]:  # transformers would leave them random
        raise UserError(f"{source} lacks weights, such as {min(loading['missing_keys'])}: {wanted}.")
    embeddings, side = model.embeddings, RESOLUTION // model.config.patch_size
    # The grid then fits, so that transformers takes it as it is.
    embeddings.position_embeddings = nn.Parameter(hub_position_embeddings(embeddings.position_embeddings, side))
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.read_bytes())
    return DINOv2(model, f"pil-bicubic-{RESOLUTION}", digest.hexdigest()).requires_grad_(False).eval()


def _from_hub(source: str) -> Path:
    try:
        return Path(
            snapshot_download(source, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"])
        )
    except (HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        remedy = "give --dinov2 FOLDER_OR_ID, with config.json and model.safetensors"
        raise MissingWeights(f"{source} is no folder here, and the Hub does not give it: {remedy}.") from error


@torch.no_grad()
def hub_position_embeddings(position_embeddings: Tensor, side: int) -> Tensor:
    """Interpolate (1, 1 + grid^2, d), the CLS token's first, to (1, 1 + side^2, d) as the code of DINOv2 does.

    It asks for a scale of (side + 0.1) / grid, so that rounding cannot lose a row, and that is also the spacing of the
    samples: pixel k is read at (k + 1/2) / scale - 1/2 (Oquab et al. 2023, https://huggingface.co/papers/2304.07193,
    `interpolate_pos_encoding` of their vision_transformer.py).
    """
    token, patches = position_embeddings[:, :1], position_embeddings[:, 1:]
    grid = math.isqrt(patches.shape[1])
    if grid == side:
        return position_embeddings
    patches = patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / grid
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([token, patches.flatten(2).transpose(1, 2)], dim=1)
