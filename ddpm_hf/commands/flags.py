"""What several commands share: their parser and groups of flags."""

import argparse

from ..errors import no_such, no_such_flag, one_sentence


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence: no page of usage, and a suggestion for a mistyped word."""

    def __init__(self, prog: str, description: str, **options):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, words: list[str], namespace=None) -> argparse.Namespace:
        """Return the parsed flags; an unknown flag is reported before anything that is missing."""
        known = self._option_string_actions
        for word in words[: words.index("--") if "--" in words else None]:
            if word.startswith("--") and word.partition("=")[0] not in known:
                self.error(no_such_flag(word, known))
        arguments, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(no_such_flag(unknown[0], known))
        return arguments

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            self.error(no_such(action.option_strings[0], value, action.choices))

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_sentence(message)}\n")


def names(text: str) -> list[str]:
    """Return the parts of a list such as `cat,dog`."""
    return [part for part in text.split(",") if part]


def add_sampler_flags(parser, name="ddpm, ancestral sampling", steps="all T for ddpm, else 50"):
    """Add the flags that decide how an image looks; `name` and `steps` say which sampler and how many by default."""
    group = parser.add_argument_group("sampler")
    add = group.add_argument
    add("--sampler", metavar="NAME", help=f"ddpm, ddim or dpmsolver++; default: {name}")
    add("--num_inference_steps", type=int, help=f"default: {steps}")
    add(
        "--timesteps",
        default="trailing",
        metavar="SPACING",
        help="trailing (default, begins in pure noise), leading (diffusers' default), linspace, uniform or quad (the "
        "DDIM paper's), or timesteps such as 999,500,0",
    )
    add("--eta", type=float, default=0.0, help="ddim's share of fresh noise, 0 to 1; default: 0")
    add(
        "--variance_type",
        choices=["fixed_small", "fixed_large", "learned_range"],
        help="ddpm's; default: the model's own on all T steps, fixed_small on fewer",
    )
    add("--dtype", default="float32", help="precision inside the UNet: float32 (default), bfloat16 or float16")
    add("--seed", type=int, default=0, help="image k is drawn from the generator seeded with seed + k; default: 0")
    add(
        "--class_labels",
        type=names,
        help="of a conditional or guided model, by name or number: cat or 0,1,2 in turn; default: all in turn",
    )
    add(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="how strongly the class is asked for; default: 1, the conditional model itself",
    )
    add("--classifier", help="guide an unconditional model by this classifier: run of --objective classify, or Hub id")
    add("--weights", default="published", choices=["published", "raw"], help="raw: before averaging, of a checkpoint")
    add("--batch_size", type=int, default=64, help="images per process at a time; changes rounding only; default: 64")


def add_repository_flags(parser, name: str):
    """Add what names a repository on the Hub; `name` says what it is called by default."""
    add = parser.add_argument
    add("--hub_model_id", metavar="[USER/]NAME", help=f"repository, created if need be; default: {name}")
    add("--hub_private_repo", action="store_true", help="create it private; one that exists must be private")
    add("--hub_token", help="token to push with; default: that of `hf auth login`")


def sampler_settings(arguments) -> dict:
    """Return the flags of the sampler's group as fields of `Sampler`, the classifier loaded."""
    from ..models.pretrained import load_classifier

    names = ["num_inference_steps", "timesteps", "eta", "variance_type", "dtype", "seed", "class_labels"]
    settings = {name: getattr(arguments, name) for name in [*names, "guidance_scale"]}
    classifier = None if arguments.classifier is None else load_classifier(arguments.classifier)
    return settings | {"classifier": classifier}


def requested_sampler(arguments, default: str):
    """Return the Sampler that the flags ask for."""
    from ..sampling.settings import sampler_named

    return sampler_named(arguments.sampler or default, sampler_settings(arguments))
