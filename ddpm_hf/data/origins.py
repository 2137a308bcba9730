"""Say in an error about data where a flag came from that the user did not type."""

import contextlib
import re

from ..errors import UserError
from .folders import printable


@contextlib.contextmanager
def naming_origin(flags: dict, origin: str, advice: str = "and the flag replaces it"):
    """Add to a UserError that names some of `flags` that they come from `origin`, inside a `with` block.

    Args:
        flags: the flags that the user did not type, with their values. Those that are None are left out.
        origin: where they come from, e.g. "--preset mnist".
        advice: what to do about it.

    Raises:
        UserError: the same error with the longer text.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        named = [
            f"--{name} {printable(','.join(map(str, value)) if isinstance(value, list) else str(value))}"
            for name, value in flags.items()
            if value is not None and re.search(rf"--{name}\b", text)
        ]
        if not named:
            raise
        come = "comes" if len(named) == 1 else "come"
        joint = "; " if text.endswith(".") else " "
        error.args = (f"{text.removesuffix('.')}{joint}{' and '.join(named)} {come} from {origin}, {advice}.",)
        raise
