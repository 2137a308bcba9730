"""Draw images with any DDPM, into a folder of PNG files or one .npz file.

If it is killed, the same command goes on with the missing images.

ddpm_hf sample runs/mnist --num_images 10000 --sampler ddim --num_inference_steps 50 --output samples/mnist
ddpm_hf sample google/ddpm-cifar10-32 --output cifar10.npz
ddpm_hf sample runs/mnist-conditional --class_labels 3 --guidance_scale 2 --sampler ddim
accelerate launch --multi_gpu -m ddpm_hf sample runs/cifar10 --num_images 50000
"""

import dataclasses
from pathlib import Path

from .flags import add_sampler_flags


ON_SHEET = 64  # images that are shown of a set


def add_flags(parser):
    parser.add_argument("model", help="folder of a pipeline, checkpoint-<step> of a run, or Hub id")
    parser.add_argument("--output", help="folder, or file ending in .npz; default: samples/MODEL-SAMPLER")
    parser.add_argument("--num_images", type=int, default=64, help="default: 64")
    add_sampler_flags(parser)


def run(arguments):
    from accelerate import PartialState

    from ..models.pretrained import load_pretrained
    from ..pictures import image_sheet
    from ..processes import start_processes
    from ..sampling.sample_set import draw_samples, read_samples
    from ..sampling.settings import resolve_sampler, sampler_flags

    start_processes()
    model, guidance = guided(load_pretrained(arguments.model, arguments.weights), arguments)
    sampler, warnings = resolve_sampler(model, **sampler_flags(arguments), **guidance)
    label = f"{model.facts['name'].replace('/', '--')}-{sampler['method']}{sampler['num_inference_steps']}"
    label += f"-guided{sampler['guidance_scale']:g}" if "guidance_scale" in sampler else ""
    output = arguments.output or Path("samples", f"{label}-seed{sampler['seed']}")
    for warning in warnings:
        PartialState().print(warning, flush=True)
    draw_samples(model, sampler, arguments.num_images, output, arguments.batch_size)
    if PartialState().is_main_process:
        sheet = Path(f"{output}.sheet.png")
        image_sheet(read_samples(output).images[:ON_SHEET], sheet)
        print(f"{arguments.num_images:,} images are in {output}; {sheet} shows the first.")


def guided(model, arguments):
    """Return the model under the guidance of --guidance_scale and --classifier, and what a record says of it."""
    from ..models.pretrained import load_classifier, names_of, weights_hash
    from ..sampling.guidance import guide

    scale, classifier, class_names = arguments.guidance_scale, None, model.class_names
    if arguments.classifier is not None:
        classifier = load_classifier(arguments.classifier)
        class_names = names_of(classifier.config.id2label)
    unet = guide(model.unet, model.scheduler, class_names, scale, classifier)
    facts = {"guidance_scale": scale, "classifier": None if classifier is None else weights_hash(classifier)}
    return dataclasses.replace(model, unet=unet, class_names=class_names), facts
