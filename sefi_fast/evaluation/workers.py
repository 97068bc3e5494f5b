"""The tasks of a study in one process or several, until they are done or a signal comes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager

import torch

from sefi_fast.errors import TrainingError
from sefi_fast.evaluation.tasks import Task, Worker
from sefi_fast.host_memory import keep_freed_memory_on_cpu
from sefi_fast.training import TrainingInterrupted
from sefi_fast.training.signals import Stop, graceful

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
