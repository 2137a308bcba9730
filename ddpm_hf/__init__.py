"""Train, sample, score, restore and share DDPMs that stock HuggingFace diffusers loads.

    import ddpm_hf

    run = ddpm_hf.train(ddpm_hf.TrainingConfig.from_preset("digits"))
    images = ddpm_hf.sample(run.folder, 16, "ddim", num_inference_steps=50)
    print(ddpm_hf.evaluate(run.folder, suite="smoke"))

A name of this package is imported when it is first used (PEP 562). Therefore `import ddpm_hf` and `--help` do not
load torch. docs/python_api.md describes all public names.
"""

from importlib import import_module

from .errors import UserError as UserError
from .errors import suggestion


__version__ = "0.1.0"
# Each public name, with the module that defines it and its name in that module.
_PUBLIC = {
    "TrainingConfig": ("config.training_config", "TrainingConfig"),
    "PRESETS": ("config.presets", "PRESETS"),
    "Preset": ("config.presets", "Preset"),
    "train": ("training.loop", "train"),
    "FinishedRun": ("training.loop", "FinishedRun"),
    "load": ("models.pretrained", "load_pretrained"),
    "load_classifier": ("models.pretrained", "load_classifier"),
    "sample": ("sampling.generate", "sample"),
    "evaluate": ("evaluation.evaluate", "evaluate"),
    "Evaluated": ("evaluation.evaluate", "Evaluated"),
    "compare": ("evaluation.compare", "compare"),
    "restore": ("sampling.restoration", "restore"),
    "Restored": ("sampling.restoration", "Restored"),
    "export": ("sharing.export", "export"),
    "push": ("sharing.push", "push"),
    "PaperDDPMScheduler": ("diffusion.scheduler", "PaperDDPMScheduler"),
    "Sampler": ("sampling.settings", "Sampler"),
    "Classes": ("models.classes", "Classes"),
    "guide": ("sampling.guidance", "guide"),
    "BETA_SCHEDULES": ("diffusion.scheduler", "BETA_SCHEDULES"),
    "OBJECTIVES": ("diffusion.losses", "OBJECTIVES"),
    "SAMPLERS": ("sampling.samplers", "SAMPLERS"),
    "Step": ("sampling.samplers", "Step"),
    "METRICS": ("evaluation.metrics", "METRICS"),
    "Metric": ("evaluation.metrics", "Metric"),
    "Look": ("evaluation.metric_input", "Look"),
}
__all__ = ["UserError", "__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        advice = suggestion(name, _PUBLIC, "see dir(ddpm_hf).")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: {advice}")
    module, name_there = _PUBLIC[name]
    return getattr(import_module(f".{module}", __name__), name_there)


def __dir__():
    return sorted({*globals(), *_PUBLIC})
