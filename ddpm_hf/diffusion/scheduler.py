"""Define the noise schedule: the papers' betas, q(x_t|x_0), q(x_t'|x_t,x_0) and the timesteps of a sampler.

`PaperDDPMScheduler` is diffusers' DDPMScheduler with added methods. Its config and its betas are those of diffusers,
so a DDPMScheduler or DDIMScheduler made from its config has the same betas.
To publish a model, save `scheduler.stock()`, which is a plain DDPMScheduler.

Two schedules have similar names. "linear" is diffusers' schedule: its betas go from 1e-4 to 0.02 for every T, so at
T=100 abar is still 0.36 after the last step. "ho_linear" is our name for the same schedule with both ends times
1000/T. It is saved as diffusers' "linear" with the scaled `beta_start` and `beta_end`.

Timesteps count from 0, as in diffusers: our t is t+1 in the papers, and t = -1 is the clean image.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from numbers import Integral

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..errors import UserError, no_such


Timesteps = Tensor | int  # a LongTensor of shape (B,), or one timestep for all images


class PaperDDPMScheduler(DDPMScheduler):
    """DDPMScheduler plus float64 tables, posteriors and subsequences of the timesteps.

    It adds no `__init__`, so its config has the same entries as diffusers', and a folder saved by diffusers loads as
    this class. Coefficients are computed in float64. They are then cast to the dtype of the images, but at least to
    float32. In bfloat16, `1 - abar_t` would be 0 for the first timesteps.

    Example:
        >>> scheduler = PaperDDPMScheduler.nichol_cosine(1000)
        >>> scheduler.subsequence(4, "trailing")
        [(999, 749), (749, 499), (499, 249), (249, -1)]
    """

    @classmethod
    def ho_linear(cls, num_train_timesteps: int = 1000, **config) -> "PaperDDPMScheduler":
        """Return a scheduler with linear betas from 1e-4 to 0.02 (Ho et al. 2020), scaled by 1000/T (Nichol's code).

        `config` holds further arguments of DDPMScheduler, e.g. `prediction_type`. T < 21 raises a UserError.
        """
        if num_train_timesteps < 21:
            given = f"ho_linear with num_train_timesteps={num_train_timesteps}"
            raise UserError(f"{given} has beta_end = 20/T >= 1; take at least 21 timesteps, or nichol_cosine.")
        scale = 1000 / num_train_timesteps
        ends = {"beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
        return cls(num_train_timesteps=num_train_timesteps, beta_schedule="linear", **ends, **config)

    @classmethod
    def nichol_cosine(cls, num_train_timesteps: int = 1000, **config) -> "PaperDDPMScheduler":
        """Return a scheduler with cosine betas: s = 0.008, each beta at most 0.999 (Nichol & Dhariwal 2021, eq. 17).

        `config` holds further arguments of DDPMScheduler. T < 1 raises a UserError.
        """
        _check_num_timesteps(num_train_timesteps)
        return cls(num_train_timesteps=num_train_timesteps, beta_schedule="squaredcos_cap_v2", **config)

    def stock(self) -> DDPMScheduler:
        """Return this scheduler as an object of diffusers' own class with the same betas, to save and publish."""
        return DDPMScheduler.from_config(self.arguments)

    @property
    def arguments(self) -> dict:
        """The arguments of DDPMScheduler that make this scheduler: its config without the entries that begin with _.

        With the entry `_use_default_values`, `from_config` would ignore all arguments that this entry lists. diffusers
        lists an argument there even if it was given by position.
        """
        return {name: value for name, value in self.config.items() if not name.startswith("_")}

    def in_stock_precision(self) -> "PaperDDPMScheduler":
        """Return a copy that computes from diffusers' float32 table, so that its steps equal those of stock pipelines.

        Near t = 0 that table loses three digits of 1 - abar_t/abar_t'. After 1000 steps this changes an image by 1e-4.
        Float64 is more accurate, but stock diffusers draws the same images as this copy.
        """
        twin = copy.copy(self)
        twin.alphas_cumprod64 = self.alphas_cumprod
        twin.__dict__.pop("_tables", None)
        return twin

    @cached_property
    def betas64(self) -> Tensor:
        """The betas (T,) in float64.

        With `rescale_betas_zero_snr`, they are diffusers' float32 betas. Without it, they are the `trained_betas`, if
        the config has any. If not, the schedules linear, scaled_linear and squaredcos_cap_v2 are computed in float64,
        and the betas of other schedules are diffusers' float32 betas.
        """
        config, T = self.config, self.config.num_train_timesteps
        formula = None if config.rescale_betas_zero_snr else config.beta_schedule
        if formula is not None and config.trained_betas is not None:
            return torch.tensor(config.trained_betas, dtype=torch.float64)
        if formula == "linear":
            return torch.linspace(config.beta_start, config.beta_end, T, dtype=torch.float64)
        if formula == "scaled_linear":
            return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, T, dtype=torch.float64) ** 2
        if formula == "squaredcos_cap_v2":
            t = torch.arange(T + 1, dtype=torch.float64) / T
            alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        return self.betas.to("cpu", torch.float64)

    @cached_property
    def alphas_cumprod64(self) -> Tensor:
        """abar_t = prod_{s <= t} (1 - beta_s) in float64, shape (T,)."""
        return torch.cumprod(1 - self.betas64, dim=0)

    @property
    def quarters(self) -> list[float]:
        """abar at a quarter, a half and three quarters of T. They tell whether two schedules are the same."""
        T = len(self)
        return [round(float(self.alphas_cumprod64[k * T // 4]), 6) for k in (1, 2, 3)]

    def alphas_cumprod_at(self, timesteps: Timesteps) -> Tensor:
        """Return abar_t in float64, in the shape and on the device of `timesteps`; 1 at t = -1."""
        timesteps = torch.as_tensor(timesteps)
        if timesteps.device.type == "mps":  # MPS has no float64
            timesteps = timesteps.cpu()
        if timesteps.device not in self._tables:  # copy the table once to each device, not in each step
            table = torch.nn.functional.pad(self.alphas_cumprod64, (1, 0), value=1.0)
            self._tables[timesteps.device] = table.to(timesteps.device)
        return self._tables[timesteps.device][timesteps + 1]

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        """A dict from each device in use to a table (T+1,) of abar_t in float64, which begins with 1 for t = -1."""
        return {}

    def snr(self, timesteps: Timesteps) -> Tensor:
        """Return the SNR abar_t / (1 - abar_t) (Kingma et al. 2021), float32 in the shape of `timesteps`."""
        alpha_bar = self.alphas_cumprod_at(timesteps)
        return (alpha_bar / (1 - alpha_bar)).float()

    def q_sample(self, original_samples: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4).

        x_t has the dtype of x_0, but at least float32.
        """
        signal, sigma = self._signal_and_sigma(timesteps, original_samples)
        return signal * original_samples + sigma * noise

    def training_target(self, original_samples: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        """Return what the model should predict: eps, x_0 or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0.

        The config's `prediction_type` decides. v is from https://huggingface.co/papers/2202.00512, appendix D.
        """
        if self._prediction_type == "epsilon":
            return noise
        if self._prediction_type == "sample":
            return original_samples
        signal, sigma = self._signal_and_sigma(timesteps, original_samples)
        return signal * noise - sigma * original_samples

    def predict_original_sample(self, model_output: Tensor, sample: Tensor, timesteps: Timesteps) -> Tensor:
        """Return the unclipped x_0 that follows from a model's eps, x_0 or v at x_t = `sample`.

        For eps this is eq. 15 of Ho et al. 2020.
        """
        signal, sigma = self._signal_and_sigma(timesteps, sample)
        if self._prediction_type == "epsilon":
            return (sample - sigma * model_output) / signal
        if self._prediction_type == "sample":
            return model_output
        return signal * sample - sigma * model_output

    def predict_epsilon(self, model_output: Tensor, sample: Tensor, timesteps: Timesteps) -> Tensor:
        """Return the noise eps that follows from a model's eps, x_0 or v at x_t = `sample`."""
        signal, sigma = self._signal_and_sigma(timesteps, sample)
        if self._prediction_type == "epsilon":
            return model_output
        if self._prediction_type == "sample":
            return (sample - signal * model_output) / sigma
        return signal * model_output + sigma * sample

    def posterior_coefficients(
        self, timesteps: Timesteps, prev_timesteps: Timesteps | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_0, c_t and beta~ of q(x_t' | x_t, x_0) = N(c_0 x_0 + c_t x_t, beta~) (Ho et al. 2020, eq. 6 and 7).

        t' is `prev_timesteps`, by default t - 1. For an earlier t', alpha_t is replaced by abar_t / abar_t', as in a
        respaced chain (Nichol & Dhariwal 2021, section 4). All three are float64, in the shape and on the device of
        `timesteps`.
        """
        alpha_bar = self.alphas_cumprod_at(timesteps)
        alpha_bar_prev = self.alphas_cumprod_at(timesteps - 1 if prev_timesteps is None else prev_timesteps)
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        coefficient_0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
        coefficient_t = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
        return coefficient_0, coefficient_t, (1 - alpha_bar_prev) / (1 - alpha_bar) * beta

    def q_posterior(
        self, original_samples: Tensor, sample: Tensor, timesteps: Timesteps, prev_timesteps: Timesteps | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean, the variance and the clipped log-variance of q(x_t' | x_t = `sample`, x_0).

        t' is as in `posterior_coefficients`. The mean has the shape of `sample`. The other two have the shape
        (B, 1, 1, 1), or (1, 1, 1, 1) if `timesteps` is an int. At t' = -1 the variance is 0, and the clipped
        log-variance is that of step 1, as in Nichol & Dhariwal's code.
        """
        coefficient_0, coefficient_t, variance = self.posterior_coefficients(timesteps, prev_timesteps)
        mean = _like(coefficient_0, sample) * original_samples + _like(coefficient_t, sample) * sample
        log_variance = self.reverse_log_variance(sample, timesteps, prev_timesteps, "fixed_small")
        return mean, _like(variance, sample), log_variance

    def reverse_log_variance(
        self,
        sample: Tensor,
        timesteps: Timesteps,
        prev_timesteps: Timesteps | None,
        variance_type: str,
        *,
        predicted_variance: Tensor | None = None,
    ) -> Tensor:
        """Return log sigma^2 of the model's step p(x_t' | x_t), in a shape that broadcasts with `sample`.

        It is finite also at t' = -1. It depends on `variance_type`:
        - fixed_small: log beta~, clipped as in `q_posterior`; log beta if the scheduler has a single timestep;
        - fixed_large: log beta; at t' = -1, log beta~ of step 1 (Ho et al. 2020, section 3.2 and code);
        - learned_range: interpolated between log beta~ and log beta with the fraction (v + 1) / 2. v in [-1, 1] is
          `predicted_variance`, the second half of the model's output channels (Nichol & Dhariwal 2021, eq. 15).

        diffusers' fixed_small_log and fixed_large_log are accepted too, and mean the same as fixed_small and
        fixed_large.

        Raises:
            UserError: for another variance_type, or for learned_range without `predicted_variance`.
        """
        timesteps = torch.as_tensor(timesteps)
        prev_timesteps = timesteps - 1 if prev_timesteps is None else prev_timesteps
        prev_timesteps = torch.as_tensor(prev_timesteps, device=timesteps.device)
        beta = 1 - self.alphas_cumprod_at(timesteps) / self.alphas_cumprod_at(prev_timesteps)
        is_last, step_1 = prev_timesteps < 0, min(1, len(self) - 1)
        clipped_steps = timesteps.where(~is_last, step_1), prev_timesteps.where(~is_last, step_1 - 1)
        beta_tilde = self.posterior_coefficients(*clipped_steps)[2]
        if len(self) == 1:  # there is no step 1
            beta_tilde = beta

        kind = variance_type.removesuffix("_log")
        if kind == "fixed_small":
            return _like(beta_tilde.log(), sample)
        if kind == "fixed_large":
            return _like(beta_tilde.where(is_last.to(beta.device), beta).log(), sample)
        if kind != "learned_range":
            raise UserError(f"variance_type is {variance_type!r}; choose fixed_small, fixed_large or learned_range.")
        if predicted_variance is None:
            raise UserError(
                "variance_type is learned_range, but the UNet predicts no variance: give fixed_small or fixed_large."
            )
        fraction = (predicted_variance + 1) / 2
        return fraction * _like(beta.log(), sample) + (1 - fraction) * _like(beta_tilde.log(), sample)

    def subsequence(
        self, num_inference_steps: int | None = None, spacing: str | Sequence[int] = "leading"
    ) -> list[tuple[int, int]]:
        """Return the steps (t, t') of a sampler: t descends, each t' is the next t, and the last t' is -1.

        `spacing` is a list of the timesteps themselves, strictly rising or falling, or one of these names. Each name
        has a formula with S = `num_inference_steps` (None: all T) and k = 0..S-1:
        - "quad": int(0.8 T k^2 / (S-1)^2), as in the DDIM paper's code. If S is large, small t are repeated; a step
          (t, t) changes nothing, so skip it.
        - "uniform": every (T//S)-th timestep, as in the DDIM paper's code. This gives more than S timesteps if S does
          not divide T.
        - "leading": k (T//S), diffusers' default.
        - "trailing": round((k+1) T/S) - 1.
        - "linspace": round(k (T-1)/(S-1)), the stride of Nichol & Dhariwal's own respaced chains.
        The last three are as in Table 2 of https://huggingface.co/papers/2305.08891, without the config's
        `steps_offset`. Sampling begins at T-1 with trailing, and with linspace if S > 1. With the other three names,
        it usually begins at a smaller t.

        Raises:
            UserError: for an unknown spacing, S outside 1..T, or timesteps that are not a subsequence of 0..T-1.
        """
        T, S = self.config.num_train_timesteps, num_inference_steps
        if not isinstance(spacing, str):
            return _pairs(_checked_timesteps(spacing, T, S))
        S = T if S is None else S
        if not 1 <= S <= T:
            raise UserError(f"num_inference_steps is {S}; it must be from 1 to the model's {T} timesteps.")
        if spacing == "quad":
            return _pairs(np.linspace(0, np.sqrt(T * 0.8), S) ** 2)
        if spacing == "uniform":
            return _pairs(range(0, T, T // S))
        if spacing == "leading":
            return _pairs(range(0, S * (T // S), T // S))
        if spacing == "trailing":
            # Take [:S], because for some S (61 at T=1000) round-off makes arange longer by one, for t = -1.
            return _pairs(np.round(np.arange(T, 0, -T / S)[:S])[::-1] - 1)
        if spacing == "linspace":
            return _pairs(np.linspace(0, T - 1, S).round())
        raise UserError(
            f"spacing is {spacing!r}; choose quad, uniform, leading, trailing or linspace, or list timesteps."
        )

    @property
    def _prediction_type(self) -> str:
        kind = self.config.prediction_type
        if kind not in ("epsilon", "sample", "v_prediction"):
            raise UserError(f"prediction_type is {kind!r}; choose epsilon, sample or v_prediction.")
        return kind

    def _signal_and_sigma(self, timesteps: Timesteps, sample: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alphas_cumprod_at(timesteps)
        return _like(alpha_bar.sqrt(), sample), _like((1 - alpha_bar).sqrt(), sample)


def _of_diffusers(beta_schedule: str) -> Callable[..., PaperDDPMScheduler]:
    """Return the entry of BETA_SCHEDULES for a `beta_schedule` of diffusers, e.g. "linear"."""

    def schedule(num_train_timesteps: int, **config) -> PaperDDPMScheduler:
        _check_num_timesteps(num_train_timesteps)
        # Write these defaults into the config, because e.g. HeunDiscreteScheduler has other defaults.
        config = {"beta_start": 1e-4, "beta_end": 0.02, **config}
        return PaperDDPMScheduler(num_train_timesteps=num_train_timesteps, beta_schedule=beta_schedule, **config)

    return schedule


# Each schedule is a function of T and of further arguments of DDPMScheduler. It returns a PaperDDPMScheduler.
# A schedule of your own can give its betas as `trained_betas`, a list of T numbers, which stock diffusers reads too.
BETA_SCHEDULES = {
    "ho_linear": PaperDDPMScheduler.ho_linear,
    "nichol_cosine": PaperDDPMScheduler.nichol_cosine,
    **{name: _of_diffusers(name) for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")},
}


def make_scheduler(beta_schedule: str, num_train_timesteps: int = 1000, **config) -> PaperDDPMScheduler:
    """Return the scheduler with a named beta schedule of BETA_SCHEDULES.

    `config` holds further arguments of DDPMScheduler.

    Raises:
        UserError: for an unknown name, for T < 1 (with ho_linear: T < 21), or if the function of a schedule does not
            return a scheduler with T betas.
    """
    if beta_schedule not in BETA_SCHEDULES:
        raise UserError(no_such("--ddpm_beta_schedule", beta_schedule, BETA_SCHEDULES))
    scheduler = BETA_SCHEDULES[beta_schedule](num_train_timesteps, **config)
    given = type(scheduler).__name__
    if isinstance(scheduler, PaperDDPMScheduler):
        if len(scheduler) == len(scheduler.betas) == num_train_timesteps:
            return scheduler
        given = f"a scheduler of {len(scheduler)} timesteps and {len(scheduler.betas)} betas"
    raise UserError(
        f"the function of the beta schedule {beta_schedule} returned {given}: return a PaperDDPMScheduler of "
        f"{num_train_timesteps} timesteps, with as many betas."
    )


def _check_num_timesteps(num_train_timesteps: int) -> None:
    if num_train_timesteps < 1:
        raise UserError(f"num_train_timesteps is {num_train_timesteps}; a schedule needs at least 1 timestep.")


def _checked_timesteps(timesteps: Sequence[int], T: int, num_inference_steps: int | None) -> list[int]:
    """Return the timesteps in rising order. Raise a UserError if they are not a subsequence of 0..T-1."""
    given, last = list(timesteps), T - 1
    rising = sorted(given)
    is_usable = given in (rising, rising[::-1]) and all(isinstance(t, Integral) and 0 <= t <= last for t in rising)
    if not rising or not is_usable or any(a == b for a, b in pairwise(rising)):
        raise UserError(f"timesteps are {given}; give whole numbers from 0 to {last}, strictly rising or falling.")
    if num_inference_steps not in (None, len(given)):
        raise UserError(
            f"num_inference_steps is {num_inference_steps}, but {len(given)} timesteps are listed: leave "
            "num_inference_steps out."
        )
    return rising


def _pairs(rising_timesteps) -> list[tuple[int, int]]:
    falling = [int(t) for t in rising_timesteps][::-1]
    return list(zip(falling, [*falling[1:], -1]))


def _like(coefficient: Tensor, sample: Tensor) -> Tensor:
    """Return coefficients, one per image, shaped to multiply `sample`, in its dtype but at least float32."""
    dtype = torch.promote_types(sample.dtype, torch.float32)
    return coefficient.to(dtype).to(sample.device, non_blocking=True).reshape(-1, *[1] * (sample.ndim - 1))
