"""Guidance: a network that predicts as a UNet does, only more towards a class; whatever samples can sample from it."""

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


class ClassifierFree(nn.Module):
    """A conditional UNet under classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w is `scale` - 1).

    out = out(no class) + scale * (out(class) - out(no class)): 1 is the UNet itself, 0 draws from all classes. "No
    class" is the UNet's last embedding. Each evaluation costs two of the UNet.
    """

    def __init__(self, unet: UNet2DModel, scheduler: PaperDDPMScheduler, scale: float):
        super().__init__()
        self.unet, self.scheduler, self.scale = unet, scheduler, scale
        self.config, self.no_class = unet.config, unet.config.num_class_embeds - 1

    device = property(lambda self: self.unet.device)
    dtype = property(lambda self: self.unet.dtype)

    def forward(self, sample, timesteps, class_labels) -> UNet2DOutput:
        """Return the guided prediction for `sample` (B, C, H, W) and `class_labels` (B,); a variance is not guided."""
        labels = torch.cat([class_labels, torch.full_like(class_labels, self.no_class)])
        output = self.unet(sample.repeat(2, 1, 1, 1), timesteps.repeat(2), labels).sample.float()
        conditional, unconditional = output.chunk(2)
        guided = (unconditional + self.scale * (conditional - unconditional))[:, : sample.shape[1]]
        original = self.scheduler.predict_original_sample(guided, sample.float(), timesteps)
        prediction = predict(self.scheduler, original, sample, timesteps)
        return UNet2DOutput(torch.cat([prediction, conditional[:, sample.shape[1] :]], dim=1))


class ClassifierGuided(nn.Module):
    """An unconditional UNet under classifier guidance (Dhariwal & Nichol 2021, Algorithm 2), conditional by that.

    eps = eps(x_t) - scale sqrt(1 - abar_t) grad log p(y | x_t): the score of x_t is -eps / sqrt(1 - abar_t), so a
    gradient of log p enters eps with that factor.
    """

    def __init__(self, unet: UNet2DModel, scheduler: PaperDDPMScheduler, classifier: NoisyClassifier, scale: float):
        super().__init__()
        self.unet, self.scheduler, self.classifier, self.scale = unet, scheduler, classifier, scale
        self.config = FrozenDict(unet.config | {"num_class_embeds": classifier.config.num_classes})

    device = property(lambda self: self.unet.device)
    dtype = property(lambda self: self.unet.dtype)

    def forward(self, sample, timesteps, class_labels) -> UNet2DOutput:
        """Return the guided prediction for `sample` (B, C, H, W), of the kind that the UNet predicts."""
        output = self.unet(sample, timesteps).sample.float()
        with torch.enable_grad():
            noisy = sample.detach().float().requires_grad_()
            log_probabilities = self.classifier(noisy, timesteps).float().log_softmax(dim=1)
            chosen = log_probabilities.gather(1, class_labels[:, None]).sum()
            gradient = torch.autograd.grad(chosen, noisy)[0]
        alpha_bar = self.scheduler.alphas_cumprod_at(timesteps).reshape(-1, 1, 1, 1)
        signal, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        prediction = output[:, : sample.shape[1]]
        change = -self.scale * sigma * gradient
        original = self.scheduler.predict_original_sample(prediction, sample.float(), timesteps)
        # eps + change is x_0 - sigma / signal * change.
        prediction.copy_(predict(self.scheduler, original - sigma / signal * change, sample, timesteps))
        return UNet2DOutput(output)


def predict(scheduler: PaperDDPMScheduler, original_samples, sample, timesteps) -> torch.Tensor:
    """Return x_0 (B, C, H, W), clipped as the scheduler says, as a prediction of its kind at x_t = `sample`.

    Guidance sends x_0 far out of range. Samplers clip it, but the eps that DDIM keeps would still step out there: of
    40 digits asked for at scale 2, a classifier knew 70 % so, and all with the eps of the clipped x_0.
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
    """Return a network that predicts what `unet` does, pulled towards the class that it is told.

    At scale 1 without a classifier this is the UNet itself. Any sampler takes the result for a UNet.

    Args:
        classes: those of the UNet.
        scale: 1 is the conditional model, larger is surer and less varied. With a classifier 0 is no guidance.
        classifier: guides an unconditional UNet; None means classifier-free guidance of a conditional one.

    Raises:
        UserError: for a UNet or a classifier that guidance of this kind is impossible with.

    Example:
        >>> model = ddpm_hf.load("runs/mnist-conditional")
        >>> network = guide(model.unet, model.scheduler, model.classes, scale=2.0)
    """
    if not math.isfinite(scale):
        raise UserError(f"--guidance_scale is {scale}, but must be a finite number.")
    if classifier is not None:
        check_classifier(classifier, unet, scheduler)
        return ClassifierGuided(unet, scheduler, classifier, scale)
    if scale == 1:
        return unet
    if not classes:
        raise UserError(
            f"--guidance_scale is {scale:g}, but this model knows no classes: give --classifier, or a model trained "
            "with --class_conditional."
        )
    if classes.no_class is None:
        raise UserError("this model was trained without --label_dropout and cannot be guided: take scale 1.")
    return ClassifierFree(unet, scheduler, scale)


def check_classifier(classifier: NoisyClassifier, unet: UNet2DModel, scheduler: PaperDDPMScheduler):
    """Refuse, with a UserError, a classifier that cannot guide this model."""
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
