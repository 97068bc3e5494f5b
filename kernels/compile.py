"""Ahead-of-time compile of launches, without a GPU: registers, spills, matrix units, loads."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sefi_fast.ops.types import AttentionInputs, OutputGrads

from .configs import KernelConfig
from .launch import Device, Launch
from .plan import (
    KEY_GRADIENTS,
    Layouts,
    empty_row_stats,
    fused_config,
    input_tensors,
    plan_backward,
    plan_backward_fused,
    plan_backward_key_value,
    plan_backward_query,
    plan_forward,
)
from .ptxas import fixed_ptxas

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
    """What the compiler made of one launch.

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
    """Types, constants and promises of the arguments, as a launch of the same tensors has them."""
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

    Needs the compiled mode of Triton: RuntimeError when TRITON_INTERPRET=1 was set at import.
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


class _Example(NamedTuple):
    """A call on tensors without memory, keys of one stream and the reference among them."""

    inputs: AttentionInputs
    gradients: OutputGrads
    attn_probs: Tensor | None
    scale: float
    device: Device

    @classmethod
    def of(
        cls, capability: int, dtype: torch.dtype, head_dim: int, rows: int, batch: int, heads: int,
        keys: int, reference: bool, weights: bool, tokens: int,
    ) -> _Example:  # fmt: skip
        def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        query, key, value = (
            empty(batch, length, heads, head_dim, of=dtype).transpose(1, 2)
            for length in (rows, keys, keys)
        )
        inputs = AttentionInputs(
            query,
            key,
            value,
            key if reference else None,
            empty(1, keys) if weights else None,
            None,
            empty(1, tokens, of=torch.int64) if tokens else None,
        )
        attn_probs = empty(batch, heads, tokens, rows) if tokens else None
        gradients = OutputGrads(query, empty(batch) if reference else None, attn_probs)
        multiprocessors = MULTIPROCESSORS.get(capability, 132)
        return cls(
            inputs,
            gradients,
            attn_probs,
            head_dim**-0.5,
            Device(capability, multiprocessors, False),
        )

    def rows_like(self, like: Tensor) -> Tensor:
        """The [B, rows, H, D] buffer of a result."""
        return torch.empty_like(like.transpose(1, 2))


def call_launches(
    capability: int, dtype: torch.dtype, head_dim: int, rows: int, batch: int, heads: int,
    keys: int = 77,
) -> list[Launch]:  # fmt: skip
    """The launches of one training call with the subject loss, in order, without memory."""
    call = _Example.of(
        capability, dtype, head_dim, rows, batch, heads, keys, reference=True, weights=False,
        tokens=0,
    )  # fmt: skip
    inputs, gradients, _, scale, device = call
    query, key, value = map(call.rows_like, (inputs.query, inputs.key, inputs.value))
    forward, _ = plan_forward(inputs, query, None, scale, device)
    totals = (query, key, value, None)
    return [forward, *plan_backward(inputs, gradients, totals, scale, False, device)]


def example_launches(
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    rows: int,
    *,
    batch: int = 2,
    heads: int = 8,
    keys: int = 77,
    reference: bool = True,
    weights: bool = False,
    tokens: int = 0,
    reference_grad: bool = False,
    configs: Mapping[str, KernelConfig] | None = None,
) -> dict[str, Launch]:
    """The launches of one call and its backward, planned on tensors without memory.

    With reference, the subject loss and its gradient take part; with tokens, so many columns of the
    maps; configs, by kernel, stand in for the table's. Keys of the result are the kernels' names;
    where each gradient has a launch of its own, the second is "backward_key_value (grad_value)".
    "backward", or "backward (grad_key)", is the kernel of the queries where it sums up both or
    dK alone.
    """
    configs = configs or {}
    call = _Example.of(
        capability, dtype, head_dim, rows, batch, heads, keys, reference, weights, tokens
    )
    inputs, gradients, attn_probs, scale, device = call
    query, key = call.rows_like(inputs.query), call.rows_like(inputs.key)
    forward, _ = plan_forward(inputs, query, attn_probs, scale, device, configs.get("forward"))
    row_stats = empty_row_stats(inputs.query)
    backward_query = plan_backward_query(
        inputs, gradients, query, row_stats, scale, reference_grad, device,
        configs.get("backward_query"),
    )  # fmt: skip
    wanted = (key, key, key if reference_grad else None)
    keys_launches = plan_backward_key_value(
        inputs, gradients, row_stats, wanted, scale, device, configs.get("backward_key_value")
    )
    launches = {"forward": forward, "backward_query": backward_query}
    config = configs.get("backward", fused_config(Layouts.of(input_tensors(inputs)), device))
    if config is not None:
        totals = (key, key if config.fuse_dkv == "dkdv" else None)
        name = "backward" if config.fuse_dkv == "dkdv" else "backward (grad_key)"
        launches[name] = plan_backward_fused(
            inputs, gradients, query, None if config.fuse_dkv == "dkdv" else row_stats, totals,
            scale, reference_grad, device, config,
        )[0]  # fmt: skip
    for launch in keys_launches:
        written = [name for name in KEY_GRADIENTS if launch.arguments.get(name) is not None]
        name = "backward_key_value" if written else "reduce_splits"
        if name in launches:
            name += f" ({written[0]})"
        launches[name] = launch
    return launches
