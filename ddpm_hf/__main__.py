"""python -m ddpm_hf COMMAND: what one does with recipes and with finished runs. Training is train_unconditional.py."""

import argparse
import json
import os
import sys
from pathlib import Path

from . import __version__
from .commands import flags as options
from .config.presets import PRESETS, find_preset
from .errors import UserError


def presets(arguments):
    """Print the presets, one line each, or the description and flags of one preset as JSON."""
    if arguments.name is None:
        for name, preset in PRESETS.items():
            print(f"{name:15} {preset.about}")
    else:
        print(json.dumps(find_preset(arguments.name)._asdict(), indent=2))


def figures(arguments):
    """Draw the figures of a finished run anew, from its pipeline, its metrics and its data."""
    run = Path(arguments.run)
    if (run / "classifier").is_dir() and not (run / "model_index.json").is_file():  # an export has both
        raise UserError(f"{run} is the run of a classifier, whose only figure is {run / 'figures' / 'loss.png'}.")
    if not (run / "train_config.json").is_file() or not (run / "model_index.json").is_file():
        raise UserError(f"{run} is not a finished run: give the --output_dir of train_unconditional.py.")
    from .config.training_config import TrainingConfig
    from .data.dataset import load_images
    from .models.pretrained import load_pretrained
    from .training.figures import run_figures

    model = load_pretrained(str(run))
    try:
        config = TrainingConfig(**model.run["flags"])
    except (TypeError, KeyError) as error:
        raise UserError(f"{run}/train_config.json is not of this version ({error}): train the run anew.") from error
    train_set, _ = load_images(config, model.unet.config.in_channels)
    images = train_set.get(list(range(min(8, train_set.num_images or 8))))
    count, steps = min(16, config.eval_batch_size), config.ddpm_num_inference_steps
    labels = [k % model.num_classes for k in range(count)] if model.num_classes else None
    options = dict(num_images=count, num_inference_steps=steps, class_labels=labels)
    run_figures(run, model.unet, model.scheduler, images, config.seed, **options)
    print(f"The figures are in {run / 'figures'}.")


def sample(arguments):
    """Draw images with any DDPM, into a folder of PNG files or one .npz; killed, it goes on where it was."""
    from .commands.sample import sample_command

    sample_command(arguments)


def evaluate(arguments):
    """Score a model, or samples, against real images; leave a record that says what each number is."""
    from .commands.evaluate import evaluate_command

    evaluate_command(arguments)


def export(arguments):
    """Write a model and the pipeline files it can use into one folder that needs diffusers alone."""
    from .commands.export import export_command

    export_command(arguments)


def card(arguments):
    """Write the model card of a run or an export anew, from its records."""
    from .commands.card import card_command

    card_command(arguments)


def push(arguments):
    """Publish a run or an export on the Hub: card, model, samples, figures and records; only what changed is sent."""
    from .commands.push import push_command

    push_command(arguments)


def push_space(arguments):
    """Publish the demo of a model that is on the Hub as a Gradio Space."""
    from .commands.push_space import push_space_command

    push_space_command(arguments)


def restore(arguments):
    """Denoise, inpaint, enlarge, colour or deblur images with a model that was trained on clean ones."""
    from .commands.restore import restore_command

    restore_command(arguments)


def compare(arguments):
    """Print records side by side; refuse those whose protocols differ, naming the field."""
    from .commands.compare import compare_command

    compare_command(arguments)


COMMANDS = {presets: options.presets, figures: options.figures, sample: options.sample}
COMMANDS |= {evaluate: options.evaluate, compare: options.compare, restore: options.restore, export: options.export}
COMMANDS |= {card: options.card, push: options.push, push_space: options.push_space}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the page of usage before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help.\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags of a command line, with the function that runs it as `run_command`."""
    parser = Parser(prog="python -m ddpm_hf", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run_command, add_flags in COMMANDS.items():
        about = run_command.__doc__
        command = commands.add_parser(
            run_command.__name__.replace("_", "-"), help=about, description=about, allow_abbrev=False
        )
        add_flags(command)
        command.set_defaults(run_command=run_command)
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    try:
        arguments.run_command(arguments)
    except UserError as error:
        if error.on_one_process or int(os.environ.get("LOCAL_RANK", 0)) <= 0:  # else one speaks for all
            print(f"python -m ddpm_hf: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped. What is drawn stays: the same command goes on with the missing images.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
