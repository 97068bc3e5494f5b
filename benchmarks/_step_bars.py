"""What a training step is held to, and whether a run met it."""

from __future__ import annotations

from _bars import Bar, at_least
from _record import MOST_SPREAD
from _step_run import INVERSION, PLAIN, SEFI, StepRecord


def step_bars(record: StepRecord) -> list[Bar]:
    """Speed against the plain method and Textual Inversion, memory against Textual Inversion.

    None for a record whose times scatter too widely to tell.
    """
    ours = record.entry(SEFI)
    if ours.timing is None:
        return []
    noisy = any(e.timing is not None and e.timing.spread > MOST_SPREAD for e in record.entries)
    name = f"{record.built.name} b{record.batch}"
    bars: list[Bar] = []
    plain, inversion = record.entry(PLAIN), record.entry(INVERSION)
    if plain.timing is not None and not noisy:
        times = plain.timing.median / ours.timing.median
        wanted = 3.0 if record.device_type == "cuda" else 1.0
        bars.append(at_least(name, "times the plain method's speed", times, wanted))
    if inversion.timing is not None and not noisy:
        times = inversion.timing.median / ours.timing.median
        bars.append(at_least(name, "times Textual Inversion's speed", times, 1.0))
    if inversion.memory is not None and ours.memory is not None:
        less = inversion.memory.peak / ours.memory.peak
        bars.append(at_least(name, "times less peak memory than Textual Inversion", less, 1.0))
    return bars
