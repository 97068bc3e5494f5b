"""The bars the operator is held to, and whether a run met them."""

from __future__ import annotations

from typing import NamedTuple

from _record import Entry, ProblemRecord


class Bar(NamedTuple):
    """One promise on one problem: what was measured, what was wanted, and the answer."""

    problem: str
    what: str
    measured: float
    wanted: float
    met: bool


def at_least(problem: str, what: str, measured: float, wanted: float) -> Bar:
    """A bar that is met from `wanted` upwards."""
    return Bar(problem, what, measured, wanted, measured >= wanted)


def _best(entries: list[Entry]) -> float | None:
    """Seconds of the fastest right contender, forward and backward."""
    times = [entry.seconds("both") for entry in entries]
    known = [seconds for seconds in times if seconds is not None]
    return min(known) if known else None


def cpu_bars(record: ProblemRecord) -> list[Bar]:
    """Float32 on the CPU: sgemm's rate, eager maps, SDPA without the loss, extra memory."""
    fused = record.entry("sefi-cpu")
    ours = fused.seconds("both") if fused else None
    if fused is None or ours is None or record.dtype != "float32":
        return []
    name, largest = record.problem.name, record.problem.queries == 4096
    largest = largest and record.problem.head_dim == 40
    bars: list[Bar] = []
    for what, seconds in record.matrix_seconds.items():
        bars.append(at_least(name, f"share of sgemm, {what}", seconds / ours, 0.65))
    eager = _best(record.of_family("eager"))
    if eager is not None:
        bars.append(at_least(name, "times eager maps' speed", eager / ours, 1.6 if largest else 1))
    plain = _best(record.of_family("sdpa"))
    if plain is not None:
        wanted = 1.0 if largest else 1 / 1.1
        bars.append(at_least(name, "times SDPA's speed without a loss", plain / ours, wanted))
    bars += _memory_bar(record, fused, 10.0)
    return bars


def _memory_bar(record: ProblemRecord, fused: Entry, factor: float) -> list[Bar]:
    eager = record.entry("eager-maps")
    if eager is None or eager.memory is None or fused.memory is None:
        return []
    less = eager.memory.extra / max(fused.memory.extra, 1)
    return [at_least(record.problem.name, "times less extra memory than eager", less, factor)]


def cuda_bars(record: ProblemRecord) -> list[Bar]:
    """On CUDA, by graph replays: SDPA without the loss, the roofline at batch 16, eager maps."""
    ours_by_name = {
        entry.contender: seconds
        for entry in record.of_family("sefi")
        if entry.contender != "sefi-eager" and (seconds := entry.seconds("both")) is not None
    }
    if not ours_by_name or record.dtype not in ("bfloat16", "float16"):
        return []
    best_name = min(ours_by_name, key=lambda name: ours_by_name[name])
    ours, problem = ours_by_name[best_name], record.problem
    fused = record.entry(best_name)
    assert fused is not None
    bars: list[Bar] = []
    plain = _best(record.of_family("sdpa"))
    if plain is not None:
        bars.append(at_least(problem.name, "times SDPA's speed without a loss", plain / ours, 1.0))
    if problem.batch >= 16:
        wanted = 0.8 if problem.head_dim >= 80 else 0.6
        share = record.bound_of(fused, "both").seconds / ours
        bars.append(at_least(problem.name, "share of the roofline", share, wanted))
    eager = _best(record.of_family("eager"))
    if problem.layer == "sd15 4096x40" and problem.batch == 8:
        if eager is not None:
            bars.append(at_least(problem.name, "times eager maps' speed", eager / ours, 8.0))
        bars += _memory_bar(record, fused, 20.0)
    return bars


def bars_of(records: list[ProblemRecord]) -> list[Bar]:
    """Every bar that the records can answer; those of noisy problems are left out."""
    found: list[Bar] = []
    for record in records:
        if record.noisy:
            continue
        found += cuda_bars(record) if record.device_type == "cuda" else cpu_bars(record)
    return found
