"""Scores of a study from its folder, by variant, score and identity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.studies.overfit import AttentionOverfit
from evals.studies.tasks import Protocol, Task
from evals.studies.variants import Variant
from sefi_fast.evaluation.judge_scorer import ImageScore

OPEN = {"open_leak": "leak", "open_id": "id"}
"""Scores over the prompts without a scene → the images' scores that they are means of."""


@dataclass(frozen=True)
class Results:
    """Scores of each identity in each variant.

    Attributes:
        found: variant's key → identity's number → contents of its file.
        protocol: the way all were scored.
        folder: folder of the study.
    """

    found: Mapping[str, Mapping[int, Mapping[str, Any]]]
    protocol: Protocol
    folder: Path

    @classmethod
    def read(
        cls, folder: Path, variants: Iterable[Variant], protocol: Protocol, identities: int
    ) -> Results:
        """Read all finished identities."""
        found = {}
        for variant in variants:
            task = Task(folder, variant, tuple(range(identities)), protocol)
            loaded = {number: task.load(number) for number in task.numbers}
            found[variant.key] = {n: result for n, result in loaded.items() if result is not None}
        return cls(found, protocol, folder)

    def numbers(self, variant: Variant) -> list[int]:
        """Return the identities with scores of a variant."""
        return sorted(self.found.get(variant.key, {}))

    def values(
        self, variant: Variant, score: str, kinds: Sequence[str] | None = None
    ) -> dict[int, float]:
        """Return identity → mean of a score over its images, or a number of its training.

        Args:
            variant: the variant.
            score: a field of ImageScore or AttentionOverfit, one of OPEN, or of the training
                ("final_loss", "final_subject_loss", "seconds").
            kinds: kinds of prompts; default: all.
        """
        values = {}
        for number, result in self.found.get(variant.key, {}).items():
            if score in ImageScore._fields or score in OPEN:
                rows = result.get("open" if score in OPEN else "images") or []
                rows = [row for row in rows if kinds is None or row["kind"] in kinds]
                if rows:
                    values[number] = sum(row[OPEN.get(score, score)] for row in rows) / len(rows)
                continue
            part = result.get("overfit" if score in AttentionOverfit._fields else "training")
            if part and part.get(score) is not None:
                values[number] = part[score]
        return values

    def kinds(self) -> list[str]:
        """Return the kinds of prompts, in their order."""
        every = (result for results in self.found.values() for result in results.values())
        return list(dict.fromkeys(row["kind"] for result in every for row in result["images"]))
