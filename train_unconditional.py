"""Train a DDPM and save a pipeline that stock diffusers loads. This is the same as `ddpm_hf train`.

python train_unconditional.py --preset digits                                  # three minutes on a CPU, no network
accelerate launch train_unconditional.py --preset cifar10 --push_to_hub        # Ho et al., on any number of GPUs
accelerate launch train_unconditional.py --preset mnist --dataset_name FOLDER  # a local copy of the dataset
accelerate launch train_unconditional.py --train_data_dir IMAGES --resolution 64 --use_ema --output_dir out
accelerate launch train_unconditional.py ... --resume_from_checkpoint latest   # continue exactly
"""

import sys

from ddpm_hf.__main__ import main as run_command


def main(argv=None):
    run_command(["train", *(sys.argv[1:] if argv is None else argv)], prog="train_unconditional.py")


if __name__ == "__main__":
    main()
