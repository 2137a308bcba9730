"""The noise-aware classifier p(y | x_t, t) of classifier guidance, in one file that travels with its weights.

The downsampling half of the UNet with pooling (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233,
section 4). `save_pretrained` writes this file beside config.json, so that the folder loads where only diffusers is:

    classifier = AutoModel.from_pretrained("runs/mnist-classifier", subfolder="classifier", trust_remote_code=True)
"""

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import Tensor, nn


class NoisyClassifier(ModelMixin, ConfigMixin):
    """Logits of K classes from an image at any noise level of a schedule of `num_train_timesteps`.

    The arguments with names of UNet2DModel's mean what they mean there; `sample_size` is the size trained at, for the
    record. `id2label` names all classes, {0: "cat", ...}, keys being ints or strings, or is None. Lists of blocks that
    differ in length, and names that are not one per class, are a ValueError.
    """

    _auto_class = "AutoModel"  # config.json gets an auto_map, by which AutoModel finds the class in the file beside it

    # More than 60 lines because each argument is a field of config.json and has a line of its own.
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
        norm_num_groups: int = 32,
        attention_head_dim: int | None = 8,  # None: one head
        add_attention: bool = True,  # in the middle block
        resnet_time_scale_shift: str = "default",
        dropout: float = 0.0,
        num_train_timesteps: int = 1000,
        beta_schedule: str | None = None,  # of the noise it knows, in diffusers' words; for the record
    ):
        super().__init__()
        if len(down_block_types) != len(block_out_channels):
            raise ValueError(
                f"There are {len(down_block_types)} down_block_types and {len(block_out_channels)} "
                "block_out_channels; give as many of both."
            )
        if id2label is not None and {str(k) for k in id2label} != {str(k) for k in range(num_classes)}:
            raise ValueError(
                f"id2label names the classes {', '.join(map(str, id2label))}; name each from 0 to {num_classes - 1}."
            )
        heads_of = [attention_head_dim or channels for channels in block_out_channels]
        if any(head_dim > channels for head_dim, channels in zip(heads_of, block_out_channels)):
            raise ValueError(
                f"attention_head_dim is {attention_head_dim}, more than the channels {list(block_out_channels)} have; "
                "give more channels, or None for one head."
            )
        width, last_width = block_out_channels[0], block_out_channels[-1]
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
                attention_head_dim=heads_of[i],
                **shared,
            )
            for i, block_type in enumerate(down_block_types)
        )
        self.mid_block = UNetMidBlock2D(
            in_channels=last_width, add_attention=add_attention, attention_head_dim=heads_of[-1], **shared
        )
        self.norm_out = nn.GroupNorm(norm_num_groups, last_width, eps=1e-5)
        self.head = nn.Linear(last_width, num_classes)

    def forward(self, sample: Tensor, timestep: Tensor | int) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) of any size, at noise level `timestep`: one int, or (B,).

        An image is clean data in [-1, 1] noised to sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        embedding = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        hidden = self.conv_in(sample)
        for block in self.down_blocks:
            hidden, _ = block(hidden, embedding)
        hidden = self.mid_block(hidden, embedding)
        return self.head(nn.functional.silu(self.norm_out(hidden)).mean(dim=(2, 3)))

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write config.json, and this file beside it: what `save_pretrained` calls, a pipeline's too."""
        code = Path(__file__)
        # The file first: an auto_map without its file could be pushed below.
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, code.name).write_text(code.read_text(encoding="utf-8"), encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
