"""Train, sample, score and share DDPMs that stock HuggingFace diffusers loads.

Nothing is imported here, so that `--help` answers at once: take what you need from the module that has it,
e.g. `from ddpm_hf.scheduler import PaperDDPMScheduler`.
"""

__version__ = "0.1.0"


class UserError(ValueError):
    """Something only the user can mend, said in one sentence: what was given, what was wanted, what to do.

    The command lines print the sentence and leave with exit code 2; in Python it is a `ValueError`.
    """

    on_one_process = False  # whether the others may not have met it, so that this one has to say it
