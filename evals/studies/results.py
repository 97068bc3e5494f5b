"""Scores of a study as they lie on the disk, by variant, score and identity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.studies.tasks import Protocol, Task
from evals.studies.variants import Variant
from sefi_fast.evaluation.scorers import SCORES

OPEN = {"open_leak": "leak", "open_id": "id"}
"""Scores over the prompts that leave the scene open, and the images' scores they are means of."""
OVERFIT = ("inside", "class_inside", "correlation", "taken")


@dataclass(frozen=True)
class Results:
    """What is known of each identity in each variant.

    Attributes:
        found: variant's key → identity's number → what its file holds.
        protocol: how all were tried.
        folder: of the study.
    """

    found: Mapping[str, Mapping[int, Mapping[str, Any]]]
    protocol: Protocol
    folder: Path

    @classmethod
    def read(
        cls, folder: Path, variants: Iterable[Variant], protocol: Protocol, identities: int
    ) -> Results:
        """Read what there is; identities that are not done are left out."""
        found = {}
        for variant in variants:
            task = Task(folder, variant, tuple(range(identities)), protocol)
            loaded = {number: task.load(number) for number in task.numbers}
            found[variant.key] = {n: result for n, result in loaded.items() if result is not None}
        return cls(found, protocol, folder)

    def numbers(self, variant: Variant) -> list[int]:
        """The identities that a variant has scores of."""
        return sorted(self.found.get(variant.key, {}))

    def values(
        self, variant: Variant, score: str, kinds: Sequence[str] | None = None
    ) -> dict[int, float]:
        """Identity → mean of a score over its images, or one of the numbers of its attention.

        Args:
            variant: whose.
            score: of `scores.SCORES`, OVERFIT, OPEN, or of the training ("final_loss",
                "final_subject_loss", "seconds").
            kinds: of prompts; default: all.
        """
        values = {}
        part_of = {**dict.fromkeys(OVERFIT, "overfit"), **dict.fromkeys(OPEN, "open")}
        for number, result in self.found.get(variant.key, {}).items():
            if score in SCORES:
                rows = [p for p in result["pictures"] if kinds is None or p["kind"] in kinds]
                if rows:
                    values[number] = sum(row[score] for row in rows) / len(rows)
                continue
            part = result.get(part_of.get(score, "training"))
            if score in OPEN and part:
                values[number] = sum(row[OPEN[score]] for row in part) / len(part)
            elif part and part.get(score) is not None:
                values[number] = part[score]
        return values

    def kinds(self) -> list[str]:
        """The kinds of prompts, in the order in which they come."""
        for results in self.found.values():
            for result in results.values():
                return list(dict.fromkeys(row["kind"] for row in result["pictures"]))
        return []
