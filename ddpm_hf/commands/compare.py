"""`ddpm_hf compare`."""

from pathlib import Path

from ..evaluation.compare import comparison
from ..evaluation.records import read_record


def compare_command(arguments):
    """Run `python -m ddpm_hf compare` with its parsed flags."""
    records = {
        Path(path).stem if len(arguments.records) > 1 else path: read_record(path) for path in arguments.records
    }
    if len(records) < len(arguments.records):
        records = {path: read_record(path) for path in arguments.records}
    print(comparison(records, arguments.vary, arguments.markdown))
