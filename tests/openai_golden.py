"""Make openai_golden.json: outputs of OpenAI's own code for tiny networks with seeded weights.

    python -m tests.openai_golden IMPROVED_DIFFUSION GUIDED_DIFFUSION

The arguments are checkouts of openai/improved-diffusion (1bc7bbb was taken) and openai/guided-diffusion (22e0df8). The
JSON holds the names and shapes of the weights too, so that the tests need neither program.
"""

import importlib
import json
import shlex
import sys
from pathlib import Path

import torch

from ddpm_hf.randomness import keyed_generator


GOLDEN = Path(__file__).with_suffix(".json")
UPDOWN = "--image_size 64 --num_channels 32 --num_res_blocks 1 --resblock_updown True --learn_sigma True"
CLASSIFIER = "--image_size 64 --classifier_width 64 --classifier_depth 1"
# The flags of each network, and the size of the images that it is given.
CASES = {
    "cifar10": (
        "improved-diffusion",
        "--image_size 32 --num_channels 32 --num_res_blocks 1 --learn_sigma True --diffusion_steps 4000 "
        "--noise_schedule cosine",
        16,
    ),
    "lsun": (
        "improved-diffusion",
        "--image_size 256 --num_channels 32 --num_res_blocks 1 --num_heads 1 --attention_resolutions 16 "
        "--use_scale_shift_norm False --rescale_timesteps False",
        32,
    ),
    "new order, classes": (
        "guided-diffusion",
        f"{UPDOWN} --channel_mult 1,2 --num_head_channels 32 --attention_resolutions 32 --class_cond True "
        "--use_new_attention_order True --noise_schedule cosine",
        8,
    ),
    "legacy order": (
        "guided-diffusion",
        f"{UPDOWN} --channel_mult 1,2,2 --num_head_channels 16 --attention_resolutions 32",
        8,
    ),
    "classifier": ("guided-diffusion", f"{CLASSIFIER} --classifier_attention_resolutions 8", 64),
    "classifier, mean": (
        "guided-diffusion",
        f"{CLASSIFIER} --classifier_pool adaptive --classifier_resblock_updown False",
        16,
    ),
}


def seeded_weights(shapes: dict) -> dict[str, torch.Tensor]:
    """Random weights by name and shape, on a scale that keeps the signal alive. Norms are near 1."""
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=keyed_generator(0, "openai", name))
        fan_in = noise[0].numel() if len(shape) > 1 else 25
        weights[name] = noise / fan_in**0.5 + (len(shape) == 1 and name.endswith("weight"))
    return weights


def seeded_input(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two images, their timesteps and classes."""
    images = torch.randn(2, 3, size, size, generator=keyed_generator(0, "openai", "images"))
    return images, torch.tensor([3, 977]), torch.tensor([1, 999])


def some(output: torch.Tensor) -> list[float]:
    """Forty numbers of an output, spread over both images and all channels."""
    flat = output.flatten()
    return flat[torch.linspace(0, len(flat) - 1, 40).long()].tolist()


def golden_of(package, flags: str, size: int) -> dict:
    """What the original network computes."""
    is_classifier = "classifier" in flags
    defaults = package.classifier_and_diffusion_defaults if is_classifier else package.model_and_diffusion_defaults
    create = package.create_classifier_and_diffusion if is_classifier else package.create_model_and_diffusion
    settings, words = defaults(), shlex.split(flags)
    for name, value in zip(words[::2], words[1::2]):
        default = settings[name[2:]]
        settings[name[2:]] = value == "True" if isinstance(default, bool) else type(default)(value)
    if settings["diffusion_steps"] == 4000:
        settings["timestep_respacing"] = "ddim1000"
    network, diffusion = create(**settings)
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    network.load_state_dict(seeded_weights(shapes))
    images, timesteps, classes = seeded_input(size)
    with torch.no_grad():
        output = network.eval()(images, timesteps, *([classes] if settings.get("class_cond") else []))
    betas = [float(diffusion.betas[i]) for i in (0, 1, 500, 998, 999)]
    return {"shapes": shapes, "output": some(output), "betas": betas}


if __name__ == "__main__":
    sys.path += sys.argv[1:]
    golden = {}
    for name, (program, flags, size) in CASES.items():
        package = importlib.import_module(program.replace("-", "_") + ".script_util")
        golden[name] = golden_of(package, flags, size)
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
