"""The one exception that users see as a sentence, and the suggestion for a mistyped word."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something only the user can mend, said in one sentence: what was given, what was wanted, what to do.

    The command lines print the sentence and leave with exit code 2; in Python it is a `ValueError`.
    """

    on_one_process = False  # whether the others may not have met it, so that this one has to say it


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `did you mean X? ` for the known word closest to a mistyped one, or "" where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""
