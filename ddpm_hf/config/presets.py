"""Define the presets. A preset is a named set of flags for a complete run.

`--preset NAME` alone starts a complete run. Every other flag overrides the preset. Descriptions and comments name the
sources of the numbers:

    Ho        Ho et al. 2020, https://huggingface.co/papers/2006.11239, hojonathanho/diffusion `scripts/run_cifar.py`
    Nichol    Nichol & Dhariwal 2021, https://huggingface.co/papers/2102.09672, and openai/improved-diffusion README
    ADM       Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233, openai/guided-diffusion script_util.py
    EDM       Karras et al. 2022, https://huggingface.co/papers/2206.00364, table of AFHQv2-64 settings
    Salimans  Salimans & Ho 2022, https://huggingface.co/papers/2202.00512
    P2        Choi et al. 2022, https://huggingface.co/papers/2204.00227, and jychoi118/P2-weighting issue 2
    course    huggingface/diffusion-models-class, units 1 and 2 (class-conditional MNIST at 28 px)
    here      experiments of this project: docs/results.md
"""

from typing import NamedTuple

from ..errors import UserError, no_such


class Preset(NamedTuple):
    """A preset: its description in one line, and the flags that differ from the defaults of TrainingConfig.

    Example:
        >>> flags = ddpm_hf.PRESETS["mnist-cpu"].flags | {"base_channels": 24}
        >>> ddpm_hf.PRESETS["mine"] = ddpm_hf.Preset("mnist-cpu with more channels", flags)
        >>> ddpm_hf.TrainingConfig.from_preset("mine").base_channels
        24
    """

    about: str
    flags: dict


ADAM = dict(adam_beta1=0.9, adam_beta2=0.999, adam_weight_decay=0.0, adam_epsilon=1e-8)  # Ho, Nichol: TF/torch default

# Ho's UNet, as in the published google/ddpm-cifar10-32. It has one attention head, the timestep embedding of
# Tensor2Tensor (sin before cos, log(10000)/(half - 1)), and padding on the right and bottom before downsampling.
HO_UNET = dict(attention_head_dim=0, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, norm_eps=1e-6)
# Nichol's UNet: 4 heads of 256 / 4 = 64 channels, and each block is scaled and shifted by the timestep ("FiLM").
# Its layers are those of improved-diffusion. Three things differ:
# - improved-diffusion multiplies the timestep by 1000 / T (`rescale_timesteps`). A stock UNet2DModel cannot do this.
#   Here the timesteps go from 0 to 3999.
# - improved-diffusion has torch's default initial weights. We use Ho's.
# - improved-diffusion starts the moving average at the initial weights. Here it starts later, see CONSTANT_EMA.
NICHOL_UNET = dict(attention_head_dim=64, resnet_time_scale_shift="scale_shift")
# Decay 0.9999 (Ho `tpu_utils.py: make_ema`, Nichol `train_util.py`), without warm-up. As in Ho's code, the average
# starts as the weights after the first step. In Nichol's code, the average starts as the initial weights.
CONSTANT_EMA = dict(use_ema=True, ema_inv_gamma=0.0, ema_max_decay=0.9999)
AFHQ = dict(
    dataset_name="huggan/AFHQ",
    class_names=["cat"],
    validation_split="500",  # AFHQ v1 has 500 test images of cats, which huggan/AFHQ has merged into train
    center_crop=True,
    random_flip=True,  # Ho: on all datasets except LSUN
    layers_per_block=2,  # Ho
    save_best=True,  # the UNet can overfit 5,000 images
    attention_resolutions=[16],  # Ho
    ddpm_beta_schedule="nichol_cosine",
    variance_type="fixed_large",  # Ho: better than fixed_small when all T steps are taken
    ddpm_num_inference_steps=100,  # previews only
    lr_scheduler="constant_with_warmup",
    lr_warmup_steps=5000,  # Ho
    save_images_epochs=50,
    save_model_epochs=50,
    validation_epochs=5,
    checkpointing_steps=2000,
    checkpoints_total_limit=3,
    mixed_precision="auto",
    **HO_UNET,
    **ADAM,
    **CONSTANT_EMA,
)
# Steps, batch and dropout are those of P2 on AFHQ at 256 px. The learning rate is that of Ho's 256 px models.
AFHQ_LARGE = dict(AFHQ, train_batch_size=8, max_train_steps=300_000, dropout=0.1, learning_rate=2e-5)
MNIST = dict(
    dataset_name="ylecun/mnist",
    resolution=28,
    validation_split="test",
    base_channels=32,  # course: channels 32, 64, 64 in three levels (28, 14, 7 px), two blocks each
    channel_mults=[1, 2, 2],
    layers_per_block=2,
    attention_resolutions=[7],  # course: 14 and 7; attention at 14 px would use a third of the training time
    attention_head_dim=0,
    ddpm_beta_schedule="nichol_cosine",
    # Predict v, because at the noisy end of cosine betas, 1/sqrt(abar) amplifies errors of a predicted epsilon
    # (Salimans). With epsilon, backgrounds stay grey for several epochs (here).
    prediction_type="v_prediction",
    variance_type="fixed_large",
    ddpm_num_inference_steps=100,
    train_batch_size=64,  # course: 128; a batch of 64 gives twice the steps in the same time
    num_epochs=5,  # course: 10; an hour on one core allows 5
    learning_rate=1e-3,  # course
    lr_warmup_steps=200,
    use_ema=True,
    ema_max_decay=0.999,  # an average over about the last 1,000 of 4,688 steps
    mixed_precision="auto",  # here: the same loss curve in less time; all larger presets use it too
    save_images_epochs=1,
    save_model_epochs=1,
    checkpointing_steps=500,
    checkpoints_total_limit=2,
    output_dir="runs/mnist",
    **ADAM,
)
# The flags that are the same in both papers, Ho and Nichol.
CIFAR10 = dict(
    dataset_name="uoft-cs/cifar10",
    resolution=32,
    validation_split="test",
    base_channels=128,
    channel_mults=[1, 2, 2, 2],
    ddpm_num_inference_steps=100,  # previews only
    train_batch_size=128,
    save_images_epochs=50,
    save_model_epochs=50,
    validation_epochs=10,
    checkpointing_steps=5000,
    checkpoints_total_limit=3,
    mixed_precision="auto",
    **ADAM,
    **CONSTANT_EMA,
)
# Color at 32 px on one CPU core.
COLOR_CPU = dict(
    resolution=32,
    random_flip=True,
    layers_per_block=1,
    norm_num_groups=8,
    attention_resolutions=[8],
    attention_head_dim=0,  # one head: heads of 8 channels take 40 % longer on a CPU (here)
    ddpm_beta_schedule="nichol_cosine",
    prediction_type="v_prediction",  # as in MNIST
    variance_type="fixed_large",
    ddpm_num_inference_steps=50,
    train_batch_size=32,  # as mnist-cpu, like adam_beta2
    use_ema=True,
    ema_max_decay=0.999,
    mixed_precision="auto",
    eval_batch_size=36,
    checkpointing_steps=500,
    checkpoints_total_limit=2,
    **dict(ADAM, adam_beta2=0.99),
)
PRESETS = {
    "digits": Preset(
        "scikit-learn's 1,797 digits of 8x8 px, bundled: a complete trial run, 3 minutes on 1 CPU core",
        dict(
            dataset_name="digits",
            resolution=8,
            validation_split="0.1",
            validation_epochs=10,
            base_channels=32,
            channel_mults=[1, 2],
            layers_per_block=2,
            attention_resolutions=[4],
            attention_head_dim=0,
            ddpm_beta_schedule="nichol_cosine",
            prediction_type="v_prediction",
            ddpm_num_inference_steps=250,
            train_batch_size=64,
            num_epochs=40,
            learning_rate=2e-3,
            lr_warmup_steps=100,
            use_ema=True,
            ema_max_decay=0.995,
            eval_batch_size=36,
            save_images_epochs=20,
            save_model_epochs=40,
            checkpointing_steps=500,
            checkpoints_total_limit=2,
            output_dir="runs/digits",
            **ADAM,
        ),
    ),
    "mnist": Preset(
        "MNIST at its native 28x28 px, one channel: the course's UNet, cosine betas; 52 minutes on 1 CPU core",
        MNIST,
    ),
    "mnist-cpu": Preset(
        "MNIST with fewer channels and blocks, small batches, all found by experiment: 6 minutes on 2 CPU cores",
        dict(
            MNIST,
            base_channels=16,
            channel_mults=[1, 2, 4],
            layers_per_block=1,
            norm_num_groups=8,
            train_batch_size=32,
            max_train_steps=2600,
            learning_rate=3e-3,
            lr_warmup_steps=100,
            adam_beta2=0.99,
            ema_max_decay=0.99,
            output_dir="runs/mnist-cpu",
        ),
    ),
    "cifar10": Preset(
        "CIFAR-10 as Ho et al.: 35.7 M parameters, 800,000 steps of batch 128; the paper has FID 3.17, IS 9.46",
        dict(
            CIFAR10,
            random_flip=True,
            layers_per_block=2,
            attention_resolutions=[16],
            dropout=0.1,
            ddpm_beta_schedule="ho_linear",
            variance_type="fixed_large",
            max_train_steps=800_000,
            learning_rate=2e-4,
            lr_scheduler="constant_with_warmup",
            lr_warmup_steps=5000,
            output_dir="runs/cifar10",
            **HO_UNET,
        ),
    ),
    "cifar10-cosine": Preset(
        "CIFAR-10 as Nichol & Dhariwal's L_hybrid: cosine betas, T=4000, learned variance; the paper has FID 3.19, "
        "3.17 bits/dim. For their L_vlb (FID 11.47, 2.94 bits/dim), add --objective vlb --timestep_sampling "
        "loss_second_moment. Unlike the paper: timesteps from 0 to 3999, and Ho's initial weights",
        dict(
            CIFAR10,
            layers_per_block=3,
            attention_resolutions=[16, 8],
            dropout=0.3,
            ddpm_beta_schedule="nichol_cosine",
            ddpm_num_steps=4000,
            variance_type="learned_range",
            max_train_steps=500_000,
            learning_rate=1e-4,
            lr_scheduler="constant",
            lr_warmup_steps=0,
            max_grad_norm=0.0,
            output_dir="runs/cifar10-cosine",
            **NICHOL_UNET,
        ),
    ),
    "afhq-cat-cpu": Preset(
        "AFHQ cats at 32 px: 75 minutes on 1 CPU core, or 18 with --max_train_steps 2400",
        dict(
            COLOR_CPU,
            dataset_name="huggan/AFHQ",
            class_names=["cat"],
            validation_split="200",
            # Few channels at 32 px, many at 4 px. In equal CPU time, this is as good as three levels of 32, 64 and 128
            # channels (here).
            base_channels=24,
            channel_mults=[1, 2, 4, 6],
            # Both lower the validation loss in the same time (here).
            resnet_time_scale_shift="scale_shift",  # Nichol
            timestep_sampling="low_discrepancy",
            max_train_steps=10_200,
            learning_rate=2e-3,
            lr_warmup_steps=100,  # as mnist-cpu
            save_images_epochs=15,
            save_model_epochs=15,
            validation_epochs=5,
            output_dir="runs/afhq-cat-cpu",
        ),
    ),
    "cifar10-cpu": Preset(
        "class-conditional CIFAR-10, to be sampled with --guidance_scale: 84 minutes on 1 CPU core",
        dict(
            COLOR_CPU,
            dataset_name="uoft-cs/cifar10",
            class_conditional=True,
            label_dropout=0.1,  # Ho & Salimans 2022, https://huggingface.co/papers/2207.12598
            validation_split="test",
            base_channels=32,
            channel_mults=[1, 2, 4, 4],
            max_train_steps=8500,
            # A UNet with 32, 64, 128 and 192 channels did not learn in 450 steps at 2e-3 (here).
            learning_rate=1.5e-3,
            lr_warmup_steps=200,
            save_images_epochs=1,
            save_model_epochs=1,
            validation_epochs=1,
            output_dir="runs/cifar10-cpu",
        ),
    ),
    "afhq-cat-64": Preset(
        "AFHQ cats at 64 px: channels and dropout as EDM's AFHQv2-64, batch and learning rate as Ho's CIFAR-10",
        dict(
            AFHQ,
            resolution=64,
            base_channels=128,
            channel_mults=[1, 2, 2, 2],  # EDM
            dropout=0.25,  # EDM
            train_batch_size=128,
            max_train_steps=100_000,  # here: 12.8 million images, 2,500 passes
            learning_rate=2e-4,
            output_dir="runs/afhq-cat-64",
        ),
    ),
    "afhq-cat-128": Preset(
        "AFHQ cats at 128 px: levels as ADM at that size, the rest as Ho's 256 px models and P2's AFHQ run",
        dict(
            AFHQ_LARGE,
            resolution=128,
            base_channels=128,
            channel_mults=[1, 1, 2, 3, 4],
            output_dir="runs/afhq-cat-128",
        ),
    ),
    "afhq-cat-256": Preset(
        "AFHQ cats at 256 px: Ho's 114 M parameter UNet for CelebA-HQ and LSUN, P2's batch, steps and dropout",
        dict(
            AFHQ_LARGE,
            resolution=256,
            base_channels=128,
            channel_mults=[1, 1, 2, 2, 4, 4],
            output_dir="runs/afhq-cat-256",
        ),
    ),
    "afhq-cat-512": Preset(
        "AFHQ cats at their native 512 px: levels as ADM at that size (0.5, 1, 1, 2, 2, 4, 4 times 128)",
        dict(
            AFHQ_LARGE,
            resolution=512,
            base_channels=64,
            channel_mults=[1, 2, 2, 4, 4, 8, 8],
            output_dir="runs/afhq-cat-512",
            dataloader_num_workers=4,
        ),
    ),
}
BUILT_IN = dict(PRESETS)  # without presets that are added later


def find_preset(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
        UserError: if there is no such preset, or if its entry of PRESETS is not a Preset.
    """
    if name not in PRESETS:
        raise UserError(no_such("preset", name, PRESETS))
    preset = PRESETS[name]
    if not isinstance(preset, Preset):
        given = type(preset).__name__
        raise UserError(
            f'PRESETS["{name}"] is a {given}, but must be a Preset: write Preset("its text", {{its flags}}).'
        )
    return preset
