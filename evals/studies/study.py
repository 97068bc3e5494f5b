"""Run a study: train its variants, score their images, report."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from evals.studies.report import write_report
from evals.studies.results import Results
from evals.studies.tasks import Protocol, Task, Worker
from evals.studies.variants import BASELINE, CONTROLS, Study, Variant, make_studies
from sefi_fast.errors import TrainingError
from sefi_fast.training import TrainConfig, TrainingInterrupted
from sefi_fast.training.signals import Stop, graceful
from sefi_fast.utils.files import check_folder
from sefi_fast.utils.malloc import keep_freed_memory_on_cpu

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_SIGNALS = 5.0

Failures = dict[int, str]
"""Identity that could not be learnt → why."""


def do_tasks(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Failures]]:
    """Do tasks, and yield each with its failures when it is done.

    Args:
        tasks: in the order in which they are begun.
        workers: processes, each with its share of PyTorch's threads; 1 is this process.

    Raises:
        TrainingInterrupted: SIGTERM, SIGHUP or SIGINT came. What was in training has a checkpoint.
        TrainingError: a worker was stopped.
    """
    with graceful() as stop:
        if workers == 1 or len(tasks) < 2:
            worker = Worker()
            for task in tasks:
                try:
                    failures = worker(task)
                except TrainingInterrupted:
                    _check(stop)
                    raise
                yield task, failures
                _check(stop)
            return
        with _pool(workers) as pool:
            running = {pool.submit(_do, task): task for task in tasks}
            while running:
                done, _ = wait(running, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                _check(stop)
                for future in done:
                    yield running.pop(future), _outcome(future, stop)


def _check(stop: Stop) -> None:
    if stop.received is not None:
        raise TrainingInterrupted(
            "the study was interrupted; the same call goes on with what is left", stop.received, 0
        )


def _outcome(future: Future[Failures], stop: Stop) -> Failures:
    try:
        return future.result()
    except Exception:
        # Ctrl-C reaches the workers too, perhaps before this process.
        _check(stop)
        raise


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of their own, begun anew: a fork would copy PyTorch's threads in any state."""
    threads = max(1, torch.get_num_threads() // workers)
    others = set(multiprocessing.active_children())
    # Libraries read it when they are loaded.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (threads,))
    try:
        yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


_worker: Worker | None


def _begin(threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    keep_freed_memory_on_cpu()
    _worker = Worker()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed outright cannot tell its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # The first signal ends a training in progress, with a checkpoint; the next the process.
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_SECONDS_BETWEEN_SIGNALS)


def _do(task: Task) -> Failures:
    global _worker
    if _worker is None:
        raise TrainingError("a worker of the study was stopped before")
    try:
        return _worker(task)
    except KeyboardInterrupt as error:
        # The next tasks may lie in the queue already.
        _worker = None
        # In a form that another process can be told.
        raise TrainingError(f"a worker of the study was stopped: {error}") from None


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

    Each identity is one that the model has never seen; it is learnt from one drawn image whose
    scene the training sentence names, and tried on prompts in other scenes. Settings that several
    studies share are trained once. What the folder already holds is not done again, so a run that
    was ended goes on with the same call; identity after identity is finished in all variants.

    Args:
        study: of `variants.STUDIES`, "all", or several.
        output: folder for subjects, scores, tables (Markdown, CSV, JSON), plots and sheets.
        identities: how many, at most 66.
        prompts: for each identity.
        seeds: images of each prompt.
        workers: processes, each with its share of PyTorch's threads; 1 stays in this process. With
            more a script must call this under ``if __name__ == "__main__":``, as always with
            processes of Python.
        side_by_side: identities that one engine trains in one batch.
        sampling_steps: default: the bundled model's usual ones.
        seed: of identities, images and prompts.
        config: settings that all variants share; default: TrainConfig().
        variants: only those of these names, and the baseline; default: all of the studies.
        progress: show a progress bar.
        **overrides: fields of TrainConfig, by name; they win over `config`. With precision="bf16"
            images are drawn in it too.

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
    folder = check_folder(output)
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
