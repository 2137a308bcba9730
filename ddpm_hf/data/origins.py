"""Say in an error message where a flag comes from, if the user did not type it."""

import contextlib
import re

from ..errors import UserError
from .folders import printable


@contextlib.contextmanager
def naming_origin(flags: dict, origin: str, advice: str = "and flags that you give override it"):
    """In a `with` block: if a UserError names any of `flags`, add to its message that these flags come from `origin`.

    Args:
        flags: the flags that the user did not type, with their values. Flags whose value is None are left out.
        origin: where the flags come from, e.g. "--preset mnist".
        advice: how to change these flags.

    Raises:
        UserError: the same error with the longer message.
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
