"""Print records side by side, if they were measured in the same way.

Records whose protocols differ are refused with the names of the fields; `--vary` allows a field to differ.

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
        help="what may differ: sampler, or fields such as "
        "sampler.num_inference_steps,model.weights; all the rest must be equal",
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
