"""What leaves the machine: the saved pipeline, its model card, the push to the Hub.

What is published names diffusers' own classes only, so that whoever loads it needs nothing of ours.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import os
import re
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path

import torch
from diffusers import DDPMPipeline
from huggingface_hub import HfApi, ModelCardData, get_token

# HTTPError is httpx's, whichever major version of httpx huggingface_hub is built on.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from . import UserError
from .config import GROUPS, EvaluationOptions, HubOptions, OutputOptions


logger = logging.getLogger(__name__)
# One for the process: it has one worker thread, so pushes arrive in the order they were made.
API = HfApi()
# Nothing else leaves a run folder: no checkpoint, no tracker's logs, nothing that a user put there.
PUBLISHED = ["model_index.json", "unet", "scheduler", "README.md", "train_config.json", "metrics.jsonl", "samples"]
PUBLISHED += ["figures", "evaluations", "best", "classifier"]
TOKEN = r"\bhf_[A-Za-z0-9]{30,}"
FACTS = dict(
    parameters="Parameters", num_images="Training images", step="Optimizer steps", images_seen="Images seen",
    seconds="Training time in seconds", loss="Last training loss", validation_loss="Last validation loss",
    validation_loss_ema="Last validation loss, EMA weights",
    validation_accuracy="Last validation accuracy, over all noise levels", git_commit="Commit of ddpm_hf",
)  # fmt: skip
MARKER = "<!-- ddpm_hf -->"
AFHQ_LICENCE = """
The images: Animal Faces-HQ by Choi et al., NAVER Corp. ([StarGAN v2](https://arxiv.org/abs/1912.01865), CVPR 2020),
[CC BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/): credit its authors, no commercial use.
"""


def create_repository(config) -> str:
    """Create the run's repository unless it exists; return its id, e.g. `me/ddpm-cifar10`.

    Called before the first step: what cannot be pushed is to fail before training, not after.

    Raises:
        UserError: the Hub cannot be reached or refuses, or a public repository is where a private one is asked for.
    """
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    token = config.hub_token
    try:
        # None leaves it to the Hub, where an organisation may have private as its default.
        repo_id = API.create_repo(name, token=token, private=config.hub_private_repo or None, exist_ok=True).repo_id
        # create_repo is content if the repository exists, even with a token that may only read.
        API.auth_check(repo_id, token=token, write=True)
        private = API.repo_info(repo_id, token=token).private
    except HFValidationError:
        raise UserError(f"{name!r} cannot name a repository: give --hub_model_id NAME or USER/NAME.") from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        remedy = "check the network, or train without --push_to_hub and push later"
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            remedy = "log in with `hf auth login`, or give --hub_token a token that may write there"
        raise UserError(f"cannot push to {name!r} on {API.endpoint} ({reason(error)}): {remedy}.") from None
    if config.hub_private_repo and not private:
        raise UserError(f"{repo_id} exists and is public: make it private, or choose another --hub_model_id.")
    return repo_id


def reason(error: Exception) -> str:
    """Say in a few words why a request failed; the token is only in the request's headers, never in these words."""
    if isinstance(error, HfHubHTTPError):
        return f"{error.response.status_code} {error.response.reason_phrase}"
    return str(error).partition("\n")[0] or type(error).__name__


def push(output_dir: str | Path, repo_id: str, token: str | None, message: str) -> "Future[bool]":
    """Upload the run as it is now, in the background, as one commit; `finish_push` waits for it.

    The files are copied first, so that training may go on writing. One that holds a token stays here, with a warning.
    A push that fails is a warning too, whatever the reason: no network may end hours of training.
    """
    secrets = "|".join([TOKEN, *map(re.escape, filter(None, [token, get_token()]))]).encode()
    paths = [path for name in PUBLISHED for path in [Path(output_dir, name), *Path(output_dir, name).rglob("*")]]
    try:
        frozen = tempfile.TemporaryDirectory(prefix=".push-", dir=output_dir, ignore_cleanup_errors=True)
        for source in filter(Path.is_file, paths):
            target = Path(frozen.name, source.relative_to(output_dir))
            if source.suffix in (".json", ".jsonl", ".md") and re.search(secrets, source.read_bytes()):
                logger.warning("%s holds an access token and was not pushed: remove the token from it.", source)
            elif source.match("evaluations/*.png"):
                continue  # training images beside samples, which need not be anybody's to publish
            elif "/." not in f"/{source.relative_to(output_dir).as_posix()}":  # half-written files start with a dot
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    except OSError as error:
        logger.warning(
            "Nothing was pushed to %s, for want of a copy (%s): free some space, push again.", repo_id, error
        )
        return API.run_as_future(lambda: False)

    def upload():
        with frozen as folder:
            try:
                API.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, token=token)
            except Exception as error:
                logger.warning(
                    "The push to %s failed (%s): the run is whole here, push again.", repo_id, reason(error)
                )
                return False
        return True

    return API.run_as_future(upload)


def finish_push(future: "Future[bool]") -> bool:
    """Wait for a push and return whether it arrived; if not, it has warned already."""
    return future.result()


def save_pipeline(folder: str | Path, unet, scheduler, class_names: list[str] | None = None):
    """Save the UNet (float32 safetensors) and the scheduler as stock diffusers' `DDPMPipeline`, over an older one.

    The names of a conditional UNet's classes go into model_index.json as `id2label`, as DiTPipeline has them. Other
    files in the folder, and the model, stay as they are.
    """
    with saving(folder) as new:
        DDPMPipeline(in_float32(unet), scheduler.stock()).save_pretrained(new)
        if class_names is not None:
            index = json.loads((new / "model_index.json").read_text())
            index["id2label"] = dict(enumerate(class_names))
            (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_classifier(folder: str | Path, classifier):
    """Save a classifier of noisy images (float32 safetensors) and its code in `folder`/classifier."""
    with saving(folder) as new:
        in_float32(classifier).save_pretrained(new / "classifier")


def in_float32(network):
    return network if network.dtype == torch.float32 else copy.deepcopy(network).float()


@contextlib.contextmanager
def saving(folder: str | Path):
    """Lend a folder to write to, then move its files to `folder` one by one, weights first and model_index.json last.

    A kill at any time leaves a folder that loads, or one with no index yet.
    """
    new = Path(folder, ".saving")
    shutil.rmtree(new, ignore_errors=True)  # left by a kill
    yield new
    order = ["*/*.safetensors*", "*/*", "model_index.json"]
    files = (path for pattern in order for path in sorted(new.glob(pattern)))
    for part in dict.fromkeys(files):
        target = folder / part.relative_to(new)
        target.parent.mkdir(exist_ok=True)
        os.replace(part, target)
    shutil.rmtree(new)


def write_card(output_dir: str | Path, config, facts: dict) -> bool:
    """Write README.md, the model card, from the run's records; return False where a card not of ours was kept.

    Args:
        output_dir: the run: the flags are those of its train_config.json; the last sheet and loss.png are shown.
        config: the TrainingConfig, for the name of the repository.
        facts: `command` is the command line; `repo_id` and the keys of `FACTS` are optional and may be None.
    """
    output_dir = Path(output_dir)
    readme, partial = output_dir / "README.md", output_dir / ".README.md"
    if readme.exists() and MARKER not in readme.read_text(encoding="utf-8"):
        return False
    flags = json.loads((output_dir / "train_config.json").read_text(encoding="utf-8"))["flags"]
    name = facts.get("repo_id") or config.hub_model_id or output_dir.resolve().name
    dataset = flags["dataset_name"] or flags["train_data_dir"]

    task = "image-classification" if flags["objective"] == "classify" else "unconditional-image-generation"
    tags = ["diffusers", "ddpm", task, "pytorch", "ddpm_hf"]
    # Cats that nobody may sell make a model that nobody may sell.
    licence = "cc-by-nc-4.0" if "afhq" in dataset.lower() else "apache-2.0"
    about = ModelCardData(license=licence, library_name="diffusers", pipeline_tag=task, tags=tags)
    source = "scikit-learn's handwritten digits" if dataset == "digits" else f"`{Path(dataset).name}`"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", dataset) and not Path(dataset).exists():
        about.datasets = [dataset]
        source = f"[{dataset}](https://huggingface.co/datasets/{dataset})"
    sheets = sorted(output_dir.glob("samples/epoch_*.png"), key=lambda sheet: (len(sheet.name), sheet.name))
    pictures = [f"![{sheet.stem}](samples/{sheet.name})" for sheet in sheets[-1:]]
    pictures += ["![Loss](figures/loss.png)"] if (output_dir / "figures" / "loss.png").exists() else []
    pictures = "\n\n".join(pictures)
    kind, usage = how_to_use(name, flags)
    command = re.sub(r"\s'?--hub[_-]token(=|\s+)\S+", "", facts["command"])
    rows = {FACTS[key]: facts[key] for key in FACTS if facts.get(key) is not None}
    rows = {k: v if isinstance(v, str) else f"{v:,.4f}" if isinstance(v, float) else f"{v:,}" for k, v in rows.items()}
    groups = [group for group in GROUPS if group not in (OutputOptions, EvaluationOptions, HubOptions)]
    for flag in (field.name for group in groups for field in dataclasses.fields(group)):
        if flags.get(flag) is not None and flags[flag] is not False and flag != "local_rank":
            rows[f"`{flag}`"] = flags[flag]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())

    card = f"""---
{about.to_yaml()}
---

{MARKER}
# {name.rpartition("/")[2]}

{kind} of {flags["resolution"]}x{flags["resolution"]} images, trained on {source} with `ddpm_hf`. {usage}

{pictures}

## Training

```bash
{re.sub(TOKEN, "***", command)}
```

| | value |
|---|---|
{table}

Every flag is in [train_config.json](train_config.json), every logged step in [metrics.jsonl](metrics.jsonl).
{AFHQ_LICENCE if "afhq" in dataset.lower() else ""}"""
    partial.write_text(card, encoding="utf-8")
    os.replace(partial, readme)
    return True


def how_to_use(name: str, flags: dict) -> tuple[str, str]:
    """Return what a model is, and a paragraph that loads it; both in Markdown."""
    ddpm, steps = "denoising diffusion model ([DDPM](https://arxiv.org/abs/2006.11239))", flags["ddpm_num_steps"]
    if flags["objective"] == "classify":
        return (
            "A noise-aware classifier",
            f"""It guides a DDPM of the same data and schedule:

```python
from diffusers import AutoModel, DiffusionPipeline

classifier = AutoModel.from_pretrained("{name}", subfolder="classifier", trust_remote_code=True)
pipeline = DiffusionPipeline.from_pretrained(
    "MODEL", custom_pipeline="pipelines/classifier_guided.py", classifier=classifier, trust_remote_code=True
)
image = pipeline(class_labels=[0], guidance_scale=2.0).images[0]
```""",
        )
    if flags["class_conditional"]:
        guidance = ", guidance_scale=2.0" if flags["label_dropout"] else ""
        return (
            f"A class-conditional {ddpm}",
            f"""With `ddpm_hf`'s pipeline file:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(
    "{name}", custom_pipeline="pipelines/class_conditional.py", trust_remote_code=True
)
image = pipeline(class_labels=[0]{guidance}).images[0]
```""",
        )
    ddim = f'In fewer steps: `DDIMPipeline.from_pretrained("{name}")(num_inference_steps={min(50, steps)}).images[0]`.'
    if flags["variance_type"] == "learned_range":
        ddim = "`DDIMPipeline` cannot use it: its UNet predicts a variance beside the noise (`learned_range`)."
    return (
        f"A {ddpm}",
        f"""It loads in stock diffusers:

```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("{name}")
image = pipeline(num_inference_steps={steps}).images[0]
```

{ddim}""",
    )
