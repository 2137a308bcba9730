"""Guide a UNet towards a class: networks with the call of a UNet, which every sampler takes in place of one."""

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


class Guided(nn.Module):
    """A network with the call, the device and the dtype of `unet`."""

    def __init__(self, unet: UNet2DModel, scheduler: PaperDDPMScheduler, scale: float):
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.scale = scale
        self.config = unet.config

    device = property(lambda self: self.unet.device)
    dtype = property(lambda self: self.unet.dtype)


class ClassifierFree(Guided):
    """A conditional UNet under classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w is `scale` - 1).

    out = out(no class) + scale * (out(class) - out(no class)). Scale 1 is the UNet's own prediction, scale 0 draws
    from all classes. The UNet's last embedding means "no class". A call costs two calls of the UNet.
    """

    def forward(self, sample, timesteps, class_labels) -> UNet2DOutput:
        """Return the guided prediction for `sample` (B, C, H, W) and `class_labels` (B,). Leave a variance as is."""
        no_class = torch.full_like(class_labels, self.config.num_class_embeds - 1)
        labels = torch.cat([class_labels, no_class])
        output = self.unet(sample.repeat(2, 1, 1, 1), timesteps.repeat(2), labels).sample.float()
        conditional, unconditional = output.chunk(2)
        guided = (unconditional + self.scale * (conditional - unconditional))[:, : sample.shape[1]]
        original = self.scheduler.predict_original_sample(guided, sample.float(), timesteps)
        prediction = as_prediction(self.scheduler, original, sample, timesteps)
        return UNet2DOutput(torch.cat([prediction, conditional[:, sample.shape[1] :]], dim=1))


class ClassifierGuided(Guided):
    """An unconditional UNet under classifier guidance (Dhariwal & Nichol 2021, Algorithm 2).

    eps = eps(x_t) - scale sqrt(1 - abar_t) grad log p(y | x_t). The factor sqrt(1 - abar_t) turns the gradient into
    noise, because the score of x_t is -eps / sqrt(1 - abar_t).
    """

    def __init__(self, unet: UNet2DModel, scheduler: PaperDDPMScheduler, classifier: NoisyClassifier, scale: float):
        super().__init__(unet, scheduler, scale)
        self.classifier = classifier
        self.config = FrozenDict(unet.config | {"num_class_embeds": classifier.config.num_classes})

    def forward(self, sample, timesteps, class_labels) -> UNet2DOutput:
        """Return the guided prediction for `sample` (B, C, H, W) and `class_labels` (B,). Leave a variance as is."""
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
        # Adding `change` to eps subtracts sigma / signal * change from x_0.
        prediction.copy_(as_prediction(self.scheduler, original - sigma / signal * change, sample, timesteps))
        return UNet2DOutput(output)


def as_prediction(scheduler: PaperDDPMScheduler, original_samples, sample, timesteps) -> torch.Tensor:
    """Clip x_0 (B, C, H, W) as the scheduler says, and return the eps, x_0 or v that implies it at x_t = `sample`.

    Guidance moves x_0 far out of range. Samplers clip it, but DDIM would keep the eps of the unclipped x_0: at scale 2
    a classifier then recognized 70 % of 40 requested digits. With the eps of the clipped x_0 it recognized all.
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
    """Return a network that samplers take in place of `unet`, with predictions moved towards the requested class.

    At scale 1 without a classifier it is `unet` itself.

    Args:
        classes: the classes of the UNet.
        scale: any finite number. A larger scale follows the class more closely and varies less. 1 is the conditional
            model itself; with a classifier, 0 is no guidance.
        classifier: guides an unconditional UNet. None: classifier-free guidance of a conditional UNet.

    Raises:
        UserError: for a scale that is not finite, or a UNet or classifier that does not support the guidance.

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
            f"--guidance_scale is {scale:g}, but this model knows no classes: give a --classifier, or a model that "
            "was trained with --class_conditional."
        )
    if classes.no_class is None:
        raise UserError(
            "this model was trained without --label_dropout, which guidance needs: give --guidance_scale 1."
        )
    return ClassifierFree(unet, scheduler, scale)


def check_classifier(classifier: NoisyClassifier, unet: UNet2DModel, scheduler: PaperDDPMScheduler):
    """Raise a UserError if the classifier cannot guide this model."""
    if unet.config.num_class_embeds is not None:
        raise UserError("--classifier guides an unconditional model, and this one is conditional: leave it out.")
    for what, of_classifier, of_model in [
        ("image channels", classifier.config.in_channels, unet.config.in_channels),
        ("timesteps", classifier.config.num_train_timesteps, len(scheduler)),
        ("betas", classifier.config.beta_schedule or scheduler.config.beta_schedule, scheduler.config.beta_schedule),
    ]:
        if of_classifier != of_model:
            raise UserError(
                f"the classifier's {what} are {of_classifier}, the model's {of_model}: give one that was trained on "
                "the same data and schedule."
            )
