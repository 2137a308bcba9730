"""Publish a Gradio Space with a demo of a model on the Hub.

ddpm_hf push-space me/ddpm-mnist
"""

from .flags import add_repository_flags


def add_flags(parser):
    parser.add_argument("model", help="Hub id of the model, e.g. me/ddpm-mnist")
    add_repository_flags(parser, "the name of the model followed by -demo")


def run(arguments):
    from ..sharing.space import push_space

    model = arguments.model
    url = push_space(model, arguments.hub_model_id, private=arguments.hub_private_repo, token=arguments.hub_token)
    print(f"The Space is at {url}.")
    print(f"If {model} is private, add a secret HF_TOKEN in the Space's settings: a token that can read {model}.")
