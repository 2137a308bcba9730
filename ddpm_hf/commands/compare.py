"""Print the scores of several records side by side.

If the records were measured differently, the command refuses them and names the settings that differ. Settings given
with `--vary` may differ.

ddpm_hf compare a.json b.json
ddpm_hf compare ddim10.json ddim50.json --vary sampler
"""

from .flags import names


def add_flags(parser):
    parser.add_argument("records", nargs="+", help="JSON files written by evaluate")
    parser.add_argument(
        "--vary",
        type=names,
        default=[],
        help="settings that may differ, e.g. sampler; separate several settings by commas, e.g. "
        "n_gen,sampler.num_inference_steps; default: none",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(arguments):
    from ..evaluation.compare import compare

    print(compare(*arguments.records, vary=arguments.vary, markdown=arguments.markdown))
