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
from dataclasses import dataclass, replace
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
"""Identity whose training failed → the error."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyResult:
    """Result of `run_study`.

    Attributes:
        results: every score of every identity and variant.
        studies: the studies.
        files: tables, plots and sheets that were written.
        failures: one line per training that failed.
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
    batch_subjects: int = 4,
    sampling_steps: int | None = None,
    seed: int = 0,
    config: TrainConfig | None = None,
    variants: Sequence[str] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> StudyResult:
    """Compare settings on the bundled model, where the judge scores identity and prompt.

    No training image of the model shows the identities. Each is trained on one drawn image, whose
    scene the training sentence names, and scored on prompts in other scenes. Settings of several
    studies are trained once. The same call resumes an interrupted run: finished parts of the folder
    stay. Each group of identities is finished in all variants before the next.

    Args:
        study: a name of `variants.STUDIES`, "all", or several names.
        output: folder of subjects, scores, tables (CSV, Markdown), plots and sheets.
        identities: number of identities, at most 66.
        prompts: prompts per identity.
        seeds: images per prompt.
        workers: processes, each with its share of PyTorch's threads. With more than one, a script
            must call this under ``if __name__ == "__main__":``.
        batch_subjects: identities that are trained in one batch.
        sampling_steps: denoising steps; default: the bundled model's.
        seed: seed of identities, images and prompts.
        config: settings that all variants share; default: TrainConfig().
        variants: names of the variants besides the baseline; default: all of the studies.
        progress: whether to show a progress bar.
        **overrides: fields of TrainConfig by name, which replace those of `config`. With
            precision="bf16" images are generated in it too.

    Raises:
        ValueError, TypeError: a number or a setting is out of range.
        OSError: the folder cannot be written.
        TrainingInterrupted: SIGTERM, SIGHUP or SIGINT came. Tables of the finished part are
            written before this KeyboardInterrupt.
    """
    for name, value in (("workers", workers), ("batch_subjects", batch_subjects), ("seeds", seeds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    base = TrainConfig.from_overrides(config, overrides)
    studies = _chosen(make_studies(study, base), variants)
    protocol = Protocol.of(
        base, prompts=prompts, seeds=seeds, seed=seed, sampling_steps=sampling_steps
    )
    protocol.subjects(identities)
    folder = check_folder(output)
    baseline = Variant(BASELINE, base)
    every = [*(Variant(name, None) for name in CONTROLS), baseline]
    every += [variant for one in studies for variant in one.variants]
    # The first of several variants with the same key gives the name.
    distinct = list({variant.key: variant for variant in reversed(every)}.values())[::-1]
    tasks = [
        Task(folder, variant, tuple(range(identities))[start : start + batch_subjects], protocol)
        for start in range(0, identities, batch_subjects)
        for variant in distinct
    ]
    failures: list[str] = []

    def report() -> tuple[Results, list[Path]]:
        results = Results.read(folder, distinct, protocol, identities)
        return results, write_report(folder, studies, results, baseline)

    try:
        left = [task for task in tasks if not all(map(task.is_done, task.numbers))]
        done = len(tasks) - len(left)
        with tqdm(total=len(tasks), initial=done, unit="task", disable=not progress) as bar:
            for task, failed in do_tasks(left, workers):
                failures += failed.values()
                bar.update()
                bar.set_postfix_str(task.variant.name)
    except KeyboardInterrupt:
        report()
        raise
    results, files = report()
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
            f"There is no variant {', '.join(map(repr, unknown))}. These studies have "
            f"{', '.join(sorted(known))}."
        )
    kept = (tuple(v for v in study.variants if v.name in names) for study in studies)
    chosen = [replace(study, variants=v) for study, v in zip(studies, kept, strict=True)]
    return [study for study in chosen if study.variants]


def do_tasks(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Failures]]:
    """Do tasks, and yield each with its failures when it is done.

    Args:
        tasks: tasks in the order in which they begin.
        workers: processes, each with its share of PyTorch's threads; 1 is this process.

    Raises:
        TrainingInterrupted: SIGTERM, SIGHUP or SIGINT came. Unfinished trainings have a checkpoint.
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
            "The study was interrupted. The same call resumes it.", stop.received, 0
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
    """Spawn processes, because a fork would copy PyTorch's threads in any state."""
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
    """End this worker when its parent is killed, which sends no signal."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # The first signal ends a training in progress with a checkpoint, the next ends the process.
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_SECONDS_BETWEEN_SIGNALS)


def _do(task: Task) -> Failures:
    global _worker
    if _worker is None:
        raise TrainingError("The worker of the study was stopped.")
    try:
        return _worker(task)
    except KeyboardInterrupt as error:
        # The queue may hold tasks for this worker.
        _worker = None
        # A KeyboardInterrupt cannot be pickled for the parent.
        raise TrainingError(f"The worker of the study was stopped: {error}") from None
