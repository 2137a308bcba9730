"""`ddpm_hf export`."""

from ..models.pretrained import load_classifier, load_pretrained
from ..sharing.export import export


def export_command(arguments):
    """Run `python -m ddpm_hf export` with its parsed flags."""
    model = load_pretrained(arguments.model, arguments.weights)
    classifier = None if arguments.classifier is None else load_classifier(arguments.classifier)
    names = export(model, arguments.output, classifier, arguments.pipeline)
    print(
        f"{arguments.output} has the model and its pipelines: {', '.join(names)}. Its README.md says how to load them."
    )
