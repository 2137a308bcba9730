"""Denoise, inpaint, enlarge, colour or deblur images with any DDPM that was trained on clean images.

The degraded image is y = A x + noise, where A is linear and known. Every sampling step predicts a clean image x_0 and
corrects it by

    x_0 <- x_0 + A^T (A A^T + lam I)^-1 (y - A x_0),    lam = noise_level^2 / (1 - alphas_cumprod[t]).

The corrected x_0 is the posterior mean if p(x_0 | x_t) is Gaussian with the variance 1 - alphas_cumprod[t]. PiGDM
(Song et al. 2023, https://openreview.net/forum?id=9_gsMA8MRKQ) assumes the same variance. With lam = 0 this is the
correction of DDNM (Wang et al. 2023, https://huggingface.co/papers/2212.00490). With lam > 0 it is close to the
correction of DiffPIR (Zhu et al. 2023, https://huggingface.co/papers/2305.08995).

A restoration is not a sample of the posterior p(x_0 | y). We tested this with Gaussian data, whose posterior is known.
The mean of many restorations is right. Their variance is about half of the posterior's (0.41 to 0.53 of it in 25 to
1000 steps), because each step adds noise around the mean of x_0. Do not measure uncertainty by the spread of
restorations.

    pipe = DiffusionPipeline.from_pretrained(MODEL, custom_pipeline="pipelines/restoration.py", trust_remote_code=True)
    small = pipe.degrade(digit, "super_resolution", scale_factor=4)
    pipe(small, "super_resolution", scale_factor=4).images[0].save("digit.png")
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor


ROUNDING = 1 / 255 / math.sqrt(12)  # the noise of rounding to 8 bits


@dataclass
class RestorationOutput(BaseOutput):
    """`images` in the requested `output_type`, and `noise_levels` (N,): given or estimated, for pixels in [0, 1]."""

    images: list | np.ndarray | Tensor
    noise_levels: Tensor


def mean_operator(apply: Callable, spread: Callable, count: int = 1) -> tuple[Callable, Callable]:
    """Return (apply, solve) for a linear operator A with A A^T = I / count.

    A takes the means of `count` pixels or channels, or selects the pixels of a mask (`count` is 1). `apply(x)` returns
    A x. `spread(y)` returns A^T y multiplied by `count`, which is the pseudo-inverse of A applied to y.
    `solve(residual, lam)` returns A^T (A A^T + lam I)^-1 residual.
    """
    return apply, lambda residual, lam: spread(residual) / (1 + count * lam)


def gaussian_operator(sigma: float, height: int, width: int, device: torch.device) -> tuple[Callable, Callable]:
    """Return (apply, solve) for a blur like scipy.ndimage.gaussian_filter(x, sigma, mode="reflect", truncate=4).

    A x = B_h x B_w^T, where B_h blurs along the height and B_w along the width. Both are symmetric, B = V diag(s) V^T.
    The eigenvalues of A are the products of an eigenvalue of B_h and an eigenvalue of B_w. Eigenvalues below 1e-4
    count as 0, because float32's rounding destroys the little signal that they keep.
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


# For each task, a function that returns (apply, solve). `keep` (B, 1, H, W) is 1 for pixels that the mask keeps.
OPERATORS = {
    "denoise": lambda keep, shape, **_: mean_operator(lambda x: x, lambda y: y),
    "inpaint": lambda keep, shape, **_: mean_operator(keep.mul, keep.mul),
    "super_resolution": lambda keep, shape, scale_factor, **_: mean_operator(
        lambda x: F.avg_pool2d(x, scale_factor), lambda y: F.interpolate(y, scale_factor=scale_factor), scale_factor**2
    ),
    "colorize": lambda keep, shape, **_: mean_operator(
        lambda x: x.mean(dim=1, keepdim=True), lambda y: y.expand(-1, shape[1], -1, -1), shape[1]
    ),
    "deblur": lambda keep, shape, blur_sigma, device, **_: gaussian_operator(blur_sigma, *shape[2:], device),
}


class RestorationPipeline(DiffusionPipeline):
    """Restores images with a UNet2DModel and any scheduler whose config holds its betas.

    A class-conditional UNet needs an embedding for "no class", after those of the classes in `id2label`.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label=id2label)

    # More than 60 lines because of its signature and its docstring.
    @torch.no_grad()
    def __call__(
        self,
        image,
        task: str,
        noise_level: float | list[float] | Tensor | None = None,
        mask=None,
        *,
        scale_factor: int = 2,
        blur_sigma: float = 1.0,
        num_inference_steps: int | None = None,
        num_samples: int | None = None,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
    ) -> RestorationOutput | tuple:
        """Restore N images.

        Args:
            image: a PIL image, an array (N,)H,W[,C] or a tensor (N,)C,H,W, or a list of them. Values are uint8, or
                floats in [0, 1]; noise may push floats out of this range. Height and width of the restored image must
                be multiples of 2^(UNet blocks - 1).
            task: "denoise"; "inpaint"; "super_resolution", if each pixel is the mean of `scale_factor`^2 pixels;
                "colorize", if each pixel is the mean of its channels; or "deblur", if the image was blurred as by
                gaussian_operator, with `blur_sigma` in pixels.
            noise_level: the standard deviation of the white noise for pixels in [0, 1]: one number, or one per image.
                0 means that y = A x holds exactly. None: "denoise" estimates the noise, and the other tasks assume
                that y was rounded to 8 bits.
            mask: for "inpaint": one mask, or one per image. Pixels that are white, True or 1 are painted anew.
            num_inference_steps: None: 1 for "denoise", and 25 (at most T) for other tasks. Timesteps are closer to
                each other near t = 0. This raises the SSIM of deblurred digits from .988 to .997.
            num_samples: how many restorations to average. The mean of 4 has 1 to 2 dB more PSNR, but a single one is
                sharper. None: 4, or 1 if there is a single step, because one step already gives the mean of all clean
                images that fit. Single restorations have half of the posterior's variance. For "denoise" in several
                steps they have more: 0.7 of it in 10 steps, and 0.96 of it in 100 steps.
            eta: share of the noise that each step draws anew. With 0.5 instead of 1, PSNR is 1 to 5 dB lower, and the
                mean of "denoise" is off by a quarter to half of a posterior standard deviation.
            generator: one for all images, or a list with one per image. With a list, image k is the same in any batch.
            output_type: "pil"; "np", float (N, H, W, C) in [0, 1]; or "pt", float (N, C, H, W) in [0, 1], on the
                pipeline's device.
            callback_on_step_end: called as callback(pipeline, i, t, tensors) after step i, where `t` is a tensor
                (N * num_samples,). `tensors` is a dict of the tensors (N * num_samples, C, H, W) that
                callback_on_step_end_tensor_inputs names: "sample", "pred_original_sample" or both. If the callback
                returns a dict with "sample", the next step starts from that tensor.

        Raises:
            ValueError: for images or arguments that do not suit this model.
        """
        options = {"scale_factor": scale_factor, "blur_sigma": blur_sigma}
        y, sigma = self._read(image, task, noise_level, **options)
        is_denoise = task == "denoise"
        default = 1 if is_denoise else min(25, len(self.scheduler))
        steps = default if num_inference_steps is None else num_inference_steps
        samples = (4 if steps > 1 else 1) if num_samples is None else num_samples
        self.check_inputs(len(y), steps, samples, eta, generator)
        check_output(output_type, callback_on_step_end_tensor_inputs)
        generator = [one for one in generator for _ in range(samples)] if isinstance(generator, list) else generator
        grown = scale_factor if task == "super_resolution" else 1
        shape = (len(y) * samples, self.unet.config.in_channels, grown * y.shape[2], grown * y.shape[3])
        keep = self._kept(task, mask, len(y), *shape[2:]).repeat_interleave(samples, dim=0)
        apply, solve = OPERATORS[task](keep, shape, **options, device=y.device)
        if is_denoise:
            sigma, y = self._unclip(y, sigma)
        y, sigma = y.repeat_interleave(samples, dim=0), sigma.repeat_interleave(samples)[:, None, None, None]
        timesteps, alphas_cumprod, noise_variances = self._schedule(steps, len(y), sigma if is_denoise else None)
        x = alphas_cumprod[0].sqrt() * y if is_denoise else randn_tensor(shape, generator, y.device)
        for i, t in enumerate(self.progress_bar(timesteps)):
            alpha_bar, alpha_bar_prev = alphas_cumprod[i], alphas_cumprod[i + 1]
            beta_bar, beta_bar_prev = noise_variances[i], noise_variances[i + 1]
            x0 = self._predict(x, t, alpha_bar)
            if not is_denoise:
                x0 = x0 + solve(y - apply(x0), sigma**2 / beta_bar)
            # The variance of the noise to draw anew. "denoise" uses DDPM's, because y is only its first x.
            variance = eta**2 * beta_bar_prev
            if is_denoise:
                variance = variance * (beta_bar - beta_bar_prev) / (alpha_bar_prev * beta_bar)
            # Eq. 12 of Song et al. 2021. The noise is not divided by its deviation, which is almost 0 near t = -1.
            old_noise = ((beta_bar_prev - variance).clamp(min=0) / beta_bar).sqrt() * (x - alpha_bar.sqrt() * x0)
            noise = randn_tensor(shape, generator, y.device) if eta > 0 and i + 1 < steps else 0
            x = alpha_bar_prev.sqrt() * x0 + old_noise + variance.sqrt() * noise
            tensors = {"sample": x, "pred_original_sample": x0}
            x = after_step(callback_on_step_end, callback_on_step_end_tensor_inputs, self, (i, t), tensors)
        self.maybe_free_model_hooks()
        images = to_output(x.unflatten(0, (-1, samples)).mean(dim=1), output_type)
        output = RestorationOutput(images, sigma.flatten()[::samples] / 2)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def degrade(
        self,
        image,
        task: str,
        mask=None,
        *,
        scale_factor: int = 2,
        blur_sigma: float = 1.0,
        noise_level: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pt",
    ) -> list | np.ndarray | Tensor:
        """Return y = A x + noise, a degraded image. To restore it, give the same arguments to `__call__`.

        Only PIL images are clipped to [0, 1]. For "inpaint", pixels to paint are 0.5 in A x.
        """
        options = {"scale_factor": scale_factor, "blur_sigma": blur_sigma}
        x, sigma = self._read(image, task, noise_level, **options, is_degraded=False)
        self.check_inputs(len(x), 1, 1, 0, generator)
        check_output(output_type, ())
        keep = self._kept(task, mask, len(x), *x.shape[2:])
        y = OPERATORS[task](keep, x.shape, **options, device=x.device)[0](x)
        y = (y + sigma[:, None, None, None] * randn_tensor(y.shape, generator, y.device) + 1) / 2
        y = y.clamp(0, 1) if output_type == "pil" else y
        return to_output(y, output_type, do_denormalize=[False] * len(y))

    @torch.no_grad()
    def estimate_noise(self, image) -> Tensor:
        """Return the noise level (N,) of `image`, for pixels in [0, 1], as "denoise" estimates it."""
        self.check_inputs(0, 1, 1, 0, None)
        return self._unclip(*self._read(image, "denoise", None))[0] / 2

    def _unclip(self, y: Tensor, sigma: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the noise level (N,) of y (N, C, H, W), and y with new noise in pixels that were clipped.

        If `sigma` is None, estimate it: solve sigma^2 = mean((y - D)^2) / (1 - mean(dD_i / dy_i)) by iteration. D is
        the image denoised at sigma, and i a pixel. By Tweedie's and Stein's formulas, this sigma has the highest
        likelihood. The iteration starts from the median estimate of Donoho & Johnstone 1994.

        If all pixels of an image are in [-1, 1], its pixels at -1 or 1 count as clipped. Each clipped pixel gets a
        random value from the part of N(D, sigma^2) beyond -1 or 1. This raises the PSNR of digits at sigma 0.25 from
        18.9 to 24.5 dB.
        """
        clipped = (y.abs() >= 1) & (y.abs() <= 1).flatten(1).all(dim=1)[:, None, None, None]
        is_known, given, kept = sigma is not None, y, 1 - clipped.float().flatten(1).mean(dim=1).clamp(max=0.8)
        # All images get the same random numbers, so that a result does not depend on the other images in the batch.
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
        """Return E[x_0 | y] for noise `sigma` (N,), by one evaluation of the UNet."""
        (t,), (alpha_bar, _), _ = self._schedule(1, len(y), sigma)
        return self._predict(alpha_bar.sqrt() * y, t, alpha_bar)

    def _predict(self, x: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
        """Return the clipped x_0 from x_t (B, C, H, W) at timesteps `t` (B,), which may be fractions."""
        config, labels = self.scheduler.config, {}
        if self.unet.config.get("num_class_embeds") is not None:
            labels["class_labels"] = torch.full_like(t, self.unet.config.num_class_embeds - 1, dtype=torch.int64)
        if self.unet.config.get("time_embedding_type") == "learned":  # a table, which has only whole timesteps
            t = t.round().long()
        output = self.unet(x.to(self.unet.dtype), t, **labels).sample.float()
        output = output[:, : x.shape[1]]  # further channels predict the variance
        reach = config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else math.inf
        return predict_original_sample(output, x, alpha_bar, config.prediction_type).clamp(-reach, reach)

    def _schedule(self, steps: int, B: int, sigma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return timesteps (steps, B), and alphas_cumprod and 1 - alphas_cumprod, each (steps + 1, B, 1, 1, 1).

        1 - alphas_cumprod is computed in float64, because float32 gives 0 near the clean image (t = -1). The timesteps
        are evenly spaced, from the timestep whose noise is `sigma` to the clean image. If `sigma` is None, the
        timesteps cover all T, and are closer to each other near 0.
        """
        table = ddpm_scheduler(self.scheduler).alphas_cumprod.double()
        # Interpolate log-SNR linearly between timesteps. The clean image, t = -1, gets a very high log-SNR.
        whole, log_snr, k = np.arange(-1, len(table)), np.append(18, table.logit()), np.arange(steps, 0, -1) / steps
        timesteps = np.round(k**1.5 * len(table)).clip(1)[:, None].repeat(B, axis=1) - 1
        if sigma is not None:
            timesteps = np.outer(k, np.interp(2 * sigma.double().flatten().log().cpu(), -log_snr, whole) + 1) - 1
        log_snr = torch.from_numpy(np.append(np.interp(timesteps, whole, log_snr), np.full((1, B), np.inf), axis=0))
        log_snr = log_snr[..., None, None, None]
        tables = torch.from_numpy(timesteps.clip(0)), log_snr.sigmoid(), (-log_snr).sigmoid()
        return tuple(table.float().to(self._execution_device) for table in tables)

    def _kept(self, task: str, mask, N: int, H: int, W: int) -> Tensor:
        """Return 1 for pixels to keep and 0 for pixels to paint, float32 (N, 1, H, W). Only "inpaint" has zeros."""
        if task != "inpaint":
            return torch.ones(N, 1, H, W, device=self._execution_device)
        _check(mask is not None, "inpaint needs a mask; give one that is white in the areas to paint.")
        masks = to_pixels(mask, 1).to(self._execution_device)
        fits = len(masks) in (1, N) and masks.shape[2:] == (H, W) and (masks >= 0).all()
        _check(fits, f"The mask has shape {[*masks.shape]}; give 1 or {N} masks of {H}x{W}, 0 to keep, 1 to paint.")
        return (masks <= masks.amax((1, 2, 3), True) / 2).float().expand(N, -1, -1, -1)

    def _read(self, image, task, noise_level, *, scale_factor=1, blur_sigma=1.0, is_degraded=True):
        """Check the arguments. Return images (N, C, H, W) in [-1, 1], and noise levels (N,), or None if not known."""
        _check(task in OPERATORS, f"task is {task!r}; choose {', '.join(OPERATORS)}.")
        fits = task != "colorize" or self.unet.config.in_channels == 3
        _check(fits, "colorize needs a model of RGB images, and this one draws other images; give another model.")
        k = scale_factor if task == "super_resolution" else 1
        _check(type(k) is int and k >= 1, f"scale_factor is {k!r}; give a whole number from 1 on.")
        _check(0 < blur_sigma < math.inf, f"blur_sigma is {blur_sigma}; give a number of pixels above 0.")
        channels = 1 if is_degraded and task == "colorize" else self.unet.config.in_channels
        image = to_pixels(image, channels).to(self._execution_device)
        N, (H, W), halved = len(image), image.shape[2:], 2 ** (len(self.unet.config.down_block_types) - 1)
        H, W, multiple = (H * k, W * k, halved) if is_degraded else (H, W, math.lcm(halved, k))
        fits = H % multiple == W % multiple == 0
        _check(fits, f"The restored image is {H}x{W}; give one whose height and width are multiples of {multiple}.")
        is_unknown = task == "denoise" and noise_level is None
        sigma = torch.as_tensor(ROUNDING if noise_level is None else noise_level).float().flatten().to(image.device)
        fits = len(sigma) in (1, N) and ((sigma >= 0) & (sigma <= 4)).all()
        _check(fits, f"noise_level is {noise_level}; give 0 to 4 for pixels in [0, 1], or one for each of {N} images.")
        beyond = 3 if is_unknown else 1e-3 + 6 * sigma.max() * is_degraded
        low, high = image.min(), image.max()  # nan if any value is
        what = f"The values {low:.4g} to {high:.4g} are out of range [0, 1]: divide by 255, or give the noise_level."
        _check(low >= -beyond and high <= 1 + beyond, what)
        return 2 * image - 1, None if is_unknown else 2 * sigma.expand(N)

    def check_inputs(self, num_images: int, steps: int, samples: int, eta: float, generator):
        """Raise ValueError for numbers out of range, and for a conditional UNet with no embedding for "no class"."""
        check_steps(steps, self.scheduler.config.num_train_timesteps)
        check_generator(generator, num_images)
        is_whole = isinstance(samples, Integral) and not isinstance(samples, bool)
        _check(is_whole and samples >= 1, f"num_samples is {samples!r}; give a whole number from 1 on.")
        _check(0 <= eta <= 1, f"eta is {eta}; give a number from 0 to 1.")
        classes, names = self.unet.config.get("num_class_embeds"), self.config.id2label or {}
        has_null = classes in (None, len(names) + 1)
        _check(has_null, f"The UNet has {classes} classes but no null class; take a model trained with label dropout.")


def _check(is_right: bool, message: str):
    if not is_right:
        raise ValueError(message)


def to_pixels(image, channels: int) -> Tensor:
    """Return PIL images, arrays or tensors as (N, channels, H, W), float32 on [0, 1]."""
    if isinstance(image, (list, tuple)):
        images = [to_pixels(one, channels) for one in image]
        _check(len({one.shape[1:] for one in images}) == 1, "The list is empty or has several sizes; give one size.")
        return torch.cat(images)
    is_image = isinstance(image, (Image.Image, np.ndarray, Tensor))
    _check(is_image, f"The image is a {type(image).__name__}; give a PIL image, array or tensor.")
    if isinstance(image, Image.Image):
        pixels = np.array(image.convert("RGB"))
        fits = image.mode in ("1", "L", "RGB") and (
            channels == 3 or channels == 1 and (pixels == pixels[..., :1]).all()
        )
        if image.mode == {2: "LA", 4: "RGBA"}.get(channels):
            fits, pixels = True, np.array(image)
        _check(fits, f"The image has mode {image.mode}, but {channels} channel(s) are wanted: convert it.")
        image = pixels[..., :channels]
    if isinstance(image, np.ndarray):
        is_grey = image.ndim == 2 or (image.ndim == 3 and channels == 1 != image.shape[-1])
        image = to_tensor(image[..., None] if is_grey else image).movedim(-1, -3)
    elif channels == 1 and image.ndim < 4:
        image = image[..., None, :, :]
    image = image[None] if image.ndim == 3 else image
    fits, wanted = image.ndim == 4 and image.shape[1] == channels and len(image) > 0, f"{channels} channel(s)"
    _check(fits, f"The image is {[*image.shape]}; give {wanted}, as a tensor (N,)C,H,W or an array (N,)H,W[,C].")
    return image / 255 if image.dtype == torch.uint8 else image.float()


# Pipeline files cannot import each other, so each has its own copies of these functions. A test compares them.


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Return an array of numbers as a tensor, whatever the order of its axes and bytes in memory.

    Raises:
        ValueError: for an array of other things than numbers.
    """
    if array.dtype.kind not in "biuf":
        raise ValueError(f"The image is an array of {array.dtype}; give uint8, or floats in [0, 1].")
    return torch.tensor(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


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


def predict_original_sample(output, x, alpha_bar, prediction_type: str):
    """Return x_0, not clipped, from the network's eps, x_0 or v at x_t = `x`."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if prediction_type == "epsilon":
        return (x - sigma * output) / signal
    return output if prediction_type == "sample" else signal * x - sigma * output


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
