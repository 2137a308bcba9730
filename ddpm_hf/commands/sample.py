"""Draw images with any DDPM, into a folder of PNG files or one .npz file.

If the command is interrupted, run it again: it draws only the missing images.

ddpm_hf sample runs/mnist --num_images 10000 --sampler ddim --num_inference_steps 50 --output samples/mnist
ddpm_hf sample google/ddpm-cifar10-32 --output cifar10.npz
ddpm_hf sample runs/photos --size 48x96
ddpm_hf sample runs/mnist-conditional --class_labels 3 --guidance_scale 2 --sampler ddim
accelerate launch --multi_gpu -m ddpm_hf sample runs/cifar10 --num_images 50000
"""

from pathlib import Path

from .flags import add_sampler_flags, sampler_settings


ON_SHEET = 64  # images on the sheet


def add_flags(parser):
    parser.add_argument("model", help="folder of a pipeline, checkpoint-<step> of a run, or Hub id")
    parser.add_argument("--output", help="folder, or file ending in .npz; default: a folder samples/MODEL-SAMPLER...")
    parser.add_argument("--num_images", type=int, default=64, help="number of images; default: 64")
    parser.add_argument(
        "--size",
        metavar="HxW",
        help="draw at another size than the model was trained on, e.g. 48x64 (height x width); default: its own size",
    )
    parser.add_argument(
        "--pixel_type",
        choices=["uint8", "uint16", "float32"],
        help="type of the pixels. uint8 has values from 0 to 255. uint16 and float32 have values in the --pixel_range "
        "of the training. If the model was trained without --pixel_range, uint16 has values from 0 to 65535, and "
        "float32 from 0 to 1. Images that PNG cannot hold are written as .npy. Default: float32 for a model that was "
        "trained with --preserve_input_precision, else uint8",
    )
    add_sampler_flags(parser)


def run(arguments):
    """Draw the images, and a sheet of the first ones next to them."""
    from accelerate import PartialState

    from ..models.pretrained import load_pretrained
    from ..pictures import check_sheet, image_sheet
    from ..processes import start_processes
    from ..sampling.sample_set import draw_samples, read_samples
    from ..sampling.settings import sampler_named

    start_processes()
    sampler = sampler_named(arguments.sampler or "ddpm", sampler_settings(arguments) | {"size": arguments.size})
    model = load_pretrained(arguments.model, arguments.weights)
    sampler = sampler.resolve(model)
    name = f"{model.facts['name'].replace('/', '--')}-{sampler.name}{sampler.num_inference_steps}"
    if sampler.classifier is not None or sampler.guidance_scale != 1:
        name += f"-guided{sampler.guidance_scale:g}"
    if sampler.size is not None:
        name += f"-{sampler.size[0]}x{sampler.size[1]}"
    output = arguments.output
    if output is None:
        output = Path("samples", f"{name}-seed{sampler.seed}")
    sheet = Path(f"{Path(output)}.sheet.png")  # Path drops a slash at the end
    check_sheet(sheet, output)
    for warning in sampler.warnings(model):
        PartialState().print(warning, flush=True)
    draw_samples(
        model, sampler, arguments.num_images, output, batch_size=arguments.batch_size, pixel_type=arguments.pixel_type
    )
    if PartialState().is_main_process:
        image_sheet(read_samples(output).images[:ON_SHEET], sheet)
        print(f"{arguments.num_images:,} images are in {output}; {sheet} shows the first ones.")
