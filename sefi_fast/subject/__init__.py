"""A trained subject, its file, and the module that computes its tokens during training."""

from __future__ import annotations

from sefi_fast.subject.subject import Subject
from sefi_fast.subject.textual_inversion import export_embedding, import_embedding
from sefi_fast.subject.tokens import SubjectTokens

__all__ = ["Subject", "SubjectTokens", "export_embedding", "import_embedding"]
