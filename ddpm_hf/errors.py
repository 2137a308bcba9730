"""Define the exception that users see as one sentence, and the phrases that several parsers share."""

import pickle
import re
from numbers import Integral, Real


class UserError(ValueError):
    """An error that the user can correct, in one sentence: what was given, what is wanted, what to do.

    Commands print the sentence and exit with code 2. Python code can catch the error as a `ValueError`.

    Example:
        >>> ddpm_hf.TrainingConfig(dataset_name="digits", train_batch_size=0)
        Traceback (most recent call last):
        ddpm_hf.errors.UserError: --train_batch_size is 0, but must be at least 1: give a larger number.
    """

    on_one_process = False  # True if the other processes may not have hit the error, so that this one must print it


def whole_number(flag: str, value) -> int:
    """Return a whole number as an int, which JSON can hold. The integers of numpy are whole numbers too.

    Raises:
        UserError: for any other value. True and 2.0 are not whole numbers.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{flag} is {value!r}, but must be a whole number: give another one.")
    return int(value)


def real_number(flag: str, value) -> float:
    """Return a real number as a float, which JSON can hold. Raise a UserError for any other value."""
    if not isinstance(value, Real):
        raise UserError(f"{flag} is {value!r}, but must be a number: give another one.")
    return float(value)


def reason_of(error: Exception, lines: int = 1) -> str:
    """Return the first `lines` lines of an error's message as one line, or the error's type if there is no message.

    If torch refuses to unpickle a file, torch's message is replaced, because it advises reading the file unsafely.
    """
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it is damaged, or holds other things than tensors and numbers"
    return " ".join(" ".join(str(error).splitlines()[:lines]).split()) or type(error).__name__


def suggestion(word: str, known, otherwise: str = "see --help.") -> str:
    """Return advice for a mistyped `word`: the closest name in `known`.

    If no name is close, the advice lists all names. If there are more than 12 names, the advice is `otherwise`.
    """
    import difflib  # imported here to keep `import ddpm_hf` fast

    if close := difflib.get_close_matches(word, known, n=1):
        return f"did you mean {close[0]}?"
    return f"choose from {', '.join(known)}." if len(known) <= 12 else otherwise


def no_such(kind: str, word: str, known) -> str:
    """Return the sentence for a `word` that is not in `known`, e.g. no_such("preset", "mnst", ["mnist"])."""
    return f"there is no {kind} {word!r}: {suggestion(word, known)}"


def no_such_flag(word: str, known) -> str:
    """Return the error message for a `word` such as --flag=value whose flag is not in `known`.

    The message does not contain the value, which may be an access token.
    """
    return no_such("flag", re.split(r"[=\s]", word)[0], known)


def one_sentence(message: str) -> str:
    """Return an argparse message as one line that ends with what to do. Access tokens of the Hub are masked."""
    message = re.sub(r"\bhf_\w+", "hf_***", " ".join(message.split()))
    return message if message.endswith((".", "?")) else f"{message}; see --help."
