"""Define every setting of a training run. Each field is a command-line flag and an entry of `train_config.json`.

A flag overrides the preset, and the preset overrides the default. This package adds the fields marked [added]. The
other 45 have the names, types and defaults of diffusers' example script
`examples/unconditional_image_generation/train_unconditional.py`.
This file does not import torch, because `--help` has to answer quickly.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UserError, no_such_flag
from ..files import is_utf_8
from ..sizes import read_size, write_size
from .fields import check_bounds, check_types, flag, split_list
from .presets import find_preset


@dataclass(kw_only=True)
class RecipeOptions:
    _argument_group_name = "recipe"

    preset: str | None = flag(None, "Recipe to start from; `ddpm_hf presets` lists them [added]")
    seed: int = flag(
        0,
        "Seed of the initial weights, the image order, the timesteps, the noise and the previews [added]",
        at_least=0,
        at_most=2**32 - 1,
    )
    dry_run: bool = flag(
        False,
        "Take a few steps; print how much time, memory and disk space the run needs; draw training images and their "
        "noisy versions in OUTPUT_DIR.dry_run.png; then stop [added]",
    )
    verbose: bool = flag(False, "With --dry_run: also print all flags and the config of the network [added]")


@dataclass(kw_only=True)
class DataOptions:
    _argument_group_name = "data"

    dataset_name: str | None = flag(
        None, "Hub id, local folder (images, or a copy of a Hub dataset), or `digits` (bundled)"
    )
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, if it has several")
    train_data_dir: str | None = flag(
        None, "Folder of images, or folder with one subfolder per class; ignored with --dataset_name"
    )
    cache_dir: str | None = flag(None, "Folder for downloads, instead of the HuggingFace cache")
    image_column: str | None = flag(None, "Column with the images; default: the first image column [added]")
    label_column: str | None = flag(None, "Column with the classes; default: the first class column [added]")
    class_names: list[str] | None = flag(
        None,
        "Keep only these classes, e.g. `cat` or `cat,dog`; default: all [added]",
    )
    resolution: int | str = flag(
        64, "Height and width in pixels that images are resized to, e.g. 64, or 48x64 (height x width) for rectangles"
    )
    center_crop: bool = flag(False, "Crop images in their middle, instead of at a random place")
    random_flip: bool = flag(False, "Mirror each image left to right with probability 1/2")
    balance_classes: bool = flag(
        False,
        "Use all classes equally often in each epoch, instead of each image once; images without a class keep their "
        "share [added]",
    )
    augment_probability: float = flag(
        0.0,
        "Share of images to rotate, scale, stretch, shift and mirror at random; a label marks these images, so that "
        "the UNet still generates unchanged images [added]",
        fraction=True,
    )
    preserve_input_precision: bool = flag(False, "Keep 16 and 32 bit images exact, instead of rounding them to 8 bit")
    channels: int | None = flag(
        None,
        "Channels of the images: 1 (grey), 2 (grey and opacity), 3 (RGB), 4 (RGBA), or any number for .npy and .npz "
        "files; default: for these files their own number, for pictures 1 if all are grey, else 3 [added]",
        at_least=1,
        at_most=1024,
    )
    pixel_range: list[str] | None = flag(
        None,
        "Values of black and white in images of more than 8 bits, e.g. --pixel_range=0,4095 for 12 bits; "
        "default: 0,65535 for integers, 0,1 for floats [added]",
    )
    on_bad_image: Literal["refuse", "skip"] = flag(
        "refuse",
        "What to do with unreadable images. refuse: stop; skip: find them before training, leave them out [added]",
    )
    pages: Literal["first", "all", "channels"] = flag(
        "first",
        "Which pages of a TIFF, or frames of a GIF, WebP or PNG, are images. all: read all files first, and use each "
        "page as an image of the file's class; channels: use all pages as the channels of one image [added]",
    )
    streaming: bool = flag(False, "Read the dataset as a stream, without storing it on disk [added]")
    validation_split: str | None = flag(
        None, "Held-out images: the name of a split, a count (500), or a share of the training images (0.05) [added]"
    )
    dataloader_num_workers: int = flag(
        0, "Extra processes that decode images, for datasets that do not fit in memory", at_least=0, at_most=1024
    )


@dataclass(kw_only=True)
class ModelOptions:
    _argument_group_name = "model"

    model_config_name_or_path: str | None = flag(
        None, "Config of a UNet2DModel: Hub id, folder or JSON file; it replaces the flags below that shape the UNet"
    )
    init_from: str | None = flag(
        None,
        "Model whose weights to start from: Hub id, or folder of a pipeline, a checkpoint or a UNet; its noise "
        "schedule, prediction type, image size and architecture are used too, unless you give their flags [added]",
    )
    base_channels: int | None = flag(None, "Channels of the first level; default: 128 [added]", at_least=1)
    channel_mults: list[str] | None = flag(
        None,
        "Channels of each level, as multiples of --base_channels; default: 1,1,2,2,4,4, with fewer levels if the "
        "images cannot be halved five times [added]",
    )
    layers_per_block: int | None = flag(None, "Residual blocks per level; default: 2 [added]", at_least=1, at_most=32)
    attention_resolutions: list[str] | None = flag(
        None,
        "Sizes in pixels of the levels with attention, e.g. 16,8; for rectangles, give the shorter side; default: the "
        "second smallest level [added]",
    )
    dropout: float | None = flag(None, "Dropout in the residual blocks; default: 0 [added]", fraction=True)
    attention_head_dim: int = flag(
        8, "Channels of each attention head; 0: one head over all channels [added]", at_least=0
    )
    norm_num_groups: int = flag(
        32,
        "Groups in a GroupNorm; this number is halved until it divides the channels of every level [added]",
        at_least=1,
    )
    norm_eps: float = flag(1e-5, "Added to the variance in a GroupNorm [added]", positive="e.g. 1e-5")
    resnet_time_scale_shift: Literal["default", "scale_shift"] = flag(
        "default",
        "How a residual block uses the timestep embedding. default: adds it; scale_shift: scales and shifts by it "
        "[added]",
    )
    flip_sin_to_cos: bool = flag(True, "Put the cosines of the timestep embedding before the sines [added]")
    freq_shift: int = flag(
        0,
        "The timestep embedding has the frequencies 10000^(-k/(n - freq_shift)), k = 0, ..., n-1 [added]",
        at_least=0,
        at_most=1,
    )
    downsample_padding: int = flag(
        1,
        "Padding before downsampling. 1: on all four sides; 0: right and bottom only [added]",
        at_least=0,
        at_most=1,
    )
    class_conditional: bool = flag(False, "Condition the UNet on the class of each image [added]")
    label_dropout: float = flag(
        0.1, "Share of images whose class is hidden in training, for classifier-free guidance [added]", fraction=True
    )
    enable_xformers_memory_efficient_attention: bool = flag(False, "Use xformers' attention, which saves memory")
    torch_compile: bool = flag(False, "Compile the UNet; this takes a minute or two before the first step [added]")
    cudnn_benchmark: bool = flag(
        True, "On NVIDIA GPUs, let cuDNN measure which of its kernels is fastest for each convolution [added]"
    )


@dataclass(kw_only=True)
class DiffusionOptions:
    _argument_group_name = "diffusion"

    ddpm_num_steps: int = flag(1000, "Timesteps T of the forward process", at_least=1, at_most=100_000)
    ddpm_num_inference_steps: int = flag(1000, "Sampling steps of the preview images", at_least=1)
    ddpm_beta_schedule: str = flag(
        "linear",
        "Noise schedule: a beta_schedule of diffusers such as linear, ho_linear (linear with betas times 1000/T), "
        "nichol_cosine, or a name that you added to BETA_SCHEDULES",
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = flag(
        "epsilon",
        "What the UNet predicts: epsilon (the noise), sample (the clean image), or v_prediction (a mix of both). "
        "If it predicts sample, all timesteps have the same weight in the loss. --snr_gamma 1e9 weights them by the "
        "SNR, as diffusers' script does",
    )
    rescale_betas_zero_snr: bool = flag(
        False, "Change the noise schedule so that its last timestep is pure noise; not for epsilon prediction [added]"
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = flag(
        "fixed_small", "Variance of the reverse process; with learned_range the UNet predicts it [added]"
    )
    objective: str | None = flag(
        None,
        "Loss to train with: simple (Ho et al.), hybrid (Nichol & Dhariwal), vlb (the variational bound), or classify "
        "(to train a classifier of noisy images for guidance, not a UNet); default: hybrid with "
        "--variance_type learned_range, else simple [added]",
    )
    timestep_sampling: Literal["uniform", "low_discrepancy", "loss_second_moment"] = flag(
        "uniform",
        "How timesteps are drawn. uniform: independently for each image; low_discrepancy: spread evenly over every "
        "batch; loss_second_moment: timesteps with large losses more often [added]",
    )
    loss_type: Literal["l2", "l1", "huber"] = flag(
        "l2", "Distance between the prediction and its target; huber is smooth L1 with beta 1 [added]"
    )
    snr_gamma: float | None = flag(
        None,
        "Weight the loss by Min-SNR with this gamma, e.g. 5; default: no weights [added]",
        positive="e.g. 5; for no weights, leave it out",
    )


@dataclass(kw_only=True)
class OptimisationOptions:
    _argument_group_name = "optimisation"

    train_batch_size: int = flag(16, "Images per process in one forward pass", at_least=1)
    gradient_accumulation_steps: int = flag(1, "Forward passes per optimizer step", at_least=1)
    num_epochs: int = flag(100, "Passes over the training images", at_least=1, at_most=10**6)
    max_train_steps: int | None = flag(
        None, "Optimizer steps, instead of --num_epochs [added]", at_least=1, at_most=10**12
    )
    learning_rate: float = flag(1e-4, "Highest learning rate, after warm-up", at_least=0)
    lr_scheduler: str = flag("cosine", "Learning-rate schedule of diffusers, e.g. constant_with_warmup or cosine")
    lr_warmup_steps: int = flag(500, "Optimizer steps of linear warm-up", at_least=0, at_most=10**12)
    adam_beta1: float = flag(0.95, "Decay of Adam's first moment", fraction=True)
    adam_beta2: float = flag(0.999, "Decay of Adam's second moment", fraction=True)
    adam_weight_decay: float = flag(1e-6, "Decoupled weight decay", at_least=0)
    adam_epsilon: float = flag(1e-08, "Added to Adam's denominator", positive="e.g. 1e-8")
    max_grad_norm: float = flag(1.0, "Clip the gradient to this norm; 0: do not clip [added]", at_least=0)
    use_ema: bool = flag(False, "Publish an exponential moving average of the weights")
    ema_inv_gamma: float = flag(
        1.0,
        "inv_gamma in the decay after s steps, 1 - (1 + s/inv_gamma)^-power; 0: the decay is always --ema_max_decay",
        at_least=0,
    )
    ema_power: float = flag(0.75, "The power in the formula of --ema_inv_gamma", at_least=0)
    ema_max_decay: float = flag(0.9999, "Highest decay of the moving average", fraction=True)
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = flag(
        "no",
        "Precision inside the UNet; the rest is float32. no: float32; auto [added]: bf16 if the processor supports "
        "it, else no",
    )
    local_rank: int = flag(-1, "Rank of this process on its machine; older launchers set this flag")


@dataclass(kw_only=True)
class OutputOptions:
    _argument_group_name = "output"

    output_dir: str = flag("ddpm-model-64", "Folder that the run is written to")
    overwrite_output_dir: bool = flag(False, "Replace an earlier run in --output_dir")
    resume_from_checkpoint: str | None = flag(
        None, "Checkpoint to continue from: its folder, or `latest` (if there is none, a new run starts)"
    )
    checkpointing_steps: int = flag(500, "Optimizer steps between checkpoints", at_least=1)
    checkpoints_total_limit: int | None = flag(None, "Number of checkpoints to keep; default: all", at_least=1)
    save_images_epochs: int = flag(10, "Epochs between sheets of preview images", at_least=1)
    save_model_epochs: int = flag(10, "Epochs between saves of the pipeline", at_least=1)
    eval_batch_size: int = flag(16, "Images on each sheet of previews", at_least=1, at_most=10_000)
    validation_epochs: int = flag(1, "Epochs between measurements of the validation loss [added]", at_least=1)
    ema_snapshots: int = flag(
        0,
        "Number of snapshots of averaged weights to save, spread evenly over the run, e.g. 32. From them, `ddpm_hf "
        "ema` makes averages over longer or shorter times. Each takes twice the disk space of the weights [added]",
        at_least=0,
        at_most=1000,
    )
    save_best: bool = flag(False, "Also save the best pipeline so far in best/, chosen by --best_by [added]")
    logger: Literal["tensorboard", "wandb", "trackio", "none"] = flag(
        "tensorboard", "Experiment tracker to log to, in addition to metrics.jsonl"
    )
    logging_dir: str = flag("logs", "The tracker's folder inside --output_dir")
    logging_steps: int = flag(10, "Optimizer steps averaged in each line of metrics.jsonl [added]", at_least=1)


@dataclass(kw_only=True)
class EvaluationOptions:
    _argument_group_name = "evaluation"

    eval_metrics: list[str] | None = flag(
        None, "Metrics to compute during training, e.g. fid,kid; the samples are drawn by DDIM in 50 steps [added]"
    )
    eval_epochs: int = flag(10, "Epochs between computations of --eval_metrics [added]", at_least=1)
    eval_num_images: int = flag(
        2000, "Images to draw for --eval_metrics, from the same noise each time [added]", at_least=40
    )
    eval_inception: str | None = flag(
        None, "File with the weights of FID's Inception network; default: pytorch-fid's [added]"
    )
    best_by: str = flag(
        "validation_loss", "Score that --save_best compares: validation_loss or one of --eval_metrics [added]"
    )


@dataclass(kw_only=True)
class HubOptions:
    _argument_group_name = "hub"

    push_to_hub: bool = flag(False, "Upload the run to the Hub, during and after training")
    hub_token: str | None = flag(None, "Hub token; default: the token of `hf auth login`")
    hub_model_id: str | None = flag(None, "Hub repository, [USER/]NAME; default: the name of --output_dir")
    hub_private_repo: bool = flag(False, "Create the repository as private")


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


@dataclass(kw_only=True)
class TrainingConfig(*reversed(GROUPS)):
    """All flags of one run. They are checked when the config is created. `from_preset` starts from a preset.

    A list may be a list (`[1, 2, 2]`) or a text as on the command line (`channel_mults="1,2,2"`). A path may be a
    string or a `pathlib.Path`. The field `preset` only records where the values came from.

    The attribute `given_flags` is not a flag. It is the set of the names of the flags that the user gave.
    `from_preset` stores the names of its arguments there, without the flags of the preset. In a config made directly,
    the set has each flag whose value is not the default. --init_from does not change the flags in this set.

    Raises:
        UserError: for a value that is not allowed. The message names the flag, the value and what is allowed.
    """

    def __post_init__(self):
        self.resolution = write_size(read_size(self.resolution, "--resolution", least=2))
        self.given_flags = frozenset(
            field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default
        )
        check_types(self)
        self._read_values()
        check_bounds(self)
        self._check_objective()
        self._check_folders()
        self._check_evaluation()
        self._check_data()

    @classmethod
    def from_preset(cls, preset: str | None = None, **flags) -> "TrainingConfig":
        """Return the config of a preset, changed by the given flags.

        Args:
            preset: a name in `PRESETS`, e.g. "mnist". None: only the defaults and `flags`.
            flags: fields of TrainingConfig. They override the preset even if their value is None. `num_epochs` also
                removes the preset's `max_train_steps`, because both flags say how long to train.

        Raises:
            UserError: for an unknown preset or flag, or a value that is not allowed.

        Example:
            >>> config = TrainingConfig.from_preset("mnist-cpu", base_channels=12, num_epochs=3)
            >>> config.base_channels, config.max_train_steps, config.learning_rate
            (12, None, 0.003)
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in flags:
            if name not in known:
                raise UserError(no_such_flag(name, known))
        values = dict(find_preset(preset).flags) if preset is not None else {}
        for name in values:
            if name not in known:
                raise UserError(f"in the preset {preset}, {no_such_flag(name, known)}")
        if "num_epochs" in flags:
            values.pop("max_train_steps", None)
        config = cls(preset=preset, **values | flags)
        config.given_flags = frozenset(flags)
        return config

    def _read_values(self):
        """Split the lists. Turn empty strings into None: on a command line, they clear a value of the preset."""
        self.validation_split = self.validation_split or None
        self.resume_from_checkpoint = self.resume_from_checkpoint or None
        self.init_from = self.init_from or None
        self.class_names = split_list(self.class_names)
        self.channel_mults = split_list(self.channel_mults, int, "--channel_mults 1,2,2,2")
        self.attention_resolutions = split_list(self.attention_resolutions, int, "--attention_resolutions 16,8")

    def _check_objective(self):
        """Choose the default objective, and refuse flags that the objective cannot use."""
        learned = self.variance_type == "learned_range"
        self.objective = self.objective or ("hybrid" if learned else "simple")
        if self.objective == "hybrid" and not learned:
            raise UserError(
                f"--objective hybrid trains a learned variance, but --variance_type is {self.variance_type}: give "
                "--variance_type learned_range, or --objective simple or vlb."
            )
        if self.objective == "simple" and learned:
            raise UserError(
                "--objective simple cannot train --variance_type learned_range: give --objective hybrid or vlb."
            )
        if self.augment_probability and self.ema_snapshots:
            raise UserError(
                "--ema_snapshots cannot be averaged after a training with --augment_probability: leave one of "
                "the two out."
            )
        if self.objective == "vlb" and (self.snr_gamma is not None or self.loss_type != "l2"):
            raise UserError("--objective vlb cannot be combined with --snr_gamma or --loss_type: leave them out.")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError(
                "--rescale_betas_zero_snr leaves no image at the last timestep, so predicting the noise there says "
                "nothing about the image: give --prediction_type v_prediction."
            )
        if self.rescale_betas_zero_snr and self.snr_gamma is not None:
            raise UserError(
                "--rescale_betas_zero_snr makes the SNR of the last timestep 0. With --snr_gamma, this timestep then "
                "has the weight 0 in the loss, so the first step of sampling would not be trained: leave one of the "
                "two out."
            )
        if self.objective == "classify":
            unused = ["class_conditional", "eval_metrics", "model_config_name_or_path", "init_from", "snr_gamma"]
            unused += ["augment_probability", "ema_snapshots", "enable_xformers_memory_efficient_attention"]
            unused += ["loss_type"] * (self.loss_type != "l2")
            if given := [name for name in unused if getattr(self, name)]:
                off = f" or add --no_{given[0]}" if getattr(self, given[0]) is True else ""  # it may be the preset's
                raise UserError(f"--objective classify cannot use --{given[0]}: leave it out{off}.")
        if self.ddpm_num_inference_steps > self.ddpm_num_steps and self.objective != "classify":
            raise UserError(
                f"--ddpm_num_inference_steps is {self.ddpm_num_inference_steps}, but must be at most "
                f"--ddpm_num_steps, {self.ddpm_num_steps}: give a smaller number."
            )

    def _check_folders(self):
        """Refuse an --output_dir that is empty or whose path is not UTF-8, and a --logging_dir outside it."""
        if not self.output_dir:
            raise UserError("--output_dir is empty: give the name of a folder.")
        if not is_utf_8(Path(self.output_dir).absolute()):
            raise UserError(
                f"--output_dir {self.output_dir!r} is in a path that is not UTF-8, and safetensors cannot load files "
                "from there: give another folder."
            )
        if Path(self.logging_dir).is_absolute() or not {"", ".", ".."}.isdisjoint(self.logging_dir.split("/")):
            raise UserError(
                f"--logging_dir {self.logging_dir!r} is not inside --output_dir: give a name such as logs."
            )

    def _check_evaluation(self):
        """Refuse metrics that cannot be computed, and a --best_by or --save_best whose score will not be measured."""
        self.eval_metrics = split_list(self.eval_metrics)
        if self.eval_metrics and self.streaming:
            raise UserError("--eval_metrics needs the whole dataset, and --streaming does not keep it: leave one out.")
        if self.best_by not in ["validation_loss", *(self.eval_metrics or [])]:
            raise UserError(
                f"--best_by {self.best_by} is not measured: give validation_loss or one of --eval_metrics."
            )
        if self.save_best and self.best_by == "validation_loss" and self.validation_split is None:
            raise UserError("--save_best needs held-out images to measure a loss: add --validation_split, e.g. 0.05.")

    def _check_data(self):
        """Refuse a missing dataset, an impossible --pixel_range, and data flags that contradict each other."""
        self.pixel_range = split_list(self.pixel_range, float, "--pixel_range=0,4095") or None
        if self.pixel_range is not None:
            numbers = ",".join(f"{value:.10g}" for value in self.pixel_range)
            is_finite = all(map(math.isfinite, self.pixel_range))
            if len(self.pixel_range) != 2 or not is_finite or self.pixel_range[0] >= self.pixel_range[1]:
                raise UserError(
                    f"--pixel_range is {numbers}, but must be two numbers: the value of black, then the larger value "
                    "of white, e.g. --pixel_range=0,4095."
                )
        for given, name in [(self.on_bad_image == "skip", "on_bad_image skip"), (self.pages == "all", "pages all")]:
            if given and self.streaming:
                raise UserError(
                    f"--{name} reads all images before training, and --streaming does not keep them: leave one out."
                )
        if self.balance_classes and self.streaming:
            raise UserError(
                "--balance_classes needs the classes of all images, and --streaming does not keep them: leave one out."
            )
        if self.validation_split == "train":
            raise UserError("--validation_split train names the training images: give another split or a share.")
        if self.dataset_name is None and self.train_data_dir is None:
            raise UserError(
                "there is nothing to train on: give --preset, --dataset_name (Hub id or folder) or --train_data_dir."
            )

    def to_dict(self) -> dict:
        """Return all flags except the Hub token, as a dict that can be written as JSON."""
        flags = dataclasses.asdict(self)
        del flags["hub_token"]
        return flags
