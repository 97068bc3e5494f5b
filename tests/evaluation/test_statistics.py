"""Intervals against theory: coverage, pairing, and refusal of too few identities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sefi_fast.evaluation.statistics import FEWEST, bootstrap, paired_difference


def test_the_interval_of_many_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(0.5, 0.2, 400)
    found = bootstrap(dict(enumerate(values)))
    error = values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.002)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.002)
    assert found.identities == 400


def test_it_covers_the_truth_about_as_often_as_it_says():
    draws = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        sample = dict(enumerate(draws.normal(0.3, 0.1, 30)))
        found = bootstrap(sample, seed=trial, resamples=1000)
        hits += found.low <= 0.3 <= found.high
    assert 0.88 <= hits / 200 <= 0.98


def test_it_repeats_and_does_not_depend_on_the_order():
    values = {3: 0.1, 1: 0.9, 2: 0.4, 7: 0.3, 5: 0.8}
    assert bootstrap(values) == bootstrap(dict(sorted(values.items())))


def test_pairing_takes_out_what_identities_have_in_common():
    draws = np.random.default_rng(2)
    hard = draws.normal(0.5, 0.3, 12)
    before = dict(enumerate(hard))
    after = {n: value + 0.05 + draws.normal(0, 0.01) for n, value in before.items()}
    found = paired_difference(after, before)
    assert found.excludes_zero and found.low > 0.03 and found.high < 0.07
    apart = bootstrap(after), bootstrap(before)
    assert apart[0].low < apart[1].high


def test_only_shared_identities_are_compared():
    found = paired_difference({1: 1.0, 2: 3.0, 9: 50.0}, {1: 0.0, 2: 0.0, 4: -50.0})
    assert found.mean == 2 and found.identities == 2


def test_few_identities_give_a_mean_and_no_interval():
    found = bootstrap({n: float(n) for n in range(FEWEST - 1)})
    assert found.mean == 1.5 and math.isnan(found.low) and not found.excludes_zero
    assert "nan" not in str(found)


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        bootstrap({})
    with pytest.raises(ValueError, match="in common"):
        paired_difference({1: 1.0}, {2: 1.0})
