"""Draw images of given classes with a DDPM, with classifier-free guidance, a classifier's guidance, or neither.

- Classifier-free guidance (Ho & Salimans 2022, https://huggingface.co/papers/2207.12598) needs a UNet that was trained
  with class labels and with label dropout. The folder is a stock DDPMPipeline whose model_index.json names the K
  classes: `"id2label": {"0": "cat", ...}`. A UNet with K + 1 class embeddings uses the last one for "no class" and can
  be guided. A UNet with K class embeddings cannot be guided.
- Classifier guidance (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233, Algorithm 2, made for DDIM and
  used here for DDPM too) needs a UNet without classes, and a classifier of noisy images that was trained on the same
  noise schedule.
- An unconditional model without a classifier is sampled without guidance.

The samplers are DDIM (Song et al. 2021, eq. 12) and ancestral sampling (Ho et al. 2020, Algorithm 2).

    import torch
    from diffusers import AutoModel, DiffusionPipeline

    code = {"custom_pipeline": "pipelines/class_guided.py", "trust_remote_code": True}
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    pipeline = DiffusionPipeline.from_pretrained("runs/mnist-conditional", **code)
    pipeline(["3", "7"], guidance_scale=2.0, generator=generators).images[0].save("3.png")

    classifier = AutoModel.from_pretrained("runs/mnist-classifier", subfolder="classifier", trust_remote_code=True)
    pipeline = DiffusionPipeline.from_pretrained("runs/mnist", classifier=classifier, **code)
    pipeline(["3", "7"], guidance_scale=10.0, generator=generators).images[0].save("3.png")
"""

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


Labels = int | str | Sequence[int | str] | torch.Tensor | np.ndarray
Scale = float | Callable[[float], float]


class ClassGuidedPipeline(DiffusionPipeline):
    """Draws images with a UNet2DModel and any scheduler whose config holds its betas.

    Args:
        classifier: a classifier of noisy images, to guide an unconditional UNet. `classifier(sample, timestep)`
            returns logits (B, K), which must be differentiable with respect to `sample`. The classifier's config has
            `in_channels`, `num_classes`, `num_train_timesteps` and `id2label` (a dict of names by number, or None).
        id2label: the names of a conditional UNet's K classes, by number from 0 to K - 1. Keys may be strings, as in
            JSON. The dict is saved in model_index.json. Without it, there are no names and there is no null class.

    Raises:
        ValueError: if id2label does not fit the UNet, if the classifier does not fit the UNet (other channels or
            timesteps), or if a classifier is given for a UNet that already has classes.
    """

    model_cpu_offload_seq = "unet->classifier"
    _optional_components = ["classifier"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        classifier: ModelMixin | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)
        self.register_to_config(id2label=id2label)
        if classifier is None:
            self.labels = _class_names(unet.config.num_class_embeds or 0, id2label)
            return
        _check_classifier(classifier, unet, scheduler)
        names = {int(key): name for key, name in (classifier.config.id2label or {}).items()}
        self.labels = [names.get(k, str(k)) for k in range(classifier.config.num_classes)]
        # Register only the name of the classifier's file: in a saved folder, its code is classifier/<file>.py.
        self.register_to_config(classifier=(type(classifier).__module__.split(".")[-1], type(classifier).__name__))

    @property
    def null_class(self) -> int | None:
        """The number of the embedding for "no class", which follows the named classes. None if it does not exist."""
        return len(self.labels) if len(self.labels) < (self.unet.config.num_class_embeds or 0) else None

    def class_ids(self, class_labels: Labels) -> list[int]:
        """Return the numbers of classes that are given by number or name. Raise ValueError for an unknown class."""
        if not self.labels:
            raise ValueError(f"class_labels is {class_labels}, but this model has no classes; give num_images.")
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        given = list(class_labels) if isinstance(class_labels, (list, tuple, range)) else [class_labels]
        known = f"one or more of {', '.join(f'{k} ({name})' for k, name in enumerate(self.labels))}"
        if not given:
            raise ValueError(f"class_labels is empty; give {known}, by number or by name.")
        numbers = {name: k for k, name in enumerate(self.labels)} | {k: k for k in range(len(self.labels))}
        for label in given:
            if not isinstance(label, (str, Integral)) or isinstance(label, bool) or label not in numbers:
                raise ValueError(f"The class label {label!r} is not known; give {known}, by number or by name.")
        return [numbers[label] for label in given]

    def guidance_scales(self, guidance_scale: Scale, timesteps: list[int]) -> list[float]:
        """Return the scale at each timestep. Raise ValueError if it is not finite or this model cannot apply it."""
        T = self.scheduler.config.num_train_timesteps
        scales = [guidance_scale((t + 1) / T) if callable(guidance_scale) else guidance_scale for t in timesteps]
        for scale in scales:
            if not isinstance(scale, Real) or not math.isfinite(scale):
                raise ValueError(f"guidance_scale is {scale!r}; give a finite number, or a function u -> number.")
            if scale != 1 and self.classifier is None and self.null_class is None:
                raise ValueError(
                    f"guidance_scale is {scale}, but the UNet has no null class and there is no classifier; use 1, "
                    "or a model trained with label dropout, or an unconditional model with a classifier."
                )
        return scales

    def check_inputs(self, sampler: str, eta: float):
        """Raise ValueError for a sampler that does not exist or that does not suit this model's scheduler."""
        config = self.scheduler.config
        if sampler not in ("ddim", "ddpm"):
            raise ValueError(f"sampler is {sampler!r}; choose 'ddim' or 'ddpm'.")
        if not isinstance(eta, Real) or not 0 <= eta <= 1 or (sampler == "ddpm" and eta != 0):
            raise ValueError(f"eta is {eta} with sampler {sampler!r}; give 0 to 1 for 'ddim', 0 for 'ddpm'.")
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"The scheduler's prediction_type is {prediction_type!r}; "
                "use a model that predicts epsilon, sample or v_prediction."
            )
        kind = _variance_kind(config)
        if sampler == "ddpm" and kind not in ("fixed_small", "fixed_large", "learned_range"):
            raise ValueError(f"The scheduler's variance_type is {kind!r}, which ddpm cannot use; take sampler='ddim'.")
        has_variance = self.unet.config.out_channels == 2 * self.unet.config.in_channels
        if sampler == "ddpm" and kind == "learned_range" and not has_variance:
            raise ValueError("The UNet does not predict the variance, which ddpm needs; take sampler='ddim'.")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        guidance_scale: Scale = 1.0,
        sampler: str = "ddim",
        num_inference_steps: int = 50,
        eta: float = 0.0,
        *,
        num_images: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
    ) -> ImagePipelineOutput | tuple:
        """Draw one image per label, or `num_images` images without a class.

        Args:
            class_labels: a class by number (0 to K - 1) or by name, or a list with one class per image. None: draw
                without a class. This needs a UNet that has a null class or is unconditional.
            guidance_scale: a number, or a function of u = (t + 1) / T, which goes from 1 at pure noise down to 1 / T.
                `lambda u: 3.0 if 0.2 < u < 0.7 else 1.0` guides in an interval only (Kynkäänniemi et al. 2024,
                https://huggingface.co/papers/2404.07724). With `lambda u: 1 + 2 * u` the scale falls linearly.
                With a null class, the scale is w in out = out_null + w (out_class - out_null). 0 ignores the class,
                and 1 is the conditional model. Larger scales give clearer but less varied images. A step costs one
                evaluation of the UNet at scale 1, and two at other scales. (The w of Ho & Salimans is this w minus 1.)
                With a classifier, the scale is s in eps' = eps - s sqrt(1 - abar_t) grad log p(class | x_t). 0 is the
                unconditional model, and 1 follows Bayes' rule. Larger scales give clearer but less varied images.
            sampler: "ddim" or "ddpm" (ancestral). With all T steps, "ddpm" uses the variance_type of the scheduler's
                config. With fewer steps it uses fixed_small, unless the variance is learned.
            num_inference_steps: the number of steps S, from 1 to T. They are at the timesteps
                round((k + 1) T / S) - 1 ("trailing").
            eta: DDIM's share of fresh noise, from 0 (none) to 1 (as much as DDPM).
            num_images: how many images to draw when class_labels is None; 1 if not given.
            generator: one for all images, or a list with one per image. With a list, image k is the same in any batch.
            output_type: "pil"; "np", float (B, H, W, C) in [0, 1]; or "pt", float (B, C, H, W) in [0, 1], on the
                pipeline's device.
            callback_on_step_end: called as callback(pipeline, i, t, tensors) after step i. `tensors` is a dict of the
                tensors (B, C, H, W) that callback_on_step_end_tensor_inputs names: "sample", "pred_original_sample" or
                both. If the callback returns a dict with "sample", the next step starts from that tensor.

        Raises:
            ValueError: for arguments that do not suit this model.
        """
        check_output(output_type, callback_on_step_end_tensor_inputs)
        arguments = {"num_images": num_images, "generator": generator}
        for i, t, tensors in self.steps(class_labels, guidance_scale, sampler, num_inference_steps, eta, **arguments):
            tensors["sample"] = after_step(
                callback_on_step_end, callback_on_step_end_tensor_inputs, self, (i, t), tensors
            )
        output = ImagePipelineOutput(to_output(tensors["sample"], output_type))
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def steps(
        self,
        class_labels: Labels | None = None,
        guidance_scale: Scale = 1.0,
        sampler: str = "ddim",
        num_inference_steps: int = 50,
        eta: float = 0.0,
        *,
        num_images: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        """Draw as `__call__` does, and yield (i, t, tensors) after step i, which is at timestep t.

        `tensors` has "sample" and "pred_original_sample", float32 (B, C, H, W), images in [-1, 1]. The next step
        starts from tensors["sample"], which the caller may replace.
        """
        numbers = self._class_numbers(class_labels, num_images)
        T, device = self.scheduler.config.num_train_timesteps, self._execution_device
        check_steps(num_inference_steps, T)
        check_generator(generator, len(numbers))
        self.check_inputs(sampler, eta)
        scheduler, timesteps = ddpm_scheduler(self.scheduler), trailing_timesteps(T, num_inference_steps)
        scales, kind = self.guidance_scales(guidance_scale, timesteps), _variance_kind(scheduler.config)
        alphas_cumprod = torch.cat([scheduler.alphas_cumprod, torch.ones(1)])  # entry -1 is the clean image
        labels = None if numbers[0] is None else torch.tensor(numbers, device=device)
        size = self.unet.config.sample_size
        shape = len(numbers), self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        for i, t in enumerate(self.progress_bar(timesteps)):
            prev_t = timesteps[i + 1] if i + 1 < len(timesteps) else -1
            x0, epsilon, predicted_variance = self._predict(scheduler, x, t, labels, scales[i])
            # Compute in 0-dim float32 tensors and in stock DDPMScheduler's order, so that images equal those of stock.
            alpha_bar, alpha_bar_prev = alphas_cumprod[t], alphas_cumprod[prev_t]
            alpha = alpha_bar / alpha_bar_prev
            beta = 1 - alpha
            beta_tilde = ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).clamp(min=1e-20)
            noise = 0
            if prev_t >= 0 and (sampler == "ddpm" or eta > 0):
                noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            if sampler == "ddim":
                x = ddim_step(x0, epsilon, alpha_bar_prev, eta**2 * beta_tilde, noise)
            else:
                variance = beta_tilde
                if kind == "learned_range":  # Nichol & Dhariwal 2021, eq. 15
                    fraction = (predicted_variance + 1) / 2
                    variance = (fraction * beta.log() + (1 - fraction) * beta_tilde.log()).exp()
                elif kind == "fixed_large" and len(timesteps) == T:  # with fewer steps, beta is too large
                    variance = beta
                weight_0 = alpha_bar_prev**0.5 * beta / (1 - alpha_bar)
                weight_t = alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
                x = weight_0 * x0 + weight_t * x + variance**0.5 * noise
            tensors = {"sample": x, "pred_original_sample": x0}
            yield i, t, tensors
            x = tensors["sample"]
        self.maybe_free_model_hooks()

    @torch.no_grad()
    def predict(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Return the clean images (B, C, H, W) that the model predicts from `x` at timestep t, without a class."""
        numbers = self._class_numbers(None, len(x))
        labels = None if numbers[0] is None else torch.tensor(numbers, device=x.device)
        return self._predict(ddpm_scheduler(self.scheduler), x, t, labels, 1.0)[0]

    def _class_numbers(self, class_labels: Labels | None, num_images: int | None) -> list[int | None]:
        """Return the class of each image: a number, or None for an unconditional model."""
        if class_labels is not None:
            if num_images is not None:
                raise ValueError(
                    f"num_images is {num_images}, but class_labels already set the number of images; drop num_images."
                )
            return self.class_ids(class_labels)
        if self.labels and self.null_class is None:
            raise ValueError("class_labels is None, but this model cannot draw without a class; give class_labels.")
        num_images = 1 if num_images is None else num_images
        if not isinstance(num_images, Integral) or num_images < 1:
            raise ValueError(f"num_images is {num_images!r}; give a whole number from 1 on.")
        return [self.null_class] * num_images

    def _predict(self, scheduler: DDPMScheduler, x, t, labels, scale):
        """Return the guided and clipped x_0, the eps for DDIM's step, and the predicted variance, if any."""
        config, alpha_bar = scheduler.config, scheduler.alphas_cumprod[t]
        output, predicted_variance = self._guided_output(x, t, labels, scale).tensor_split([x.shape[1]], dim=1)
        x0 = predict_original_sample(output, x, alpha_bar, config.prediction_type)
        if self.classifier is not None and scale != 0 and alpha_bar > 0:  # at abar = 0, x_t is pure noise
            # Guide x_0. This equals the formula for eps' in the docstring of __call__. DDPM is guided in this way too.
            # For small steps, this shifts the mean of a DDPM step as Algorithm 1 does.
            x0 = x0 + scale * ((1 - alpha_bar) / alpha_bar**0.5) * self._log_probability_gradient(x, t, labels)
        clipped = x0
        if config.thresholding:
            clipped = scheduler._threshold_sample(x0)
        elif config.clip_sample:
            clipped = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        # Without guidance, DDIM uses the predicted eps, like stock diffusers. With guidance, it uses the eps of the
        # clipped x_0, because guidance moves x_0 far out of range. Of 40 MNIST digits drawn at scale 2, a classifier
        # recognized 70 % with the predicted eps, and all with the eps of the clipped x_0.
        is_guided = self.classifier is not None or scale != 1
        epsilon = (x - alpha_bar**0.5 * (clipped if is_guided else x0)) / (1 - alpha_bar) ** 0.5
        return clipped, epsilon, predicted_variance

    def _guided_output(self, x, t, labels, scale):
        """Return the UNet's guided float32 output at x_t. The channels of the variance are not guided."""
        if self.unet.config.num_class_embeds is None:
            return self.unet(x.to(self.unet.dtype), t).sample.float()
        if scale == 1:
            return self.unet(x.to(self.unet.dtype), t, class_labels=labels).sample.float()
        labels = torch.cat([torch.full_like(labels, self.null_class), labels])
        output = self.unet(torch.cat([x, x]).to(self.unet.dtype), t, class_labels=labels).sample.float()
        null, conditional = output.chunk(2)
        channels = x.shape[1]
        guided = null + scale * (conditional - null)
        return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)

    def _log_probability_gradient(self, x, t, labels):
        """Return grad_{x_t} log p(label | x_t, t) of each image, without gradients for the classifier's weights."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()  # clone, because a tensor made in inference mode cannot have a gradient
            log_probabilities = self.classifier(x.to(self.classifier.dtype), t).float().log_softmax(dim=1)
            return torch.autograd.grad(log_probabilities[range(len(x)), labels.tolist()].sum(), x)[0]


def _class_names(num_embeds: int, id2label: dict | None) -> list[str]:
    labels = {int(key): name for key, name in (id2label or {}).items()}
    is_numbered = sorted(labels) == [*range(len(labels))] and num_embeds - len(labels) in (0, 1)
    if id2label is not None and not is_numbered:
        raise ValueError(
            f"id2label names the classes {sorted(labels)} of a UNet with {num_embeds} class embeddings; give one "
            f"name to each of 0..{num_embeds - 1}, or to each of 0..{num_embeds - 2} if the last means no class."
        )
    return [labels.get(k, str(k)) for k in range(len(labels) or num_embeds)]


def _check_classifier(classifier: ModelMixin, unet: UNet2DModel, scheduler: SchedulerMixin):
    if unet.config.num_class_embeds is not None:
        raise ValueError("The UNet has classes already; give an unconditional UNet, or leave the classifier out.")
    for name, of_classifier, of_model in (
        ("channels", classifier.config.in_channels, unet.config.in_channels),
        ("timesteps", classifier.config.num_train_timesteps, scheduler.config.num_train_timesteps),
    ):
        if of_classifier != of_model:
            raise ValueError(
                f"The classifier is for {of_classifier} {name} and the model for {of_model}; "
                "give a classifier trained on the model's data and noise schedule."
            )


def _variance_kind(config) -> str:
    return (config.get("variance_type") or "fixed_small").removesuffix("_log")


# Pipeline files cannot import each other, so each has its own copies of these functions. A test compares them.


def to_output(images: torch.Tensor, output_type: str, **options):
    """Convert images (B, C, H, W) in [-1, 1] to an output_type, in [0, 1]. "pt" images stay on their device.

    `options` are those of VaeImageProcessor.postprocess.

    Raises:
        ValueError: if output_type is "pil" and the images are not finite, because PIL images cannot hold nan, or if
            they have more than 4 channels.
    """
    if output_type == "pil" and images.shape[1] > 4:
        raise ValueError(f"Images of {images.shape[1]} channels cannot be PIL images; give output_type 'np' or 'pt'.")
    if output_type == "pil" and not images.isfinite().all():
        raise ValueError(
            "The pipeline computed pixels that are nan or infinite; give a model and settings that do not overflow."
        )
    return VaeImageProcessor().postprocess(images, output_type, **options)


def ddpm_scheduler(scheduler) -> DDPMScheduler:
    """Return a stock DDPMScheduler with the betas and the prediction type of a scheduler of any class."""
    # Drop _use_default_values: from_config would reset the fields that it lists, even betas, to the defaults.
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    return DDPMScheduler.from_config(config)


def trailing_timesteps(T: int, num_steps: int) -> list[int]:
    """Return the timesteps round((k + 1) T / S) - 1, from T - 1 down (https://huggingface.co/papers/2305.08891)."""
    return (np.round(np.arange(T, 0, -T / num_steps)[:num_steps]).astype(int) - 1).tolist()


def predict_original_sample(output, x, alpha_bar, prediction_type: str):
    """Return x_0, not clipped, from the network's eps, x_0 or v at x_t = `x`."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if prediction_type == "epsilon":
        return (x - sigma * output) / signal
    return output if prediction_type == "sample" else signal * x - sigma * output


def ddim_step(x0, epsilon, alpha_bar_prev, variance, noise):
    """Return the sample at the next timestep: eq. 12 of Song et al. 2021, whose sigma^2 is `variance`."""
    direction = (1 - alpha_bar_prev - variance).clamp(min=0) ** 0.5
    return alpha_bar_prev**0.5 * x0 + direction * epsilon + variance**0.5 * noise


def after_step(callback: Callable | None, names: Sequence[str], pipeline, step: tuple, tensors: dict):
    """Call `callback_on_step_end` with the requested tensors, and return the sample for the next step."""
    if callback is None:
        return tensors["sample"]
    returned = callback(pipeline, *step, {name: tensors[name] for name in names}) or {}
    return returned.get("sample", tensors["sample"])


def check_steps(num_inference_steps: int, T: int):
    if not isinstance(num_inference_steps, Integral) or not 1 <= num_inference_steps <= T:
        raise ValueError(f"num_inference_steps is {num_inference_steps!r}; give a whole number from 1 to {T}.")


def check_generator(generator, num_images: int):
    generators = generator if isinstance(generator, list) else [generator] * (generator is not None)
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"generator is {generator!r}; give a torch.Generator, or a list with one per image.")
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"generator is a list of {len(generator)} for {num_images} images; give one per image.")


def check_output(output_type: str, tensor_inputs: Sequence[str]):
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type is {output_type!r}; choose 'pil', 'np' or 'pt'.")
    if not set(tensor_inputs) <= {"sample", "pred_original_sample"}:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs is {tensor_inputs}; choose from 'sample' and 'pred_original_sample'."
        )
