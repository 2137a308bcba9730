"""List the degradations of benchmarks/restoration.py, and the classical methods that it compares with.

The methods are those of scikit-image, Pillow and bm3d. Each takes a degraded image (H, W, C) float64, a dict of what
is known about the degradation (noise_level, mask, scale_factor, blur_sigma) and its own parameters, and returns (H, W,
C).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ddpm_hf.randomness import keyed_generator


DIFFUSION = ("ddpm_hf", "ddpm_hf, noise estimated")


@dataclass
class Row:
    """A degradation: the pipeline's task and arguments, and the names of the classical methods for it."""

    name: str
    task: str
    arguments: dict = field(default_factory=dict)
    classical: tuple[str, ...] = ()

    @property
    def diffusion(self) -> tuple[str, ...]:
        """The names of our pipeline's results: for "denoise" two, because it can also estimate the noise level."""
        return DIFFUSION if self.task == "denoise" else DIFFUSION[:1]


def rows(side: int, channels: int, with_bm3d: bool) -> list[Row]:
    """Return the degradations to measure on images of side x side pixels."""
    denoisers = ("non-local means", "TV-Chambolle") + ("BM3D",) * with_bm3d
    found = [
        Row(f"denoise, sigma {sigma}", "denoise", {"noise_level": sigma}, denoisers) for sigma in (0.1, 0.25, 0.5)
    ]
    half = torch.zeros(side, side, dtype=torch.bool)
    half[:, side // 2 :] = True
    scattered = torch.rand(side, side, generator=keyed_generator(0, "mask")) < 0.5
    for name, mask in [("right half", half), ("random 50 %", scattered)]:
        found.append(Row(f"inpaint, {name}", "inpaint", {"mask": mask}, ("biharmonic",)))
    for factor in (2, 4):
        found.append(Row(f"super-resolution x{factor}", "super_resolution", {"scale_factor": factor}, ("bicubic",)))
    blur = {"blur_sigma": 1.5, "noise_level": 0.01}
    found.append(
        Row("deblur, sigma 1.5, noise 0.01", "deblur", blur, ("unsupervised Wiener", "Wiener", "Richardson-Lucy"))
    )
    if channels == 3:
        found.append(Row("colorize", "colorize"))
    return found


def non_local_means(image, known, strength, patch_size):
    from skimage import restoration

    sigma = known["noise_level"]
    options = dict(patch_size=patch_size, patch_distance=11, fast_mode=False, channel_axis=-1)
    return restoration.denoise_nl_means(image, h=strength * sigma, sigma=sigma, **options).reshape(image.shape)


def total_variation(image, known, strength):
    from skimage import restoration

    return restoration.denoise_tv_chambolle(image, strength * known["noise_level"], channel_axis=-1)


def bm3d(image, known, strength):
    import bm3d

    sigma = strength * known["noise_level"]
    method = bm3d.bm3d_rgb if image.shape[-1] == 3 else bm3d.bm3d
    return method(image, sigma).reshape(image.shape)


def biharmonic(image, known):
    from skimage import restoration

    return restoration.inpaint_biharmonic(image, known["mask"].numpy(), channel_axis=-1)


def bicubic(image, known):
    size = [side * known["scale_factor"] for side in image.shape[1::-1]]
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(image, -1, 0)]
    return np.stack([plane.resize(size, Image.Resampling.BICUBIC) for plane in planes], axis=-1)


def deconvolution(method):
    """Return a classical method that applies `method(plane, kernel)` to each channel, with mirrored borders."""

    def restore(image, known, **parameters):
        sigma = known["blur_sigma"]
        reach = int(4 * sigma + 0.5)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
        border = [(2 * reach, 2 * reach)] * 2
        planes = [np.pad(plane, border, mode="symmetric") for plane in np.moveaxis(image, -1, 0)]
        inside = slice(2 * reach, -2 * reach)
        return np.stack([method(plane, kernel, **parameters)[inside, inside] for plane in planes], axis=-1)

    return restore


def unsupervised_wiener(plane, kernel):
    from skimage import restoration

    return restoration.unsupervised_wiener(plane, kernel, clip=False, rng=0)[0]


def wiener(plane, kernel, balance):
    from skimage import restoration

    return restoration.wiener(plane, kernel, balance, clip=False)


def richardson_lucy(plane, kernel, num_iter):
    from skimage import restoration

    return restoration.richardson_lucy(plane.clip(0), kernel, num_iter, clip=False)


# Name -> (method, the values to try for each of its parameters).
CLASSICAL = {
    "non-local means": (non_local_means, {"strength": [0.3, 0.45, 0.6, 0.8, 1.0, 1.3, 1.7], "patch_size": [5, 7, 9]}),
    "TV-Chambolle": (total_variation, {"strength": [0.3, 0.45, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2]}),
    "BM3D": (bm3d, {"strength": [0.85, 1.0, 1.15]}),
    "biharmonic": (biharmonic, {}),
    "bicubic": (bicubic, {}),
    "unsupervised Wiener": (deconvolution(unsupervised_wiener), {}),
    "Wiener": (deconvolution(wiener), {"balance": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]}),
    "Richardson-Lucy": (deconvolution(richardson_lucy), {"num_iter": [10, 20, 40, 80, 160, 320]}),
}
