"""Means with bootstrap intervals over identities, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
FEWEST = 5
"""Identities below which resampling them says nothing, and no interval is given."""


class Interval(NamedTuple):
    """A mean and its 95 % interval; NaN bounds where there are too few identities for one.

    identities: how many.
    """

    mean: float
    low: float
    high: float
    identities: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def signed(self) -> str:
        """As a difference in Markdown: with signs, and bold where zero lies outside."""
        if math.isnan(self.low):
            return f"{self.mean:+.3f}"
        text = f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return f"**{text}**" if self.excludes_zero else text


def bootstrap(values: Mapping[int, float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean over identities and its percentile bootstrap interval, identities resampled.

    Args:
        values: identity → its mean score.
        seed: of the resampling.
        resamples: how many.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("bootstrap got no values: give at least one identity's")
    array = np.array([values[number] for number in sorted(values)], dtype=np.float64)
    if len(array) < FEWEST:
        return Interval(float(array.mean()), math.nan, math.nan, len(array))
    places = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    low, high = np.quantile(array[places].mean(1), [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high), len(array))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], seed: int = 0
) -> Interval:
    """Mean of `values` less `baseline` over the identities that both have, with its interval.

    Raises:
        ValueError: they have no identity in common.
    """
    shared = values.keys() & baseline.keys()
    if not shared:
        raise ValueError("the two variants have no identity in common: nothing can be paired")
    return bootstrap({number: values[number] - baseline[number] for number in shared}, seed)
