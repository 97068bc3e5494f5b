"""Largest counts of a subject, alike in training, in Python and in files."""

from __future__ import annotations

MOST_STAGES = 100
"""More than a sampler has steps; a prompt of SDXL with so many takes 126 MB in float32."""
MOST_VECTORS = 75
"""Tokens of a CLIP prompt between its start and its end."""
MOST_TEXT_ENCODERS = 4
