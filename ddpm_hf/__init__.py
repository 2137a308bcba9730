"""Train, sample, score and share DDPMs that stock HuggingFace diffusers loads.

Nothing is imported here, so that `--help` answers at once: take what you need from the module that has it,
e.g. `from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler`.
"""

from .errors import UserError as UserError


__version__ = "0.1.0"
