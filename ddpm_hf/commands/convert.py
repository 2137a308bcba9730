"""Convert pickled weights, a bare UNet, or a checkpoint of diffusers' script to a pipeline with safetensors.

The checkpoint-<step> folders of diffusers' train_unconditional.py contain UNets, but no noise schedule. The defaults
of that script are used, unless flags give another schedule.

ddpm_hf convert old-model new-model                        # a pipeline whose weights are pickled (.bin)
ddpm_hf convert ddpm-model-64/checkpoint-500 new-model --ddpm_beta_schedule squaredcos_cap_v2
"""

from .flags import add_weights_flag


def add_flags(parser):
    parser.add_argument(
        "model", help="folder or Hub id of a pipeline or a UNet, or a checkpoint folder of diffusers' script"
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
    add_weights_flag(parser)


def run(arguments):
    from ..models.convert import convert

    names = ["ddpm_num_steps", "ddpm_beta_schedule", "prediction_type"]
    schedule = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    convert(arguments.model, arguments.output, weights=arguments.weights, **schedule)
    print(f"{arguments.output} is a pipeline: try `ddpm_hf sample {arguments.output}`.")
