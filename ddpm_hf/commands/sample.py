"""`ddpm_hf sample`."""

import dataclasses
from pathlib import Path

from accelerate import PartialState

from ..models.pretrained import Pretrained, load_classifier, load_pretrained, names_of, weights_hash
from ..pictures import image_sheet
from ..processes import start_processes
from ..sampling.guidance import guide
from ..sampling.sample_set import draw_samples, read_samples
from ..sampling.settings import resolve_sampler, sampler_flags


ON_SHEET = 64  # images that are shown of a set


def sample_command(arguments):
    """Run `python -m ddpm_hf sample` with its parsed flags."""
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


def guided(model: Pretrained, arguments) -> tuple[Pretrained, dict]:
    """Return the model under the guidance of --guidance_scale and --classifier, and what a record says of it."""
    scale, classifier, class_names = arguments.guidance_scale, None, model.class_names
    if arguments.classifier is not None:
        classifier = load_classifier(arguments.classifier)
        class_names = names_of(classifier.config.id2label)
    unet = guide(model.unet, model.scheduler, class_names, scale, classifier)
    facts = {"guidance_scale": scale, "classifier": None if classifier is None else weights_hash(classifier)}
    return dataclasses.replace(model, unet=unet, class_names=class_names), facts
