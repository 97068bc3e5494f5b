"""Roofline arithmetic: the work of a call, and the least time that it takes on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from common.shapes import Problem

Direction = Literal["forward", "backward", "both"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "both")

# Products of N x M x D a head, docs/method.md equations 4 and 7 to 9. Backward recomputes the
# scores, since no map is kept: S_t, S_r, then dA, dV, dQ and dK.
_PRODUCTS_WITH_LOSS = {"forward": 3, "backward": 6}
_PRODUCTS_PLAIN = {"forward": 2, "backward": 5}
_MATRIX_GRANULE = 16


class Work(NamedTuple):
    """Work of one direction of a call, for the whole problem."""

    row_bytes: float
    """Query-side bytes: q + o forward, q + do + dq backward; each moved once."""
    key_bytes: float
    """Keys, values and their gradients, moved once a head."""
    exponentials: float
    flops: float
    """Multiplies and adds of the products, unpadded: GFLOP/s count these."""
    tile_flops: float
    """The same on a matrix unit of 16-wide steps: head width and keys rounded up to 16."""


@dataclass(frozen=True)
class Rates:
    """Rates of a device a second; `source` says whether by datasheet or measured here."""

    name: str
    bytes: float
    exponentials: float
    flops: float
    source: str
    padded: bool = True
    """Whether the matrix unit works in 16-wide steps (tensor cores) or not (vector units)."""


class Bound(NamedTuple):
    """Least time of a call in seconds, and the unit that sets it: bytes, exponentials or matrix."""

    seconds: float
    unit: str
    parts: dict[str, float]


def _sfu(multiprocessors: int, megahertz: float) -> float:
    """Return exponentials a second: special-function units do 16 a clock and multiprocessor."""
    return 16.0 * multiprocessors * megahertz * 1e6


# Datasheet rates of the SXM parts: dense bf16/fp16 tensor-core FLOP/s and memory bandwidth;
# exponentials at the highest boost clock.
DATASHEET: dict[str, Rates] = {
    "A100": Rates("A100", 2.039e12, _sfu(108, 1410), 312e12, "datasheet, A100 SXM 80 GB"),
    "H100": Rates("H100", 3.35e12, _sfu(132, 1980), 989e12, "datasheet, H100 SXM 80 GB"),
    "H200": Rates("H200", 4.8e12, _sfu(132, 1980), 989e12, "datasheet, H200 SXM 141 GB"),
}


def _up(number: int, step: int = _MATRIX_GRANULE) -> int:
    return -(-number // step) * step


def products(direction: Direction, with_loss: bool = True) -> int:
    """Return the matrix products of N x M x D a head and direction: nine in all with the loss."""
    table = _PRODUCTS_WITH_LOSS if with_loss else _PRODUCTS_PLAIN
    if direction == "both":
        return table["forward"] + table["backward"]
    return table[direction]


def work(problem: Problem, itemsize: int, direction: Direction, with_loss: bool = True) -> Work:
    """Return the least work of one direction of `problem`, in elements of `itemsize` bytes.

    Keys are counted as 80 for 77 in the exponentials too: a tile's padded columns go through the
    exponential unit like the others.
    """
    if direction == "both":
        forward = work(problem, itemsize, "forward", with_loss)
        backward = work(problem, itemsize, "backward", with_loss)
        return Work(*(a + b for a, b in zip(forward, backward, strict=True)))
    rows, width, keys = problem.rows, problem.head_dim, problem.keys
    softmaxes = 2 if with_loss else 1
    row_tensors = 2 if direction == "forward" else 3
    # k, v and their gradients belong to each sample; the reference key serves all samples.
    own_tensors = 2 if direction == "forward" else 4
    key_tensors = own_tensors * problem.batch + (1 if with_loss else 0)
    count = products(direction, with_loss)
    return Work(
        row_bytes=float(row_tensors * rows * width * itemsize),
        key_bytes=float(key_tensors * problem.heads * keys * width * itemsize),
        exponentials=float(softmaxes * rows * _up(keys)),
        flops=float(count * 2 * rows * keys * width),
        tile_flops=float(count * 2 * rows * _up(keys) * _up(width)),
    )


class KernelDesign(NamedTuple):
    """Tensors and products a row of one Triton kernel, with the loss."""

    row_tensors: int
    """Query-side tensors read or written, of head width."""
    products: int
    softmaxes: int
    statistics: int
    """float32 numbers a row that the query kernel hands to the kernels of the keys: up to six, in
    the eight of one sector."""


# dQ, dK and dV fit one kernel up to 64 columns on 9.0, dQ and dK up to 80. Elsewhere q and do are
# read and scores computed by each; where dK and dV do not fit one kernel either, each has its own.
KERNELS: dict[str, KernelDesign] = {
    "forward": KernelDesign(2, 3, 2, 0),
    "backward": KernelDesign(3, 6, 2, 0),
    "backward (grad_key)": KernelDesign(3, 5, 2, 8),
    "backward_query": KernelDesign(3, 4, 2, 8),
    "backward_key_value": KernelDesign(2, 5, 2, 8),
    "backward_key_value (grad_key)": KernelDesign(2, 4, 2, 8),
    "backward_key_value (grad_value)": KernelDesign(2, 2, 1, 8),
}


def kernel_work(problem: Problem, itemsize: int, kernel: str) -> Work:
    """Return the work of one kernel of the Triton backend by its design, for all of `problem`."""
    design = KERNELS[kernel]
    rows, width, keys = problem.rows, problem.head_dim, problem.keys
    return Work(
        row_bytes=float(rows * (design.row_tensors * width * itemsize + 4 * design.statistics)),
        key_bytes=0.0,
        exponentials=float(design.softmaxes * rows * _up(keys)),
        flops=float(design.products * 2 * rows * keys * width),
        tile_flops=float(design.products * 2 * rows * _up(keys) * _up(width)),
    )


def bound(work_: Work, rates: Rates) -> Bound:
    """Return the least time of `work_`: the largest of row bytes, exponentials and matrix."""
    parts = {
        "bytes": work_.row_bytes / rates.bytes,
        "exponentials": work_.exponentials / rates.exponentials,
        "matrix": (work_.tile_flops if rates.padded else work_.flops) / rates.flops,
    }
    unit = max(parts, key=lambda name: parts[name])
    return Bound(parts[unit], unit, parts)


def direction_bound(
    problem: Problem, itemsize: int, rates: Rates, direction: Direction, with_loss: bool = True
) -> Bound:
    """Return the bound of a direction. Of both it is the sum, because one runs after the other."""
    if direction != "both":
        return bound(work(problem, itemsize, direction, with_loss), rates)
    forward = bound(work(problem, itemsize, "forward", with_loss), rates)
    backward = bound(work(problem, itemsize, "backward", with_loss), rates)
    parts = {name: forward.parts[name] + backward.parts[name] for name in forward.parts}
    longer = forward if forward.seconds >= backward.seconds else backward
    return Bound(forward.seconds + backward.seconds, longer.unit, parts)
