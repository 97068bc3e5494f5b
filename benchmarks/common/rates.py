"""Rates of this device, measured in the same run: matrix work, bytes and exponentials."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import replace
from pathlib import Path

import torch

from common.reference import Inputs
from common.roofline import Rates
from common.timing import Call

_PRODUCTS_OF_SCORES, _PRODUCTS_OF_ROWS, _PRODUCTS_OF_KEYS = 5, 2, 2


def device_name(device: torch.device) -> str:
    """Return the name of a folder of results: the GPU's, or the CPU's with its cores."""
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device)
    else:
        words = f"cpu {_cpu_model()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    model = ""
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        model = found.group(1) if found else ""
    model = model or platform.processor() or platform.machine()
    model = re.sub(r"\((R|TM|r|tm)\)|@.*|\b(CPU|Processor|Intel|AMD)\b", " ", model)
    return " ".join(model.split())


def _fastest(call: Call, device: torch.device, repeats: int = 12) -> float:
    """Return the seconds of the fastest of some calls: a ceiling needs the least disturbed one."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e-3 * float(do_bench(call, return_mode="min"))

    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(repeats))


def nine_products(inputs: Inputs) -> Call:
    """Return the nine products of forward and backward with the loss as torch.mm, head by head.

    Shapes are the operator's, operands are dense, and results stay in cache: this is the machine's
    matrix rate on these shapes.
    """
    query, key = inputs.query.detach(), inputs.key.detach()
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    rows = [query[b, h].contiguous() for b in range(batch) for h in range(heads)]
    columns = [key[b, h].contiguous() for b in range(batch) for h in range(heads)]
    scores = query.new_empty(queries, keys)
    scores_of = torch.softmax(query.new_empty(queries, keys).normal_(), dim=-1)
    row_result = query.new_empty(queries, head_dim)
    key_result = query.new_empty(keys, head_dim)

    def run() -> None:
        for row, column in zip(rows, columns, strict=True):
            for _ in range(_PRODUCTS_OF_SCORES):
                torch.mm(row, column.t(), out=scores)
            for _ in range(_PRODUCTS_OF_ROWS):
                torch.mm(scores_of, column, out=row_result)
            for _ in range(_PRODUCTS_OF_KEYS):
                torch.mm(scores_of.t(), row, out=key_result)

    return run


def large_product(device: torch.device, dtype: torch.dtype, size: int) -> tuple[Call, float]:
    """Return one square product on random data, and its floating-point operations."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    result = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=result), 2.0 * size**3


def _copy_rate(device: torch.device) -> float:
    """Return the bytes read plus the bytes written a second by a large copy."""
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / _fastest(lambda: target.copy_(source), device)


def _exponential_rate(device: torch.device) -> float:
    if device.type == "cuda":
        from common.exponentials import exponentials

        call, count = exponentials(device)
        return count / _fastest(call, device)
    values = torch.randn(1 << 17)
    result = torch.empty_like(values)

    def run() -> None:
        for _ in range(50):
            torch.exp(values, out=result)

    return 50.0 * values.numel() / _fastest(run, device)


def measured_rates(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Rates:
    """Measure the ceilings of `device`."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else (1024 if quick else 2048)
    call, flops = large_product(device, dtype, size)
    matrix = flops / _fastest(call, device)
    return Rates(
        name=device_name(device),
        bytes=_copy_rate(device),
        exponentials=_exponential_rate(device),
        flops=matrix,
        source=f"measured in this run: torch.mm of {size}, a large copy, exponentials in registers"
        if cuda
        else f"measured in this run: torch.mm of {size}, a 64 MiB copy, torch.exp in cache",
        padded=cuda,
    )


def faster(first: Rates, second: Rates) -> Rates:
    """Return the higher of each rate of two measurements of one device."""
    return replace(
        first,
        bytes=max(first.bytes, second.bytes),
        exponentials=max(first.exponentials, second.exponentials),
        flops=max(first.flops, second.flops),
    )
