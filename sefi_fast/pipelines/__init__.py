"""Use subjects in diffusers pipelines: load, attach, detach, generate, swap, trace, regions."""

from __future__ import annotations

from sefi_fast.pipelines.attachment import attach, detach
from sefi_fast.pipelines.generation import generate, swap
from sefi_fast.pipelines.loading import load_pipeline
from sefi_fast.pipelines.region_prompts import regions
from sefi_fast.pipelines.tracing import Trace, trace

__all__ = ["Trace", "attach", "detach", "generate", "load_pipeline", "regions", "swap", "trace"]
