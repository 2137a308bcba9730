"""Class-conditional DDPM with classifier-free guidance, for a UNet2DModel trained with class labels.

Guidance: Ho & Salimans 2022 (https://huggingface.co/papers/2207.12598); only in an interval of the steps: Kynkäänniemi
et al. 2024 (https://huggingface.co/papers/2404.07724). Steps: Ho et al. 2020, Algorithm 2 (sampler "ddpm"), and Song
et al. 2021, eq. 12 ("ddim").

The folder is a stock DDPMPipeline whose model_index.json has `"id2label": {"0": "cat", ...}`, K names. A UNet of K+1
embeddings keeps the last for "no class" and can be guided; one of K cannot.

    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(
        "MODEL", custom_pipeline="pipelines/class_conditional.py", trust_remote_code=True
    )
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    pipeline([0, 1], guidance_scale=2.0, generator=generators).images[0].save("class_0.png")
    pipeline.class_sheet(num_per_class=10, guidance_scale=2.0).save("classes.png")
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageDraw, ImageFont


@dataclass
class ClassConditionalOutput(BaseOutput):
    """`images` in the output_type asked for; `intermediates`, the x_0 predictions: a list, one such batch a step."""

    images: list[Image.Image] | np.ndarray | torch.Tensor
    intermediates: list | None = None


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws images of given classes, by DDIM or ancestral sampling, guided or not.

    `id2label` maps 0..K-1 (keys may be strings, as in JSON) to the K names; it is saved in model_index.json. Without
    it classes go by number alone and no null class is known. A UNet without class embeddings, or with neither K nor
    K+1 of them, is a ValueError.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler, id2label: dict | None = None):
        super().__init__()
        num_embeds = unet.config.num_class_embeds
        if num_embeds is None:
            raise ValueError(
                "This UNet is unconditional (num_class_embeds is None): give a model trained with class labels, or "
                "guide this one with pipelines/classifier_guided.py."
            )
        labels = {int(key): name for key, name in (id2label or {}).items()}
        is_numbered = sorted(labels) == [*range(len(labels))] and num_embeds - len(labels) in (0, 1)
        if id2label is not None and not is_numbered:
            raise ValueError(
                f"id2label names the classes {sorted(labels)} of a UNet with {num_embeds} class embeddings; give one "
                f"name to each of 0..{num_embeds - 1}, or of 0..{num_embeds - 2} where the last means no class."
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        self.labels = [labels.get(k, str(k)) for k in range(len(labels) or num_embeds)]

    @property
    def null_class(self) -> int | None:
        """The number that means "no class": the embedding after the last name; None where there is none."""
        return len(self.labels) if len(self.labels) < self.unet.config.num_class_embeds else None

    def class_ids(self, class_labels: int | str | Sequence[int | str] | torch.Tensor) -> list[int]:
        """The numbers, from 0 to K-1, of labels given by number or by name; an unknown one is a ValueError."""
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        given = list(class_labels) if isinstance(class_labels, (list, tuple, range)) else [class_labels]
        numbers = {name: k for k, name in enumerate(self.labels)} | {k: k for k in range(len(self.labels))}
        is_label = [isinstance(label, (str, Integral)) and not isinstance(label, bool) for label in given]
        unknown = [label for label, fits in zip(given, is_label) if not fits or label not in numbers]
        if unknown or not given:
            known = ", ".join(f"{k} ({name})" for k, name in enumerate(self.labels))
            raise ValueError(f"class_labels are {given}; give one or more of {known}, by number or by name.")
        return [numbers[label] for label in given]

    def guidance_scales(self, guidance_scale: float | Callable[[float], float], timesteps: list[int]) -> list[float]:
        """The scale at each timestep; not a finite number, or not 1 without a null class, is a ValueError."""
        T = self.scheduler.config.num_train_timesteps
        scales = [guidance_scale((t + 1) / T) if callable(guidance_scale) else guidance_scale for t in timesteps]
        for scale in scales:
            if not isinstance(scale, Real) or not math.isfinite(scale):
                raise ValueError(f"guidance_scale is {scale!r}; give a finite number, or a function u -> number.")
        if self.null_class is None and any(scale != 1 for scale in scales):
            raise ValueError(
                f"guidance_scale is {next(s for s in scales if s != 1)}, but this UNet has no null class (it has "
                f"{len(self.labels)} embeddings for {len(self.labels)} classes): use 1, or a model trained with label "
                "dropout and id2label."
            )
        return scales

    def check_inputs(
        self, num_images, sampler, num_inference_steps, eta, generator, output_type, callback_on_step_end_tensor_inputs
    ):
        """Refuse with a ValueError what `__call__` cannot do, before anything is drawn."""
        T = self.scheduler.config.num_train_timesteps
        if sampler not in ("ddim", "ddpm"):
            raise ValueError(f"sampler is {sampler!r}; choose 'ddim' or 'ddpm'.")
        if not isinstance(num_inference_steps, Integral) or not 1 <= num_inference_steps <= T:
            raise ValueError(f"num_inference_steps is {num_inference_steps!r}; give a whole number from 1 to {T}.")
        if not isinstance(eta, Real) or not 0 <= eta <= 1 or (sampler == "ddpm" and eta != 0):
            raise ValueError(f"eta is {eta} with sampler {sampler!r}; it belongs to 'ddim' and is from 0 to 1.")
        generators = generator if isinstance(generator, list) else [generator] * (generator is not None)
        if not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"generator is {generator!r}; give a torch.Generator, or a list of one per label.")
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(f"{len(generator)} generators were given for {num_images} images; give one per label.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}; choose 'pil', 'np' or 'pt'.")
        if not set(callback_on_step_end_tensor_inputs) <= {"sample", "pred_original_sample"}:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs is {callback_on_step_end_tensor_inputs}; choose from 'sample' "
                "and 'pred_original_sample'."
            )

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
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
    ) -> ClassConditionalOutput | tuple:
        """Draw one image per label.

        Args:
            class_labels: numbers from 0 to K-1 or names, one or a list; as many images are drawn.
            guidance_scale: w in out = out_null + w (out_cond - out_null): 0 is the unconditional model, 1 the
                conditional one (one evaluation of the UNet a step), above 1 guided (a doubled batch). Papers differ by
                one: this w is 1 + w of Ho & Salimans, s of most others. Or a function of u = (t + 1) / T, from 1 at
                pure noise down towards 0: `lambda u: 3.0 if 0.2 < u < 0.7 else 1.0` is an interval,
                `lambda u: 1 + 2 * u` a linear ramp, `lambda u: 2 - math.cos(math.pi * u)` a cosine one. As eps, x_0
                and v are linear in each other at one x_t, w means the same for each.
            sampler: "ddim", or "ddpm": ancestral, with the variance of the scheduler's config on all T steps, on
                fewer fixed_small (learned_range stays, the variance being that of the conditional output).
            num_inference_steps: S from 1 to T, at timesteps round((k+1) T/S) - 1 ("trailing").
            eta: DDIM's share of fresh noise, from 0 (none) to 1 (as much as DDPM).
            generator: one for the batch, or a list of one per image: then image k is the same alone and in any batch.
            output_type: "pil"; "np", float (B, H, W, C) in [0, 1]; or "pt", float (B, C, H, W) in [0, 1], on the CPU.
            return_intermediates: keep the x_0 prediction of every step.
            callback_on_step_end: called as (pipeline, i, t, tensors) after step i; a "sample" in the dict that it
                returns replaces x.

        x_0 is clipped or thresholded as the scheduler's config says, after guidance. At scale 1 DDIM's eps stays as
        predicted, as in stock diffusers, so that it redraws the images of stock DDIM; at others it is that of the
        clipped x_0, for guidance sends x_0 far out of range, and the eps of that breaks the image: of 40 digits of
        MNIST asked for at scale 2, a classifier knew 70 % so, and all with the eps of the clipped x_0.
        """
        labels = self.class_ids(class_labels)
        self.check_inputs(
            len(labels), sampler, num_inference_steps, eta, generator, output_type, callback_on_step_end_tensor_inputs
        )
        scheduler = self._ddpm_scheduler(num_inference_steps)
        timesteps = scheduler.timesteps.tolist()
        scales = self.guidance_scales(guidance_scale, timesteps)

        device, config = self._execution_device, self.unet.config
        labels = torch.tensor(labels, device=device)
        size = config.sample_size
        shape = len(labels), config.in_channels, *((size, size) if isinstance(size, int) else size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        intermediates = []
        for i, t in enumerate(self.progress_bar(timesteps)):
            output = self._guided_output(x, t, labels, scales[i])
            prev_t = timesteps[i + 1] if i + 1 < len(timesteps) else -1
            if sampler == "ddim":
                keep_epsilon, output = scales[i] == 1, output[:, : shape[1]]
                x, pred_original_sample = _ddim_step(scheduler, output, x, t, prev_t, eta, generator, keep_epsilon)
            else:
                if not scheduler.variance_type.startswith("learned"):
                    output = output[:, : shape[1]]
                x, pred_original_sample = scheduler.step(output, t, x, generator=generator, return_dict=False)
                if prev_t < 0:  # the posterior mean is x_0 itself, to which stock adds noise where t > 0
                    x = pred_original_sample
            if callback_on_step_end is not None:
                tensors = {"sample": x, "pred_original_sample": pred_original_sample}
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                x = (callback_on_step_end(self, i, t, tensors) or {}).get("sample", x)
            if return_intermediates:
                intermediates.append(self._to_output(pred_original_sample, output_type))
        self.maybe_free_model_hooks()
        images = self._to_output(x, output_type)
        result = ClassConditionalOutput(images, intermediates if return_intermediates else None)
        return result if return_dict else result.to_tuple()

    def class_sheet(self, num_per_class: int = 10, seed: int = 0, names: bool = True, **kwargs) -> Image.Image:
        """One row a class, `num_per_class` images each, on white; with `names`, the name of the class left of its row.

        Column k comes from `torch.Generator().manual_seed(seed + k)` in every row, so that a column shows the same
        noise as each class. `kwargs` are those of `__call__`. num_per_class < 1 is a ValueError.
        """
        if num_per_class < 1:
            raise ValueError(f"num_per_class is {num_per_class}; give at least 1.")
        rows = []
        for k in range(len(self.labels)):
            generators = [torch.Generator().manual_seed(seed + column) for column in range(num_per_class)]
            rows.append(self([k] * num_per_class, generator=generators, **kwargs).images)
        (width, height), gap, font = rows[0][0].size, 2, ImageFont.load_default()
        boxes = [font.getbbox(name) for name in self.labels]
        left = max(box[2] for box in boxes) + 2 * gap if names else 0
        height = max(height, max(box[3] for box in boxes)) if names else height
        size = left + num_per_class * (width + gap) + gap, len(rows) * (height + gap) + gap
        sheet = Image.new(rows[0][0].mode, size, "white")
        for k, row in enumerate(rows):
            top = gap + k * (height + gap)
            for column, image in enumerate(row):
                sheet.paste(image, (left + gap + column * (width + gap), top))
            if names:
                middle = top + (height - boxes[k][1] - boxes[k][3]) // 2
                ImageDraw.Draw(sheet).text((gap, middle), self.labels[k], fill="black", font=font)
        return sheet

    def _ddpm_scheduler(self, num_inference_steps: int) -> DDPMScheduler:
        """Stock DDPM with the betas and prediction type of whatever scheduler is here, on trailing timesteps."""
        # _use_default_values would have from_config replace the defaults of the other class, betas too, by DDPM's.
        config = {key: value for key, value in self.scheduler.config.items() if key != "_use_default_values"}
        T = config["num_train_timesteps"]
        kind = (config.get("variance_type") or "fixed_small").removesuffix("_log")
        if num_inference_steps < T and not kind.startswith("learned"):
            kind = "fixed_small"
        scheduler = DDPMScheduler.from_config(config | {"variance_type": kind})
        steps = np.round(np.arange(T, 0, -T / num_inference_steps)[:num_inference_steps]).astype(int) - 1
        scheduler.set_timesteps(timesteps=steps.tolist())
        return scheduler

    def _guided_output(self, x, t, labels, scale):
        """The UNet's float32 output at x_t; of the channels that predict the variance, those of the condition."""
        if scale != 1:
            x = torch.cat([x, x])
            labels = torch.cat([torch.full_like(labels, self.null_class), labels])
        timesteps = torch.full((len(x),), t, device=x.device)
        output = self.unet(x.to(self.unet.dtype), timesteps, class_labels=labels).sample.float()
        if scale == 1:
            return output
        null, conditional = output.chunk(2)
        channels = x.shape[1]
        guided = null + scale * (conditional - null)
        return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)

    def _to_output(self, x, output_type):
        images = (x / 2 + 0.5).clamp(0, 1).cpu()
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).numpy()
        return images if output_type == "np" else self.numpy_to_pil(images)


def _ddim_step(scheduler, output, x, t, prev_t, eta, generator, keep_epsilon):
    """x at prev_t by eq. 12 of Song et al. 2021, sigma = eta sqrt(beta~) as in its eq. 16, and the x_0 predicted.

    `keep_epsilon`: as predicted, whatever clipping does to x_0.
    """
    alpha_bar = scheduler.alphas_cumprod[t].item()
    alpha_bar_prev = scheduler.alphas_cumprod[prev_t].item() if prev_t >= 0 else 1.0
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    kind, config = scheduler.config.prediction_type, scheduler.config
    if kind == "epsilon":
        pred_original_sample, epsilon = (x - noise * output) / signal, output
    elif kind == "sample":
        pred_original_sample, epsilon = output, (x - signal * output) / noise
    else:
        pred_original_sample, epsilon = signal * x - noise * output, signal * output + noise * x
    if config.thresholding:
        pred_original_sample = scheduler._threshold_sample(pred_original_sample)
    elif config.clip_sample:
        pred_original_sample = pred_original_sample.clamp(-config.clip_sample_range, config.clip_sample_range)
    if not keep_epsilon:
        epsilon = (x - signal * pred_original_sample) / noise
    variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    x = alpha_bar_prev**0.5 * pred_original_sample + (1 - alpha_bar_prev - variance) ** 0.5 * epsilon
    if eta > 0 and prev_t >= 0:
        x = x + variance**0.5 * randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x, pred_original_sample
