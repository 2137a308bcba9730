"""Start a run from the weights of another model (--init_from): read it, take over its settings, copy its weights.

A resumed run does not need the other model: its checkpoint has the settings that were taken over.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from diffusers import UNet2DModel

from ..config.training_config import TrainingConfig
from ..data.folders import printable
from ..diffusion.scheduler import BETA_SCHEDULES, PaperDDPMScheduler, make_scheduler
from ..errors import UserError
from ..files import read_json
from ..sizes import read_size, write_size
from . import judge
from .classes import Classes
from .pretrained import check_shards, find_folder, load_pretrained, opening, read_network, weights_hash


# The flags that take the values of the other model unless they are given.
FOLLOWING = ["resolution", "channels", "class_conditional", "ddpm_num_steps", "ddpm_beta_schedule", "prediction_type"]
FOLLOWING += ["variance_type", "rescale_betas_zero_snr"]
# Each of these flags sets the entry of UNet2DModel's config that has its name.
UNET_FLAGS = ["layers_per_block", "attention_head_dim", "norm_num_groups", "norm_eps", "resnet_time_scale_shift"]
UNET_FLAGS += ["flip_sin_to_cos", "freq_shift", "downsample_padding"]
LEVEL_FLAGS = ["base_channels", "channel_mults", "attention_resolutions"]
CLASS_TABLE, TIME_BIAS = "class_embedding.weight", "time_embedding.linear_2.bias"


@dataclass(frozen=True)
class BaseModel:
    """The model that a run starts from.

    Attributes:
        unet: the config of its UNet.
        scheduler: the arguments of its DDPMScheduler, or None for a UNet without one.
        weights: its weights by name; {} if a checkpoint is resumed, because the checkpoint has its own weights.
        classes: its classes.
        facts: "name", "revision" (the commit on the Hub) and "unet_sha256", for train_config.json.
    """

    unet: dict
    scheduler: dict | None
    weights: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    classes: Classes = Classes()
    facts: dict = field(default_factory=dict)


def open_base_model(config: TrainingConfig, saved: dict | None) -> BaseModel | None:
    """Return the model of --init_from, or None without that flag.

    Args:
        saved: the train_config.json of the checkpoint to resume, or None.

    Raises:
        UserError: if the flag does not name a DDPM, a checkpoint or a UNet2DModel.
    """
    if config.init_from is None:
        return None
    if saved is not None:
        return BaseModel(saved["unet"], saved.get("scheduler"), facts=saved.get("base_model") or {})
    name, folder, revision = find_folder(config.init_from)
    unet_folder = next((folder / part for part in ("unet_ema", "unet") if (folder / part).is_dir()), folder)
    is_bare = not any((folder / file).is_file() for file in ("model_index.json", "state.pt"))
    if not is_bare or not (unet_folder / "config.json").is_file():
        model = load_pretrained(config.init_from)
        facts = {key: model.facts[key] for key in ("name", "revision", "unet_sha256")}
        unet = model.unet
        return BaseModel(dict(unet.config), model.scheduler.arguments, unet.state_dict(), model.classes, facts)
    with opening(
        f"--init_from {name}", "give a pipeline, a checkpoint, or a UNet2DModel that is saved as safetensors"
    ):
        saved_config = read_json(unet_folder / "config.json")
        if saved_config.get("_class_name") != "UNet2DModel":
            raise ValueError(f"it is a {str(saved_config.get('_class_name'))[:60]}")
        judge.check_unet(saved_config)
        check_shards(unet_folder)
        unet = read_network(UNet2DModel, unet_folder)
    facts = {"name": name if revision else folder.resolve().name, "revision": revision}
    facts["unet_sha256"] = weights_hash(unet.state_dict())
    return BaseModel(
        dict(unet.config), None, unet.state_dict(), Classes(None, unet.config.num_class_embeds or 0), facts
    )


def follow(config: TrainingConfig, base: BaseModel | None, saved: dict | None) -> TrainingConfig:
    """Return the config of a run, in which the base model sets every flag of FOLLOWING that was not given.

    The base model overrides a preset.

    Args:
        saved: the train_config.json of the checkpoint to resume, or None. In a resumed run, these flags are set by the
            checkpoint instead of the base model.

    Raises:
        UserError: if the result is not an allowed config, or if a given flag contradicts the model.
    """
    if base is None:
        return config
    names = [*FOLLOWING, "objective", "ddpm_num_inference_steps"]
    if saved is not None:
        values = {name: saved["flags"][name] for name in names if name in saved["flags"]}
    else:
        values = _values_of(config, base)
    if config.model_config_name_or_path is None and (levels := config.given_flags.intersection(LEVEL_FLAGS)):
        raise UserError(
            f"--init_from {config.init_from} sets the levels of the UNet: leave --{min(levels)} out, or describe "
            "another UNet with --model_config_name_or_path."
        )
    try:
        followed = replace(config, **{name: v for name, v in values.items() if name not in config.given_flags})
    except UserError as error:
        raise UserError(f"--init_from {config.init_from} cannot be used with these flags: {error}") from error
    followed.given_flags = config.given_flags
    return followed


def _values_of(config: TrainingConfig, base: BaseModel) -> dict:
    """Return a dict of the flags that follow the base model, with the values of the base model."""
    unet = base.unet
    values = {"objective": None}  # chosen again, to suit the variance_type
    if config.model_config_name_or_path is None:
        values["resolution"] = write_size(read_size(unet["sample_size"]))
        values["channels"] = unet["in_channels"]
        values["class_conditional"] = unet["num_class_embeds"] is not None
    if base.scheduler is None:
        is_learned = unet["out_channels"] == 2 * unet["in_channels"]
        return values | ({"variance_type": "learned_range"} if is_learned else {})
    T = base.scheduler["num_train_timesteps"]
    name = _schedule_name(base.scheduler)
    changes_length = "ddpm_num_steps" in config.given_flags and config.ddpm_num_steps != T
    if name is None and changes_length and "ddpm_beta_schedule" not in config.given_flags:
        raise UserError(
            f"the noise schedule of --init_from {config.init_from} has no name, so it exists only for its {T} "
            "timesteps: leave --ddpm_num_steps out, or add --ddpm_beta_schedule."
        )
    return values | {
        "ddpm_num_steps": T,
        "ddpm_num_inference_steps": min(config.ddpm_num_inference_steps, T),
        "ddpm_beta_schedule": name or base.scheduler["beta_schedule"],
        "prediction_type": base.scheduler["prediction_type"],
        "variance_type": (base.scheduler["variance_type"] or "fixed_small").removesuffix("_log"),
        "rescale_betas_zero_snr": base.scheduler["rescale_betas_zero_snr"],
    }


def _schedule_name(scheduler: dict) -> str | None:
    """Return the --ddpm_beta_schedule that has the betas of a scheduler's config. None: no schedule has them."""
    T, betas = scheduler["num_train_timesteps"], PaperDDPMScheduler.from_config(scheduler).betas
    rescale = {"rescale_betas_zero_snr": scheduler["rescale_betas_zero_snr"]}
    for name in [scheduler["beta_schedule"], *BETA_SCHEDULES]:
        if (name != "ho_linear" or T >= 21) and torch.equal(make_scheduler(name, T, **rescale).betas, betas):
            return name
    return None


def run_scheduler(config: TrainingConfig, base: BaseModel | None, saved: dict | None) -> PaperDDPMScheduler:
    """Return the scheduler of a run, from its flags or with the betas of its base model.

    A new run takes the betas of its base model if both have the same number of timesteps and --ddpm_beta_schedule is
    not given. A resumed run with a base model takes the betas of its checkpoint.

    Args:
        saved: the train_config.json of the checkpoint to resume, or None.

    Raises:
        UserError: for a --ddpm_beta_schedule that is unknown, does not exist for these timesteps, or cannot be
            trained.
    """
    names = ("prediction_type", "variance_type", "rescale_betas_zero_snr")
    settings = {name: getattr(config, name) for name in names}
    if base is not None and base.scheduler is not None:
        is_same_length = config.ddpm_num_steps == base.scheduler["num_train_timesteps"]
        if saved is not None or (is_same_length and "ddpm_beta_schedule" not in config.given_flags):
            return PaperDDPMScheduler.from_config({**base.scheduler, **settings})
    scheduler = make_scheduler(config.ddpm_beta_schedule, config.ddpm_num_steps, **settings)
    try:
        judge.check_schedule(scheduler)
    except ValueError as error:
        raise UserError(
            f"--ddpm_beta_schedule {config.ddpm_beta_schedule} cannot be trained ({error}): give another schedule, or "
            "--prediction_type v_prediction if only the last beta is 1."
        ) from error
    return scheduler


def unet_arguments(config: TrainingConfig, base: BaseModel, needed: dict) -> dict:
    """Return the UNet2DModel arguments of a run: those of its base model, changed by the flags that were given.

    Of a preset's values for the UNet, only the dropout is used, because it belongs to the training.

    Args:
        needed: the entries that depend on the data, e.g. "in_channels".

    Raises:
        UserError: if such a UNet cannot be built, or cannot draw images of this resolution.
    """
    given = {name: getattr(config, name) for name in UNET_FLAGS if name in config.given_flags}
    if given.get("attention_head_dim") == 0:
        given["attention_head_dim"] = None
    if config.dropout is not None:
        given["dropout"] = config.dropout
    arguments = {key: value for key, value in base.unet.items() if not key.startswith("_")} | given | needed
    try:
        judge.check_unet(arguments)
    except ValueError as error:
        raise UserError(
            f"the UNet of --init_from {config.init_from} cannot be used with these flags ({error}): change "
            "--resolution or the flags that shape the UNet."
        ) from error
    return arguments


@torch.no_grad()
def copy_weights(unet: UNet2DModel, base: BaseModel, classes: Classes) -> dict:
    """Copy every layer of `base` that has the same name and shapes in `unet`.

    If only `unet` has class embeddings, they become zeros, so that its output is the same for every class. If both
    have class embeddings, each class starts from the class of `base` with the same name, or with the same number if
    `base` has no names. Every other class starts from "no class" of `base`. If `base` has no embedding for "no class",
    the class starts from the mean of all classes of `base`. If only `base` has class embeddings, its embedding for
    "no class" is added to the bias of the timestep embedding.

    Args:
        classes: the classes of `unet`.

    Returns:
        a dict with the layers of `unet` that keep their random weights ("random_layers"), the layers that only `base`
        has ("unused_layers"), and the classes that `base` does not have ("new_classes").

    Raises:
        UserError: if no layer has the same name and shapes.
    """
    own, weights, new_classes = unet.state_dict(), dict(base.weights), []
    table = weights.pop(CLASS_TABLE, None)
    unused = []
    if classes:
        rows, new_classes = _class_table(own[CLASS_TABLE][: classes.num_embeddings], table, base.classes, classes)
        # With --augment_probability there are as many embeddings for augmented images.
        weights[CLASS_TABLE] = rows.repeat(len(own[CLASS_TABLE]) // len(rows), 1)
    elif table is not None and base.classes.no_class is not None:
        weights[TIME_BIAS] = weights[TIME_BIAS] + table[base.classes.no_class]
    elif table is not None:
        unused = ["class_embedding"]
    if not classes and CLASS_TABLE in own:  # the two embeddings of --augment_probability
        weights[CLASS_TABLE] = torch.zeros_like(own[CLASS_TABLE])
    random = {name for name in own if name not in weights or weights[name].shape != own[name].shape}
    random_layers = _layers(random, own)
    fits = {name: weights[name] for name in own if _layer(name) not in random_layers}
    if not fits.keys() - {CLASS_TABLE}:
        raise UserError(
            f"no layer of --init_from {base.facts['name']} has the name and the shape of a layer of this UNet: change "
            "the flags that shape the UNet, or leave --init_from out."
        )
    unet.load_state_dict(own | fits)
    return {
        "random_layers": random_layers,
        "unused_layers": unused + _layers(weights.keys() - own.keys(), weights),
        "new_classes": new_classes,
    }


def _class_table(own, table, base: Classes, classes: Classes) -> tuple[torch.Tensor, list[str]]:
    """Return the class embeddings to start from, and the classes that the base model does not have.

    Args:
        own: the random class embeddings of the new UNet.
        table: the class embeddings of the base model, or None.
        base, classes: the classes of the base model and of the new UNet.
    """
    names = list(classes.names)
    if table is None or table.shape[1] != own.shape[1]:
        return torch.zeros_like(own), names
    start = table.mean(dim=0) if base.no_class is None else table[base.no_class]
    rows = start.repeat(len(own), 1)  # also the row of "no class", which is the last
    if base.names is None and len(table) == len(own):
        return table.clone(), []
    known = base.names or names[: len(base)]  # without names, class k is the same as the class of number k
    for number, name in enumerate(names):
        if name in known:
            rows[number] = table[known.index(name)]
    return rows, [name for name in names if name not in known]


def _layers(names, order) -> list[str]:
    """Return the layers that the weights `names` belong to, each layer once, in the order of `order`."""
    return list(dict.fromkeys(_layer(name) for name in order if name in names))


def _layer(weight: str) -> str:
    """Return the layer of a weight: conv_in for conv_in.bias."""
    return weight.rpartition(".")[0]


def describe_start(base: BaseModel, copied: dict) -> str:
    """Return sentences that say what was copied from the base model, and name every layer that was not copied."""
    parts = [f"Starting from the weights of {base.facts['name']}."]
    if copied["random_layers"]:
        listed = ", ".join(copied["random_layers"])
        parts.append(
            "These layers start from random weights, because that model has no layer with their name and shape: "
            f"{listed}."
        )
    if copied["unused_layers"]:
        parts.append(f"These layers of that model are not used: {', '.join(copied['unused_layers'])}.")
    if copied["new_classes"] and not base.classes:
        parts.append(
            "The class embeddings are new and start as zeros, so that every class has the same output at first."
        )
    elif copied["new_classes"]:
        names = [printable(name) for name in copied["new_classes"]]
        more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
        parts.append(f"That model does not have these classes: {', '.join(names[:10])}{more}.")
    return " ".join(parts)
