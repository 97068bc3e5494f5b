"""A short personalisation of the bundled model shows the subject and still obeys prompts."""

from __future__ import annotations

import pytest

from evals.studies import run_study
from evals.studies.variants import Variant

STEPS = 100
LEAST_GAIN = 0.15
"""Of ID over the class word's, whose creatures show an identity by chance."""
MOST_LOSS = 0.25
"""Of Prompt against the class word's."""


@pytest.mark.slow
def test_a_short_run_gains_identity_and_keeps_the_prompt(tmp_path):
    found = run_study(
        "lambda",
        variants=["λ = 0.003"],
        output=tmp_path,
        identities=2,
        side_by_side=2,
        prompts=6,
        seeds=1,
        sampling_steps=12,
        steps=STEPS,
        batch_size=4,
        progress=False,
    )
    assert not found.failures
    (learnt,) = found.studies[0].variants

    def mean(variant, score):
        values = found.results.values(variant, score)
        assert set(values) == {0, 1}
        return sum(values.values()) / len(values)

    control = Variant("class word", None)
    assert mean(learnt, "id") >= mean(control, "id") + LEAST_GAIN
    assert mean(learnt, "prompt") >= mean(control, "prompt") - MOST_LOSS
