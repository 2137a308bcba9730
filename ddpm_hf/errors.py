"""The one exception that users see as a sentence, and the words of refusals that several parsers share."""

import re


class UserError(ValueError):
    """Something only the user can mend, said in one sentence: what was given, what was wanted, what to do.

    The command lines print the sentence and leave with exit code 2; in Python it is a `ValueError`.

    Example:
        >>> ddpm_hf.TrainingConfig(dataset_name="digits", train_batch_size=0)
        Traceback (most recent call last):
        ddpm_hf.errors.UserError: --train_batch_size is 0, but must be at least 1: give a larger number.
    """

    on_one_process = False  # whether the others may not have met it, so that this one has to say it


def suggestion(word: str, known) -> str:
    """Return what to type instead of `word`: the name in `known` that is close to it, a short list, or the help."""
    import difflib  # only here: `import ddpm_hf` is to be quick

    if close := difflib.get_close_matches(word, known, n=1):
        return f"did you mean {close[0]}?"
    return f"choose from {', '.join(known)}." if len(known) <= 12 else "see --help."


def no_such(kind: str, word: str, known) -> str:
    """Return the sentence for a `word` that is not in `known`, e.g. no_such("preset", "mnst", ["mnist"])."""
    return f"there is no {kind} {word!r}: {suggestion(word, known)}"


def no_such_flag(word: str, known) -> str:
    """Return the sentence for a flag that is not in `known`, without its value, which may be a token."""
    return no_such("flag", re.split(r"[=\s]", word)[0], known)


def one_sentence(message: str) -> str:
    """Return a message of argparse as one line that says what to do, with access tokens of the Hub masked."""
    message = re.sub(r"\bhf_\w+", "hf_***", " ".join(message.split()))
    return message if message.endswith((".", "?")) else f"{message}; see --help."
