"""Compare the settings of a checkpoint with those of the run that resumes it."""

import hashlib
import json
import math
from dataclasses import fields

from ..config.training_config import EvaluationOptions, HubOptions, ModelOptions, OutputOptions, TrainingConfig
from ..errors import UserError


# A run can only be resumed with the same values of these flags, because they decide what the weights mean.
FIXED = ["init_from", "prediction_type", "variance_type", "ddpm_num_steps", "ddpm_beta_schedule"]
FIXED += ["rescale_betas_zero_snr"]
# Changes of these flags are not printed, because they affect only output, scores and speed.
FREE = {field.name for group in (OutputOptions, EvaluationOptions, HubOptions) for field in fields(group)}
FREE |= {
    "preset",
    "dry_run",
    "verbose",
    "cache_dir",
    "dataloader_num_workers",
    "local_rank",
    "ddpm_num_inference_steps",
}
# The flags of the network are free too, because the config of the network is compared instead. The flags below are
# not in that config, so they are not free.
FREE |= {field.name for field in fields(ModelOptions)} - {
    "init_from",
    "label_dropout",
    "torch_compile",
    "enable_xformers_memory_efficient_attention",
}
# Facts, and the flags that determine them. The fact is compared, so a change of these flags alone is not printed.
DECIDE = {
    "data_fingerprint": {"dataset_name", "dataset_config_name", "train_data_dir", "image_column"},
    "total_steps": {"num_epochs", "max_train_steps"},
}


def facts_to_compare(run, step: int) -> dict:
    """Return facts about the data, steps and learning rate of a run, which its flags alone do not determine.

    The checkpoint of the optimizer step `step` saves these facts.
    """
    names = ("data_fingerprint", "num_images", "global_batch_size", "total_steps")
    facts = {name: run.facts[name] for name in names}
    facts["labels_fingerprint"] = labels_fingerprint(run)
    return facts | {"classes": run.facts["class_names"], "learning_rate": run.learning_rate(step - 1)}


def labels_fingerprint(run) -> str | None:
    """Return a hash of the classes of the training images; None for a stream, or if the run does not use classes.

    The data fingerprint covers only the images.
    """
    config, labels = run.config, run.train_set.labels
    if labels is None or not (config.class_conditional or config.balance_classes or config.objective == "classify"):
        return None
    return hashlib.sha256(labels.numpy()).hexdigest()[:16]


def check_fixed_flags(name: str, flags: dict, run):
    """Raise a UserError if a flag of FIXED differs between a checkpoint and a run.

    Args:
        name: the name of the checkpoint in the message.
        flags: the flags in the checkpoint.
    """
    for flag, was, now in changed_flags(flags, run):
        if flag in FIXED and was is None:
            raise UserError(f"{name} was trained without --{flag}: leave it out.")
        if flag in FIXED:
            raise UserError(f"{name} was trained with --{flag} {was}, not {now}: give --{flag} {was}.")


def changed_flags(flags: dict, run) -> list[tuple]:
    """Return (name, value in the checkpoint, value in the run) of each flag that has changed.

    The checkpoint of an earlier version may lack a flag. The flag then has its default, which keeps the earlier
    behaviour.
    """
    before = {field.name: field.default for field in fields(TrainingConfig)} | flags
    now = json.loads(json.dumps(run.config.to_dict()))
    return [(name, before[name], now[name]) for name in now if before[name] != now[name]]


def warnings_about(name: str, flags: dict, facts: dict, step: int, run) -> list[str]:
    """Return warnings to print, about changed settings and about a jump of the learning rate.

    Args:
        name, flags: as in `check_fixed_flags`.
        facts: the result of `facts_to_compare` for the checkpoint; {} in checkpoints of earlier versions.
        step: the optimizer step of the checkpoint.
    """
    free = set(FREE)
    if facts.get("data_fingerprint") == run.facts["data_fingerprint"]:
        free |= DECIDE["data_fingerprint"]
    if "total_steps" in facts:
        free |= DECIDE["total_steps"]
    changed = [(flag, was, now) for flag, was, now in changed_flags(flags, run) if flag not in free]
    facts_now = facts_to_compare(run, step)
    rate, rate_now = facts.get("learning_rate"), facts_now.pop("learning_rate")
    if None in (facts.get("labels_fingerprint"), facts_now["labels_fingerprint"]):  # then the changed flag is printed
        del facts_now["labels_fingerprint"]
    changed += [(fact, facts[fact], now) for fact, now in facts_now.items() if facts.get(fact, now) != now]
    lines = []
    if changed:
        listed = ", ".join(f"{what} {was} -> {now}" for what, was, now in changed)
        lines.append(
            f"Warning: these settings differ from those of {name}, so the result will not be that of one unbroken "
            f"run: {listed}."
        )
    if isinstance(rate, float) and not math.isclose(rate, rate_now, rel_tol=1e-6) and step < run.total_steps:
        lines.append(
            f"Warning: the learning rate was {rate:.3g} in step {step:,} and is {run.learning_rate(step):.3g} in the "
            "next one, because its schedule has changed."
        )
    return lines
