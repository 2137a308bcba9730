"""Load a trained DDPM from a folder, a checkpoint or the Hub. Models of other packages load too."""

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from diffusers import UNet2DModel
from huggingface_hub.errors import HFValidationError

from ..config.run_record import read_run
from ..diffusion.scheduler import BETA_SCHEDULES, PaperDDPMScheduler, make_scheduler
from ..errors import UserError, reason_of
from ..files import read_json
from ..hub_requests import API, HUB_ERRORS, download, short_reason
from ..manifest import check_files
from ..run_folder import checkpoints, is_checkpoint_name, step_of
from . import judge
from .augmented import without_augmentation
from .classes import Classes
from .classifier import NoisyClassifier
from .judge import quiet_diffusers


# A pipeline with any of these schedulers is a DDPM, because each scheduler's config holds the betas that DDPM uses.
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
PARTS = ("unet", "scheduler", "classifier")
WEIGHTS = ("published", "raw")
# The arguments of a scheduler that do not change what we draw: our samplers choose the timesteps and the variance.
CHOSEN_BY_SAMPLERS = ("timestep_spacing", "steps_offset", "variance_type")
# The files to download from the Hub. Some old repositories have all files in the top folder.
PIPELINE_FILES = ["model_index.json", "train_config.json", "config.json", "scheduler_config.json"]
PIPELINE_FILES += ["diffusion_pytorch_model*.safetensors*", "unet/*.json", "unet/*.safetensors", "scheduler/*.json"]
PIPELINE_FILES += ["classifier/*.json", "classifier/*.safetensors"]


@dataclass
class Pretrained:
    """A UNet (float32, in eval mode, on the CPU) with its scheduler and classes.

    Attributes:
        facts: entries for records: "name" (a Hub id or the folder's name), "revision" (the commit on the Hub),
            "weights" ("published", or "raw" for weights before averaging), "unet_sha256" (a hash of the weights),
            "schedule" (a hash of the scheduler), "parameters" (a number), "train_step" (of a checkpoint) and "commit"
            (of the ddpm_hf source that trained the model). Unknown facts are None.
        run: the content of train_config.json, or {}.
        folder: the folder that the model was read from.
        classes: the classes that can be requested. It is empty, and therefore falsy, for an unconditional UNet.
    """

    unet: UNet2DModel
    scheduler: PaperDDPMScheduler
    facts: dict
    run: dict
    folder: Path
    classes: Classes = Classes()

    @property
    def run_folder(self) -> Path:
        """The folder of the run. For a checkpoint, this is the folder that holds the checkpoint."""
        return self.folder.parent if (self.folder / "state.pt").is_file() else self.folder


def load_pretrained(name: str | Path, weights: str = "published") -> Pretrained:
    """Load a DDPM to sample from, to score or to restore with.

    Any DDPM in diffusers' format can be loaded. Weights are read from safetensors files only, and code in the folder
    is not run.

    Args:
        name: a pipeline folder, a run's `checkpoint-<step>`, or a Hub id such as `me/ddpm-mnist`.
        weights: "published" loads the weights of the pipeline, or the moving average of a checkpoint if it has one.
            "raw" loads the weights before averaging, from the given checkpoint or from a run's last checkpoint.

    Raises:
        UserError: if there is no such folder or Hub repository, if the pipeline is not a DDPM, or if the weights are
            missing.

    Example:
        >>> model = ddpm_hf.load("runs/digits")
        >>> model.unet.config.sample_size, len(model.scheduler), model.facts["weights"]
        (8, 1000, 'published')
    """
    if weights not in WEIGHTS:
        raise UserError(f"--weights is {weights!r}; choose {' or '.join(WEIGHTS)}.")
    name, folder, revision = find_folder(name)
    if (folder / "state.pt").is_file():
        return _from_checkpoint(folder, weights)
    if (folder / "classifier").is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(
            f"{name} is the run of a classifier, not of a model: give a model, and --classifier {name} to guide it."
        )
    if not (folder / "model_index.json").is_file() and any(
        (folder / part / "config.json").is_file() for part in ("", "unet", "unet_ema")
    ):
        raise UserError(
            f"{name} has no model_index.json, so it is not a pipeline yet: make one from its UNet with "
            f"`ddpm_hf convert {name} NEW_FOLDER`."
        )
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{name} has no model_index.json: give the folder or the Hub id of a pipeline, or a checkpoint folder."
        )
    index = read_json(folder / "model_index.json")
    check_is_ddpm(name, index)
    if weights == "raw":
        found = checkpoints(folder)
        if not found:
            raise UserError(
                f"{name} has no checkpoint, and only checkpoints hold raw weights: give --weights published."
            )
        return _from_checkpoint(found[-1], weights)
    with opening(name, "give a folder or Hub id of a whole pipeline, or repair this one"):
        unet, scheduler = _read_parts(name, folder, index)
    run = read_run(folder)
    if not run and folder.name == "best":  # a run's best/ holds only a pipeline
        run = read_run(folder.parent)
    classes = Classes.of_model(unet.config.num_class_embeds, index.get("id2label"))
    facts = {"name": name if revision else folder.resolve().name, "revision": revision, "weights": "published"}
    return _pretrained(unet, scheduler, facts, run=run, folder=folder, classes=classes)


@contextlib.contextmanager
def opening(what, advice: str):
    """In a `with` block that opens files from elsewhere, turn every error into a UserError with this advice."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a broken file may raise anything
        reason = f"there is no {error}" if isinstance(error, KeyError) else reason_of(error, lines=20)[:400]
        raise UserError(f"{what} cannot be loaded ({reason}): {advice}.") from error


def _read_parts(name: str, folder: Path, index: dict) -> tuple[UNet2DModel, PaperDDPMScheduler]:
    """Return the UNet and the scheduler of a pipeline folder. Their configs are checked first."""
    unet_folder = part_folder(folder, "unet")
    config = read_json(unet_folder / "config.json")
    judge.check_index(index)
    judge.check_unet(config, index)
    scheduler = read_scheduler(folder)
    check_shards(unet_folder)
    if not any(unet_folder.glob("*.safetensors")):
        raise UserError(
            f"{name} has no safetensors weights, and pickled ones (.bin) are not opened, because a pickle can run "
            f"code: convert them with `ddpm_hf convert {name} NEW_FOLDER`."
        )
    unet = read_network(UNet2DModel, unet_folder)
    judge.check_together(unet.config, scheduler.config)
    return unet, scheduler


def read_scheduler(folder: Path) -> PaperDDPMScheduler:
    """Return the scheduler of a pipeline folder. Raise a ValueError for a config or a schedule that cannot be used."""
    config = read_json(part_folder(folder, "scheduler") / "scheduler_config.json")
    judge.check_scheduler(config)
    # The config of DPM-Solver has no variance type. Give it the default of DDPM.
    config |= {"variance_type": config.get("variance_type") or "fixed_small"}
    scheduler = PaperDDPMScheduler.from_config(config)
    judge.check_schedule(scheduler)
    return scheduler


def read_network(kind: type, folder: Path):
    """Read a network from the config and the safetensors files in a folder, as float32.

    Args:
        kind: the class of the network, e.g. UNet2DModel.

    Raises:
        ValueError: for weights that are missing or not finite.
        Exception: anything else that diffusers raises for a broken file.
    """
    judge.check_sizes(read_json(folder / "config.json", missing={}))
    with quiet_diffusers():  # diffusers would warn that NoisyClassifier does not use auto_map
        network, info = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    if len(info["missing_keys"]) == len(network.state_dict()):
        raise ValueError("its file of weights has no weights of this network")
    if info["missing_keys"]:
        raise ValueError(f"its weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
    judge.check_weights(network)
    return network


def part_folder(folder: Path, name: str) -> Path:
    """Return the folder with the files of one part. Some old pipelines keep all files in the top folder."""
    return folder / name if (folder / name).is_dir() else folder


def check_shards(folder: Path):
    """Refuse a list of weight files that names other files than safetensors, because diffusers would unpickle them."""
    for path in folder.glob("*.safetensors.index.json"):
        names = read_json(path).get("weight_map")
        names = list(names.values()) if isinstance(names, dict) else [names]
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            raise UserError(f"{path} names files that are not safetensors: give a model that is saved as safetensors.")


def find_folder(name: str | Path, patterns: list[str] = PIPELINE_FILES) -> tuple[str, Path, str | None]:
    """Return (name, folder, revision) of a local folder, or of a Hub repository after downloading it.

    Only files that match `patterns` are downloaded. The revision of a local folder is None.
    """
    name, folder = os.fspath(name), Path(name)
    if os.path.exists(name):  # False for a name that is too long, where Path.exists would raise an error
        return name, folder, None
    try:
        folder = download(name, patterns, ignore="*.fp16.*")
    except HFValidationError:
        raise UserError(f"{name} is neither a folder here nor a Hub id: give a folder or USER/NAME.") from None
    except HUB_ERRORS as error:
        where = f"cannot be downloaded from the Hub, {API.endpoint} ({short_reason(error)})"
        raise UserError(f"{name} is not a folder here, and it {where}: check the name and the network.") from error
    return name, folder, folder.name


def check_is_ddpm(name: str, index: dict):
    """Raise a UserError if a model_index.json with the content `index` is not that of a DDPM."""
    parts = {key: value for key, value in index.items() if not key.startswith("_")}
    found = {key: value[1] for key, value in parts.items() if isinstance(value, list) and len(value) == 2}
    if found.get("unet") != "UNet2DModel" or found.get("scheduler") not in SCHEDULERS or set(found) - set(PARTS):
        listed = ", ".join(f"{key}: {value}" for key, value in found.items()) or "nothing"
        raise UserError(
            f"{name} is not a DDPM (it has {listed}): give a pipeline with a UNet2DModel and a DDPMScheduler."
        )


def _from_checkpoint(checkpoint: Path, weights: str) -> Pretrained:
    """Return the model of a checkpoint. Its configs and weights are checked like those of a pipeline."""
    averaged = weights == "published" and (checkpoint / "ema.safetensors").is_file()
    file = "ema.safetensors" if averaged else "model.safetensors"
    check_files(checkpoint, ["train_config.json", file])
    saved = read_run(checkpoint)
    flags = saved.get("flags", {})
    if flags.get("objective") == "classify":
        raise UserError(f"{checkpoint} is a checkpoint of a classifier: give a pipeline or a checkpoint of a model.")
    names = saved.get("class_names")
    id2label = dict(enumerate(names)) if names else None
    with opening(checkpoint, "it is damaged, so give another checkpoint"):
        # With --augment_probability, the UNet has more embeddings than classes, see without_augmentation.
        judge.check_unet(saved["unet"], {} if flags.get("augment_probability") else {"id2label": id2label})
        scheduler = _scheduler_of_checkpoint(saved)
        judge.check_schedule(scheduler)
        tensors = safetensors.torch.load_file(checkpoint / file)
        unet = judge.build_unet(saved["unet"], tensors)
        unet.load_state_dict(tensors)
        judge.check_weights(unet)
        judge.check_together(unet.config, scheduler.config)
        if flags.get("augment_probability"):
            unet = without_augmentation(unet, bool(flags["class_conditional"]))
    facts = {
        "name": checkpoint.resolve().parent.name,
        "revision": None,
        "weights": "published" if averaged else "raw",
        "train_step": step_of(checkpoint) if is_checkpoint_name(checkpoint.name) else None,
    }
    return _pretrained(
        unet,
        scheduler,
        facts,
        run=read_run(checkpoint.parent) or saved,
        folder=checkpoint,
        classes=Classes.of_model(unet.config.num_class_embeds, id2label),
    )


def _scheduler_of_checkpoint(saved: dict) -> PaperDDPMScheduler:
    """Return the scheduler of a checkpoint. Checkpoints of earlier versions have its flags, but not its config."""
    flags, config = saved["flags"], saved.get("scheduler")
    if config is not None:
        judge.check_scheduler(config)
        return PaperDDPMScheduler.from_config(config)
    settings = {"prediction_type": flags["prediction_type"], "variance_type": flags["variance_type"]}
    judge.check_scheduler({"num_train_timesteps": flags["ddpm_num_steps"], **settings})
    if flags["ddpm_beta_schedule"] not in BETA_SCHEDULES:
        raise ValueError(f"its ddpm_beta_schedule is {flags['ddpm_beta_schedule']!r}, which does not exist")
    return make_scheduler(flags["ddpm_beta_schedule"], flags["ddpm_num_steps"], **settings)


def _pretrained(unet, scheduler, facts: dict, *, run: dict, folder: Path, classes: Classes) -> Pretrained:
    """Return a `Pretrained` with the UNet in eval mode. Add commit, hash and number of parameters to `facts`."""
    unet = unet.eval().requires_grad_(False)
    facts = {"train_step": None, **facts, "commit": run.get("git_commit")}
    facts |= {"unet_sha256": weights_hash(unet.state_dict()), "schedule": schedule_hash(scheduler)}
    facts |= {"parameters": sum(each.numel() for each in unet.parameters())}
    return Pretrained(unet, scheduler, facts, run, folder, classes)


def load_classifier(name: str | Path) -> NoisyClassifier:
    """Load a classifier that guides models.

    Args:
        name: a run with --objective classify, its `classifier` folder, or a Hub id.

    Raises:
        UserError: for a folder or a repository without a classifier.

    Example:
        >>> ddpm_hf.load_classifier("runs/digits-classifier").config.num_classes
        10
    """
    name, folder, _ = find_folder(name)
    folder = part_folder(folder, "classifier")
    with opening(f"the classifier in {name}", "give a run of --objective classify, or its folder `classifier`"):
        check_shards(folder)
        classifier = read_network(NoisyClassifier, folder)
    return classifier.eval().requires_grad_(False)


def schedule_hash(scheduler: PaperDDPMScheduler) -> str:
    """Return 8 hex digits: a hash of the scheduler's arguments that change which images are generated.

    The arguments in CHOSEN_BY_SAMPLERS are left out.
    """
    arguments = {key: value for key, value in scheduler.arguments.items() if key not in CHOSEN_BY_SAMPLERS}
    return hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:8]


def published_hash(folder: Path) -> str | None:
    """Return the `weights_hash` of the UNet in a folder that ddpm_hf wrote. None if its file cannot be read."""
    try:
        return weights_hash(safetensors.torch.load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    except (OSError, safetensors.SafetensorError):
        return None


def weights_hash(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors of a state dict, as float32 in the order of their names.

    Equal weights have equal hashes, whatever file they were read from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
