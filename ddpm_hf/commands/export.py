"""Copy a model and the pipelines that suit it into a folder that needs only diffusers.

ddpm_hf export runs/mnist my-export
ddpm_hf export runs/mnist my-export --classifier runs/mnist-classifier    # can be asked for a class
"""


def add_flags(parser):
    parser.add_argument("model", help="folder of a pipeline, checkpoint-<step> of a run, or Hub id")
    parser.add_argument("output", help="folder to write; must not exist")
    parser.add_argument("--classifier", help="take this classifier along: run of --objective classify, or Hub id")
    parser.add_argument("--weights", default="published", choices=["published", "raw"], help="raw: before averaging")
    parser.add_argument(
        "--pipeline",
        help="that `DiffusionPipeline.from_pretrained(output, trust_remote_code=True)` gives, e.g. restoration; "
        "default: class_guided where there are classes, else stock DDPMPipeline",
    )


def run(arguments):
    from ..models.pretrained import load_classifier, load_pretrained
    from ..sharing.export import export

    model = load_pretrained(arguments.model, arguments.weights)
    classifier = None if arguments.classifier is None else load_classifier(arguments.classifier)
    names = export(model, arguments.output, classifier, arguments.pipeline)
    print(
        f"{arguments.output} has the model and its pipelines: {', '.join(names)}. Its README.md says how to load them."
    )
