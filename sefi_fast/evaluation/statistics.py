"""Means with bootstrap intervals over identities, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
FEWEST = 5
"""Fewest identities for an interval. Resampling fewer says nothing."""


class Interval(NamedTuple):
    """A mean over identities and its 95 % interval, with NaN bounds below FEWEST identities."""

    mean: float
    low: float
    high: float
    identities: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return self._text("")

    def signed(self) -> str:
        """Return a difference in Markdown: with signs, and bold if the interval excludes zero."""
        return f"**{self._text('+')}**" if self.excludes_zero else self._text("+")

    def _text(self, sign: str) -> str:
        mean, low, high = (f"{value:{sign}.3f}" for value in self[:3])
        return mean if math.isnan(self.low) else f"{mean} [{low}, {high}]"


def bootstrap(values: Mapping[int, float]) -> Interval:
    """Return the mean over identities and its percentile bootstrap interval, always by one seed.

    Args:
        values: identity → its mean score.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("bootstrap got no values. Give at least one identity's.")
    array = np.array([values[number] for number in sorted(values)], dtype=np.float64)
    mean, count = float(array.mean()), len(array)
    if count < FEWEST:
        return Interval(mean, math.nan, math.nan, count)
    places = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile(array[places].mean(1), [0.025, 0.975])
    return Interval(mean, float(low), float(high), count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Return the mean of `values` − `baseline` over the identities of both, with its interval.

    Raises:
        ValueError: they have no identity in common.
    """
    shared = values.keys() & baseline.keys()
    return bootstrap({number: values[number] - baseline[number] for number in shared})
