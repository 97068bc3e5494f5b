"""Ranks configurations by what the compiler makes of them, without a GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from _compiled import Choice, Facts, compile_case
from _tuning import Place, Trial, Winner, problems_of

ENOUGH_WARPS = 8
"""Two warps a scheduler: with fewer, waiting is taken to cost in proportion."""
LEAST_GAIN = 0.03
_ROWS = 4096


def compile_trial(trial: Trial, dtype: str, head_dim: int) -> list[Facts]:
    """The facts of each launch of a trial: two where each gradient has a launch of its own."""
    kernel = trial.place.kernel
    names = [f"{kernel} (grad_key)" if trial.config.sums == 1 else kernel]
    if trial.config.separate:
        names.append(f"{kernel} (grad_value)")
    return [
        compile_case(
            Choice(name, trial.place.capability, dtype, head_dim, _ROWS), config=trial.config
        )
        for name in names
    ]


def cost_of(facts: Facts) -> tuple[float, str]:
    """What a row takes, in its unit: played where latencies are known, else the bound, where rates
    are known, or warp instructions.

    The mean over the devices of the architecture; what is not played is longer in proportion where
    fewer than ENOUGH_WARPS warps are resident.
    """
    played = [bound["played"] for bound in facts.bounds.values() if "played" in bound]
    if played:
        return sum(played) / len(played), "ps"
    waiting = max(1.0, ENOUGH_WARPS / max(facts.warps_resident, 1))
    if not facts.bounds:
        return facts.instructions_a_row * waiting, "instructions"
    bounds = [bound["picoseconds"] for bound in facts.bounds.values()]
    return sum(bounds) / len(bounds) * waiting, "ps"


def judge(trial: Trial, launches: list[Facts]) -> None:
    """Put the figures of a compiled trial into it, or why it cannot run."""
    costs = [cost_of(facts) for facts in launches]
    trial.figures = {
        "measured": False,
        "registers": max(facts.registers for facts in launches),
        "spill_bytes": sum(facts.spill_bytes for facts in launches),
        "cost": sum(cost for cost, _ in costs),
        "unit": costs[0][1],
        "warps_resident": min(facts.warps_resident for facts in launches),
        "launches": [facts.as_dict() for facts in launches],
    }
    resident = min(facts.blocks_resident for facts in launches)
    if resident == 0:
        trial.dropped = "its registers or shared memory fit on no multiprocessor"
    elif not trial.default:
        trial.config = trial.config._replace(resident=resident)


def rank(trial: Trial) -> tuple[bool, float]:
    """Sorts trials: those that spill last, then by what a row takes."""
    return trial.figures["spill_bytes"] > 0, trial.figures["cost"]


def static_winner(trials: list[Trial]) -> Winner | None:
    """The best of one place where it is better than the default by more than LEAST_GAIN.

    No spills come before any gain; None where the default is as good.
    """
    default = next(trial for trial in trials if trial.default)
    sound = [trial for trial in trials if trial.dropped is None]
    if not sound:
        return None
    best = min(sound, key=rank)
    if default.dropped is None:
        spills, cost = rank(default)
        better = rank(best)[0] < spills or rank(best)[1] < cost * (1.0 - LEAST_GAIN)
        if best is default or not better:
            return None
    return Winner(best.place, best.config, f"{_words(best)} (now {_words(default)})")


def _words(trial: Trial) -> str:
    if trial.dropped is not None:
        return trial.dropped
    figures = trial.figures
    return (
        f"static, not measured: {figures['cost']:.0f} {figures['unit']} a row, "
        f"{figures['registers']} registers, {figures['spill_bytes']} bytes of spills, "
        f"{figures['warps_resident']} warps"
    )


def try_all(trials: list[Trial], dtype: str, jobs: int) -> Iterator[Trial]:
    """Compile every trial over some processes; each comes back judged, as it is ready."""
    import torch

    element = getattr(torch, dtype)
    widths: dict[Place, int] = {}
    for trial in trials:
        if trial.place not in widths:
            widths[trial.place] = problems_of(trial.place, element)[0].head_dim

    def settle(trial: Trial, result: Callable[[], list[Facts]]) -> Trial:
        try:
            judge(trial, result())
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises, the others go on
            first = (str(error).strip() or "no reason given").splitlines()[0]
            trial.dropped = f"does not compile: {type(error).__name__}: {first[:120]}"
        return trial

    if jobs <= 1:
        for trial in trials:
            head_dim = widths[trial.place]
            yield settle(trial, lambda t=trial, d=head_dim: compile_trial(t, dtype, d))  # type: ignore[misc]
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending = {
            pool.submit(compile_trial, trial, dtype, widths[trial.place]): trial for trial in trials
        }
        for future in as_completed(pending):
            yield settle(pending[future], future.result)
