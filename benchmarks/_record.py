"""What one problem's measurement found, as plain data for tables, JSON, CSV and plots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from _measure import Memory, Timing
from _roofline import DIRECTIONS, Bound, Direction, Rates, Work, direction_bound, products, work
from _shapes import Problem

MOST_SPREAD = 0.3
"""Half the quartile distance over the median beyond which a machine was too busy to measure on."""

Target = tuple[str, str, float, float]
"""A problem, a ratio, what was measured and what is wanted at least."""


@dataclass
class Entry:
    """One contender on one problem. A wrong or refused one has `problem_with` and no times."""

    contender: str
    family: str
    with_loss: bool
    errors: dict[str, float] = field(default_factory=dict)
    wrong: str | None = None
    unavailable: str | None = None
    eager_times: dict[str, Timing] = field(default_factory=dict)
    """By the clock on the CPU, by events on CUDA."""
    graph_times: dict[str, Timing] = field(default_factory=dict)
    no_graph: str | None = None
    memory: Memory | None = None

    @property
    def sound(self) -> bool:
        return self.wrong is None and self.unavailable is None

    @property
    def verdict(self) -> str:
        if self.wrong is not None:
            return f"wrong: {self.wrong}"
        return "right" if self.unavailable is None else f"not run: {self.unavailable}"

    def timing(self, direction: str) -> Timing | None:
        """The graph replay's timing where there is one, else the plain call's; none if wrong."""
        if not self.sound:
            return None
        return self.graph_times.get(direction) or self.eager_times.get(direction)

    def seconds(self, direction: str) -> float | None:
        timing = self.timing(direction)
        return timing.median if timing else None


@dataclass
class ProblemRecord:
    """All contenders on one problem in one dtype on one device."""

    problem: Problem
    dtype: str
    itemsize: int
    device_type: str
    rates: Rates
    """This device's own, for the dtype."""
    entries: list[Entry] = field(default_factory=list)
    matrix_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of the nine products at the machine's own matrix rate, CPU only."""

    @property
    def noisy(self) -> bool:
        """Whether some contender's times scatter too widely to hold them to a target."""
        timings = [entry.timing("both") for entry in self.entries]
        return any(timing is not None and timing.spread > MOST_SPREAD for timing in timings)

    def entry(self, contender: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.contender == contender), None)

    def of_family(self, family: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.family == family]

    def work_of(self, entry: Entry, direction: Direction) -> Work:
        return work(self.problem, self.itemsize, direction, entry.with_loss)

    def bound_of(self, entry: Entry, direction: Direction) -> Bound:
        """The least seconds of what this contender computes: with the loss or without it."""
        return direction_bound(self.problem, self.itemsize, self.rates, direction, entry.with_loss)

    def row(self, entry: Entry, direction: Direction) -> dict[str, Any]:
        """One flat row: shape, contender, verdict and, for a sound contender, the figures."""
        problem = self.problem
        found: dict[str, Any] = {
            "model": problem.model,
            "queries": problem.queries,
            "head_dim": problem.head_dim,
            "heads": problem.heads,
            "batch": problem.batch,
            "keys": problem.keys,
            "dtype": self.dtype,
            "contender": entry.contender,
            "with_loss": entry.with_loss,
            "direction": direction,
            "verdict": entry.verdict,
            "worst_error": max(entry.errors.values(), default=None),
        }
        timing = entry.timing(direction)
        if timing is None:
            return found
        work_ = self.work_of(entry, direction)
        found |= {
            "seconds": timing.median,
            "fastest_seconds": timing.fastest,
            "spread": timing.spread,
            "rounds": timing.rounds,
            "timed_by": "graph replay" if direction in entry.graph_times else "call",
            "call_seconds": entry.eager_times[direction].median,
            "products": products(direction, entry.with_loss),
            "gflops": work_.flops / timing.median * 1e-9,
            "gigabytes_per_second": (work_.row_bytes + work_.key_bytes) / timing.median * 1e-9,
        }
        bound = self.bound_of(entry, direction)
        found["roofline_seconds"] = bound.seconds
        found["roofline_unit"] = bound.unit
        found["roofline_share"] = bound.seconds / timing.median
        for what, seconds in self.matrix_seconds.items():
            if direction == "both":
                found[f"sgemm_share_{what.split()[0]}"] = seconds / timing.median
        if direction == "both" and entry.memory is not None:
            found["peak_bytes"] = entry.memory.peak
            found["extra_bytes"] = entry.memory.extra
        return found

    def rows(self) -> list[dict[str, Any]]:
        return [self.row(entry, direction) for entry in self.entries for direction in DIRECTIONS]

    def _fastest(self, family: str) -> float | None:
        return min(filter(None, (e.seconds("both") for e in self.of_family(family))), default=None)

    def targets(self) -> list[Target]:
        """Ratios of the fastest fused backend, forward and backward; none if times are noisy.

        float32 on a CPU, half precision on CUDA.
        """
        ours = [
            entry
            for entry in self.of_family("sefi")
            if entry.contender != "sefi-eager" and entry.seconds("both")
        ]
        cpu, problem = self.device_type == "cpu", self.problem
        if self.noisy or not ours or cpu != (self.dtype == "float32"):
            return []
        fused = min(ours, key=lambda entry: entry.seconds("both") or 0.0)
        seconds = fused.seconds("both") or 0.0
        largest = (problem.queries, problem.head_dim) == (4096, 40)
        found = {
            f"share of sgemm, {what}": (product / seconds, 0.65)
            for what, product in self.matrix_seconds.items()
        }
        if plain := self._fastest("sdpa"):
            wanted = 1 / 1.1 if cpu and not largest else 1.0
            found["times SDPA's speed without a loss"] = (plain / seconds, wanted)
        if not cpu and problem.batch >= 16:
            share = self.bound_of(fused, "both").seconds / seconds
            found["share of the roofline"] = (share, 0.8 if problem.head_dim >= 80 else 0.6)
        if cpu or (largest and problem.batch == 8):
            if eager := self._fastest("eager"):
                wanted = (1.6 if largest else 1.0) if cpu else 8.0
                found["times eager maps' speed"] = (eager / seconds, wanted)
            maps = self.entry("eager-maps")
            if maps and maps.memory and fused.memory:
                less = maps.memory.extra / max(fused.memory.extra, 1)
                found["times less extra memory than eager"] = (less, 10.0 if cpu else 20.0)
        return [(problem.name, what, *pair) for what, pair in found.items()]
