"""What the Triton kernels should take on a GPU that is not here: machine code, played.

python benchmarks/played_times.py
python benchmarks/played_times.py --shapes sd15:4096 --batches 1 16 --json FILE

Every kernel of forward and backward is compiled for compute capability 9.0 and its hot loop played
with as many programs as fit (_latency.py). How near that comes to an H200 is told in
docs/performance-gpu.md; no figure of it was measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

_ROOT = Path(__file__).resolve().parent.parent
for _place in (str(_ROOT), str(_ROOT / "benchmarks")):
    if _place not in sys.path:
        sys.path.append(_place)

from _compiled import Choice, Facts, compile_facts  # noqa: E402
from _latency import LAUNCH_SECONDS, launch_seconds  # noqa: E402
from _report import table, write_json  # noqa: E402
from _shapes import Problem, problems  # noqa: E402
from tqdm import tqdm  # noqa: E402

if TYPE_CHECKING:
    from sefi_fast.kernels import Launch

CAPABILITY = 90
# An H100 or H200 as SXM part, at its highest clock.
MULTIPROCESSORS, HERTZ = 132, 1.98e9
DTYPE = "bfloat16"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", default=["sd15", "sd21", "sdxl"], metavar="SHAPE",
        help="as for attn_bench.py",
    )  # fmt: skip
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], metavar="B")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def written(launch: Launch) -> str:
    """What a launch is for, by what it writes: "output", "dQ dK dV", "sums"."""
    if launch.kernel.__name__ == "sum_partials":
        return "sums"
    names = {"output": "output", "grad_query": "dQ", "grad_key": "dK", "grad_value": "dV"}
    given = [short for name, short in names.items() if launch.arguments.get(name) is not None]
    return " ".join(given)


class Player:
    """Compiles each kernel once and plays its launches."""

    def __init__(self) -> None:
        self._facts: dict[tuple[str, int, Any], Facts] = {}

    def facts(self, launch: Launch, problem: Problem) -> Facts:
        """What was compiled for a launch, whatever the number of its rows."""
        what = written(launch)
        known = (what, problem.head_dim, launch.config)
        if known not in self._facts:
            kernel = {"output": "forward", "dQ": "backward_query", "dQ dK dV": "backward"}
            kernel |= {"dQ dK": "backward (grad_key)", "dK dV": "backward_key_value"}
            name = kernel.get(what, "backward_key_value (grad_value)")
            choice = Choice(name, CAPABILITY, DTYPE, problem.head_dim, problem.queries)
            self._facts[known] = compile_facts(launch, choice)
        return self._facts[known]

    def seconds(self, launch: Launch, problem: Problem) -> float:
        """What one launch should take; one that adds up sums as long as it takes to start."""
        if written(launch) == "sums":
            return LAUNCH_SECONDS
        first, second = launch.prepared.grid[:2]
        blocks = launch.arguments["blocks_a_program"]
        clocks = self.facts(launch, problem).turn_clocks
        return launch_seconds(first * second, blocks, clocks, MULTIPROCESSORS, HERTZ)


def play(problem: Problem, player: Player) -> list[dict[str, Any]]:
    """A flat row a launch of forward and backward with the loss."""
    import torch
    from sefi_fast.kernels.compile import call_launches

    launches = call_launches(
        CAPABILITY, getattr(torch, DTYPE), problem.head_dim, problem.queries, problem.batch,
        problem.heads,
    )  # fmt: skip
    return [
        {
            "layer": problem.layer,
            "batch": problem.batch,
            "writes": written(launch),
            "seconds": player.seconds(launch, problem),
        }
        for launch in launches
    ]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 2 where a word fits no layer."""
    options = parse(arguments)
    # Interpreting would prevent compiling; Triton reads both late.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        asked = list(problems(options.shapes, options.batches))
    except ValueError as error:
        print(f"played_times: {error}", file=sys.stderr)
        return 2
    player, found, lines = Player(), [], []
    for problem in tqdm(asked, unit="layer"):
        rows = play(problem, player)
        found += rows
        kernels = ", ".join(f"{row['writes']} {row['seconds'] * 1e6:.1f}" for row in rows)
        total = sum(row["seconds"] for row in rows)
        lines.append([problem.layer, str(problem.batch), kernels, f"{total * 1e6:.1f}"])
    print(table(["layer", "batch", "us a kernel", "together"], lines))
    if options.json:
        note = "machine code for compute capability 9.0, played; no GPU ran anything here"
        write_json(options.json, {"benchmark": "played_times", "note": note, "results": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
