"""Correlated action noise, so that demonstrations show how to recover from a drift."""

import numpy as np

from envs.demonstrators.rotations import Array

ROTATION_SHARE = 0.3  # a turn of the hand moves the fingers through clutter sooner than a shift of it


class OrnsteinUhlenbeck:
    """A mean-reverting walk over the six pose entries of an action, in units of their full scale."""

    def __init__(self, scale: float, correlation: float, rng: np.random.Generator) -> None:
        """Draws the first value from the stationary distribution.

        Args:
            scale: stationary standard deviation of the three translations, in [0, 1].
            correlation: between one control step and the next, in [0, 1).
            rng: source of randomness; owned by the caller.

        Raises:
            ValueError: `scale` or `correlation` outside its range.
        """
        if not 0.0 <= scale <= 1.0:
            raise ValueError(f"action noise is a share of full scale: expected [0, 1], got {scale}")
        if not 0.0 <= correlation < 1.0:
            raise ValueError(f"noise correlation: expected [0, 1), got {correlation}")
        self._scales = scale * np.array([1.0, 1.0, 1.0, ROTATION_SHARE, ROTATION_SHARE, ROTATION_SHARE])
        self._correlation = correlation
        self._rng = rng
        self._value = self._scales * rng.standard_normal(6)

    def step(self) -> Array:
        """The next value [6] of the walk; its standard deviation does not change over time."""
        fresh = np.sqrt(1.0 - self._correlation**2) * self._rng.standard_normal(6)
        self._value = self._correlation * self._value + self._scales * fresh
        return self._value
