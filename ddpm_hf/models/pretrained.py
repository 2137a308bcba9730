"""Load a trained DDPM from a folder, a checkpoint or the Hub. Models of other packages load too."""

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import diffusers
import safetensors.torch
import torch
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub.errors import HFValidationError

from ..diffusion.scheduler import PaperDDPMScheduler, make_scheduler
from ..errors import UserError
from ..files import read_json
from ..hub_requests import API, HUB_ERRORS, download, short_reason
from ..run_folder import checkpoints, step_of
from .classes import Classes
from .classifier import NoisyClassifier


# A pipeline with any of these schedulers is a DDPM, because each scheduler's config holds the betas that DDPM uses.
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
PARTS = ("unet", "scheduler", "classifier")
WEIGHTS = ("published", "raw")
# The files to download from the Hub. Some old repositories have all files in the top folder.
PIPELINE_FILES = ["model_index.json", "train_config.json", "config.json", "scheduler_config.json"]
PIPELINE_FILES += ["diffusion_pytorch_model*.safetensors*", "unet/*.json", "unet/*.safetensors", "scheduler/*.json"]
PIPELINE_FILES += ["classifier/*.json", "classifier/*.safetensors"]


@dataclass
class Pretrained:
    """A UNet (float32, in eval mode, on the CPU) with its scheduler and classes.

    Attributes:
        facts: what records say about the model: "name" (a Hub id or the folder's name), "revision" (the commit on the
            Hub), "weights" ("published", or "raw" for weights before averaging), "unet_sha256" (a hash of the
            weights), "parameters" (their number), "train_step" (of a checkpoint) and "commit" (of the ddpm_hf source
            that trained the model). Unknown facts are None.
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
    name, folder, revision = _find_folder(name)
    if (folder / "state.pt").is_file():
        return _from_checkpoint(folder, weights)
    if (folder / "classifier").is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(
            f"{name} is the run of a classifier, not of a model: give a model, and --classifier {name} to guide it."
        )
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{name} has no model_index.json: give the folder or the Hub id of a pipeline, or a checkpoint folder."
        )
    _check_is_ddpm(name, folder)
    if weights == "raw":
        found = checkpoints(folder)
        if not found:
            raise UserError(
                f"{name} has no checkpoint, and only checkpoints hold raw weights: give --weights published."
            )
        return _from_checkpoint(found[-1], weights)
    _check_shards(_part_folder(folder, "unet"))
    try:
        unet = UNet2DModel.from_pretrained(_part_folder(folder, "unet"), local_files_only=True, use_safetensors=True)
        scheduler = PaperDDPMScheduler.from_config(DDPMScheduler.load_config(_part_folder(folder, "scheduler")))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} cannot be loaded ({reason}): give a folder or Hub id of a whole pipeline.") from error
    if unet.config.sample_size is None:
        raise UserError(
            f"the UNet config of {name} has no sample_size, the size of the images: add sample_size to "
            "unet/config.json."
        )
    run_folder = folder.parent if folder.name == "best" else folder  # a run's best/ holds only a pipeline
    run = read_json(run_folder / "train_config.json", missing={})
    classes = Classes.of_model(unet.config.num_class_embeds, read_json(folder / "model_index.json").get("id2label"))
    facts = {"name": name if revision else folder.resolve().name, "revision": revision, "weights": "published"}
    return _pretrained(unet, scheduler, facts, run=run, folder=folder, classes=classes)


def _part_folder(folder: Path, name: str) -> Path:
    """Return the folder with the files of one part. Some old pipelines keep all files in the top folder."""
    return folder / name if (folder / name).is_dir() else folder


def _check_shards(folder: Path):
    """Refuse an index of shards that names anything but safetensors, because diffusers would read pickles."""
    for path in folder.glob("*.safetensors.index.json"):
        names = read_json(path).get("weight_map")
        names = list(names.values()) if isinstance(names, dict) else [names]
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            raise UserError(f"{path} names files that are not safetensors: give a model that is saved as safetensors.")


@contextlib.contextmanager
def quiet_diffusers():
    """Silence diffusers' warnings, but not its errors, inside a `with` block."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(level)


def _find_folder(name: str | Path) -> tuple[str, Path, str | None]:
    """Return (name, folder, revision) of a local folder or of a Hub repository.

    A repository is downloaded first. The revision of a local folder is None.
    """
    name, folder = os.fspath(name), Path(name)
    if folder.exists():
        return name, folder, None
    try:
        folder = download(name, PIPELINE_FILES, ignore="*.fp16.*")
    except HFValidationError:
        raise UserError(f"{name} is neither a folder here nor a Hub id: give a folder or USER/NAME.") from None
    except HUB_ERRORS as error:
        where = f"cannot be downloaded from the Hub, {API.endpoint} ({short_reason(error)})"
        raise UserError(f"{name} is not a folder here, and it {where}: check the name and the network.") from error
    return name, folder, folder.name


def _check_is_ddpm(name: str, folder: Path):
    index = read_json(folder / "model_index.json")
    parts = {key: value for key, value in index.items() if not key.startswith("_")}
    found = {key: value[1] for key, value in parts.items() if isinstance(value, list) and len(value) == 2}
    if found.get("unet") != "UNet2DModel" or found.get("scheduler") not in SCHEDULERS or set(found) - set(PARTS):
        listed = ", ".join(f"{key}: {value}" for key, value in found.items()) or "nothing"
        raise UserError(
            f"{name} is not a DDPM (it has {listed}): give a pipeline with a UNet2DModel and a DDPMScheduler."
        )


def _from_checkpoint(checkpoint: Path, weights: str) -> Pretrained:
    saved = read_json(checkpoint / "train_config.json")
    averaged = weights == "published" and (checkpoint / "ema.safetensors").is_file()
    flags = saved["flags"]
    if flags.get("objective") == "classify":
        raise UserError(f"{checkpoint} is a checkpoint of a classifier: give a pipeline or a checkpoint of a model.")
    unet = UNet2DModel.from_config(saved["unet"])
    file = checkpoint / ("ema.safetensors" if averaged else "model.safetensors")
    unet.load_state_dict(safetensors.torch.load_file(file))
    scheduler = make_scheduler(
        flags["ddpm_beta_schedule"],
        flags["ddpm_num_steps"],
        prediction_type=flags["prediction_type"],
        variance_type=flags["variance_type"],
    )
    names = saved.get("class_names")
    facts = {
        "name": checkpoint.parent.resolve().name,
        "revision": None,
        "weights": "raw" if weights == "raw" or not flags["use_ema"] else "published",
        "train_step": step_of(checkpoint),
    }
    return _pretrained(
        unet,
        scheduler,
        facts,
        run=read_json(checkpoint.parent / "train_config.json", missing=saved),
        folder=checkpoint,
        classes=Classes.of_model(unet.config.num_class_embeds, dict(enumerate(names)) if names else None),
    )


def _pretrained(unet, scheduler, facts: dict, *, run: dict, folder: Path, classes: Classes) -> Pretrained:
    """Return a `Pretrained` with the UNet in eval mode. Add commit, hash and number of parameters to `facts`."""
    unet = unet.eval().requires_grad_(False)
    facts = {"train_step": None, **facts, "commit": run.get("git_commit")}
    facts |= {"unet_sha256": weights_hash(unet), "parameters": sum(each.numel() for each in unet.parameters())}
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
    name, folder, _ = _find_folder(name)
    folder = _part_folder(folder, "classifier")
    _check_shards(folder)
    try:
        with quiet_diffusers():  # diffusers would warn that NoisyClassifier does not use auto_map
            classifier = NoisyClassifier.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{name} has no classifier ({' '.join(str(error).split())[:200]}): train one with --objective classify."
        ) from error
    return classifier.eval().requires_grad_(False)


def weights_hash(module: torch.nn.Module) -> str:
    """Return the SHA-256 of a module's tensors, as float32 in the order of their names.

    Equal weights have equal hashes, whatever file they were read from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
