"""The table of launch configurations: block of rows, warps and stages by device and head width."""

from __future__ import annotations

from typing import NamedTuple


class KernelConfig(NamedTuple):
    """How one kernel is launched: rows of a block, warps, software-pipeline stages.

    reload: the keys are loaded again for each block of rows, each set where it is used. Where the
    matrix unit takes its operands from registers (8.x), keys held over the loop would fill them
    all. With two stages all that a block needs is on its way to shared memory while the block
    before it is worked on, and stays there until it is used: no wait, and hardly a barrier, at
    the price of that memory. registers: the most a thread, for the compiler to keep to; 0 leaves
    it to the compiler. resident: so many programs fit on a multiprocessor at once, by the registers
    and the shared memory that come of it.

    For the kernel of the queries alone: sums, how many of dK and dV it adds up as well (1 is dK),
    where the registers hold their accumulators; what is left is for the kernel of the keys.
    prefetch: the next block's rows are asked for before this block's products. late: a block's
    output gradients are asked for after the scores, and their tile may take the queries' shared
    memory, where dK is not summed up as well; with reload always.

    For the kernel of the keys alone: separate, one launch a gradient, where the accumulators of two
    do not fit into the registers together. key_tile: so many keys a program, a power of two
    from 16 on, where the accumulators of all keys do not fit; 0 is all keys. Programs of the same
    rows then read them once each, from the L2 cache but for the first.
    """

    block: int
    warps: int
    stages: int
    reload: bool = False
    separate: bool = False
    key_tile: int = 0
    registers: int = 0
    resident: int = 2
    sums: int = 0
    prefetch: bool = False
    late: bool = False

    @property
    def pipelined(self) -> bool:
        """Whether a block's loads, keys included, are asked for a block ahead."""
        return self.reload and self.stages > 1

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": self.registers} if self.registers else options


WIDTHS = (48, 64, 80, 160, 256)
"""Upper ends of the head width buckets, in columns of main and tail tile together: of all devices,
some have more."""

SUM_COLUMNS = {1: 128, 4: 512}
"""Elements a program of the kernel that adds up partial gradients, by its warps: no more than four
a thread, so that a thread has all partial sums of its elements and shares none."""


# Lines as benchmarks/tune_kernels.py prints them. Those of "forward", and of "backward" up to 64
# columns, on 9.0 were chosen on an H200 (docs/performance-gpu.md). The others were never measured:
# they were chosen by spills, then by an estimate from the machine code of 77 keys with the loss.
# benchmarks/kernel_report.py shows registers; tests/kernels/test_compile.py checks spills and what
# is resident.
TABLE: dict[tuple[str, int, str], dict[int, KernelConfig]] = {
    ("forward", 90, "half"): {
        48: KernelConfig(64, 4, 1, registers=128, resident=4),
        64: KernelConfig(64, 4, 1, registers=128, resident=4),
        80: KernelConfig(64, 4, 1, resident=4),
        160: KernelConfig(64, 4, 1),
        256: KernelConfig(64, 8, 1, resident=1),
    },
    ("backward_query", 90, "half"): {
        48: KernelConfig(64, 4, 1, registers=128, resident=4),
        64: KernelConfig(64, 4, 1, registers=128, resident=4),
        80: KernelConfig(64, 4, 1, registers=168, resident=3),
        160: KernelConfig(64, 4, 1, late=True),
        256: KernelConfig(64, 8, 1, resident=1),
    },
    # dK and dV, or at 80 dK alone, along with dQ.
    ("backward", 90, "half"): {
        48: KernelConfig(64, 4, 1, registers=255, sums=2, prefetch=True),
        64: KernelConfig(64, 4, 1, registers=255, sums=2, prefetch=True),
        80: KernelConfig(64, 4, 1, registers=255, sums=1, late=True),
    },
    ("backward_key_value", 90, "half"): {
        48: KernelConfig(64, 4, 1),
        64: KernelConfig(64, 4, 1),
        80: KernelConfig(64, 4, 1, key_tile=64),
        160: KernelConfig(64, 4, 1, key_tile=64),
        256: KernelConfig(64, 8, 1, separate=True, resident=1),
    },
    ("forward", 100, "half"): {
        48: KernelConfig(64, 4, 1),
        64: KernelConfig(64, 4, 1, registers=168, resident=3),
        80: KernelConfig(64, 4, 1),
        160: KernelConfig(64, 4, 1, registers=255),
        256: KernelConfig(64, 8, 1, resident=1),
    },
    ("backward_query", 100, "half"): {
        48: KernelConfig(64, 4, 1, resident=3),
        64: KernelConfig(64, 4, 1, reload=True, resident=3),
        80: KernelConfig(64, 4, 1, reload=True),
        160: KernelConfig(64, 4, 1, reload=True),
        256: KernelConfig(64, 8, 1, resident=1),
    },
    ("forward", 80, "half"): {
        48: KernelConfig(64, 4, 2, reload=True),
        64: KernelConfig(64, 4, 2, reload=True),
        80: KernelConfig(64, 4, 2, reload=True),
        160: KernelConfig(16, 4, 1),
        256: KernelConfig(16, 4, 1),
    },
    ("backward_query", 80, "half"): {
        48: KernelConfig(64, 4, 2, reload=True),
        64: KernelConfig(64, 4, 2, reload=True),
        80: KernelConfig(64, 4, 2, reload=True),
        128: KernelConfig(16, 4, 2, reload=True),
        160: KernelConfig(64, 4, 2, reload=True, resident=1),
        256: KernelConfig(16, 4, 1, reload=True),
    },
    ("backward_key_value", 80, "half"): {
        48: KernelConfig(64, 4, 1, key_tile=32),
        64: KernelConfig(64, 4, 1, key_tile=32),
        80: KernelConfig(64, 4, 2, reload=True, key_tile=64),
        160: KernelConfig(64, 4, 2, reload=True, key_tile=16),
        256: KernelConfig(16, 4, 1, reload=True, separate=True),
    },
    # 100 KiB of shared memory a multiprocessor: what is pipelined must be small.
    ("forward", 86, "half"): {
        48: KernelConfig(64, 4, 2, reload=True),
        64: KernelConfig(64, 4, 2, reload=True),
        80: KernelConfig(64, 4, 1, reload=True),
        160: KernelConfig(16, 4, 1),
        256: KernelConfig(16, 4, 1),
    },
    ("backward_query", 86, "half"): {
        48: KernelConfig(64, 4, 2, reload=True),
        64: KernelConfig(64, 4, 1, reload=True),
        80: KernelConfig(64, 4, 2, reload=True, resident=1),
        160: KernelConfig(16, 4, 1, reload=True),
        256: KernelConfig(16, 4, 1, reload=True),
    },
    ("backward_key_value", 86, "half"): {
        48: KernelConfig(64, 4, 1, key_tile=32),
        64: KernelConfig(64, 4, 1, key_tile=32),
        80: KernelConfig(32, 4, 1, key_tile=32),
        160: KernelConfig(32, 4, 2, reload=True, key_tile=16),
        256: KernelConfig(16, 4, 1, reload=True, separate=True),
    },
    # Without tensor cores a thread's part of a product is long, and ptxas gives up early where it
    # has no limit to keep to: 32 registers and all else in memory, at 160 columns.
    ("forward", 80, "single"): {
        48: KernelConfig(16, 8, 1, resident=1),
        64: KernelConfig(16, 8, 1, reload=True, resident=1),
        80: KernelConfig(16, 8, 1, reload=True, resident=1),
        160: KernelConfig(16, 8, 1, reload=True, registers=255, resident=1),
        256: KernelConfig(16, 8, 1, reload=True, registers=255, resident=1),
    },
    ("backward_query", 80, "single"): {
        48: KernelConfig(16, 8, 1, resident=1),
        64: KernelConfig(16, 8, 1, reload=True, resident=1),
        80: KernelConfig(16, 8, 1, reload=True, resident=1),
        160: KernelConfig(16, 8, 1, reload=True, registers=255, resident=1),
        256: KernelConfig(16, 8, 1, reload=True, registers=255, resident=1),
    },
    ("backward_key_value", 80, "single"): {
        48: KernelConfig(16, 8, 1, reload=True, resident=1),
        64: KernelConfig(16, 8, 1, reload=True, resident=1),
        80: KernelConfig(16, 8, 1, reload=True, resident=1),
        160: KernelConfig(16, 8, 1, True, True, key_tile=32, registers=255, resident=1),
        256: KernelConfig(16, 4, 1, True, True, key_tile=16, registers=255),
    },
}


def _unpipelined(kernel: str, width: int) -> KernelConfig:
    """What stands in for a configuration with a pipeline, in half precision before 9.0."""
    wide = width > 80
    if kernel == "backward_key_value":
        return KernelConfig(32, 4, 1, reload=wide, key_tile=16 if wide else 32)
    return KernelConfig(16 if wide else 64, 4, 1, reload=True)


def choose_config(
    kernel: str,
    capability: int,
    precision: str,
    width: int,
    key_width: int,
    pipeline: bool = True,
) -> KernelConfig:
    """The configuration of the newest listed device that is not newer than this one.

    kernel is "forward", "backward_query" or "backward_key_value"; capability is major · 10 + minor;
    precision "half" or "single"; width and key_width are columns of main and tail tile together.
    pipeline: whether Triton pipelines the call well: it has no maps, whose loop inside the loop
    over the rows prevents that, and nothing more to hold than usual, as the reference key's
    gradient is, or in the kernel of the keys a mask.
    """
    if capability // 10 == 12:
        capability = 89  # consumer Blackwell: matrix instructions and shared memory as on 8.9
    listed = [c for k, c, p in TABLE if k == kernel and p == precision and c <= capability]
    table = TABLE[kernel, max(listed, default=80), precision]
    config = table[next(limit for limit in table if width <= limit)]
    if config.pipelined and (not pipeline or (key_width > 80 and not config.key_tile)):
        config = _unpipelined(kernel, width)
    if config.key_tile:
        return config
    # More than 80 keys hold more probabilities a row: more warps to hold them, or fewer rows, but
    # no fewer than a warp group's 64 where there are warp groups.
    if key_width > 80:
        config = config._replace(warps=8, stages=1, registers=255, resident=1)
    if kernel == "backward_key_value" and key_width > (128 if precision == "half" else 80):
        return config._replace(key_tile=64 if precision == "half" else 32)
    if key_width > 128:
        if capability >= 90 and precision == "half":
            # 160 keys of 160 columns, three times, are what shared memory holds.
            reload = config.reload or key_width * width > 160 * 160
            return config._replace(block=64, reload=reload)
        config = config._replace(block=max(config.block // 2, 16))
    return config


def choose_sums(capability: int, precision: str, width: int, key_width: int) -> KernelConfig | None:
    """The configuration with which the kernel of the queries sums up dK, and dV, as well.

    None where the registers do not hold the sums. Arguments are those of `choose_config`.
    """
    table = TABLE.get(("backward", capability // 10 * 10, precision), {})
    limit = next((limit for limit in table if width <= limit), None)
    if limit is None or key_width > 80:
        return None
    return table[limit]


def shared_bytes(precision: str, capability: int, width: int, key_main: int, key_tail: int) -> int:
    """Shared memory that a program of any of the kernels needs, at most, as compiling them showed.

    precision, capability and width are those of `choose_config`, key_main and key_tail the tiles of
    keys. Before 9.0 pipelined kernels need up to 88 KiB whatever these are, which every device has,
    and on 8.0 up to 124.
    """
    keys = key_main + key_tail
    if precision == "single":
        if keys > 80:
            needed = 4 * width * (2 * keys + 16) + 16 * 1024
        else:
            needed = 4 * width * (key_main + 32 if width <= 160 else 2 * key_main + 48)
    elif capability // 10 in (9, 10):
        # Warp groups take keys, values and a block's rows from shared memory.
        needed = 4 * width * keys + (84 if keys <= 80 else 64) * 1024
    else:
        needed = 2 * width * keys + 8 * 1024
    pipelined = 124 if precision == "half" and capability < 86 else 88
    return max(needed, pipelined * 1024)


def smallest_tile(kernel: str, precision: str, capability: int) -> int:
    """Columns that a main tile of the head width has at least; arguments as in `choose_config`.

    For warp groups a tail tile is another product to wait for, which takes longer than columns
    without a meaning: 40 columns are one tile of 64. In the kernel of the keys the head width is
    also a row count of the matrix unit, 64 at least. Float32 has no matrix unit and keeps the
    scores of all kernels equal to the last bit.
    """
    if precision == "single":
        return 32
    return 64 if kernel == "backward_key_value" or capability // 10 == 9 else 32


def split_tile(size: int, smallest: int) -> tuple[int, int]:
    """Main and tail tile, powers of two from 16 on, that cover a size; no tail gives 0.

    A tail is used where both together are smaller than the next power of two and the main tile has
    at least `smallest` columns: 77 -> (64, 16), 40 -> (32, 16), 160 -> (128, 32), 64 -> (64, 0).
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
