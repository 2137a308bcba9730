"""Tell a UNet which training images are augmented, and make the UNet to publish, which draws no such images.

A stock UNet2DModel has no input for this, so a UNet that is trained with --augment_probability has class embeddings
for it: twice as many as it has classes, or two without classes. The first half is for images as they are, and the
second half for augmented ones. To publish the UNet, only the first half is kept. Without classes, the first half is
one vector. It is added to the bias of the layer that it would be added to anyway (time_embedding.linear_2), so a stock
unconditional UNet2DModel remains.
"""

import copy

import torch
from torch import nn


def labels_with_augmentation(class_labels: torch.Tensor | None, augmented: torch.Tensor, num_embeddings: int):
    """Return the labels (B,) int64 of a batch for a UNet of this kind.

    Args:
        class_labels: (B,) int64, the result of `training_labels`; None without classes.
        augmented: (B,) bool.
        num_embeddings: the number of class embeddings of the UNet that is trained.
    """
    labels = torch.zeros(len(augmented), dtype=torch.int64) if class_labels is None else class_labels
    return labels + num_embeddings // 2 * augmented


@torch.no_grad()
def without_augmentation(unet, is_conditional: bool):
    """Return a copy of a UNet of this kind as a stock UNet2DModel that draws images as they are.

    Args:
        is_conditional: whether the UNet has classes.
    """
    unet = copy.deepcopy(unet)
    table = unet.class_embedding.weight
    if is_conditional:
        half = len(table) // 2
        unet.class_embedding = nn.Embedding.from_pretrained(table[:half].clone(), freeze=not table.requires_grad)
        unet.register_to_config(num_class_embeds=half)
    else:
        unet.time_embedding.linear_2.bias += table[0]
        unet.class_embedding = None
        unet.register_to_config(num_class_embeds=None)
    return unet
