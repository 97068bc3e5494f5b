"""Ahead-of-time compilation of launches, without a GPU: registers, spills, matrix units, loads."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from typing import Any, NamedTuple

import torch
import triton
from sefi_fast.kernels.launch import Device, Launch
from sefi_fast.kernels.plan import (
    KEY_GRADIENTS,
    Layouts,
    empty_row_stats,
    fused_config,
    input_tensors,
    plan_backward_fused,
    plan_backward_key_value,
    plan_backward_query,
    plan_forward,
)
from sefi_fast.kernels.ptxas import fixed_ptxas
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sefi_fast.ops.inputs import AttentionInputs, OutputGrads

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148}
HEAD_DIMS = (40, 64, 80, 160)


class Report(NamedTuple):
    """Properties of one compiled launch.

    registers a thread; spill_bytes stored and loaded; shared_bytes of a program; matrix
    instructions in the PTX (warp-group ones count among them) and warp-group ones alone; global
    loads by width in bits, asynchronous copies included; serialized: ptxas makes each warp-group
    instruction wait for the one before.
    """

    name: str
    capability: int
    block: int
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instructions: int
    warp_group_instructions: int
    loads: dict[int, int]
    serialized: bool


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Return types, constants and known alignments of the arguments, as a launch has them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    promises: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        divisible = isinstance(value, Tensor)
        plain = parameter.do_not_specialize
        one = type(value) is int and value == 1 and not plain
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            divisible = value % 16 == 0 and not plain
        if divisible:
            promises[index,] = [["tt.divisibility", 16]]
    return signature, constants, promises


def _load_widths(ptx: str) -> dict[int, int]:
    widths: dict[int, int] = {}
    for vector, bits in re.findall(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)", ptx):
        width = int(vector or 1) * int(bits)
        widths[width] = widths.get(width, 0) + 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)", ptx):
        width = int(size, 0) * 8
        widths[width] = widths.get(width, 0) + 1
    return dict(sorted(widths.items()))


def compile_launch(launch: Launch, capability: int) -> Report:
    """Compile one planned launch for compute capability major · 10 + minor.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was set when the kernels were imported.
    """
    if not hasattr(launch.kernel, "params"):
        raise RuntimeError(
            "the kernels were imported for Triton's interpreter; unset TRITON_INTERPRET and start "
            "a new Python process to compile them"
        )
    signature, constants, promises = _signature(launch)
    source = ASTSource(launch.kernel, signature, constants, promises)
    log = io.StringIO()
    knobs = triton.knobs
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        fixed_ptxas(capability) as options,
        knobs.nvidia.scope(),
    ):
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target, {**launch.config.options, **options})
    text = log.getvalue()
    registers = re.search(r"Used (\d+) registers", text)
    if registers is None:
        raise RuntimeError(f"ptxas reported no registers for {source.name}:\n{text}")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    ptx = compiled.asm["ptx"]
    warp_group = len(re.findall(r"\bwgmma\.mma_async", ptx))
    return Report(
        source.name,
        capability,
        launch.config.block_m,
        launch.config.num_warps,
        launch.config.num_stages,
        int(registers.group(1)),
        sum(map(int, spills)),
        compiled.metadata.shared,
        warp_group + len(re.findall(r"\b(?:mma\.sync|tcgen05\.mma)", ptx)),
        warp_group,
        _load_widths(ptx),
        "wgmma.mma_async instructions are serialized" in text,
    )


def example_launches(
    capability: int, dtype: torch.dtype, head_dim: int, rows: int
) -> dict[str, Launch]:
    """Return the launches of one call with the subject loss and its backward, by kernel.

    They are planned on tensors without memory: batch 2, 8 heads, 77 keys. Where each gradient has
    its own launch, the second is "backward_key_value (grad_value)". "backward", or "backward
    (grad_key)", is the kernel of the queries where it also sums up both, or dK alone.
    """
    batch, heads, keys = 2, 8, 77

    def empty(length: int) -> Tensor:
        shape = (batch, length, heads, head_dim)
        return torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2)

    query, key, value, reference_key = (empty(length) for length in (rows, keys, keys, keys))
    inputs = AttentionInputs(query, key, value, reference_key)
    gradients = OutputGrads(query, torch.empty(batch, device="meta"), None)
    scale = head_dim**-0.5
    device = Device(capability, MULTIPROCESSORS.get(capability, 132), False)
    # [B, rows, H, D] buffers of the results.
    output, total = (torch.empty_like(like.transpose(1, 2)) for like in (query, key))
    forward, _ = plan_forward(inputs, output, None, scale, device)
    row_stats = empty_row_stats(query)
    launches = {
        "forward": forward,
        "backward_query": plan_backward_query(
            inputs, gradients, output, row_stats, scale, False, device
        ),
    }
    config = fused_config(Layouts.of(input_tensors(inputs)), device)
    if config is not None:
        both = config.fuse_dkv == "dkdv"
        launches["backward" if both else "backward (grad_key)"] = plan_backward_fused(
            inputs, gradients, output, None if both else row_stats,
            (total, total if both else None), scale, False, device, config,
        )[0]  # fmt: skip
    for launch in plan_backward_key_value(
        inputs, gradients, row_stats, (total, total, None), scale, device
    ):
        written = [name for name in KEY_GRADIENTS if launch.arguments.get(name) is not None]
        name = "backward_key_value" if written else "reduce_splits"
        if name in launches:
            name += f" ({written[0]})"
        launches[name] = launch
    return launches
