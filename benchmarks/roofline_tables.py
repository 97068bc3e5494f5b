"""Print the roofline of the cross-attention as Markdown: per row, per layer, per device.

python benchmarks/roofline_tables.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.roofline import DATASHEET, Direction, bound, kernel_work, work
from common.shapes import MODELS, Problem

_WIDTHS = (40, 64, 80, 160)
_HALF = 2
_SHORT = {"bytes": "bytes", "exponentials": "exp", "matrix": "matrix"}
_ONE_WAY: tuple[Direction, ...] = ("forward", "backward")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns except the first are aligned right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def row_table() -> str:
    """Return the work of one row of one head, in 16-bit elements."""
    rows = []
    for width in _WIDTHS:
        row = Problem("custom", 1, width, 1)
        forward, backward = work(row, _HALF, "forward"), work(row, _HALF, "backward")
        rows.append(
            [str(width)]
            + [f"{forward.row_bytes:.0f}", f"{backward.row_bytes:.0f}"]
            + [f"{forward.exponentials:.0f}", f"{backward.exponentials:.0f}"]
            + [f"{forward.tile_flops / 1e3:.1f}", f"{backward.tile_flops / 1e3:.1f}"]
        )
    head = ["head_dim", "bytes fwd", "bytes bwd", "exp fwd", "exp bwd", "kFLOP fwd", "kFLOP bwd"]
    return markdown(head, rows)


def device_table() -> str:
    """Return the least picoseconds per row and head of each device, and the unit that sets them."""
    rows = []
    for width in _WIDTHS:
        row, cells = Problem("custom", 1, width, 1), [str(width)]
        for rates in DATASHEET.values():
            for direction in _ONE_WAY:
                least = bound(work(row, _HALF, direction), rates)
                cells.append(f"{least.seconds * 1e12:.0f} {_SHORT[least.unit]}")
        rows.append(cells)
    head = ["head_dim", *(f"{name} {way}" for name in DATASHEET for way in ("fwd", "bwd"))]
    return markdown(head, rows)


def kernel_table() -> str:
    """Return the least picoseconds per row of each Triton kernel, and the largest roofline share.

    The share is that of dQ, dK and dV in one kernel, in two (dQ alone) and in three.
    """
    rows = []
    names = ["forward", "backward", "backward_query", "backward_key_value"]
    names += [f"backward_key_value ({grad})" for grad in ("grad_key", "grad_value")]
    for width in _WIDTHS:
        row = Problem("custom", 1, width, 1)
        for rates in DATASHEET.values():
            floors = [bound(kernel_work(row, _HALF, name), rates) for name in names]
            forward, whole, query, key_value, key, value = (floor.seconds for floor in floors)
            least = sum(bound(work(row, _HALF, way), rates).seconds for way in _ONE_WAY)
            cells = [f"{floor.seconds * 1e12:.0f} {_SHORT[floor.unit]}" for floor in floors]
            one = least / (forward + whole)
            together = least / (forward + query + key_value)
            apart = least / (forward + query + key + value)
            rows.append(
                [f"{width}, {rates.name}", *cells, f"{one:.0%}", f"{together:.0%}", f"{apart:.0%}"]
            )
    head = ["head_dim, device", "forward", "dQ dK dV", "dQ", "dK dV", "dK", "dV"]
    return markdown([*head, "most, in one", "most, in two", "most, in three"], rows)


def layer_table(batch: int) -> str:
    """Return the least microseconds of each layer at a batch, forward / backward."""
    rows = []
    for model, layers in MODELS.items():
        for layer in layers:
            problem = Problem(model, layer.queries, layer.head_dim, layer.heads, batch)
            cells = [f"{problem.layer}, {layer.heads} heads"]
            for rates in DATASHEET.values():
                times = [bound(work(problem, _HALF, way), rates).seconds for way in _ONE_WAY]
                cells.append(" / ".join(f"{seconds * 1e6:.1f}" for seconds in times))
            rows.append(cells)
    return markdown([f"layer, batch {batch}", *DATASHEET], rows)


def main() -> int:
    """Print all tables."""
    tables = (row_table(), device_table(), kernel_table(), layer_table(1), layer_table(16))
    print(*tables, sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
