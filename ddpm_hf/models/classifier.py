"""Classify noisy images: the classifier p(y | x_t, t) of classifier guidance.

The classifier is the downsampling half of the UNet, with pooling at the end (Dhariwal & Nichol 2021,
https://huggingface.co/papers/2105.05233, section 4). `save_pretrained` writes a copy of this file next to config.json,
so that the folder loads with diffusers alone:

    classifier = AutoModel.from_pretrained("runs/mnist-classifier", subfolder="classifier", trust_remote_code=True)
"""

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import Tensor, nn
from torch.nn import Module


class AttentionPool(Module):
    """Pool features (B, C, H, W) to logits: attention whose only query is the mean of the pixels.

    The tokens are the mean and all pixels. Each token has a learned position (Radford et al. 2021, section 2.3, and
    Dhariwal & Nichol 2021, section 4).
    """

    def __init__(self, channels: int, height: int, width: int, head_dim: int, num_classes: int):
        super().__init__()
        self.num_heads = channels // head_dim
        self.positions = nn.Parameter(torch.randn(height * width + 1, channels) / channels**0.5)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, num_classes)

    def forward(self, hidden: Tensor) -> Tensor:
        pixels = hidden.flatten(2).transpose(1, 2)
        tokens = torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1) + self.positions
        # Split the channels of q, k and v into heads: (B, heads, tokens, head_dim).
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.to_qkv(tokens).chunk(3, dim=2)
        )
        pooled = nn.functional.scaled_dot_product_attention(q[:, :, :1], k, v)  # the mean is the only query
        return self.to_out(pooled.flatten(1))


class NoisyClassifier(ModelMixin, ConfigMixin):
    """A classifier of images at any noise level of a schedule with `num_train_timesteps` steps.

    Arguments with the names of UNet2DModel's arguments have the same meaning. `sample_size`, `beta_schedule` and
    `quarters` record what the classifier was trained on. `quarters` holds abar at a quarter, a half and three quarters
    of the timesteps. `pool` is "mean" or "attention" (see `AttentionPool`). With "attention", the size of the images
    must be `sample_size`. `id2label` is None or names every class: {0: "cat", ...}, with ints or strings as keys.

    Raises:
        ValueError: if `down_block_types` and `block_out_channels` differ in length, if `id2label` does not name each
            class once, if an attention head is wider than its block, for an unknown `pool`, or for attention pooling
            without a `sample_size`.
    """

    _auto_class = "AutoModel"  # diffusers then writes an auto_map to config.json, by which AutoModel finds this class

    # Longer than 60 lines, because each argument is a field of config.json and stands on a separate line.
    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        num_classes: int = 10,
        id2label: dict[int | str, str] | None = None,
        block_out_channels: tuple[int, ...] = (64, 128, 256),
        layers_per_block: int = 2,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        downsample_type: str = "conv",
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        attention_head_dim: int | None = 8,  # None: one head
        add_attention: bool = True,  # in the middle block
        resnet_time_scale_shift: str = "default",
        dropout: float = 0.0,
        pool: str = "mean",
        num_train_timesteps: int = 1000,
        beta_schedule: str | None = None,  # diffusers' name of the schedule
        quarters: tuple[float, ...] | None = None,  # abar at a quarter, a half and three quarters of the schedule
    ):
        super().__init__()
        if len(down_block_types) != len(block_out_channels):
            raise ValueError(
                f"There are {len(down_block_types)} down_block_types and {len(block_out_channels)} "
                "block_out_channels; give the same number of both."
            )
        if id2label is not None and {str(k) for k in id2label} != {str(k) for k in range(num_classes)}:
            raise ValueError(
                f"id2label names the classes {', '.join(map(str, id2label))}; give a name for each class from 0 to "
                f"{num_classes - 1}."
            )
        if pool not in ("mean", "attention") or (pool == "attention" and not sample_size):
            raise ValueError(
                f"pool is {pool!r} and sample_size is {sample_size}; give pool mean, or attention and a sample_size."
            )
        heads_of = [attention_head_dim or channels for channels in block_out_channels]
        if any(head_dim > channels for head_dim, channels in zip(heads_of, block_out_channels)):
            raise ValueError(
                f"attention_head_dim is {attention_head_dim}, but a block has fewer channels (block_out_channels is "
                f"{list(block_out_channels)}); give more channels, or attention_head_dim None for one head."
            )
        width = block_out_channels[0]
        shared = {
            "temb_channels": 4 * width,
            "resnet_eps": 1e-5,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
            "resnet_time_scale_shift": resnet_time_scale_shift,
            "dropout": dropout,
        }
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, 4 * width)
        self.conv_in = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                block_type,
                num_layers=layers_per_block,
                in_channels=block_out_channels[max(i - 1, 0)],
                out_channels=block_out_channels[i],
                add_downsample=i < len(block_out_channels) - 1,
                downsample_padding=1,
                downsample_type=downsample_type,
                attention_head_dim=heads_of[i],
                **shared,
            )
            for i, block_type in enumerate(down_block_types)
        )
        self.mid_block = UNetMidBlock2D(
            in_channels=block_out_channels[-1],
            add_attention=add_attention,
            attention_head_dim=heads_of[-1],
            attn_groups=attn_norm_num_groups,
            **shared,
        )
        self.norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[-1], eps=1e-5)
        if pool == "mean":
            self.head = nn.Linear(block_out_channels[-1], num_classes)
        else:
            sizes = sample_size if isinstance(sample_size, (tuple, list)) else (sample_size, sample_size)
            height, width = (size >> (len(block_out_channels) - 1) for size in sizes)
            self.head = AttentionPool(block_out_channels[-1], height, width, heads_of[-1], num_classes)

    def forward(self, sample: Tensor, timestep: Tensor | int) -> Tensor:
        """Return logits (B, num_classes) for noisy images (B, C, H, W), of any size unless `pool` is "attention".

        A noisy image is x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, with x_0 in [-1, 1] and t = `timestep`.

        Args:
            timestep: one int for all images, or a tensor (B,).
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        embedding = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        hidden = self.conv_in(sample)
        for block in self.down_blocks:
            hidden, _ = block(hidden, embedding)
        hidden = self.mid_block(hidden, embedding)
        hidden = nn.functional.silu(self.norm_out(hidden))
        return self.head(hidden.mean(dim=(2, 3)) if self.config.pool == "mean" else hidden)

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write config.json and a copy of this file to `save_directory`. `save_pretrained` calls this method."""
        code = Path(__file__)
        # Copy this file first, because super().save_config may push the folder to the Hub.
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, code.name).write_text(code.read_text(encoding="utf-8"), encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
