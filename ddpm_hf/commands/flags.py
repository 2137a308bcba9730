"""The parser, and the groups of flags that several commands share."""

import argparse
import json

from ..config.parser_errors import OneSentenceErrors


class Parser(OneSentenceErrors, argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, and whose help keeps the line breaks of the description."""

    def __init__(self, prog: str, description: str, **options):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )


def names(text: str) -> list[str]:
    """Return the parts of a list such as `cat,dog`."""
    return [part for part in text.split(",") if part]


def number_or_auto(text: str) -> int | str:
    """Return a whole number, or the text auto."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def setting(text: str) -> tuple[str, object]:
    """Return the name and the value of a setting such as `order=3`.

    The value is read as JSON, e.g. as a number, true or null. If it is not JSON, it stays a text.
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_sampler_flags(parser, name="ddpm, ancestral sampling", steps="all T for ddpm, 50 for the others"):
    """Add the flags of the sampler. `name` and `steps` are shown in --help as the defaults."""
    group = parser.add_argument_group("sampler")
    add = group.add_argument
    add("--sampler", metavar="NAME", help=f"ddpm, ddim or dpmsolver++; default: {name}")
    add("--num_inference_steps", type=int, help=f"number of steps; default: {steps}")
    add(
        "--timesteps",
        default="trailing",
        metavar="SPACING",
        help="which timesteps the steps visit: trailing (starts at pure noise), leading (diffusers' default), "
        "linspace, uniform or quad (both from the DDIM paper), or a list such as 999,500,0; default: trailing",
    )
    add("--eta", type=float, default=0.0, help="for ddim: share of fresh noise, 0 to 1; default: 0")
    add(
        "--variance_type",
        choices=["fixed_small", "fixed_large", "learned_range"],
        help="variance of ddpm's noise; default: the variance type of the model, but fixed_small instead of "
        "fixed_large if fewer than T steps are taken",
    )
    add(
        "--dtype",
        default="float32",
        help="precision inside the UNet: float32, bfloat16, float16 or auto (bfloat16 if the hardware computes in "
        "it, else float32); default: float32",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="image k uses the generator seeded with seed + k, so image 1 of seed 0 is image 0 of seed 1. To draw N "
        "other images, give a seed that is at least N higher. Default: 0",
    )
    add("--class_labels", type=names, help="classes to draw in turn, e.g. cat,dog or 0,1,2; default: all")
    add(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="strength of guidance towards the class. Without a --classifier, 1 means no guidance. With a "
        "--classifier, 0 means no guidance, and 1 is Bayes' rule. Default: 1",
    )
    add("--classifier", help="classifier to guide a model without classes: run of --objective classify, or Hub id")
    add(
        "--own_settings",
        type=setting,
        action="append",
        metavar="NAME=VALUE",
        help="setting of a sampler that you added, e.g. order=3; can be repeated; default: the sampler's own",
    )
    add_weights_flag(group)
    add(
        "--batch_size",
        type=number_or_auto,
        default=64,
        help="images that each process draws together, or auto: up to 512 on a GPU, 64 elsewhere. It is halved if "
        "memory runs out. Default: 64",
    )


def add_weights_flag(parser):
    parser.add_argument(
        "--weights",
        default="published",
        choices=["published", "raw"],
        help="published: the moving average, if there is one; raw: the weights of a checkpoint without averaging",
    )


def add_repository_flags(parser, name: str):
    """Add the flags of a repository on the Hub. `name` is shown in --help as the default."""
    add = parser.add_argument
    add("--hub_model_id", metavar="[USER/]NAME", help=f"repository, created if it does not exist; default: {name}")
    add(
        "--hub_private_repo",
        action="store_true",
        help="create the repository as private; if it exists, it must be private",
    )
    add("--hub_token", help="Hub token; default: the token of `hf auth login`")


def sampler_settings(arguments) -> dict:
    """Return the flags of the sampler as fields of `Sampler`."""
    names = ["num_inference_steps", "timesteps", "eta", "variance_type", "dtype", "seed", "class_labels"]
    settings = {name: getattr(arguments, name) for name in [*names, "guidance_scale", "classifier"]}
    return settings | ({"own_settings": dict(arguments.own_settings)} if arguments.own_settings else {})
