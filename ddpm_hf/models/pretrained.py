"""A trained DDPM, ours or anyone's, from a folder, a checkpoint or the Hub: what is sampled from and scored."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import diffusers
import safetensors.torch
import torch
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..diffusion.scheduler import PaperDDPMScheduler, make_scheduler
from ..errors import UserError
from ..files import read_json
from ..run_folder import checkpoints, step_of
from .classes import Classes
from .classifier import NoisyClassifier


# Schedulers whose config holds the same betas: a pipeline saved with one of them is a DDPM all the same.
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
PARTS = ("unet", "scheduler", "classifier")
WEIGHTS = ("published", "raw")
# What is fetched of a Hub repository: some old ones have the UNet's and the scheduler's files beside the index.
PIPELINE_FILES = ["model_index.json", "train_config.json", "config.json", "scheduler_config.json"]
PIPELINE_FILES += ["diffusion_pytorch_model*.safetensors*", "unet/*.json", "unet/*.safetensors", "scheduler/*.json"]
PIPELINE_FILES += ["classifier/*.json", "classifier/*.safetensors"]


@dataclass
class Pretrained:
    """A UNet in eval mode, float32, on the CPU; its scheduler, its classes, and what a record says about them.

    Attributes:
        facts: "name" (a Hub id or the folder's name), "revision" (the Hub's commit, or None), "weights" ("published",
            or "raw" for weights before averaging), "unet_sha256", "parameters", "train_step" (of a checkpoint) and
            "commit", None where the folder does not tell.
        run: the content of train_config.json, or {}.
        folder: where all was read from.
        classes: what a conditional UNet can be asked for; false for an unconditional one.
    """

    unet: UNet2DModel
    scheduler: PaperDDPMScheduler
    facts: dict
    run: dict
    folder: Path
    classes: Classes = Classes()

    @property
    def run_folder(self) -> Path:
        """The folder of the run that this is a model of: of a checkpoint, the one that it is in."""
        return self.folder.parent if (self.folder / "state.pt").is_file() else self.folder


def load_pretrained(name: str | Path, weights: str = "published") -> Pretrained:
    """Load a DDPM to sample from, to score or to restore with.

    Any DDPM in diffusers' format will do, whoever trained it. Only safetensors are read, and no code is run.

    Args:
        name: a pipeline folder, a `checkpoint-<step>` of a run, or a Hub id such as `me/ddpm-mnist`.
        weights: "published" are those that a pipeline holds (of a checkpoint: the moving average where it has one).
            "raw" are those that were trained, before averaging, of the checkpoint given or of a run's last one.

    Raises:
        UserError: for a name that is none of these, a pipeline that is not a DDPM, or weights that are not there.

    Example:
        >>> model = ddpm_hf.load("runs/digits")
        >>> model.unet.config.sample_size, len(model.scheduler), model.facts["weights"]
        (8, 1000, 'published')
    """
    if weights not in WEIGHTS:
        raise UserError(f"--weights is {weights!r}; choose {' or '.join(WEIGHTS)}.")
    name, folder, revision = str(name), Path(name), None
    if not folder.exists():
        folder = _from_hub(name)
        revision = folder.name
    if (folder / "state.pt").is_file():
        return _from_checkpoint(folder, weights)
    if (folder / "classifier").is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"{name} is the run of a classifier: give a model, and --classifier {name} to guide it.")
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{name} has no model_index.json: give the folder or the Hub id of a pipeline, or a checkpoint."
        )
    _check_is_ddpm(name, folder)
    if weights == "raw":
        found = checkpoints(folder)
        if not found:
            raise UserError(f"{name} has no checkpoint, where raw weights are kept: take --weights published.")
        return _from_checkpoint(found[-1], weights)
    try:
        unet = UNet2DModel.from_pretrained(part(folder, "unet"), local_files_only=True, use_safetensors=True)
        scheduler = PaperDDPMScheduler.from_config(DDPMScheduler.load_config(part(folder, "scheduler")))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} cannot be loaded ({' '.join(str(error).split())}): is it whole?") from error
    if unet.config.sample_size is None:
        raise UserError(f"{name} does not say the size of its images (sample_size): add it to unet/config.json.")
    of_run = folder.parent if folder.name == "best" else folder  # best/ of a run is a pipeline of its own
    run = read_json(of_run / "train_config.json", missing={})
    classes = Classes.of_model(unet.config.num_class_embeds, read_json(folder / "model_index.json").get("id2label"))
    facts = {"name": name if revision else Path(name).resolve().name, "revision": revision, "weights": "published"}
    return _pretrained(unet, scheduler, facts, run=run, folder=folder, classes=classes)


def part(folder: Path, name: str) -> Path:
    """Return where a part of a pipeline is: some old ones have the files of all parts beside the index."""
    return folder / name if (folder / name).is_dir() else folder


@contextlib.contextmanager
def quiet_diffusers():
    """Keep diffusers from warning for a while; its errors stay."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(level)


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=PIPELINE_FILES, ignore_patterns="*.fp16.*"))
    except HFValidationError:
        raise UserError(
            f"{name} is neither here nor the name of a Hub repository: give a folder or USER/NAME."
        ) from None
    except LocalEntryNotFoundError as error:
        raise UserError(f"{name} is no folder here, and the Hub cannot be reached: check the name.") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{name} is no folder here, and the Hub does not give it ({reason}): check the name."
        ) from error


def _check_is_ddpm(name: str, folder: Path):
    index = read_json(folder / "model_index.json")
    parts = {key: value for key, value in index.items() if not key.startswith("_")}
    found = {key: value[1] for key, value in parts.items() if isinstance(value, list) and len(value) == 2}
    if found.get("unet") != "UNet2DModel" or found.get("scheduler") not in SCHEDULERS or set(found) - set(PARTS):
        has = ", ".join(f"{key}: {value}" for key, value in found.items()) or "nothing"
        raise UserError(f"{name} is no DDPM (it has {has}): give a pipeline of a UNet2DModel and a DDPMScheduler.")


def _from_checkpoint(checkpoint: Path, weights: str) -> Pretrained:
    saved = read_json(checkpoint / "train_config.json")
    averaged = weights == "published" and (checkpoint / "ema.safetensors").is_file()
    flags = saved["flags"]
    if flags.get("objective") == "classify":
        raise UserError(f"{checkpoint} is of a classifier: give a pipeline, or a checkpoint of one.")
    unet = UNet2DModel.from_config(saved["unet"])
    unet.load_state_dict(
        safetensors.torch.load_file(checkpoint / ("ema.safetensors" if averaged else "model.safetensors"))
    )
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
    unet = unet.eval().requires_grad_(False)
    facts = {"train_step": None, **facts, "commit": run.get("git_commit")}
    facts |= {"unet_sha256": weights_hash(unet), "parameters": sum(each.numel() for each in unet.parameters())}
    return Pretrained(unet, scheduler, facts, run, folder, classes)


def load_classifier(name: str | Path) -> NoisyClassifier:
    """Load a classifier that guides models.

    Args:
        name: the folder of a run with --objective classify, its `classifier` folder, or a Hub id.

    Raises:
        UserError: if there is none.

    Example:
        >>> ddpm_hf.load_classifier("runs/digits-classifier").config.num_classes
        10
    """
    name, folder = str(name), Path(name)
    if not folder.exists():
        folder = _from_hub(name)
    folder = folder / "classifier" if (folder / "classifier").is_dir() else folder
    try:
        with quiet_diffusers():  # it warns that our class has no use for the auto_map in the config
            classifier = NoisyClassifier.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{name} has no classifier ({' '.join(str(error).split())[:200]}): train one with --objective classify."
        ) from error
    return classifier.eval().requires_grad_(False)


def weights_hash(module: torch.nn.Module) -> str:
    """Return the SHA-256 of a module's tensors, by name, in float32: the same from whichever file they came."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
