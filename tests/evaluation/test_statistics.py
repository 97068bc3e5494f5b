"""Intervals against scipy's, pairing, and refusal of too few identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sefi_fast.evaluation.statistics import FEWEST, RESAMPLES, bootstrap, paired_difference


@pytest.mark.parametrize("count", [FEWEST, 12, 30])
def test_the_interval_equals_scipys(count):
    values = np.random.default_rng(count).beta(2, 1, count)
    found = bootstrap(dict(enumerate(values)))
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert found[:3] == pytest.approx((values.mean(), expected.low, expected.high), abs=1e-9)
    assert found.identities == count


def test_the_interval_does_not_depend_on_the_order():
    values = {3: 0.1, 1: 0.9, 2: 0.4, 7: 0.3, 5: 0.8}
    assert bootstrap(values) == bootstrap(dict(sorted(values.items())))


def test_pairing_removes_the_differences_between_identities():
    rng = np.random.default_rng(2)
    before = dict(enumerate(rng.normal(0.5, 0.3, 12)))
    after = {n: value + 0.05 + rng.normal(0, 0.01) for n, value in before.items()}
    found = paired_difference(after, before)
    assert found.excludes_zero and 0.03 < found.low < found.high < 0.07
    assert bootstrap(after).low < bootstrap(before).high
    assert found.signed() == f"**{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]**"


def test_only_shared_identities_are_compared():
    found = paired_difference({1: 1.0, 2: 3.0, 9: 50.0}, {1: 0.0, 2: 0.0, 4: -50.0})
    assert found.mean == 2 and found.identities == 2


def test_few_identities_have_a_mean_and_no_interval():
    found = bootstrap({n: float(n) for n in range(FEWEST - 1)})
    assert found.mean == 1.5 and math.isnan(found.low) and not found.excludes_zero
    assert (str(found), found.signed()) == ("1.500", "+1.500")


def test_nothing_is_refused():
    for nothing in (lambda: bootstrap({}), lambda: paired_difference({1: 1.0}, {2: 1.0})):
        with pytest.raises(ValueError, match="no values"):
            nothing()
