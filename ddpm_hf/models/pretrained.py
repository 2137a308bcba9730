"""A trained DDPM, ours or anyone's, from a folder, a checkpoint or the Hub: what is sampled from and scored."""

import contextlib
import hashlib
import json
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
from ..run_folder import checkpoints, step_of
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
    """A UNet in eval mode, float32, on the CPU; its scheduler; and what a record says about them.

    `facts` has "name" (a Hub id or the folder's name), "revision" (the Hub's commit, or None), "weights"
    ("published", or "raw" for weights that no average was taken of), "unet_sha256", "parameters", "train_step" (of a
    checkpoint) and "commit", None where the folder does not tell. `run` is the content of train_config.json, or {};
    `folder` is where all was read from. `class_names` are those of a conditional UNet, None where none are known.
    """

    unet: UNet2DModel
    scheduler: PaperDDPMScheduler
    facts: dict
    run: dict
    folder: Path
    class_names: list[str] | None = None

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for: an embedding for "no class" is none of them."""
        return len(self.class_names or []) or self.unet.config.num_class_embeds or 0


def load_pretrained(name: str, weights: str = "published") -> Pretrained:
    """Load a pipeline folder, a `checkpoint-<step>` of a run, or a Hub id such as `me/ddpm-mnist`.

    Args:
        weights: "published", those that a pipeline holds (of a checkpoint: the EMA where it has one), or "raw", those
            that were trained, before any averaging, of the checkpoint given or of a run's last one.

    Raises:
        UserError: for a name that is nothing of this, a pipeline that is no DDPM, or weights that cannot be had.
    """
    if weights not in WEIGHTS:
        raise UserError(f"--weights is {weights!r}; choose {' or '.join(WEIGHTS)}.")
    folder, revision = Path(name), None
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
    of_run = folder.parent if folder.name == "best" else folder  # best/ of a run is a pipeline of its own
    run = _read_json(of_run / "train_config.json") if (of_run / "train_config.json").is_file() else {}
    if unet.config.sample_size is None:
        raise UserError(f"{name} does not say the size of its images (sample_size): add it to unet/config.json.")
    class_names = names_of(_read_json(folder / "model_index.json").get("id2label"))
    class_names = class_names if unet.config.num_class_embeds else None
    return _pretrained(unet, scheduler, name, revision, "published", run, folder, None, class_names)


def part(folder: Path, name: str) -> Path:
    """Return where a part of a pipeline is: some old ones have the files of all parts beside the index."""
    return folder / name if (folder / name).is_dir() else folder


@contextlib.contextmanager
def errors_only():
    """Keep diffusers from warning for a while."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(level)


def names_of(id2label: dict | None) -> list[str] | None:
    """Return the names of an `id2label` by their numbers, which may be text in any order; None for none."""
    return [id2label[number] for number in sorted(id2label, key=int)] if id2label else None


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
    index = _read_json(folder / "model_index.json")
    parts = {key: value for key, value in index.items() if not key.startswith("_")}
    found = {key: value[1] for key, value in parts.items() if isinstance(value, list) and len(value) == 2}
    if found.get("unet") != "UNet2DModel" or found.get("scheduler") not in SCHEDULERS or set(found) - set(PARTS):
        has = ", ".join(f"{key}: {value}" for key, value in found.items()) or "nothing"
        raise UserError(f"{name} is no DDPM (it has {has}): give a pipeline of a UNet2DModel and a DDPMScheduler.")


def _from_checkpoint(checkpoint: Path, weights: str) -> Pretrained:
    saved = _read_json(checkpoint / "train_config.json")
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
    record = checkpoint.parent / "train_config.json"
    run = _read_json(record) if record.is_file() else saved
    kind = "raw" if weights == "raw" or not flags["use_ema"] else "published"
    class_names, of_run = saved.get("class_names"), str(checkpoint.parent)
    return _pretrained(unet, scheduler, of_run, None, kind, run, checkpoint, step_of(checkpoint), class_names)


def _pretrained(unet, scheduler, name, revision, weights, run, folder, step, class_names) -> Pretrained:
    unet = unet.eval().requires_grad_(False)
    facts = {
        "name": name if revision else Path(name).resolve().name,
        "revision": revision,
        "weights": weights,
        "unet_sha256": weights_hash(unet),
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "train_step": step,
        "commit": run.get("git_commit"),
    }
    return Pretrained(unet, scheduler, facts, run, folder, class_names)


def load_classifier(name: str) -> NoisyClassifier:
    """Load a classifier: the folder of a run with --objective classify, its `classifier` folder, or a Hub id.

    Raises:
        UserError: if there is none.
    """
    folder = Path(name)
    if not folder.exists():
        folder = _from_hub(name)
    folder = folder / "classifier" if (folder / "classifier").is_dir() else folder
    try:
        with errors_only():  # nor has the class of the installed package for the auto_map of the one saved
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


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): is the folder whole?") from error
