"""Classifier guidance: an unconditional DDPM draws images of a class, steered by a classifier of noisy images.

Dhariwal & Nichol 2021 (https://huggingface.co/papers/2105.05233), Algorithm 2: the noise prediction becomes

    eps' = eps - guidance_scale * sqrt(1 - abar_t) * grad_{x_t} log p(y | x_t, t)

and any sampler goes on from there, with x_0 and eps taken from eps'. The classifier has to know noise: it is trained
on x_t and t of the same schedule as the UNet. A folder that this pipeline's `save_pretrained` wrote holds all three
components; with a stock DDPMPipeline's folder, pass the classifier:

    import torch
    from diffusers import AutoModel, DiffusionPipeline

    classifier = AutoModel.from_pretrained("runs/mnist-classifier", subfolder="classifier", trust_remote_code=True)
    pipeline = DiffusionPipeline.from_pretrained(
        "runs/mnist", classifier=classifier, custom_pipeline="pipelines/classifier_guided.py", trust_remote_code=True
    )
    generators = [torch.Generator().manual_seed(k) for k in range(10)]
    images = pipeline(class_labels=list(range(10)), guidance_scale=2.0, generator=generators).images
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


@dataclass
class ClassifierGuidedOutput(BaseOutput):
    """`images` in the `output_type` asked for, and `intermediates`: None, or each step's x_0 prediction likewise."""

    images: list[Image.Image] | np.ndarray | torch.Tensor
    intermediates: list | None = None


class ClassifierGuidedPipeline(DiffusionPipeline):
    """An unconditional UNet2DModel, a scheduler whose config holds its betas, and a classifier of noisy images.

    `classifier(sample, timestep)` returns logits (B, K) and can be differentiated by `sample`; its config has
    `in_channels`, `num_classes`, `num_train_timesteps` and `id2label` (names by number, or None). A classifier for
    other channels or another number of timesteps than the model's, and a class-conditional UNet, are a ValueError.
    """

    model_cpu_offload_seq = "unet->classifier"
    _callback_tensor_inputs = ["sample", "pred_original_sample"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, classifier: ModelMixin):
        super().__init__()
        for name, of_classifier, of_model in (
            ("channels", classifier.config.in_channels, unet.config.in_channels),
            ("timesteps", classifier.config.num_train_timesteps, scheduler.config.num_train_timesteps),
        ):
            if of_classifier != of_model:
                raise ValueError(
                    f"The classifier is for {of_classifier} {name} and the model for {of_model}; "
                    "give a classifier trained on the model's data and noise schedule."
                )
        if unet.config.num_class_embeds is not None:
            raise ValueError("The UNet is class-conditional; give an unconditional one, or use class_conditional.py.")
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)
        # Where its code lies once saved: classifier/<file>.py, whatever package the class was imported from here.
        code = type(classifier).__module__.split(".")[-1], type(classifier).__name__
        self.register_to_config(classifier=code)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        guidance_scale: float | Callable[[float], float] = 1.0,
        sampler: str = "ddim",
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_intermediates: bool = False,
        callback_on_step_end: Callable[["ClassifierGuidedPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
    ) -> ClassifierGuidedOutput | tuple:
        """Draw one image per label.

        - `class_labels`: numbers from 0 to K-1, or names of the classifier's `id2label`; one or a list.
        - `guidance_scale`: 0 is the unconditional model, 1 the distribution given the class by Bayes' rule, more is
          surer of the class and less diverse. A function is called with u = (t + 1) / T, from 1 (noise) down, at each
          step: `lambda u: 3 * u` falls off linearly, `lambda u: 2.0 * (u < 0.6)` guides the later part only.
        - `sampler`: "ddim" with its `eta` from 0 to 1 (Song et al. 2021, eq. 12 and 16), or "ddpm", ancestral, with
          the config's variance on all T steps, and fixed_small on fewer unless the variance is learned.
        - `num_inference_steps`: from 1 to T, spaced as "trailing" (https://huggingface.co/papers/2305.08891).
        - `generator`: one for all, or a list of one per image, which makes an image the same alone as in a batch.
        - `output_type`: "pil", "np" (N, H, W, C) in [0, 1] or "pt" (N, C, H, W) in [0, 1].
        - `callback_on_step_end(pipeline, i, t, tensors)` returns a dict; a "sample" (x_t') in it replaces the sample.
        Bad arguments are a ValueError.
        """
        scheduler = self._ddpm_scheduler()
        labels = self._label_numbers(class_labels)
        self.check_inputs(
            len(labels), sampler, num_inference_steps, eta, generator, output_type,
            callback_on_step_end_tensor_inputs, scheduler,
        )  # fmt: skip
        T, device = len(scheduler), self._execution_device
        timesteps = [int(t) for t in np.round(np.arange(T, 0, -T / num_inference_steps)[:num_inference_steps]) - 1]
        scales = [guidance_scale((t + 1) / T) if callable(guidance_scale) else guidance_scale for t in timesteps]
        if not all(isinstance(scale, Real) and math.isfinite(scale) for scale in scales):
            raise ValueError(f"guidance_scale is {guidance_scale!r}; give a finite number, or a function u -> number.")
        size = self.unet.config.sample_size
        shape = len(labels), self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        intermediates = [] if return_intermediates else None

        steps = list(zip(timesteps, [*timesteps[1:], -1]))
        for i, (t, prev_t) in enumerate(self.progress_bar(steps)):
            # As 0-dim float32 tensors, in the order of stock DDPMScheduler's arithmetic: scale 0 is its image.
            alpha_bar = scheduler.alphas_cumprod[t]
            alpha_bar_prev = scheduler.alphas_cumprod[prev_t] if prev_t >= 0 else torch.tensor(1.0)
            signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
            output = self.unet(x.to(self.unet.dtype), t).sample.float()
            output, *predicted_variance = output.split(shape[1], dim=1)
            x0 = _predict_original_sample(output, x, signal, sigma, scheduler.config.prediction_type)

            # eps' in terms of x_0, (x - sigma eps')/signal. For DDIM and DDPM alike: Algorithm 1, which moves DDPM's
            # mean by scale * variance * gradient, is its limit for small steps (here it is beta/sqrt(alpha) for the
            # variance).
            scale = scales[i]
            if scale != 0 and signal > 0:  # at abar = 0 (zero terminal SNR) x_t says nothing of the class
                x0 = x0 + scale * (sigma**2 / signal) * self._log_probability_gradient(x, t, labels)
            if scheduler.config.thresholding:
                x0 = scheduler._threshold_sample(x0)
            elif scheduler.config.clip_sample:
                x0 = x0.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)

            alpha = alpha_bar / alpha_bar_prev
            beta = 1 - alpha
            beta_tilde = ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).clamp(min=1e-20)
            if sampler == "ddim":
                # eps of the x_0 as clipped: the unclipped one adds up what a large scale overshoots.
                epsilon = (x - signal * x0) / sigma
                variance = eta**2 * beta_tilde
                x = alpha_bar_prev**0.5 * x0 + (1 - alpha_bar_prev - variance).clamp(min=0) ** 0.5 * epsilon
            else:
                coefficient_0 = alpha_bar_prev**0.5 * beta / (1 - alpha_bar)
                coefficient_t = alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
                variance = _variance(scheduler, len(steps), beta, beta_tilde, *predicted_variance)
                x = coefficient_0 * x0 + coefficient_t * x
            if prev_t >= 0 and (sampler == "ddpm" or eta > 0):
                noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
                x = x + variance**0.5 * noise

            if return_intermediates:
                intermediates.append(self._to_output(x0, output_type))
            if callback_on_step_end is not None:
                tensors = {"sample": x, "pred_original_sample": x0}
                asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                x = (callback_on_step_end(self, i, t, asked) or {}).get("sample", x)

        images = self._to_output(x, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, intermediates
        return ClassifierGuidedOutput(images=images, intermediates=intermediates)

    def check_inputs(
        self, num_images, sampler, num_inference_steps, eta, generator, output_type,
        callback_on_step_end_tensor_inputs, scheduler,
    ):  # fmt: skip
        """Refuse what `__call__` cannot do, with a ValueError, before anything is drawn."""
        if sampler not in ("ddim", "ddpm"):
            raise ValueError(f"sampler is {sampler!r}; choose ddim or ddpm.")
        if not isinstance(num_inference_steps, Integral) or not 1 <= num_inference_steps <= len(scheduler):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}; give a whole number from 1 to the model's "
                f"{len(scheduler)} timesteps."
            )
        if not isinstance(eta, Real) or not 0 <= eta <= 1 or (sampler != "ddim" and eta != 0):
            raise ValueError(f"eta is {eta} with sampler {sampler}; it belongs to ddim and is from 0 to 1.")
        generators = generator if isinstance(generator, list) else [generator] * (generator is not None)
        if not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"generator is {generator!r}; give a torch.Generator, or a list of one per label.")
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(f"There are {len(generator)} generators for {num_images} labels; give one per label.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}; choose pil, np or pt.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(sorted(unknown))}; "
                f"choose of {', '.join(self._callback_tensor_inputs)}."
            )
        if scheduler.config.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"The scheduler's prediction_type is {scheduler.config.prediction_type!r}; "
                "use a model that predicts epsilon, sample or v_prediction."
            )
        kind = (scheduler.config.variance_type or "fixed_small").removesuffix("_log")
        if sampler == "ddpm" and kind not in ("fixed_small", "fixed_large", "learned_range"):
            raise ValueError(f"The scheduler's variance_type is {kind!r}, which ddpm cannot use; take sampler='ddim'.")
        if (
            sampler == "ddpm"
            and kind == "learned_range"
            and self.unet.config.out_channels == self.unet.config.in_channels
        ):
            raise ValueError("variance_type learned_range needs a UNet with out_channels twice its in_channels.")

    def _ddpm_scheduler(self) -> DDPMScheduler:
        # from_config replaces what _use_default_values lists by DDPMScheduler's defaults, given by position included.
        config = {k: v for k, v in self.scheduler.config.items() if k != "_use_default_values"}
        return DDPMScheduler.from_config(config)

    def _label_numbers(self, class_labels) -> list[int]:
        """The labels as numbers, one per image."""
        num_classes = self.classifier.config.num_classes
        names = {name: int(number) for number, name in (self.classifier.config.id2label or {}).items()}
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.tolist()
        given = list(class_labels) if isinstance(class_labels, list | tuple | range) else [class_labels]
        numbers = [names.get(label) if isinstance(label, str) else label for label in given]
        for label, number in zip(given, numbers):
            if not isinstance(number, Integral) or isinstance(number, bool) or not 0 <= number < num_classes:
                known = f" or a name: {', '.join(sorted(names, key=names.get))}" if names else ""
                raise ValueError(f"The class label {label!r} is not known; give 0 to {num_classes - 1}{known}.")
        if not numbers:
            raise ValueError("class_labels is empty; give one label per image.")
        return [int(number) for number in numbers]

    def _log_probability_gradient(self, x: torch.Tensor, t: int, labels: list[int]) -> torch.Tensor:
        """grad_{x_t} log p(y | x_t, t) of each image; the classifier's own weights get no gradient."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()  # a clone, as a tensor of the caller's inference mode takes no gradient
            log_probabilities = self.classifier(x.to(self.classifier.dtype), t).float().log_softmax(dim=1)
            return torch.autograd.grad(log_probabilities[range(len(labels)), labels].sum(), x)[0]

    def _to_output(self, x: torch.Tensor, output_type: str):
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images


def _predict_original_sample(output, x, signal, sigma, prediction_type):
    if prediction_type == "epsilon":
        return (x - sigma * output) / signal
    return output if prediction_type == "sample" else signal * x - sigma * output


def _variance(scheduler, num_steps, beta, beta_tilde, predicted_variance=None):
    """sigma^2 of the ancestral step (Ho et al. 2020, section 3.2; Nichol & Dhariwal 2021, eq. 15)."""
    kind = (scheduler.config.variance_type or "fixed_small").removesuffix("_log")
    if kind == "learned_range":
        fraction = (predicted_variance + 1) / 2
        return (fraction * beta.log() + (1 - fraction) * beta_tilde.log()).exp()
    # fixed_large overshoots where steps are skipped.
    return beta if kind == "fixed_large" and num_steps == len(scheduler) else beta_tilde
