"""Print the scores of several records side by side.

If the records were measured differently, the command refuses them and names the settings that differ. Settings given
with `--vary` may differ.

ddpm_hf compare a.json b.json
ddpm_hf compare ddim10.json ddim50.json --vary sampler
"""

from pathlib import Path

from .flags import names


def add_flags(parser):
    parser.add_argument("records", nargs="+", help="JSON files written by evaluate")
    parser.add_argument(
        "--vary",
        type=names,
        default=[],
        help="settings that may differ, e.g. sampler, or sampler.num_inference_steps,model.weights; default: none",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(arguments):
    from ..evaluation.compare import comparison
    from ..evaluation.records import read_record

    records = {
        Path(path).stem if len(arguments.records) > 1 else path: read_record(path) for path in arguments.records
    }
    if len(records) < len(arguments.records):
        records = {path: read_record(path) for path in arguments.records}
    print(comparison(records, arguments.vary, arguments.markdown))
