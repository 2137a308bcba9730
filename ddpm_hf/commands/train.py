"""Train a DDPM and save a pipeline that stock diffusers loads.

ddpm_hf train --preset digits                                   # three minutes on a CPU, no network
accelerate launch -m ddpm_hf train --preset cifar10 --push_to_hub         # on any number of GPUs
accelerate launch -m ddpm_hf train --preset mnist --dataset_name FOLDER   # a local copy of the dataset
ddpm_hf train --train_data_dir IMAGES --resolution 64 --use_ema --output_dir out
ddpm_hf train --preset mnist --resume_from_checkpoint latest    # continue exactly where it stopped
"""

import argparse


def parse(words: list[str], prog: str) -> argparse.Namespace:
    """Return a namespace whose `config` is the TrainingConfig of the flags. Other commands have `add_flags` instead.

    The flags of this command are the fields of TrainingConfig, which has its own parser. The parser is imported here,
    because the import takes a third of a second, too long for `ddpm_hf --help`.
    """
    from ..config.command_line import parse_config

    return argparse.Namespace(config=parse_config(words, prog, __doc__))


def run(arguments):
    """Train. If a signal stopped the run, exit with code 128 + the number of the signal."""
    from ..training.loop import train

    finished = train(arguments.config)
    if finished is not None and not finished.finished:
        raise SystemExit(128 + finished.signal)
