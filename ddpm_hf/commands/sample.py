"""`ddpm_hf sample`."""

from pathlib import Path


ON_SHEET = 64  # images that are shown of a set


def run(arguments):
    """Draw the images, and a sheet of the first ones beside them."""
    from accelerate import PartialState

    from ..models.pretrained import load_pretrained
    from ..pictures import image_sheet
    from ..processes import start_processes
    from ..sampling.sample_set import draw_samples, read_samples
    from .flags import requested_sampler

    start_processes()
    model = load_pretrained(arguments.model, arguments.weights)
    sampler = requested_sampler(arguments, "ddpm").resolve(model)
    name = f"{model.facts['name'].replace('/', '--')}-{sampler.name}{sampler.num_inference_steps}"
    if sampler.classifier is not None or sampler.guidance_scale != 1:
        name += f"-guided{sampler.guidance_scale:g}"
    output = arguments.output or Path("samples", f"{name}-seed{sampler.seed}")
    for warning in sampler.warnings(model):
        PartialState().print(warning, flush=True)
    draw_samples(model, sampler, arguments.num_images, output, batch_size=arguments.batch_size)
    if PartialState().is_main_process:
        sheet = Path(f"{output}.sheet.png")
        image_sheet(read_samples(output).images[:ON_SHEET], sheet)
        print(f"{arguments.num_images:,} images are in {output}; {sheet} shows the first.")
