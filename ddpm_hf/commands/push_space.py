"""Publish the demo of a model that is on the Hub as a Gradio Space.

ddpm_hf push-space me/ddpm-mnist
"""

from .flags import add_repository_flags


def add_flags(parser):
    parser.add_argument("model", help="that the Space shows: a Hub id, e.g. me/ddpm-mnist")
    add_repository_flags(parser, "the model's name and -demo")


def run(arguments):
    from ..sharing.space import push_space

    model, private = arguments.model, arguments.hub_private_repo
    url = push_space(model, arguments.hub_model_id, private=private, token=arguments.hub_token)
    print(f"The Space is on {url}.")
    print(f"If {model} is private, give the Space a secret HF_TOKEN that may read it, in its settings.")
