"""Rotary position embedding (RoFormer, arXiv 2104.09864) with the context extensions of transformers 5.

The frequencies are computed on the host in float32, step for step as in ``transformers.modeling_rope_utils``, because
an angle of thousands of radians amplifies every rounding error of its frequency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

__all__ = ["Rope", "apply_rope"]

Frequencies = npt.NDArray[np.float32]

_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one attention kind. Field names are those of transformers' ``rope_parameters``.

    Attributes:
        dim: number of rotated features per head, even; further features stay as they are.
        theta: base of the wavelengths.
        kind: ``default``, ``linear``, ``llama3``, ``yarn`` or ``longrope``.
        factor: ratio of the context length to that in pretraining (all kinds but ``default``).
        original_length: context length in pretraining, in tokens (``llama3``, ``yarn``, ``longrope``).
        low_freq_factor: divisor for ``llama3`` (Llama 3.1): wavelengths above original_length / this are slowed down.
        high_freq_factor: divisor for ``llama3``: wavelengths below original_length / this are unchanged.
        beta_fast: number of rotations over the original context above which ``yarn`` (arXiv 2309.00071) changes
            nothing.
        beta_slow: number of rotations below which ``yarn`` fully interpolates the frequencies.
        truncate: whether ``yarn`` rounds the bounds of the ramp to whole features.
        short_factor: divisors of the frequencies up to the original context, for ``longrope`` (arXiv 2402.13753).
        long_factor: divisors of the frequencies beyond it, for ``longrope``.
        attention_factor: factor of cosine and sine.
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.kind not in _KINDS:
            raise ValueError(f"rope kind: expected one of {', '.join(_KINDS)}, got {self.kind!r}")
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"rope dim: expected a positive even number, got {self.dim}")
        if self.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(self, name)) != self.dim // 2:
                    raise ValueError(
                        f"rope {name}: expected {self.dim // 2} numbers (half of dim), got {len(getattr(self, name))}"
                    )

    @property
    def switches_at(self) -> int | None:
        """Length in tokens beyond which the frequencies change, or None."""
        return self.original_length if self.kind == "longrope" else None

    def cos_sin(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return cosine and sine of every position and rotated feature pair.

        Args:
            positions: int ``[B, T]``. For ``longrope`` the largest of them selects the factors for all.

        Returns:
            Two float32 arrays ``[B, T, dim / 2]``, multiplied by ``attention_factor``.
        """
        if self.kind == "longrope":
            beyond = jnp.max(positions) + 1 > self.original_length
            frequencies = jnp.where(beyond, self._frequencies(self.long_factor), self._frequencies(self.short_factor))
        else:
            frequencies = jnp.asarray(self._frequencies())
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * self.attention_factor, jnp.sin(angles) * self.attention_factor

    def _frequencies(self, divisors: tuple[float, ...] = ()) -> Frequencies:
        """Return the radians per token, float32 ``[dim / 2]``."""
        one = np.float32(1)
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        wavelengths: Frequencies = np.power(np.float32(self.theta), exponents)
        if divisors:
            stretched: Frequencies = one / (np.asarray(divisors, np.float32) * wavelengths)
            return stretched
        frequencies: Frequencies = one / wavelengths
        if self.kind == "linear":
            frequencies /= np.float32(self.factor)
        if self.kind == "llama3":
            return self._llama3(frequencies)
        if self.kind == "yarn":
            interpolated = one / (np.float32(self.factor) * wavelengths)
            kept = one - self._yarn_ramp()
            frequencies = interpolated * (one - kept) + frequencies * kept
        return frequencies

    def _llama3(self, frequencies: Frequencies) -> Frequencies:
        turns = self.original_length / (np.float32(2 * math.pi) / frequencies)
        slowed = frequencies / np.float32(self.factor)
        smooth = (turns - self.low_freq_factor) / np.float32(self.high_freq_factor - self.low_freq_factor)
        between = (1 - smooth) * slowed + smooth * frequencies
        out = np.where(turns < self.low_freq_factor, slowed, between)
        return np.where(turns > self.high_freq_factor, frequencies, out).astype(np.float32)

    def _yarn_ramp(self) -> Frequencies:
        def feature(rotations: float) -> float:
            return self.dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = feature(self.beta_fast), feature(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp: Frequencies = (np.arange(self.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        return ramp.clip(0, 1)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first ``2 * cos.shape[-1]`` features of each head; feature i pairs with i + half, as in HF models.

    Args:
        x: ``[B, T, H, K]``.
        cos: ``[B, T, dim / 2]``, in the dtype of ``x``.
        sin: ``[B, T, dim / 2]``, in the dtype of ``x``.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
