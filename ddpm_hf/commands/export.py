"""Copy a model and its pipelines into a folder that can be loaded with diffusers alone.

ddpm_hf export runs/mnist my-export
ddpm_hf export runs/mnist my-export --classifier runs/mnist-classifier    # draws images of a class
"""

from .flags import add_weights_flag


def add_flags(parser):
    parser.add_argument("model", help="folder of a pipeline, checkpoint-<step> of a run, or Hub id")
    parser.add_argument("output", help="new folder to write")
    parser.add_argument("--classifier", help="classifier to include: run of --objective classify, or Hub id")
    add_weights_flag(parser)
    parser.add_argument(
        "--pipeline",
        help="name of the pipeline that `DiffusionPipeline.from_pretrained(OUTPUT, trust_remote_code=True)` loads, "
        "e.g. restoration; default: class_guided if the model has classes or --classifier is given, else DDPMPipeline",
    )


def run(arguments):
    from ..sharing.export import export

    names = export(
        arguments.model,
        arguments.output,
        classifier=arguments.classifier,
        pipeline=arguments.pipeline,
        weights=arguments.weights,
    )
    print(
        f"{arguments.output} contains the model and its pipelines: {', '.join(names)}. See its README.md to load them."
    )
