"""Runs studies on the tiny world: variants × held-out identities × prompts × seeds, resumable."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sefi_fast.evaluation.report import write_report
from sefi_fast.evaluation.results import Results
from sefi_fast.evaluation.tasks import Protocol, Task
from sefi_fast.evaluation.variants import BASELINE, CONTROLS, Study, Variant, make_studies
from sefi_fast.evaluation.workers import do_tasks
from sefi_fast.training import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyResult:
    """What `run_study` found.

    Attributes:
        results: every score of every identity and variant.
        studies: what was compared.
        files: tables, plots and sheets that were written.
        failures: what could not be learnt, and why.
    """

    results: Results
    studies: tuple[Study, ...]
    files: tuple[Path, ...]
    failures: tuple[str, ...]


def run_study(
    study: str | Iterable[str] = "all",
    *,
    output: str | os.PathLike[str] = "evidence",
    identities: int = 12,
    prompts: int = 12,
    seeds: int = 4,
    workers: int = 1,
    side_by_side: int = 4,
    sampling_steps: int | None = None,
    seed: int = 0,
    config: TrainConfig | None = None,
    variants: Sequence[str] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> StudyResult:
    """Compare settings on the bundled model, where the judge can score identity and prompt.

    Each identity is one that the model has never seen; it is learnt from one drawn picture whose
    scene the training sentence names, and tried on prompts in other scenes. Settings that several
    studies share are trained once. What the folder already holds is not done again, so a run that
    was ended goes on with the same call; identity after identity is finished in all variants.

    Args:
        study: of `variants.STUDIES`, "all", or several.
        output: folder for subjects, scores, tables (Markdown, CSV, JSON), plots and sheets.
        identities: how many, at most 66.
        prompts: for each identity.
        seeds: pictures of each prompt.
        workers: processes, each with its share of PyTorch's threads; 1 stays in this process. With
            more a script must call this under ``if __name__ == "__main__":``, as always with
            processes of Python.
        side_by_side: identities that one engine trains in one batch.
        sampling_steps: default: the bundled model's usual ones.
        seed: of identities, pictures and prompts.
        config: settings that all variants share; default: TrainConfig().
        variants: only those of these names, and the baseline; default: all of the studies.
        progress: show a progress bar.
        **overrides: fields of TrainConfig, by name; they win over `config`. With precision="bf16"
            pictures are drawn in it too.

    Returns:
        Scores and files.

    Raises:
        ValueError, TypeError: a number or a setting is out of range.
        OSError: the folder cannot be written.
        TrainingInterrupted: SIGTERM, SIGHUP or SIGINT came, a KeyboardInterrupt; tables of what is
            done are written before.
    """
    for name, value in (("workers", workers), ("side_by_side", side_by_side), ("seeds", seeds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    base = TrainConfig.from_overrides(config, overrides)
    studies = _chosen(make_studies(study, base), variants)
    protocol = Protocol.of(
        base, prompts=prompts, seeds=seeds, seed=seed, sampling_steps=sampling_steps
    )
    protocol.subjects(identities)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    everything = _distinct(studies, base)
    tasks = _tasks(folder, everything, identities, side_by_side, protocol)
    baseline = Variant(BASELINE, base)
    failures: list[str] = []
    try:
        _run(tasks, workers, progress, failures)
    except KeyboardInterrupt:
        _report(folder, studies, everything, protocol, identities, baseline)
        raise
    results, files = _report(folder, studies, everything, protocol, identities, baseline)
    for failure in failures:
        logger.warning("left out: %s", failure)
    return StudyResult(results, tuple(studies), tuple(files), tuple(failures))


def _chosen(studies: Sequence[Study], names: Sequence[str] | None) -> list[Study]:
    if names is None:
        return list(studies)
    known = {variant.name for study in studies for variant in study.variants}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(
            f"no variant is called {', '.join(map(repr, unknown))}; these studies have: "
            f"{', '.join(sorted(known))}"
        )
    kept = []
    for study in studies:
        variants = tuple(v for v in study.variants if v.name in names)
        if variants:
            kept.append(Study(study.name, study.title, variants, study.axis, study.log))
    return kept


def _distinct(studies: Iterable[Study], base: TrainConfig) -> list[Variant]:
    """Controls, the baseline, and every other variant once."""
    found = [Variant(name, None) for name in CONTROLS] + [Variant(BASELINE, base)]
    found += [variant for study in studies for variant in study.variants]
    return list({variant.key: variant for variant in reversed(found)}.values())[::-1]


def _tasks(
    folder: Path,
    variants: Sequence[Variant],
    identities: int,
    side_by_side: int,
    protocol: Protocol,
) -> list[Task]:
    tasks = []
    for start in range(0, identities, side_by_side):
        numbers = tuple(range(start, min(start + side_by_side, identities)))
        tasks += [Task(folder, variant, numbers, protocol) for variant in variants]
    return tasks


def _run(tasks: Sequence[Task], workers: int, progress: bool, failures: list[str]) -> None:
    left = [task for task in tasks if not all(map(task.is_done, task.numbers))]
    open_ones = {task: sum(not task.is_done(n) for n in task.numbers) for task in left}
    total = sum(len(task.numbers) for task in tasks)
    done = total - sum(open_ones.values())
    with tqdm(total=total, initial=done, unit="subject", disable=not progress) as bar:
        for task, failed in do_tasks(left, workers):
            failures += failed.values()
            bar.update(open_ones[task])
            bar.set_postfix_str(task.variant.name)


def _report(
    folder: Path,
    studies: Sequence[Study],
    variants: Sequence[Variant],
    protocol: Protocol,
    identities: int,
    baseline: Variant,
) -> tuple[Results, list[Path]]:
    results = Results.read(folder, variants, protocol, identities)
    return results, write_report(folder, studies, results, baseline)
