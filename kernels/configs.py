"""Launch configurations by kernel, compute capability, precision and head dimension."""

from __future__ import annotations

from typing import NamedTuple

import torch


class KernelConfig(NamedTuple):
    """Launch configuration of one kernel.

    Attributes:
        block_m: queries of a block.
        num_warps: warps of a program.
        num_stages: stages of Triton's software pipeline.
        kv_in_loop: load the keys and values again for each block of queries. Where the matrix unit
            takes operands from registers (8.x), keys held over the loop would fill them all. With
            two stages a block's loads arrive in shared memory during the block before it: no waits
            and hardly a barrier, at the price of that memory.
        split_dk_dv: only "backward_key_value": one launch a gradient, where the accumulators of two
            do not fit into the registers together.
        block_n: only "backward_key_value": keys of a program, a power of two from 16 on, where the
            accumulators of all keys do not fit; 0 is all keys.
        max_registers: limit of registers a thread; 0 leaves it to the compiler.
        ctas_per_sm: programs that fit on a multiprocessor at once, by registers and shared memory.
        fuse_dkv: only "backward": the gradients that `_attn_bwd_dq` sums along with dQ, a key of
            FUSED_GRADS.
        prefetch: only "backward": load the next block's queries before this block's products.
        load_do_late: only the kernels of dQ: load a block's output gradients after the scores, so
            that their tile can reuse the queries' shared memory if dK is not summed. Always on with
            kv_in_loop.
    """

    block_m: int
    num_warps: int
    num_stages: int
    kv_in_loop: bool = False
    split_dk_dv: bool = False
    block_n: int = 0
    max_registers: int = 0
    ctas_per_sm: int = 2
    fuse_dkv: str = "none"
    prefetch: bool = False
    load_do_late: bool = False

    @property
    def pipelined(self) -> bool:
        """Whether a block's loads, keys included, are issued a block ahead."""
        return self.kv_in_loop and self.num_stages > 1

    @property
    def options(self) -> dict[str, int]:
        """Options of Triton's compiler."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**options, "maxnreg": self.max_registers} if self.max_registers else options


FUSED_GRADS = {"none": 0, "dk": 1, "dkdv": 2}
"""Number of gradients of keys that `_attn_bwd_dq` sums, by `KernelConfig.fuse_dkv`."""

WIDTHS = (48, 64, 80, 160, 256)
"""Upper ends of the buckets of head dimensions, main and tail tile together. Some devices have
more."""

REDUCE_BLOCKS = {1: 128, 4: 512}
"""Elements of a program of `_reduce_splits`, by its warps: up to four a thread, so that a thread
has all partial sums of its elements and shares none."""


# Lines as benchmarks/tune_kernels.py prints them. On 9.0 those of "forward", and of "backward" up
# to 64, were chosen on an H200 (docs/performance.md). All others are not measured: they were
# chosen by spills, then by an estimate from the machine code of 77 keys with the loss.
# benchmarks/kernel_report.py shows registers; tests/kernels/test_compile.py checks spills and
# ctas_per_sm.
TABLE: dict[tuple[str, int, str], dict[int, KernelConfig]] = {
    ("forward", 90, "half"): {
        48: KernelConfig(64, 4, 1, max_registers=128, ctas_per_sm=4),
        64: KernelConfig(64, 4, 1, max_registers=128, ctas_per_sm=4),
        80: KernelConfig(64, 4, 1, ctas_per_sm=4),
        160: KernelConfig(64, 4, 1),
        256: KernelConfig(64, 8, 1, ctas_per_sm=1),
    },
    ("backward_query", 90, "half"): {
        48: KernelConfig(64, 4, 1, max_registers=128, ctas_per_sm=4),
        64: KernelConfig(64, 4, 1, max_registers=128, ctas_per_sm=4),
        80: KernelConfig(64, 4, 1, max_registers=168, ctas_per_sm=3),
        160: KernelConfig(64, 4, 1, load_do_late=True),
        256: KernelConfig(64, 8, 1, ctas_per_sm=1),
    },
    # `_attn_bwd_dq` with dK and dV, or at 80 with dK alone.
    ("backward", 90, "half"): {
        48: KernelConfig(64, 4, 1, max_registers=255, fuse_dkv="dkdv", prefetch=True),
        64: KernelConfig(64, 4, 1, max_registers=255, fuse_dkv="dkdv", prefetch=True),
        80: KernelConfig(64, 4, 1, max_registers=255, fuse_dkv="dk", load_do_late=True),
    },
    ("backward_key_value", 90, "half"): {
        48: KernelConfig(64, 4, 1),
        64: KernelConfig(64, 4, 1),
        80: KernelConfig(64, 4, 1, block_n=64),
        160: KernelConfig(64, 4, 1, block_n=64),
        256: KernelConfig(64, 8, 1, split_dk_dv=True, ctas_per_sm=1),
    },
    ("forward", 100, "half"): {
        48: KernelConfig(64, 4, 1),
        64: KernelConfig(64, 4, 1, max_registers=168, ctas_per_sm=3),
        80: KernelConfig(64, 4, 1),
        160: KernelConfig(64, 4, 1, max_registers=255),
        256: KernelConfig(64, 8, 1, ctas_per_sm=1),
    },
    ("backward_query", 100, "half"): {
        48: KernelConfig(64, 4, 1, ctas_per_sm=3),
        64: KernelConfig(64, 4, 1, kv_in_loop=True, ctas_per_sm=3),
        80: KernelConfig(64, 4, 1, kv_in_loop=True),
        160: KernelConfig(64, 4, 1, kv_in_loop=True),
        256: KernelConfig(64, 8, 1, ctas_per_sm=1),
    },
    ("forward", 80, "half"): {
        48: KernelConfig(64, 4, 2, kv_in_loop=True),
        64: KernelConfig(64, 4, 2, kv_in_loop=True),
        80: KernelConfig(64, 4, 2, kv_in_loop=True),
        160: KernelConfig(16, 4, 1),
        256: KernelConfig(16, 4, 1),
    },
    ("backward_query", 80, "half"): {
        48: KernelConfig(64, 4, 2, kv_in_loop=True),
        64: KernelConfig(64, 4, 2, kv_in_loop=True),
        80: KernelConfig(64, 4, 2, kv_in_loop=True),
        128: KernelConfig(16, 4, 2, kv_in_loop=True),
        160: KernelConfig(64, 4, 2, kv_in_loop=True, ctas_per_sm=1),
        256: KernelConfig(16, 4, 1, kv_in_loop=True),
    },
    ("backward_key_value", 80, "half"): {
        48: KernelConfig(64, 4, 1, block_n=32),
        64: KernelConfig(64, 4, 1, block_n=32),
        80: KernelConfig(64, 4, 2, kv_in_loop=True, block_n=64),
        160: KernelConfig(64, 4, 2, kv_in_loop=True, block_n=16),
        256: KernelConfig(16, 4, 1, kv_in_loop=True, split_dk_dv=True),
    },
    # A multiprocessor has 100 KiB of shared memory: pipelined tiles must be small.
    ("forward", 86, "half"): {
        48: KernelConfig(64, 4, 2, kv_in_loop=True),
        64: KernelConfig(64, 4, 2, kv_in_loop=True),
        80: KernelConfig(64, 4, 1, kv_in_loop=True),
        160: KernelConfig(16, 4, 1),
        256: KernelConfig(16, 4, 1),
    },
    ("backward_query", 86, "half"): {
        48: KernelConfig(64, 4, 2, kv_in_loop=True),
        64: KernelConfig(64, 4, 1, kv_in_loop=True),
        80: KernelConfig(64, 4, 2, kv_in_loop=True, ctas_per_sm=1),
        160: KernelConfig(16, 4, 1, kv_in_loop=True),
        256: KernelConfig(16, 4, 1, kv_in_loop=True),
    },
    ("backward_key_value", 86, "half"): {
        48: KernelConfig(64, 4, 1, block_n=32),
        64: KernelConfig(64, 4, 1, block_n=32),
        80: KernelConfig(32, 4, 1, block_n=32),
        160: KernelConfig(32, 4, 2, kv_in_loop=True, block_n=16),
        256: KernelConfig(16, 4, 1, kv_in_loop=True, split_dk_dv=True),
    },
    # Without tensor cores a thread's part of a product is long, and without a limit ptxas gives up
    # early: 32 registers at a head dimension of 160, and everything else in memory.
    ("forward", 80, "single"): {
        48: KernelConfig(16, 8, 1, ctas_per_sm=1),
        64: KernelConfig(16, 8, 1, kv_in_loop=True, ctas_per_sm=1),
        80: KernelConfig(16, 8, 1, kv_in_loop=True, ctas_per_sm=1),
        160: KernelConfig(16, 8, 1, kv_in_loop=True, max_registers=255, ctas_per_sm=1),
        256: KernelConfig(16, 8, 1, kv_in_loop=True, max_registers=255, ctas_per_sm=1),
    },
    ("backward_query", 80, "single"): {
        48: KernelConfig(16, 8, 1, ctas_per_sm=1),
        64: KernelConfig(16, 8, 1, kv_in_loop=True, ctas_per_sm=1),
        80: KernelConfig(16, 8, 1, kv_in_loop=True, ctas_per_sm=1),
        160: KernelConfig(16, 8, 1, kv_in_loop=True, max_registers=255, ctas_per_sm=1),
        256: KernelConfig(16, 8, 1, kv_in_loop=True, max_registers=255, ctas_per_sm=1),
    },
    ("backward_key_value", 80, "single"): {
        48: KernelConfig(16, 8, 1, kv_in_loop=True, ctas_per_sm=1),
        64: KernelConfig(16, 8, 1, kv_in_loop=True, ctas_per_sm=1),
        80: KernelConfig(16, 8, 1, kv_in_loop=True, ctas_per_sm=1),
        160: KernelConfig(16, 8, 1, True, True, block_n=32, max_registers=255, ctas_per_sm=1),
        256: KernelConfig(16, 4, 1, True, True, block_n=16, max_registers=255),
    },
}


def _unpipelined(kernel: str, width: int) -> KernelConfig:
    """Return the replacement of a pipelined configuration, in half precision before 9.0."""
    wide = width > 80
    if kernel == "backward_key_value":
        return KernelConfig(32, 4, 1, kv_in_loop=wide, block_n=16 if wide else 32)
    return KernelConfig(16 if wide else 64, 4, 1, kv_in_loop=True)


def choose_config(
    kernel: str,
    capability: int,
    precision: str,
    width: int,
    key_width: int,
    pipeline: bool = True,
) -> KernelConfig:
    """Return the configuration of the newest listed device that is not newer than this one.

    Args:
        kernel: "forward", "backward_query" or "backward_key_value".
        capability: major * 10 + minor.
        precision: "half" or "single".
        width: head dimension of main and tail tile together.
        key_width: keys of main and tail tile together.
        pipeline: whether Triton pipelines the call well. Probabilities prevent it by their inner
            loop; the reference key's gradient, or in "backward_key_value" a mask, take registers.
    """
    if capability // 10 == 12:
        capability = 89  # consumer Blackwell has the matrix instructions and shared memory of 8.9
    listed = [c for k, c, p in TABLE if k == kernel and p == precision and c <= capability]
    table = TABLE[kernel, max(listed, default=80), precision]
    config = table[next(limit for limit in table if width <= limit)]
    if config.pipelined and (not pipeline or (key_width > 80 and not config.block_n)):
        config = _unpipelined(kernel, width)
    if config.block_n:
        return config
    # More than 80 keys have more probabilities a query: more warps hold them, or fewer queries, but
    # no fewer than a warp group's 64.
    if key_width > 80:
        config = config._replace(num_warps=8, num_stages=1, max_registers=255, ctas_per_sm=1)
    if kernel == "backward_key_value" and key_width > (128 if precision == "half" else 80):
        return config._replace(block_n=64 if precision == "half" else 32)
    if key_width > 128:
        if capability >= 90 and precision == "half":
            # Shared memory holds three times 160 keys of a head dimension of 160.
            kv_in_loop = config.kv_in_loop or key_width * width > 160 * 160
            return config._replace(block_m=64, kv_in_loop=kv_in_loop)
        config = config._replace(block_m=max(config.block_m // 2, 16))
    return config


def choose_fused_config(
    capability: int, precision: str, width: int, key_width: int
) -> KernelConfig | None:
    """Return the configuration with which `_attn_bwd_dq` sums dK, and dV, as well.

    None where the registers do not hold the sums. Arguments are those of `choose_config`.
    """
    table = TABLE.get(("backward", capability // 10 * 10, precision), {})
    limit = next((limit for limit in table if width <= limit), None)
    if limit is None or key_width > 80:
        return None
    return table[limit]


SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
"""Shared memory that a program can have, by compute capability; 99 on the others from 8.6 on."""


def shared_bytes(precision: str, capability: int, width: int, key_main: int, key_tail: int) -> int:
    """Return the most shared memory that a program of any kernel needs, found by compiling them.

    Arguments are those of `choose_config`; key_main and key_tail are the tiles of keys. Before 9.0
    pipelined kernels need up to 88 KiB in all cases, which every device has, and up to 124 on 8.0.
    """
    keys = key_main + key_tail
    if precision == "single":
        if keys > 80:
            needed = 4 * width * (2 * keys + 16) + 16 * 1024
        else:
            needed = 4 * width * (key_main + 32 if width <= 160 else 2 * key_main + 48)
    elif capability // 10 in (9, 10):
        # Warp groups take keys, values and a block's queries from shared memory.
        needed = 4 * width * keys + (84 if keys <= 80 else 64) * 1024
    else:
        needed = 2 * width * keys + 8 * 1024
    pipelined = 124 if precision == "half" and capability < 86 else 88
    return max(needed, pipelined * 1024)


def not_supported_reason(
    dtype: torch.dtype, head_dim: int, seqlen_k: int, capability: int
) -> str | None:
    """Say why a device has too little shared memory for the kernels; None where it has enough."""
    tiles = (sum(split_tile(head_dim, 32)), *split_tile(seqlen_k, 64))
    half = shared_bytes("half", capability, *tiles)
    single = dtype == torch.float32
    needed = shared_bytes("single", capability, *tiles) if single else half
    available = SHARED_KIB.get(capability, 99)
    if needed <= 1024 * available:
        return None
    fits = ": bfloat16 fits" if half <= 1024 * available else ""
    return (
        f"{str(dtype).removeprefix('torch.')} with {seqlen_k} keys and a head dimension of "
        f"{head_dim} may need {-(-needed // 1024)} KiB of shared memory, and the device gives a "
        f"program {available} KiB{fits}"
    )


def smallest_tile(kernel: str, precision: str, capability: int) -> int:
    """Return the smallest main tile of the head dimension; arguments are those of `choose_config`.

    With warp groups a tail tile is another product to wait for, which takes longer than padding: a
    head dimension of 40 is one tile of 64. In "backward_key_value" the head dimension is also a row
    count of the matrix unit, at least 64. Float32 has no matrix unit; its tiles keep the scores of
    all kernels equal to the last bit.
    """
    if precision == "single":
        return 32
    return 64 if kernel == "backward_key_value" or capability // 10 == 9 else 32


def split_tile(size: int, smallest: int) -> tuple[int, int]:
    """Return main and tail tile, powers of two from 16 on, that cover a size; no tail is 0.

    There is a tail if both together are smaller than the next power of two and the main tile is at
    least `smallest`: 77 -> (64, 16), 40 -> (32, 16), 160 -> (128, 32), 64 -> (64, 0).
    """
    whole = 16
    while whole < size:
        whole *= 2
    main = whole // 2
    if main < smallest or whole == size:
        return whole, 0
    tail = 16
    while main + tail < size:
        tail *= 2
    return (main, tail) if main + tail < whole else (whole, 0)
