"""Restore images with any unconditional DDPM: denoise, inpaint, enlarge, colour and deblur, without training for it.

Given y = A x + noise with a known linear A, every step of the reverse process corrects the predicted clean image,

    x_0 <- x_0 + A^T (A A^T + lam I)^-1 (y - A x_0),    lam = noise_level^2 / (1 - alphas_cumprod[t]),

the posterior mean if x_0 | x_t is Gaussian with the variance 1 - alphas_cumprod[t] (that of PiGDM, Song et al. 2023,
https://openreview.net/forum?id=9_gsMA8MRKQ): DDNM (Wang et al. 2023, https://huggingface.co/papers/2212.00490) where
lam = 0, close to DiffPIR (Zhu et al. 2023, https://huggingface.co/papers/2305.08995) where not.

    pipe = DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="pipelines/restoration.py", trust_remote_code=True)
    small = pipe.degrade(digit, "super_resolution", scale_factor=4)
    pipe(small, "super_resolution", scale_factor=4).images[0].save("digit.png")
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor


TASKS = ("denoise", "inpaint", "super_resolution", "colorize", "deblur")
ROUNDING = 1 / 255 / math.sqrt(12)  # the noise of rounding to 8 bits


@dataclass
class RestorationOutput(BaseOutput):
    """`noise_levels` (N,): estimated or given, on [0, 1]; `intermediates`: the x_0 of each step, or None."""

    images: list | np.ndarray | Tensor
    noise_levels: Tensor
    intermediates: list | None = None


def mean_operator(apply: Callable, spread: Callable, count: int = 1) -> tuple[Callable, Callable]:
    """A with A A^T = I / count: means of `count` pixels or channels, or known pixels; `spread` is A+ = count A^T.

    Return `apply(x)` = A x and `solve(residual, lam)` = A^T (A A^T + lam I)^-1 residual; lam = 0: the pseudo-inverse.
    """
    return apply, lambda residual, lam: spread(residual) / (1 + count * lam)


def gaussian_operator(sigma: float, height: int, width: int, device: torch.device) -> tuple[Callable, Callable]:
    """A x = B_h x B_w^T: scipy.ndimage.gaussian_filter(x, sigma, mode="reflect", truncate=4), B symmetric.

    B = V diag(s) V^T, so A has eigenvalues outer(s_h, s_w). Those below 1e-4 count as 0: lost in float32's rounding.
    """

    def eigen(n):
        # Row i of B is the kernel around i, folded back at the borders: d c b a | a b c d | d c b a.
        offsets = torch.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
        kernel = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
        columns = (torch.arange(n)[:, None] + offsets) % (2 * n)
        columns = columns.where(columns < n, 2 * n - 1 - columns)
        kernel = (kernel / kernel.sum()).repeat(n, 1)
        return torch.linalg.eigh(torch.zeros(n, n).to(kernel).scatter_add_(1, columns, kernel))

    (s_h, v_h), (s_w, v_w) = eigen(height), eigen(width)
    s, v_h, v_w = (part.float().to(device) for part in (torch.outer(s_h, s_w), v_h, v_w))
    s = s.where(s.abs() > 1e-4, 0)
    return (
        lambda x: v_h @ (s * (v_h.T @ x @ v_w)) @ v_w.T,
        lambda y, lam: v_h @ (torch.where(s == 0, 0, s / (s**2 + lam)) * (v_h.T @ y @ v_w)) @ v_w.T,
    )


class RestorationPipeline(DiffusionPipeline):
    """Any UNet2DModel with any scheduler that has its betas; of a class-conditional one, the class past `id2label`."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label=id2label)

    @torch.no_grad()
    def __call__(
        self, image, task: str, noise_level: float | list[float] | Tensor | None = None, mask=None,
        scale_factor: int = 2, blur_sigma: float = 1.0, num_inference_steps: int | None = None,
        num_samples: int | None = None, eta: float = 1.0, generator=None, output_type: str = "pil",
        return_dict: bool = True, callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs=("sample",), return_intermediates: bool = False,
    ) -> RestorationOutput | tuple:  # fmt: skip
        """Restore N images of any size that the UNet can halve. What cannot be done is a ValueError.

        - `image`: PIL, array (N,)H,W[,C], tensor (N,)C,H,W, uint8 or float on [0, 1] (beyond it by noise), or a list.
        - `task`: denoise; inpaint; super_resolution, of the means of `scale_factor`^2 pixels; colorize, of the mean of
          the channels; deblur, of gaussian_operator with `blur_sigma` in pixels.
        - `noise_level`: standard deviation of white noise on [0, 1], one or one per image. None: denoise estimates it,
          others take rounding to 8 bits. 0: A x = y holds exactly.
        - `mask` of inpaint, one or one per image: white, True or 1 is painted anew.
        - `num_samples` restorations, averaged: 4 for PSNR (1 to 2 dB), 1 for sharpness, in 25 steps, closer near t = 0
          (SSIM of deblurred digits .997, evenly .988). denoise takes 1, the mean of all clean images; 10 draw one.
        - `eta`: 1 renews the noise at each step; 0.5 costs 1 to 5 dB. `generator`: one, or one per image.
        """
        y, sigma = self._read(image, task, noise_level, scale_factor, blur_sigma)
        steps = (1 if task == "denoise" else 25) if num_inference_steps is None else num_inference_steps
        samples = (4 if steps > 1 else 1) if num_samples is None else num_samples
        self.check_inputs(len(y), steps, samples, eta, generator, output_type, callback_on_step_end_tensor_inputs)
        generator = [g for g in generator for _ in range(samples)] if isinstance(generator, list) else generator
        grown = scale_factor if task == "super_resolution" else 1
        shape = (len(y) * samples, self.unet.config.in_channels, grown * y.shape[2], grown * y.shape[3])
        apply, solve = self._operator(task, shape, mask, samples, scale_factor, blur_sigma)
        if task == "denoise":
            sigma, y = self._unclip(y, sigma)
        y, sigma = y.repeat_interleave(samples, dim=0), sigma.repeat_interleave(samples)[:, None, None, None]
        timesteps, alphas_cumprod = self._schedule(steps, len(y), sigma if task == "denoise" else None)
        x = alphas_cumprod[0].sqrt() * y if task == "denoise" else randn_tensor(shape, generator, y.device)
        intermediates = []
        for i, t in enumerate(self.progress_bar(timesteps)):
            a, b = alphas_cumprod[i], alphas_cumprod[i + 1]
            x0 = self._pred_original_sample(x, t, a)
            if task != "denoise":
                x0 = x0 + solve(y - apply(x0), sigma**2 / (1 - a))
            # The noise kept and the variance of fresh noise: DDPM's for denoise, whose y lives in x alone.
            noise = (x - a.sqrt() * x0) / (1 - a).sqrt()
            fresh = eta**2 * (1 - b) * ((1 - a / b) / (1 - a) if task == "denoise" else 1)
            drawn = randn_tensor(shape, generator, y.device) if eta > 0 and i + 1 < steps else 0
            x = b.sqrt() * x0 + (1 - b - fresh).sqrt() * noise + fresh.sqrt() * drawn
            if callback_on_step_end is not None:
                tensors = {"sample": x, "pred_original_sample": x0}
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                x = (callback_on_step_end(self, i, t, tensors) or {}).get("sample", x)
            intermediates += [x0] if return_intermediates else []
        self.maybe_free_model_hooks()
        means = (v.unflatten(0, (-1, samples)).mean(dim=1) for v in (x, *intermediates))
        images, *intermediates = (VaeImageProcessor().postprocess(mean, output_type) for mean in means)
        output = images, sigma.flatten()[::samples] / 2, intermediates if return_intermediates else None
        return RestorationOutput(*output) if return_dict else output

    @torch.no_grad()
    def degrade(
        self, image, task, mask=None, scale_factor=2, blur_sigma=1.0, noise_level=0.0, generator=None, output_type="pt"
    ) -> list | np.ndarray | Tensor:
        """y = A x + noise, what `__call__` undoes, with its arguments; not clipped; where `mask` hides, A x is 0.5."""
        x, sigma = self._read(image, task, noise_level, scale_factor, blur_sigma, degraded=False)
        self.check_inputs(len(x), 1, 1, 0, generator, output_type)
        y = self._operator(task, x.shape, mask, 1, scale_factor, blur_sigma)[0](x)
        y = (y + sigma[:, None, None, None] * randn_tensor(y.shape, generator, y.device) + 1) / 2
        y = y.clamp(0, 1) if output_type == "pil" else y
        return VaeImageProcessor().postprocess(y, output_type, do_denormalize=[False] * len(y))

    @torch.no_grad()
    def estimate_noise(self, image) -> Tensor:
        """Return the standard deviation (N,) of the white noise in `image`, on [0, 1], as denoise finds it."""
        self.check_inputs(0, 1, 1, 0, None, "pt")
        return self._unclip(*self._read(image, "denoise", None))[0] / 2

    def _unclip(self, y: Tensor, sigma: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the noise (N,) of y (N, C, H, W), estimated if `sigma` is None, and y with its clipped noise redrawn.

        sigma^2 = mean (y - D)^2 / (1 - mean dD/dy), D the denoiser at sigma: by Tweedie's and Stein's formulas, where
        the likelihood of sigma is highest; begun at Donoho and Johnstone's median (1994). A pixel at an end of the
        range, in an image within it, is drawn from N(D, sigma^2) beyond: 18.9 -> 24.5 dB on digits at sigma 0.25.
        """
        clipped = (y.abs() >= 1) & (y.abs() <= 1).flatten(1).all(dim=1)[:, None, None, None]
        is_known, given, kept = sigma is not None, y, 1 - clipped.float().flatten(1).mean(dim=1).clamp(max=0.8)
        # The same draws for every image, so that it does not matter which others are in its batch.
        uniform = torch.rand(2, *y.shape[1:], generator=torch.Generator().manual_seed(1997)).to(y.device)
        uniform, signs = uniform[0].clamp(min=1e-6), (uniform[1] - 0.5).sign()
        if not is_known:
            wavelets = F.conv2d(y.flatten(0, 1)[:, None], y.new_tensor([[[[0.5, -0.5], [-0.5, 0.5]]]]), stride=2)
            sigma = wavelets.unflatten(0, y.shape[:2]).abs().flatten(1).median(dim=1).values / 0.6745 / kept
        sigma = sigma.clamp(min=2 * ROUNDING)
        if is_known and not clipped.any():
            return sigma, y
        x = self._denoise(y, sigma)
        for _ in range(4):
            scale = sigma[:, None, None, None]
            tail = torch.special.ndtr((given * x - 1) / scale).clamp(min=1e-12)
            beyond = given * (given * x - scale * torch.special.ndtri(uniform * tail)).clamp(min=1)
            y = beyond.where(clipped, given)
            x = self._denoise(y, sigma)
            if not is_known:
                step = 0.1 * scale * signs
                slope = ((self._denoise(y + step, sigma) - x) / step).flatten(1).mean(dim=1).clamp(0, 0.9)
                change = (y - x).square().flatten(1).mean(dim=1) / (1 - slope) - sigma**2
                sigma = (sigma**2 + change / kept).clamp(min=sigma**2 / 4).sqrt().clamp(min=2 * ROUNDING)
        return sigma, y

    def _denoise(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | y] for noise `sigma` (N,): one evaluation."""
        (t,), (alphas_cumprod, _) = self._schedule(1, len(y), sigma)
        return self._pred_original_sample(alphas_cumprod.sqrt() * y, t, alphas_cumprod)

    def _pred_original_sample(self, x: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
        """x_0 from x_t, (B, C, H, W), at timesteps `t` (B,), whole or not."""
        config, labels = self.scheduler.config, {}
        if self.unet.config.get("num_class_embeds") is not None:
            labels["class_labels"] = torch.full_like(t, self.unet.config.num_class_embeds - 1, dtype=torch.int64)
        output = self.unet(x.to(self.unet.dtype), t, **labels).sample.float()[:, : x.shape[1]]  # then a variance
        if config.prediction_type == "epsilon":
            output = (x - (1 - alphas_cumprod).sqrt() * output) / alphas_cumprod.sqrt()
        elif config.prediction_type == "v_prediction":
            output = alphas_cumprod.sqrt() * x - (1 - alphas_cumprod).sqrt() * output
        reach = config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else math.inf
        return output.clamp(-reach, reach)

    def _schedule(self, steps: int, B: int, sigma: Tensor | None) -> tuple[Tensor, Tensor]:
        """Timesteps (steps, B), alphas_cumprod (steps + 1, B, 1, 1, 1); from `sigma` down, or all T, closer near 0."""
        config = {k: v for k, v in self.scheduler.config.items() if k != "_use_default_values"}  # drops what it lists
        table = DDPMScheduler.from_config(config).alphas_cumprod.double()
        # Linear in log-SNR between timesteps; t = -1, the clean image, is given a very high one.
        whole, log_snr, k = np.arange(-1, len(table)), np.append(18, table.logit()), np.arange(steps, 0, -1) / steps
        timesteps = np.round(k**1.5 * len(table)).clip(1)[:, None].repeat(B, axis=1) - 1
        if sigma is not None:
            timesteps = np.outer(k, np.interp(2 * sigma.double().flatten().log().cpu(), -log_snr, whole) + 1) - 1
        alphas_cumprod = torch.from_numpy(np.interp(timesteps, whole, log_snr)).sigmoid()
        alphas_cumprod = torch.cat([alphas_cumprod, torch.ones(1, B)])[..., None, None, None]
        tables = torch.from_numpy(timesteps.clip(0)), alphas_cumprod
        return tuple(table.float().to(self._execution_device) for table in tables)

    def _operator(self, task: str, shape: tuple[int, ...], mask, samples: int, k: int, blur_sigma: float):
        """A on images of `shape`, of which `samples` after `samples` share a mask."""
        N, C, H, W = shape[0] // samples, *shape[1:]
        if task == "deblur":
            return gaussian_operator(blur_sigma, H, W, self._execution_device)
        if task == "super_resolution":
            return mean_operator(lambda x: F.avg_pool2d(x, k), lambda y: F.interpolate(y, scale_factor=k), k**2)
        if task == "colorize":
            return mean_operator(lambda x: x.mean(dim=1, keepdim=True), lambda y: y.expand(-1, C, -1, -1), C)
        _check(task == "denoise" or mask is not None, "inpaint needs a mask, white where to paint anew; give one.")
        masks = _pixels(torch.zeros(H, W) if task == "denoise" else mask, 1).to(self._execution_device)
        fits = len(masks) in (1, N) and masks.shape[2:] == (H, W) and (masks >= 0).all()
        _check(fits, f"The mask is {[*masks.shape]}; give {H}x{W}, one or {N}, of 0 (kept) and 1 (painted).")
        keep = (masks <= masks.amax((1, 2, 3), True) / 2).float().expand(N, -1, -1, -1).repeat_interleave(samples, 0)
        return mean_operator(keep.mul, keep.mul)

    def _read(self, image, task, noise_level, scale_factor=1, blur_sigma=1.0, degraded=True):
        """Return the image in [-1, 1] (N, C, H, W) and its noise there (N,), None if not known; or refuse them."""
        _check(task in TASKS, f"task is {task!r}; choose {', '.join(TASKS)}.")
        k = scale_factor if task == "super_resolution" else 1
        _check(isinstance(k, int) and k >= 1, f"scale_factor is {k}; give a whole number from 1 on.")
        _check(0 < blur_sigma < math.inf, f"blur_sigma is {blur_sigma}; give a number of pixels above 0.")
        channels = 1 if degraded and task == "colorize" else self.unet.config.in_channels
        image = _pixels(image, channels).to(self._execution_device)
        N, (H, W), halved = len(image), image.shape[2:], 2 ** (len(self.unet.config.down_block_types) - 1)
        H, W, wanted = (H * k, W * k, halved) if degraded else (H, W, math.lcm(halved, k))
        _check(H % wanted == W % wanted == 0, f"The restored image is {H}x{W}; give one of multiples of {wanted}.")
        unknown = task == "denoise" and noise_level is None
        sigma = torch.as_tensor(ROUNDING if noise_level is None else noise_level).float().flatten().to(image.device)
        fits = len(sigma) in (1, N) and ((sigma >= 0) & (sigma <= 4)).all()
        _check(fits, f"noise_level is {noise_level}; give 0 to 4, on pixels in [0, 1], or one for each of {N} images.")
        beyond = 3 if unknown else 1e-3 + 6 * sigma.max() * degraded
        low, high = image.min(), image.max()  # nan where there is one
        what = f"Values from {low:.4g} to {high:.4g} are out of range: divide by 255, or give the noise_level?"
        _check(low >= -beyond and high <= 1 + beyond, what)
        return 2 * image - 1, None if unknown else 2 * sigma.expand(N)

    def check_inputs(self, N, steps, samples, eta, generator, output_type, tensor_inputs=()):
        """Refuse with a ValueError what cannot be drawn, and a UNet that wants a class."""
        T, classes, names = len(self.scheduler), self.unet.config.get("num_class_embeds"), self.config.id2label or {}
        _check(steps in range(1, T + 1), f"num_inference_steps is {steps}; give a whole number from 1 to {T}.")
        _check(isinstance(samples, int) and samples >= 1, f"num_samples is {samples}; give a whole number from 1 on.")
        _check(0 <= eta <= 1, f"eta is {eta}; give a number from 0 to 1.")
        fits = not isinstance(generator, list) or len(generator) == N
        _check(fits, f"generator is a list of {fits or len(generator)}; give one, or a list of {N}, one per image.")
        _check(output_type in ("pil", "np", "pt"), f"output_type is {output_type!r}; choose pil, np or pt.")
        fits = {"sample", "pred_original_sample"}.issuperset(tensor_inputs)
        _check(fits, f"No callback gets all of {tensor_inputs}; choose sample, pred_original_sample.")
        fits = classes in (None, len(names) + 1)
        _check(fits, f"The UNet has {classes} classes but no null class; take one that has.")


def _check(is_right: bool, message: str) -> None:
    if not is_right:
        raise ValueError(message)


def _pixels(image, channels: int) -> Tensor:
    """PIL images, arrays or tensors as (N, channels, H, W), float32 on [0, 1]."""
    if isinstance(image, (list, tuple)):
        images = [_pixels(one, channels) for one in image]
        _check(len({one.shape[1:] for one in images}) == 1, "The images differ in size, or are none; give one size.")
        return torch.cat(images)
    _check(isinstance(image, (Image.Image, np.ndarray, Tensor)), f"{type(image)} is no PIL image, array or tensor.")
    if isinstance(image, Image.Image):
        pixels = np.array(image.convert("RGB"))
        fits = image.mode in ("1", "L", "RGB") and (channels > 1 or (pixels == pixels[..., :1]).all())
        _check(fits, f"The image has mode {image.mode} or colours, but {channels} channel(s) are wanted: convert it.")
        image = pixels[..., :channels]
    if isinstance(image, np.ndarray):
        is_grey = image.ndim == 2 or (image.ndim == 3 and channels == 1 != image.shape[-1])
        image = torch.tensor(image[..., None] if is_grey else image).movedim(-1, -3)
    elif channels == 1 and image.ndim < 4:
        image = image[..., None, :, :]
    image = image[None] if image.ndim == 3 else image
    fits, wanted = image.ndim == 4 and image.shape[1] == channels, f"{channels} channel(s)"
    _check(fits, f"The image is {[*image.shape]}; give {wanted}, as a tensor (N,)C,H,W or an array (N,)H,W[,C].")
    return image / 255 if image.dtype == torch.uint8 else image.float()
