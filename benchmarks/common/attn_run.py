"""One problem from inputs to record: check every contender, then measure those that are right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _contenders import Contender
from _measure import Call, Effort, captured, interleaved, interleaved_cuda, memory
from _rates import large_product, nine_products
from _record import Entry, ProblemRecord
from _reference import Inputs, Results, errors, float64_results, make_inputs, verdict
from _roofline import DIRECTIONS, Rates, work
from _shapes import Problem
from _workload import Workload

_LARGE = 1024
STEPS_PER_CONTENDER = 1 + len(DIRECTIONS)
SGEMM_SAME = "same shapes"
SGEMM_LARGE = "large square"


def reason(error: Exception) -> str:
    """One line of an error, without anything of this machine's paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return " ".join(word for word in text.split() if "/" not in word)[:160]


def _check(
    workload: Workload, wanted: Results, eager: dict[str, float] | None, dtype: torch.dtype
) -> Entry:
    contender = workload.contender
    entry = Entry(contender.name, contender.family, contender.with_loss)
    try:
        with contender.context():
            results = workload.results()
    except Exception as error:  # noqa: BLE001 - whatever a library raises is why it has no figure
        entry.unavailable = reason(error)
        return entry
    entry.errors = errors(results, wanted)
    strict = contender.family == "sefi" and eager is not None
    entry.wrong = verdict(entry.errors, eager or {}, dtype, strict)
    return entry


def _checked(
    contenders: list[Contender], inputs: Inputs, dtype: torch.dtype, tick: Callable[[], None]
) -> list[tuple[Workload, Entry]]:
    """Every contender with its verdict; the eager maps come first and set the others' measure."""
    with_loss, plain = float64_results(inputs), float64_results(inputs, with_loss=False)
    eager: dict[str, float] | None = None
    found: list[tuple[Workload, Entry]] = []
    for contender in sorted(contenders, key=lambda contender: contender.family != "eager"):
        workload = Workload(contender, inputs)
        entry = _check(workload, with_loss if contender.with_loss else plain, eager, dtype)
        if contender.family == "eager" and entry.unavailable is None:
            eager = entry.errors
        found.append((workload, entry))
        tick()
    return found


def _graph_times(sound: list[tuple[Workload, Entry]], direction: str, effort: Effort) -> None:
    replays: dict[str, Call] = {}
    by_name = {entry.contender: entry for _, entry in sound}
    for workload, entry in sound:
        workload.release()
        try:
            replays[entry.contender] = captured(workload.call(direction))
        except RuntimeError as error:
            torch.cuda.synchronize()
            entry.no_graph = reason(error)
    if replays:
        for name, timing in interleaved_cuda(replays, effort).items():
            by_name[name].graph_times[direction] = timing


def _matrix_calls(inputs: Inputs, dtype: torch.dtype) -> dict[str, Call]:
    large, _ = large_product(inputs.query.device, dtype, _LARGE)
    return {SGEMM_SAME: nine_products(inputs), SGEMM_LARGE: large}


def measure(
    problem: Problem,
    contenders: list[Contender],
    device: torch.device,
    dtype: torch.dtype,
    rates: Rates,
    effort: Effort,
    tick: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> ProblemRecord:
    """Check, then time in turns, then measure memory, all on the same calls.

    A contender whose results are off float64 gets no time and no memory figure. `tick` is called
    STEPS_PER_CONTENDER times a contender.
    """
    record = ProblemRecord(
        problem, str(dtype).removeprefix("torch."), dtype.itemsize, device.type, rates
    )
    inputs = make_inputs(problem, device, dtype, seed)
    checked = _checked(contenders, inputs, dtype, tick)
    record.entries = [entry for _, entry in checked]
    sound = [(workload, entry) for workload, entry in checked if entry.sound]
    for direction in DIRECTIONS:
        calls = {entry.contender: workload.call(direction) for workload, entry in sound}
        if device.type == "cuda":
            times = interleaved_cuda(calls, effort)
        else:
            if direction == "both":
                calls |= _matrix_calls(inputs, dtype)
            times = interleaved(calls, effort)
        for workload, entry in sound:
            entry.eager_times[direction] = times[entry.contender]
            workload.release()
        if device.type == "cuda":
            _graph_times(sound, direction, effort)
        elif direction == "both":
            flops = work(problem, dtype.itemsize, "both").flops
            rate = 2.0 * _LARGE**3 / times[SGEMM_LARGE].median
            record.matrix_seconds = {
                SGEMM_SAME: times[SGEMM_SAME].median,
                SGEMM_LARGE: flops / rate,
            }
        for _ in contenders:
            tick()
    for workload, entry in sound:
        workload.release()
        entry.memory = memory(workload.call("both"), device)
    return record
