"""sefi_fast: personalise diffusion models from one image (SeFi-IDE), fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sefi_fast.utils.lazy import lazy_names

__version__ = "0.1.0"

_HOMES = {
    "attention.processor": ["SeFiAttnProcessor"],
    "ops": ["CrossAttentionOutput", "available_backends", "fused_cross_attention"],
    "pipelines": ["attach", "detach", "generate", "load_pipeline", "regions", "swap", "trace"],
    "prompts": ["encode"],
    "subject": ["Subject", "export_embedding", "import_embedding"],
    "tiny_world": ["bundled_model_path", "bundled_subject_image"],
    "training": ["TrainConfig", "train", "train_many"],
    "utils.malloc": ["keep_freed_memory"],
}
_MODULES = (
    "attention",
    "errors",
    "evaluation",
    "ops",
    "pipelines",
    "prompts",
    "subject",
    "tiny_world",
    "training",
)
__all__ = [
    "CrossAttentionOutput",
    "SeFiAttnProcessor",
    "Subject",
    "TrainConfig",
    "__version__",
    "attach",
    "available_backends",
    "bundled_model_path",
    "bundled_subject_image",
    "detach",
    "encode",
    "export_embedding",
    "fused_cross_attention",
    "generate",
    "import_embedding",
    "keep_freed_memory",
    "load_pipeline",
    "regions",
    "swap",
    "trace",
    "train",
    "train_many",
]

# An installed wheel has the Triton kernels as sefi_fast/kernels. In a source checkout they are
# next to the package, so the search path of submodules includes the root of the checkout.
_root = Path(__file__).resolve().parent.parent
if not (_root / "sefi_fast" / "kernels").is_dir() and (_root / "csrc").is_dir():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from sefi_fast.attention.processor import SeFiAttnProcessor
    from sefi_fast.ops import CrossAttentionOutput, available_backends, fused_cross_attention
    from sefi_fast.pipelines import attach, detach, generate, load_pipeline, regions, swap, trace
    from sefi_fast.prompts import encode
    from sefi_fast.subject import Subject, export_embedding, import_embedding
    from sefi_fast.tiny_world import bundled_model_path, bundled_subject_image
    from sefi_fast.training import TrainConfig, train, train_many
    from sefi_fast.utils.malloc import keep_freed_memory

__getattr__ = lazy_names(
    __name__,
    {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names},
    _MODULES,
)


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
