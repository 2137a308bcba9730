"""Guide a UNet towards a class. The networks here are called like a UNet, so every sampler accepts them."""

import math

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ..diffusion.scheduler import PaperDDPMScheduler
from ..errors import UserError
from ..models.classes import Classes
from ..models.classifier import NoisyClassifier
from .samplers import clipped


SAME_SIGNAL = 0.01  # a classifier can guide a model if their abar differ by at most this


class Guided(nn.Module):
    """The base class of networks that replace `unet` in a sampler. Their device and dtype are those of `unet`."""

    def __init__(self, unet: UNet2DModel, scheduler: PaperDDPMScheduler, scale: float):
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.scale = scale
        self.config = unet.config

    device = property(lambda self: self.unet.device)
    dtype = property(lambda self: self.unet.dtype)


class ClassifierFree(Guided):
    """A conditional UNet under classifier-free guidance (Ho & Salimans 2022, eq. 6, where w is `scale` - 1).

    out = out(no class) + scale * (out(class) - out(no class)). With scale 1 this is the prediction of the UNet itself.
    With scale 0 the class has no effect, so images of all classes are drawn. The UNet's last embedding means "no
    class". Each call of this network makes two predictions with the UNet.
    """

    def forward(self, sample, timesteps, class_labels) -> UNet2DOutput:
        """Return the guided prediction for `sample` (B, C, H, W) and `class_labels` (B,).

        If the UNet also predicts a variance, the variance is returned without guidance.
        """
        no_class = torch.full_like(class_labels, self.config.num_class_embeds - 1)
        labels = torch.cat([class_labels, no_class])
        output = self.unet(sample.repeat(2, 1, 1, 1), timesteps.repeat(2), labels).sample.float()
        conditional, unconditional = output.chunk(2)
        guided = (unconditional + self.scale * (conditional - unconditional))[:, : sample.shape[1]]
        original = self.scheduler.predict_original_sample(guided, sample.float(), timesteps)
        prediction = as_prediction(self.scheduler, original, sample, timesteps)
        return UNet2DOutput(torch.cat([prediction, conditional[:, sample.shape[1] :]], dim=1))


class ClassifierGuided(Guided):
    """An unconditional UNet under classifier guidance (Dhariwal & Nichol 2021, Algorithm 2, which is for DDIM).

    Every sampler is guided in this way, DDPM too. For DDPM, Dhariwal & Nichol have another rule, Algorithm 1, which
    shifts the mean of each step. For small steps, the two rules agree. With the linear schedule and 1,000 timesteps,
    the shift here is larger than in Algorithm 1: by 1 % for t from 300 to 990, and by 16 % at t = 10.

    eps = eps(x_t) - scale sqrt(1 - abar_t) grad log p(y | x_t). The factor sqrt(1 - abar_t) converts a gradient to the
    scale of eps, because the gradient of log p(x_t) is -eps / sqrt(1 - abar_t).
    """

    def __init__(self, unet: UNet2DModel, scheduler: PaperDDPMScheduler, classifier: NoisyClassifier, scale: float):
        super().__init__(unet, scheduler, scale)
        self.classifier = classifier
        self.config = FrozenDict(unet.config | {"num_class_embeds": classifier.config.num_classes})

    def forward(self, sample, timesteps, class_labels) -> UNet2DOutput:
        """Return the guided prediction for `sample` (B, C, H, W) and `class_labels` (B,).

        If the UNet also predicts a variance, the variance is returned without guidance.
        """
        output = self.unet(sample, timesteps).sample.float()
        with torch.enable_grad():
            noisy = sample.detach().float().requires_grad_()
            log_probabilities = self.classifier(noisy, timesteps).float().log_softmax(dim=1)
            chosen = log_probabilities.gather(1, class_labels[:, None]).sum()
            gradient = torch.autograd.grad(chosen, noisy)[0]
        alpha_bar = self.scheduler.alphas_cumprod_at(timesteps).reshape(-1, 1, 1, 1)
        signal = alpha_bar.sqrt().float()
        sigma = (1 - alpha_bar).sqrt().float()
        prediction = output[:, : sample.shape[1]]
        change = -self.scale * sigma * gradient
        original = self.scheduler.predict_original_sample(prediction, sample.float(), timesteps)
        # Adding `change` to eps subtracts sigma / signal * change from x_0. Without a signal, x_t is pure noise, which
        # tells the classifier nothing.
        original = original - torch.where(signal > 0, sigma / signal * change, 0.0)
        prediction.copy_(as_prediction(self.scheduler, original, sample, timesteps))
        return UNet2DOutput(output)


def as_prediction(scheduler: PaperDDPMScheduler, original_samples, sample, timesteps) -> torch.Tensor:
    """Clip x_0 (B, C, H, W) as the scheduler's config says, and convert it to a prediction at x_t = `sample`.

    The prediction is eps, x_0 or v, as the scheduler's `prediction_type` says. It is computed from the clipped x_0.

    Guidance moves x_0 far out of range. All samplers clip x_0, but DDIM would still use the eps of the unclipped x_0.
    At scale 2, a classifier recognized 70 % of 40 requested digits with the eps of the unclipped x_0, and all 40 with
    the eps of the clipped x_0.
    """
    alpha_bar = scheduler.alphas_cumprod_at(timesteps).reshape(-1, 1, 1, 1)
    original = clipped(original_samples, scheduler)
    epsilon = (sample.float() - alpha_bar.sqrt().float() * original) / (1 - alpha_bar).sqrt().float()
    return scheduler.training_target(original, epsilon, timesteps)


def guide(
    unet: UNet2DModel,
    scheduler: PaperDDPMScheduler,
    classes: Classes,
    scale: float,
    classifier: NoisyClassifier | None = None,
) -> nn.Module:
    """Return a network to use in place of `unet` in a sampler. Its predictions are moved towards the requested class.

    At scale 1 without a classifier, the result is `unet` itself.

    Args:
        classes: the classes of the UNet.
        scale: any finite number. With a larger scale, images follow the class more closely and vary less. Without a
            classifier, scale 1 is the conditional model itself. With a classifier, scale 0 switches guidance off.
        classifier: guides an unconditional UNet. None: classifier-free guidance of a conditional UNet.

    Raises:
        UserError: if the scale is not finite, or if the UNet or the classifier does not support this guidance.

    Example:
        >>> model = ddpm_hf.load("runs/mnist-conditional")
        >>> network = guide(model.unet, model.scheduler, model.classes, scale=2.0)
    """
    if not math.isfinite(scale):
        raise UserError(f"--guidance_scale is {scale}, but must be a finite number, e.g. 2.")
    if classifier is not None:
        check_classifier(classifier, unet, scheduler)
        return ClassifierGuided(unet, scheduler, classifier, scale)
    if scale == 1:
        return unet
    if not classes:
        raise UserError(
            f"--guidance_scale is {scale:g}, but this model has no classes: give a --classifier, or a model that "
            "was trained with --class_conditional."
        )
    if classes.no_class is None:
        raise UserError(
            "guidance needs a model that was trained with --label_dropout, and this model was not: give "
            "--guidance_scale 1."
        )
    return ClassifierFree(unet, scheduler, scale)


def check_classifier(classifier: NoisyClassifier, unet: UNet2DModel, scheduler: PaperDDPMScheduler):
    """Raise a UserError if the classifier cannot guide this model."""
    if unet.config.num_class_embeds is not None:
        raise UserError(
            "--classifier can only guide an unconditional model, and this model is conditional: leave --classifier "
            "out."
        )
    for what, of_classifier, of_model in [
        ("image channels", classifier.config.in_channels, unet.config.in_channels),
        ("timesteps", classifier.config.num_train_timesteps, len(scheduler)),
        ("betas", classifier.config.beta_schedule or scheduler.config.beta_schedule, scheduler.config.beta_schedule),
    ]:
        if of_classifier != of_model:
            raise UserError(
                f"the {what} of the classifier are {of_classifier}, but those of the model are {of_model}: give a "
                "classifier that was trained on the same data and with the same schedule as the model."
            )
    # The name of a schedule is not enough: "linear" can have any first and last beta. Older classifiers store only the
    # name.
    of_classifier, of_model = classifier.config.quarters or scheduler.quarters, scheduler.quarters
    if any(abs(one - other) > SAME_SIGNAL for one, other in zip(of_classifier, of_model)):
        raise UserError(
            "at a quarter, a half and three quarters of the timesteps, the classifier was trained with abar = "
            f"{', '.join(map(str, of_classifier))}, but the model has {', '.join(map(str, of_model))}: give a "
            "classifier that was trained with the betas of the model."
        )
