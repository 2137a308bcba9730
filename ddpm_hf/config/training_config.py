"""Every knob of a training run: one field is one flag is one line of `train_config.json`.

Precedence: default < preset < command line. Fields marked [ours] are not in diffusers' example
`examples/unconditional_image_generation/train_unconditional.py`; the other 45 have its names, types and defaults.
No torch in here, so that `--help` answers at once.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from ..errors import UserError
from .presets import split_list


METRICS = [
    "fid",
    "inception_score",
    "kid",
    "precision_recall",
    "fd_dinov2",
    "fd_mnist",
    "bits_per_dim",
    "memorization",
]


def flag(default, help):
    return HfArg(default=default, help=help)


@dataclass(kw_only=True)
class RecipeOptions:
    _argument_group_name = "recipe"

    preset: str | None = flag(None, "Published recipe to start from; `python -m ddpm_hf presets` lists them [ours]")
    seed: int = flag(0, "Seeds weights, order of images, timesteps, noise and previews [ours]")
    dry_run: bool = flag(False, "Print config, parameters, images and steps, then stop [ours]")


@dataclass(kw_only=True)
class DataOptions:
    _argument_group_name = "data"

    dataset_name: str | None = flag(
        None, "Hub id, local folder in the Hub's layout or of images, or `digits` (bundled)"
    )
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, if it has several")
    train_data_dir: str | None = flag(None, "Folder of images, subfolders are classes; ignored with --dataset_name")
    cache_dir: str | None = flag(None, "Where downloads go instead of the HuggingFace cache")
    image_column: str | None = flag(None, "Column of the images; default: the first that holds images [ours]")
    label_column: str | None = flag(None, "Column of the classes; default: the first class column [ours]")
    class_names: list[str] | None = flag(None, "Keep only these classes, e.g. `cat` or `cat,dog` [ours]")
    resolution: int = flag(64, "Height and width in pixels that images are resized to")
    center_crop: bool = flag(False, "Crop the centre of images that are not square; otherwise a random square")
    random_flip: bool = flag(False, "Mirror half of the images left to right")
    preserve_input_precision: bool = flag(False, "Keep 16 and 32 bit images exact instead of rounding to 8 bit")
    streaming: bool = flag(False, "Read the dataset as a stream, never whole on disk [ours]")
    validation_split: str | None = flag(
        None, "Held-out images: a split's name, or a count (500) or share (0.05) chosen by hash from train [ours]"
    )
    dataloader_num_workers: int = flag(0, "Processes that decode images of sets too large to be held in memory")


@dataclass(kw_only=True)
class ModelOptions:
    _argument_group_name = "model"

    model_config_name_or_path: str | None = flag(None, "UNet2DModel config: Hub id, folder or JSON file")
    base_channels: int | None = flag(None, "Channels of the first level [ours]")
    channel_mults: list[str] | None = flag(None, "Channels of each level over --base_channels, e.g. 1,2,2,2 [ours]")
    layers_per_block: int | None = flag(None, "Residual blocks per level [ours]")
    attention_resolutions: list[str] | None = flag(None, "Levels with attention, in pixels: 16,8; empty: none [ours]")
    dropout: float | None = flag(None, "Dropout in the residual blocks [ours]")
    class_conditional: bool = flag(False, "Tell the UNet the class of each image [ours]")
    label_dropout: float = flag(0.1, "Share of --class_conditional images taught without class, for guidance [ours]")
    enable_xformers_memory_efficient_attention: bool = flag(False, "Use xformers' attention")
    torch_compile: bool = flag(False, "Compile the UNet; costs a minute or two before the first step [ours]")


@dataclass(kw_only=True)
class DiffusionOptions:
    _argument_group_name = "diffusion"

    ddpm_num_steps: int = flag(1000, "Timesteps T of the forward process")
    ddpm_num_inference_steps: int = flag(1000, "Steps of the preview samples")
    ddpm_beta_schedule: str = flag(
        "linear", "ho_linear (scaled by 1000/T), nichol_cosine, or a name of diffusers with its meaning there"
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = flag("epsilon", "What the UNet predicts")
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = flag(
        "fixed_small", "Variance of the reverse process; learned_range trains it too [ours]"
    )
    objective: str | None = flag(
        None,
        "simple (Ho), hybrid (Nichol; default with learned_range), vlb (the variational bound), or classify: train a "
        "classifier of noisy images, for guidance, instead of a UNet [ours]",
    )
    timestep_sampling: Literal["uniform", "loss_second_moment"] = flag(
        "uniform", "How timesteps are drawn; loss_second_moment: costly ones more often, weighted less [ours]"
    )
    loss_type: Literal["l2", "l1", "huber"] = flag("l2", "Distance between prediction and target [ours]")
    snr_gamma: float | None = flag(None, "Min-SNR loss weighting with this gamma, e.g. 5; default: none [ours]")


@dataclass(kw_only=True)
class OptimisationOptions:
    _argument_group_name = "optimisation"

    train_batch_size: int = flag(16, "Images per process in one forward pass")
    gradient_accumulation_steps: int = flag(1, "Forward passes per optimizer step")
    num_epochs: int = flag(100, "Times each image is seen")
    max_train_steps: int | None = flag(None, "Optimizer steps; overrides --num_epochs [ours]")
    learning_rate: float = flag(1e-4, "Highest learning rate, after warm-up")
    lr_scheduler: str = flag("cosine", "Learning-rate schedule of diffusers: constant_with_warmup, cosine, ...")
    lr_warmup_steps: int = flag(500, "Optimizer steps of linear warm-up")
    adam_beta1: float = flag(0.95, "Decay of the first moment")
    adam_beta2: float = flag(0.999, "Decay of the second moment")
    adam_weight_decay: float = flag(1e-6, "Decoupled weight decay")
    adam_epsilon: float = flag(1e-08, "Added to the denominator")
    max_grad_norm: float = flag(1.0, "Clip the gradient to this global norm; 0: never [ours]")
    use_ema: bool = flag(False, "Publish an exponential moving average of the weights")
    ema_inv_gamma: float = flag(1.0, "Decay after s steps is 1 - (1 + s/inv_gamma)^-power; 0: no warm-up")
    ema_power: float = flag(0.75, "See --ema_inv_gamma")
    ema_max_decay: float = flag(0.9999, "Highest decay of the average")
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = flag(
        "no", "Precision inside the UNet; all else stays float32. auto: bf16 where the processor has it [auto is ours]"
    )
    local_rank: int = flag(-1, "Rank on this machine, as older launchers pass it")


@dataclass(kw_only=True)
class OutputOptions:
    _argument_group_name = "output"

    output_dir: str = flag("ddpm-model-64", "Folder of the run")
    overwrite_output_dir: bool = flag(False, "Replace the run that is in --output_dir")
    resume_from_checkpoint: str | None = flag(None, "`latest` (starts afresh if there is none) or a checkpoint folder")
    checkpointing_steps: int = flag(500, "Optimizer steps between checkpoints")
    checkpoints_total_limit: int | None = flag(None, "Checkpoints kept; default: all")
    save_images_epochs: int = flag(10, "Epochs between sample sheets")
    save_model_epochs: int = flag(10, "Epochs between savings of the pipeline")
    eval_batch_size: int = flag(16, "Images on a sample sheet")
    validation_epochs: int = flag(1, "Epochs between validation losses [ours]")
    save_best: bool = flag(False, "Keep the pipeline with the lowest validation loss in best/ [ours]")
    logger: Literal["tensorboard", "wandb", "trackio", "none"] = flag("tensorboard", "Tracker beside metrics.jsonl")
    logging_dir: str = flag("logs", "The tracker's folder inside --output_dir")
    logging_steps: int = flag(10, "Optimizer steps that one line of metrics.jsonl averages [ours]")


@dataclass(kw_only=True)
class EvaluationOptions:
    _argument_group_name = "evaluation"

    eval_metrics: list[str] | None = flag(
        None, "Scores of DDIM-50 samples while training, e.g. fid,kid or fd_mnist,bits_per_dim [ours]"
    )
    eval_epochs: int = flag(10, "Epochs between scores [ours]")
    eval_num_images: int = flag(2000, "Images that scores are of, from the same noise each time [ours]")
    eval_inception: str | None = flag(None, "Weights of FID's Inception; default: pytorch-fid's release [ours]")
    best_by: str = flag("validation_loss", "What best/ is chosen by: validation_loss or one of --eval_metrics [ours]")


@dataclass(kw_only=True)
class HubOptions:
    _argument_group_name = "hub"

    push_to_hub: bool = flag(False, "Push the pipeline to the Hub, during and after training")
    hub_token: str | None = flag(None, "Token to push with; default: that of `hf auth login`")
    hub_model_id: str | None = flag(None, "Repository; default: the name of --output_dir")
    hub_private_repo: bool = flag(False, "Create the repository private")


GROUPS = [
    RecipeOptions,
    DataOptions,
    ModelOptions,
    DiffusionOptions,
    OptimisationOptions,
    OutputOptions,
    EvaluationOptions,
    HubOptions,
]
# A flag of these must be at least this much.
MINIMUM = dict(
    resolution=2, dataloader_num_workers=0, base_channels=1, layers_per_block=1, ddpm_num_steps=1,
    ddpm_num_inference_steps=1, train_batch_size=1, gradient_accumulation_steps=1, num_epochs=1, max_train_steps=1,
    learning_rate=0, lr_warmup_steps=0, adam_weight_decay=0, max_grad_norm=0, ema_inv_gamma=0, ema_power=0,
    checkpointing_steps=1, checkpoints_total_limit=1, save_images_epochs=1, save_model_epochs=1, eval_batch_size=1,
    validation_epochs=1, logging_steps=1, seed=0, eval_epochs=1, eval_num_images=40,
)  # fmt: skip
# A flag of these must be at most this much.
MAXIMUM = dict(seed=2**32 - 1, ddpm_num_steps=100_000, resolution=8192)
# A flag of these lies in [0, 1).
FRACTIONS = ["dropout", "label_dropout", "adam_beta1", "adam_beta2", "ema_max_decay"]


@dataclass(kw_only=True)
class TrainingConfig(*reversed(GROUPS)):
    """The resolved flags of one run.

    Raises:
        UserError: for a value that no run can have, naming the flag, the value and what it may be.
    """

    def __post_init__(self):
        self.validation_split = self.validation_split or None  # `--validation_split ""`: not even the preset's
        self.resume_from_checkpoint = self.resume_from_checkpoint or None
        self.class_names = split_list(self.class_names)
        self.channel_mults = split_list(self.channel_mults, int, "--channel_mults 1,2,2,2")
        self.attention_resolutions = split_list(self.attention_resolutions, int, "--attention_resolutions 16,8")
        for name, least in MINIMUM.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"--{name} is {value}, but must be at least {least}: give a larger number.")
        for name, most in MAXIMUM.items():
            if getattr(self, name) > most:
                raise UserError(
                    f"--{name} is {getattr(self, name)}, but must be at most {most}: give a smaller number."
                )
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name} is {value}, but must be a number: give a finite one.")
        for name in FRACTIONS:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"--{name} is {value}, but must lie between 0 and 1 (1 excluded).")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise UserError(f"--snr_gamma is {self.snr_gamma}, but must be positive, e.g. 5; leave it out for none.")
        learned = self.variance_type == "learned_range"
        self.objective = self.objective or ("hybrid" if learned else "simple")
        if self.objective == "hybrid" and not learned:
            raise UserError(
                f"--objective hybrid teaches a learned variance, but --variance_type is {self.variance_type}: "
                "give learned_range, or simple or vlb."
            )
        if self.objective == "simple" and learned:
            raise UserError("--objective simple leaves --variance_type learned_range untaught: give hybrid or vlb.")
        if self.objective == "vlb" and (self.snr_gamma is not None or self.loss_type != "l2"):
            raise UserError(
                "--objective vlb is a likelihood, which --snr_gamma and --loss_type cannot change: leave them out."
            )
        if self.objective == "classify":
            unused = ["class_conditional", "eval_metrics", "model_config_name_or_path", "snr_gamma"]
            unused += ["enable_xformers_memory_efficient_attention"] + ["loss_type"] * (self.loss_type != "l2")
            if given := [name for name in unused if getattr(self, name)]:
                raise UserError(f"--objective classify trains a classifier, which has no --{given[0]}: leave it out.")
        if self.adam_epsilon <= 0:
            raise UserError(f"--adam_epsilon is {self.adam_epsilon}, but must be positive, e.g. 1e-8.")
        if self.ddpm_num_inference_steps > self.ddpm_num_steps and self.objective != "classify":
            raise UserError(
                f"--ddpm_num_inference_steps is {self.ddpm_num_inference_steps}, but a model of "
                f"--ddpm_num_steps {self.ddpm_num_steps} can take at most {self.ddpm_num_steps}: lower the first."
            )
        if not self.output_dir:
            raise UserError("--output_dir is empty: give the name of a folder.")
        if Path(self.logging_dir).is_absolute() or not {"", ".", ".."}.isdisjoint(self.logging_dir.split("/")):
            raise UserError(
                f"--logging_dir {self.logging_dir!r} is not inside --output_dir: give a name such as logs."
            )
        if self.validation_split == "train":
            raise UserError("--validation_split train is what is trained on: name another split, a count or a share.")
        self.eval_metrics = split_list(self.eval_metrics)
        for name in self.eval_metrics or []:
            if name not in METRICS:
                raise UserError(f"--eval_metrics {name} is not known: choose from {', '.join(METRICS)}.")
        if self.eval_metrics and self.streaming:
            raise UserError("--eval_metrics compare with all images, and --streaming has them not: leave one out.")
        if self.best_by not in ["validation_loss", *(self.eval_metrics or [])]:
            raise UserError(
                f"--best_by {self.best_by} is not measured: give validation_loss or one of --eval_metrics."
            )
        if self.save_best and self.best_by == "validation_loss" and self.validation_split is None:
            raise UserError("--save_best needs held-out images to choose by: add --validation_split, e.g. 0.05.")
        if self.dataset_name is None and self.train_data_dir is None:
            raise UserError(
                "there is nothing to train on: give --preset, --dataset_name (Hub id or folder) or --train_data_dir."
            )

    def to_dict(self):
        """Return the flags as a JSON-able dict, without the token."""
        flags = dataclasses.asdict(self)
        del flags["hub_token"]
        return flags
