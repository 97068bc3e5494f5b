"""Cross-attention layers of a U-Net, and the processors that run them."""

from __future__ import annotations

from sefi_fast.attention.processor import LayerRecord, SeFiAttnProcessor

__all__ = ["LayerRecord", "SeFiAttnProcessor"]
