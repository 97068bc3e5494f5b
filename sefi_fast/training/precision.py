"""Which number format a run computes in, on which device."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(wanted: str | None, current: torch.device | None = None) -> torch.device:
    """The device of a run: the one asked for, the pipeline's own, or CUDA where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if wanted is None:
        chosen = current or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return _checked(chosen)
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"device {wanted!r} cannot be used here ({reason}); give 'cpu' or None"
        ) from error
    return _checked(device)


def _checked(device: torch.device) -> torch.device:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"training runs on the CPU and on CUDA, not on {str(device)!r}")
    return device


def choose_dtype(precision: str, device: torch.device, model_dtype: torch.dtype) -> torch.dtype:
    """The compute dtype. "auto": float32 on a CPU; on CUDA a half-precision model's own, else
    bfloat16 where the device has it and float16 where it lacks it.

    On a CPU with bfloat16 matrix units "bf16" was measured to gain nothing on the bundled model and
    on U-Nets up to 320 channels, and 1.6 times the speed at 640: worth asking for on large models,
    no default, since the numbers would change from one processor to the next.

    Raises:
        ValueError: float16 was asked for on a CPU, which has no gradient scaler for it.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision 'fp16' works on CUDA only; on a CPU use 'fp32' or 'bf16'")
    if precision != "auto":
        return _DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    if model_dtype in (torch.float16, torch.bfloat16):
        return model_dtype
    with torch.cuda.device(device):
        # Emulated, as before compute capability 8.0, it is slower than float32.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Autocast to `dtype`; off for float32."""
    enabled = dtype != torch.float32
    # Frozen weights are never cached by autocast, so its cache would only hold memory.
    cast_to = dtype if enabled else torch.bfloat16
    return torch.autocast(device.type, dtype=cast_to, enabled=enabled, cache_enabled=False)
