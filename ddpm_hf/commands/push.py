"""Publish a run or an export on the Hub.

The command uploads the model, a new model card, samples, figures and records. Unchanged files are not sent again.

ddpm_hf push runs/mnist --hub_model_id me/ddpm-mnist
ddpm_hf push my-export --hub_private_repo
"""

from .flags import add_repository_flags


def add_flags(parser):
    parser.add_argument("run", help="folder of a run or of an export")
    add_repository_flags(parser, "the name of the folder")


def run(arguments):
    from ..sharing.push import push

    url = push(arguments.run, arguments.hub_model_id, private=arguments.hub_private_repo, token=arguments.hub_token)
    print(f"The model is at {url}.")
