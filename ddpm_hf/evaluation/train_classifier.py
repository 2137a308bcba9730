"""Train a small classifier that scores images. These commands made the weights in the package:

python -m ddpm_hf.evaluation.train_classifier digits --dataset_name ylecun/mnist --output digits.safetensors
python -m ddpm_hf.evaluation.train_classifier cifar10 --dataset_name uoft-cs/cifar10 --output cifar10.safetensors
"""

import argparse
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..config.training_config import TrainingConfig
from ..data.dataset import load_images
from ..errors import UserError
from ..randomness import keyed_generator
from .extractor import CLASSIFIERS
from .small_classifier import SmallClassifier, initialize, load_weights


def train_classifier(
    kind: type[SmallClassifier], images: Tensor, labels: Tensor, *, seed: int = 0, progress: bool = True, **recipe
) -> SmallClassifier:
    """Return a classifier trained on uint8 images (N, C, H, W) with labels (N,).

    The optimizer is AdamW with a one-cycle learning rate (Smith & Topin 2018, https://huggingface.co/papers/1708.07120).
    The loss has label smoothing (Szegedy et al. 2016). On one machine and with one thread, the same seed gives exactly
    the same weights.

    Args:
        recipe: settings in place of those in `kind.recipe`: num_epochs, batch_size, learning_rate, weight_decay,
            label_smoothing, autocast (True: bfloat16 inside the network).
    """
    recipe = kind.recipe | recipe
    with torch.device("meta"):
        classifier = kind()
    classifier.to_empty(device="cpu")
    initialize(classifier, seed)
    classifier.body.train()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=recipe["weight_decay"])
    batch_size = recipe["batch_size"]
    num_steps = recipe["num_epochs"] * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["learning_rate"], total_steps=num_steps)
    bar = tqdm(total=num_steps, unit="step", disable=not progress)
    for epoch in range(recipe["num_epochs"]):
        generator = keyed_generator(seed, "epoch", epoch)
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe["autocast"]):
                features = classifier.body(kind.augment(images[rows], generator))
                logits = classifier.head(features).float()
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=recipe["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    return classifier.requires_grad_(False).eval()


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_hf.evaluation.train_classifier", description="Train a classifier that scores images."
    )
    parser.add_argument("kind", choices=CLASSIFIERS)
    parser.add_argument("--dataset_name", required=True, help="the data: a Hub id, or a folder in the Hub's layout")
    parser.add_argument("--output", required=True, type=Path, help="the safetensors file to write the weights to")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    parser.add_argument("--num_epochs", type=int, help="default: as many as for the weights in the package")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        _train_command(CLASSIFIERS[arguments.kind], arguments)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        sys.exit(2)


def _train_command(kind: type[SmallClassifier], arguments):
    if arguments.output.exists() and not arguments.overwrite:
        raise UserError(f"{arguments.output} exists: give another --output, or add --overwrite to replace it.")
    config = TrainingConfig(dataset_name=arguments.dataset_name, resolution=kind.resolution, validation_split="test")
    train, test = load_images(config, channels=kind.channels)
    if set(train.class_names or []) != set(kind.class_names):
        raise UserError(
            f"{arguments.dataset_name} does not have the classes {', '.join(kind.class_names)}: give {kind.dataset}."
        )
    torch.set_num_threads(1)  # otherwise round-off, and so the weights, depend on the number of cores
    numbers = torch.tensor([kind.class_names.index(name) for name in train.class_names])
    recipe = {} if arguments.num_epochs is None else {"num_epochs": arguments.num_epochs}
    classifier = train_classifier(kind, train.pixels, numbers[train.labels], seed=arguments.seed, **recipe)
    safetensors.torch.save_file(classifier.state_dict(), arguments.output)
    classifier = load_weights(kind, arguments.output)
    guesses = torch.cat([classifier(images)[1].argmax(dim=1) for images in test.pixels.split(500)])
    accuracy = (guesses == numbers[test.labels]).double().mean()
    print(f"accuracy on {len(test)} test images: {accuracy:.2%}, sha256 of {arguments.output}: {classifier.sha256}")


if __name__ == "__main__":
    main()
