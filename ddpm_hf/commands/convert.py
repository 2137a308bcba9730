"""Convert pickled weights, a bare UNet, or a checkpoint of another program to a pipeline with safetensors.

The checkpoint-<step> folders of diffusers' train_unconditional.py contain UNets, but no noise schedule. The
schedule is the default of that script, unless flags give another one.

A checkpoint (.pt) of OpenAI's improved-diffusion or guided-diffusion needs the flags that it was trained with, unless
its file has the name of a published checkpoint. docs/convert.md says which checkpoints can be converted.

ddpm_hf convert old-model new-model                        # a pipeline whose weights are pickled (.bin)
ddpm_hf convert ddpm-model-64/checkpoint-500 new-model --ddpm_beta_schedule squaredcos_cap_v2
ddpm_hf convert cifar10_uncond_50M_500K.pt ddpm-cifar10    # a published checkpoint of improved-diffusion
ddpm_hf convert ema_0.9999_200000.pt new-model --original improved-diffusion \\
    --original_flags "--image_size 32 --num_channels 128 --num_res_blocks 3 --diffusion_steps 4000"
"""

import os

from ..errors import UserError
from .flags import add_weights_flag


FOLDER_FLAGS = ["ddpm_num_steps", "ddpm_beta_schedule", "prediction_type"]
FILE_FLAGS = ["original", "original_flags"]


def add_flags(parser):
    parser.add_argument(
        "model",
        help="a pipeline or a UNet (folder or Hub id), a checkpoint folder of diffusers' script, or a checkpoint file "
        "of OpenAI's improved-diffusion or guided-diffusion",
    )
    parser.add_argument("output", help="new folder to write")
    add = parser.add_argument
    add("--ddpm_num_steps", type=int, help="number of timesteps, if the model's files do not give it; default: 1000")
    add(
        "--ddpm_beta_schedule",
        metavar="NAME",
        help="noise schedule, if the model's files do not give it; default: linear",
    )
    add(
        "--prediction_type",
        metavar="NAME",
        help="what the UNet predicts, if the model's files do not give it: epsilon, sample or v_prediction; default: "
        "epsilon",
    )
    add(
        "--original",
        metavar="PROGRAM",
        help="program that wrote a checkpoint file: improved-diffusion or guided-diffusion; default: "
        "found from the name of a published file",
    )
    add(
        "--original_flags",
        metavar='"FLAGS"',
        help="flags that the checkpoint was trained with, in quotes. Other flags have the program's defaults. "
        "Default: found from the name of a published file",
    )
    add_weights_flag(parser)


def run(arguments):
    from ..models.convert import convert, convert_checkpoint

    given = {name: getattr(arguments, name) for name in FOLDER_FLAGS + FILE_FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    is_file = os.path.isfile(arguments.model)
    for name in FOLDER_FLAGS if is_file else FILE_FLAGS:
        if name in given:
            what = "a checkpoint file, which takes --original_flags instead" if is_file else "not a checkpoint file"
            raise UserError(f"{arguments.model} is {what}: leave --{name} out.")
    if is_file and arguments.weights == "raw":
        raise UserError(f"{arguments.model} holds one set of weights: leave --weights out.")
    if is_file:
        convert_checkpoint(arguments.model, arguments.output, **given)
    else:
        convert(arguments.model, arguments.output, weights=arguments.weights, **given)
    if os.path.isdir(os.path.join(arguments.output, "classifier")):
        print(f"{arguments.output} is a classifier: try `ddpm_hf sample MODEL --classifier {arguments.output}`.")
    else:
        print(f"{arguments.output} is a pipeline: try `ddpm_hf sample {arguments.output}`.")
