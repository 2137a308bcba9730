"""Label augmented training images for the UNet, and make a UNet to publish that draws images without augmentation.

A stock UNet2DModel has no input that says whether an image is augmented, so --augment_probability uses class
embeddings for this. The UNet has twice as many embeddings as its classes need, or two embeddings without classes. The
first half is for unchanged images, and the second half is for augmented images. The published UNet keeps only the
first half. Without classes, this half is one vector, which the UNet adds to the output of time_embedding.linear_2. We
add the vector to the bias of this layer instead. This gives the same output and a stock unconditional UNet2DModel.
"""

import copy

import torch
from torch import nn


def labels_with_augmentation(class_labels: torch.Tensor | None, augmented: torch.Tensor, num_embeddings: int):
    """Return the labels (B,) int64 of a batch for a UNet that is trained with --augment_probability.

    Args:
        class_labels: (B,) int64, the result of `training_labels`; None if the UNet has no classes.
        augmented: (B,) bool, True for augmented images.
        num_embeddings: the number of class embeddings of the UNet that is trained.
    """
    labels = torch.zeros(len(augmented), dtype=torch.int64) if class_labels is None else class_labels
    return labels + num_embeddings // 2 * augmented


@torch.no_grad()
def without_augmentation(unet, is_conditional: bool):
    """Copy a UNet that was trained with --augment_probability. The copy has no embeddings that mark augmented images.

    Args:
        is_conditional: whether the UNet has classes, whose embeddings are kept.
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
