"""The checks of a GPU's backends, in processes: a kernel that breaks its own ends no other's."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import NamedTuple, TypeVar

import torch
from _contenders import Contender
from _gpu_checks import (
    ACCURACY,
    DTYPES,
    FEATURES,
    Check,
    accuracy,
    accuracy_problems,
    all_checks,
    features,
    repeats,
    sefi_contenders,
)

_MOST_WORKERS = 12
_Result = TypeVar("_Result")


class Task(NamedTuple):
    """What one process checks, by words: a piece of the accuracy, or with None the features."""

    backend: str
    dtype: str
    places: tuple[int, ...] | None


def _contender(backend: str, device: torch.device) -> Contender:
    return next(one for one in sefi_contenders(device) if one.name == backend)


def _run_task(task: Task, device_word: str, small: bool) -> Check:
    device, dtype = torch.device(device_word), getattr(torch, task.dtype)
    contender = _contender(task.backend, device)
    if task.places is None:
        return features(contender, device, dtype)
    return accuracy(contender, device, dtype, small, task.places)


def _run_repeats(backend: str, device_word: str, small: bool) -> list[Check]:
    device = torch.device(device_word)
    return list(repeats(_contender(backend, device), device, small))


def _alone(work: Callable[..., _Result], *arguments: object) -> _Result:
    """Run in a process of its own: after an illegal access a device gives nothing but errors."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def _run_on_cpu() -> list[Check]:
    # The other threads belong to the compilers that run beside it.
    torch.set_num_threads(2)
    return list(all_checks(torch.device("cpu"), small=True))


def checks_of_cpu() -> list[Check]:
    """The CPU's checks, small, in a process with two threads."""
    return _alone(_run_on_cpu)


def _pieces(backend: str, dtype: str, count: int) -> list[tuple[int, ...]]:
    """The accuracy's problems in pieces: Triton compiles for each, float32 the longest."""
    a_piece = count
    if backend == "sefi-triton":
        a_piece = 2 if dtype == "float32" else 5
    return [tuple(range(count))[first : first + a_piece] for first in range(0, count, a_piece)]


def _checked(task: Task, device_word: str, small: bool) -> Check:
    try:
        return _alone(_run_task, task, device_word, small)
    except Exception as error:  # noqa: BLE001 - a process that broke has failed its check
        name = FEATURES if task.places is None else ACCURACY
        broken = f"its process broke: {type(error).__name__}"
        return Check(name, task.backend, task.dtype, "failed", broken)


def _repeated(backend: str, device_word: str, small: bool) -> list[Check]:
    try:
        return _alone(_run_repeats, backend, device_word, small)
    except Exception as error:  # noqa: BLE001 - a process that broke has failed its check
        broken = f"its process broke: {type(error).__name__}"
        return [Check("repeats", backend, "all", "failed", broken)]


def _against_float64(names: list[str], device_word: str, small: bool) -> Iterator[Check]:
    """The accuracy and the features; an accuracy is told when all its pieces are known."""
    count = len(accuracy_problems(small))
    tasks = [
        Task(name, dtype, places)
        # The slowest to compile first.
        for dtype in reversed(DTYPES)
        for name in names
        for places in [*_pieces(name, dtype, count), None]
    ]
    answers: dict[tuple[str, str], list[Check]] = {}
    workers = max(1, min(_MOST_WORKERS, (os.cpu_count() or 2) - 1))
    with ThreadPoolExecutor(workers) as pool:
        pending = {pool.submit(_checked, task, device_word, small): task for task in tasks}
        for future in as_completed(pending):
            task, check = pending[future], future.result()
            if task.places is None:
                yield check
                continue
            known = answers.setdefault((task.backend, task.dtype), [])
            known.append(check)
            if len(known) == len(_pieces(task.backend, task.dtype, count)):
                red = [one for one in known if one.status == "failed"]
                yield (red or known)[0]


def checks_apart(device: torch.device, small: bool) -> Iterator[Check]:
    """Every check of `device`, none in this process; with what compiles in many at once."""
    names = [contender.name for contender in sefi_contenders(device)]
    yield from _against_float64(names, device.type, small)
    for name in names:
        yield from _repeated(name, device.type, small)
