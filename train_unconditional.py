"""Train a DDPM and leave a pipeline that stock diffusers loads.

python train_unconditional.py --preset digits                                  # two minutes on a CPU, no network
accelerate launch train_unconditional.py --preset cifar10 --push_to_hub        # Ho et al., on any number of GPUs
accelerate launch train_unconditional.py --preset mnist --dataset_name FOLDER  # a local copy of the dataset
accelerate launch train_unconditional.py --train_data_dir IMAGES --resolution 64 --use_ema --output_dir out
accelerate launch train_unconditional.py ... --resume_from_checkpoint latest   # go on, exactly
"""

import os
import sys

from ddpm_hf import UserError
from ddpm_hf.config.command_line import parse_config


def main(argv=None):
    config = parse_config(argv)
    # Only now, so that --help and mistyped flags are answered at once: this imports torch and diffusers.
    from ddpm_hf.training.loop import train

    try:
        finished = train(config)
    except UserError as error:
        if error.on_one_process or int(os.environ.get("LOCAL_RANK", 0)) <= 0:  # else one speaks for all
            print(f"train_unconditional.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    if finished is not None and not finished.finished:
        sys.exit(128 + finished.signal)


if __name__ == "__main__":
    main()
