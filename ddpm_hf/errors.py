"""The one exception that users see as a sentence."""


class UserError(ValueError):
    """Something only the user can mend, said in one sentence: what was given, what was wanted, what to do.

    The command lines print the sentence and leave with exit code 2; in Python it is a `ValueError`.
    """

    on_one_process = False  # whether the others may not have met it, so that this one has to say it
