"""Check and measure all providers on one problem; rows of the results, and ratios with a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from common.providers import EAGER, Provider, Workload
from common.rates import large_product, nine_products
from common.reference import (
    Inputs,
    Results,
    errors,
    float64_results,
    make_inputs,
    problem_with,
)
from common.report import Row, Target, reason, table, time_text
from common.roofline import DIRECTIONS, Direction, Rates, direction_bound, products, work
from common.shapes import Problem
from common.timing import (
    Call,
    Effort,
    Memory,
    Timing,
    captured,
    interleaved_cuda,
    interleaved_on,
    memory,
)

MOST_SPREAD = 0.3
"""Largest spread of times that can be compared with a target: a busy machine has a larger one."""

STEPS_PER_PROVIDER = 1 + len(DIRECTIONS)
_LARGE = 1024
_SAME_SHAPES, _LARGE_SQUARE = "same shapes", "large square"


@dataclass
class _Entry:
    """One provider on one problem. One that fails gets no figures."""

    workload: Workload
    status: str = "pass"
    errors: dict[str, float] = field(default_factory=dict)
    call_times: dict[str, Timing] = field(default_factory=dict)
    """By the clock on the CPU, by events on CUDA."""
    graph_times: dict[str, Timing] = field(default_factory=dict)
    memory: Memory | None = None

    @property
    def provider(self) -> Provider:
        return self.workload.provider


def _check(entry: _Entry, true: Results, eager: dict[str, float], dtype: torch.dtype) -> None:
    provider = entry.provider
    try:
        with provider.context():
            results = entry.workload.results()
    except Exception as error:  # noqa: BLE001 - a library may raise anything; the row says what
        entry.status = f"not run: {reason(error)}"
        return
    entry.errors = errors(results, true)
    strict = provider.family == "sefi" and bool(eager)
    if wrong := problem_with(entry.errors, eager, dtype, strict):
        entry.status = f"fail: {wrong}"


def _checked(
    chosen: list[Provider], inputs: Inputs, dtype: torch.dtype, tick: Callable[[], object]
) -> list[_Entry]:
    """Check every provider, the eager maps first: their error is the measure of the others'."""
    with_loss, plain = float64_results(inputs), float64_results(inputs, with_loss=False)
    eager: dict[str, float] = {}
    found = []
    for provider in sorted(chosen, key=lambda one: one.name != EAGER.name):
        entry = _Entry(Workload(provider, inputs))
        _check(entry, with_loss if provider.with_loss else plain, eager, dtype)
        if provider.name == EAGER.name:
            eager = entry.errors
        found.append(entry)
        tick()
    return found


def _time_graphs(entries: list[_Entry], direction: Direction, effort: Effort) -> None:
    replays: dict[str, Call] = {}
    for entry in entries:
        entry.workload.release()
        try:
            replays[entry.provider.name] = captured(entry.workload.call(direction))
        except RuntimeError:
            # Its plain calls are timed.
            torch.cuda.synchronize()
    times = interleaved_cuda(replays, effort) if replays else {}
    for entry in entries:
        if timing := times.get(entry.provider.name):
            entry.graph_times[direction] = timing


def measure(
    problem: Problem,
    chosen: list[Provider],
    device: torch.device,
    dtype: torch.dtype,
    rates: Rates,
    effort: Effort,
    tick: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> list[Row]:
    """Check, then time alternately, then measure memory, all on the same calls.

    A provider whose results differ from float64 gets no time and no memory figure. `tick` is called
    STEPS_PER_PROVIDER times a provider.
    """
    inputs = make_inputs(problem, device, dtype, seed)
    entries = _checked(chosen, inputs, dtype, tick)
    passed = [entry for entry in entries if entry.status == "pass"]
    sgemm: dict[str, float] = {}
    for direction in DIRECTIONS:
        calls = {entry.provider.name: entry.workload.call(direction) for entry in passed}
        if device.type == "cpu" and direction == "both":
            calls[_SAME_SHAPES] = nine_products(inputs)
            calls[_LARGE_SQUARE], large_flops = large_product(device, dtype, _LARGE)
        times = interleaved_on(device, calls, effort)
        for entry in passed:
            entry.call_times[direction] = times[entry.provider.name]
            entry.workload.release()
        if device.type == "cuda":
            _time_graphs(passed, direction, effort)
        elif direction == "both":
            share = work(problem, dtype.itemsize, "both").flops / large_flops
            sgemm = {
                "same": times[_SAME_SHAPES].median,
                "large": share * times[_LARGE_SQUARE].median,
            }
        for _ in chosen:
            tick()
    for entry in passed:
        entry.workload.release()
        entry.memory = memory(entry.workload.call("both"), device)
    return [
        _row(problem, dtype, rates, entry, direction, sgemm)
        for entry in entries
        for direction in DIRECTIONS
    ]


def _row(
    problem: Problem,
    dtype: torch.dtype,
    rates: Rates,
    entry: _Entry,
    direction: Direction,
    sgemm: dict[str, float],
) -> Row:
    """Return one flat row: shape, provider, status and, if it passed, the figures."""
    with_loss = entry.provider.with_loss
    row: Row = {
        "model": problem.model,
        "queries": problem.queries,
        "head_dim": problem.head_dim,
        "heads": problem.heads,
        "batch": problem.batch,
        "keys": problem.keys,
        "dtype": str(dtype).removeprefix("torch."),
        "provider": entry.provider.name,
        "with_loss": with_loss,
        "direction": direction,
        "status": entry.status,
        "worst_error": max(entry.errors.values(), default=None),
    }
    if entry.status != "pass":
        return row
    by_graph = direction in entry.graph_times
    timing = (entry.graph_times if by_graph else entry.call_times)[direction]
    work_ = work(problem, dtype.itemsize, direction, with_loss)
    bound = direction_bound(problem, dtype.itemsize, rates, direction, with_loss)
    row |= {
        "seconds": timing.median,
        "fastest_seconds": timing.fastest,
        "spread": timing.spread,
        "rounds": timing.rounds,
        "timed_by": "graph replay" if by_graph else "call",
        "call_seconds": entry.call_times[direction].median,
        "products": products(direction, with_loss),
        "gflops": work_.flops / timing.median * 1e-9,
        "gigabytes_per_second": (work_.row_bytes + work_.key_bytes) / timing.median * 1e-9,
        "roofline_seconds": bound.seconds,
        "roofline_unit": bound.unit,
        "roofline_share": bound.seconds / timing.median,
    }
    if direction == "both":
        row |= {f"sgemm_share_{name}": seconds / timing.median for name, seconds in sgemm.items()}
        if entry.memory is not None:
            row |= {"peak_bytes": entry.memory.peak, "extra_bytes": entry.memory.extra}
    return row


def both_rows(rows: Sequence[Row]) -> dict[str, Row]:
    """Return the measured rows of forward and backward together, by provider."""
    return {
        row["provider"]: row for row in rows if row["direction"] == "both" and row.get("seconds")
    }


def name_of(row: Row) -> str:
    """Return the name of a row's problem."""
    return f"{row['model']} {row['queries']}x{row['head_dim']} b{row['batch']}"


def by_problem(rows: Sequence[Row]) -> list[list[Row]]:
    """Split rows by problem and dtype, in their order."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(list(row.values())[:7]), []).append(row)
    return list(groups.values())


def is_noisy(rows: Sequence[Row]) -> bool:
    """Say whether some provider's times scatter too widely for a comparison with a target."""
    return any(row["spread"] > MOST_SPREAD for row in both_rows(rows).values())


def targets(rows: Sequence[Row], device_type: str) -> list[Target]:
    """Return ratios of the fastest fused backend on one problem; none if times are noisy.

    Of float32 on a CPU, and of half precision on CUDA.
    """
    both, cpu = both_rows(rows), device_type == "cpu"
    ours = [row for name, row in both.items() if name.startswith("sefi-") and name != "sefi-eager"]
    if is_noisy(rows) or not ours or cpu != (rows[0]["dtype"] == "float32"):
        return []
    fused = min(ours, key=lambda row: row["seconds"])
    head_dim, batch = fused["head_dim"], fused["batch"]
    largest = (fused["queries"], head_dim) == (4096, 40)
    found = {}
    for name, what in (("same", _SAME_SHAPES), ("large", _LARGE_SQUARE)):
        if share := fused.get(f"sgemm_share_{name}"):
            found[f"share of sgemm, {what}"] = (share, 0.65)
    plain = [row["seconds"] for name, row in both.items() if name.startswith("sdpa")]
    if plain:
        least = 1 / 1.1 if cpu and not largest else 1.0
        found["times SDPA's speed without a loss"] = (min(plain) / fused["seconds"], least)
    if not cpu and batch >= 16:
        found["share of the roofline"] = (fused["roofline_share"], 0.8 if head_dim >= 80 else 0.6)
    eager = both.get(EAGER.name)
    if eager and (cpu or (largest and batch == 8)):
        least = (1.6 if largest else 1.0) if cpu else 8.0
        found["times eager maps' speed"] = (eager["seconds"] / fused["seconds"], least)
        less = eager["extra_bytes"] / max(fused["extra_bytes"], 1)
        found["times less extra memory than eager"] = (less, 10.0 if cpu else 20.0)
    return [(name_of(fused), what, *pair) for what, pair in found.items()]


def problem_table(rows: Sequence[Row]) -> str:
    """Return the providers of one problem: times as medians, both directions' rates and memory."""
    first, both = rows[0], both_rows(rows)
    seconds = {(row["provider"], row["direction"]): row.get("seconds") for row in rows}
    eager = seconds.get((EAGER.name, "both"))
    lines = []
    for name in dict.fromkeys(row["provider"] for row in rows):
        row = next(row for row in rows if row["provider"] == name)
        line = [name, "yes" if row["with_loss"] else "no"]
        if row["status"] != "pass":
            lines.append([*line, row["status"]])
            continue
        row = both[name]
        line += [f"{row['worst_error']:.1e}"]
        line += [time_text(seconds[name, direction]) for direction in DIRECTIONS]
        lines.append(
            [
                *line,
                f"{row['spread'] * 100:.0f}%",
                f"{row['gflops']:.0f}",
                f"{row['gigabytes_per_second']:.1f}",
                f"{row['roofline_share'] * 100:.0f}% {row['roofline_unit'][:4]}",
                f"{row['extra_bytes'] / 2**20:.2f}",
                f"{eager / row['seconds']:.2f}" if eager else "-",
            ]
        )
    head = ["provider", "loss", "error", *DIRECTIONS, "spread"]
    head += ["GFLOP/s", "GB/s", "roofline", "extra-MiB", "xeager"]
    title = f"{name_of(first)}: {first['heads']} heads, {first['keys']} keys, {first['dtype']}"
    return f"\n{title}\n{table(head, lines)}"
