"""sefi_fast: personalise diffusion models from one image (SeFi-IDE), fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sefi_fast.utils.lazy import lazy_names

__version__ = "0.1.0"

_HOME = {
    "fused_cross_attention": "sefi_fast.ops",
    "CrossAttentionOutput": "sefi_fast.ops",
    "available_backends": "sefi_fast.ops",
    "SeFiAttnProcessor": "sefi_fast.attention.processor",
    "Subject": "sefi_fast.subject",
    "export_embedding": "sefi_fast.subject",
    "import_embedding": "sefi_fast.subject",
    "encode": "sefi_fast.prompts",
    "attach": "sefi_fast.pipelines",
    "detach": "sefi_fast.pipelines",
    "keep_freed_memory": "sefi_fast.utils.malloc",
    "regions": "sefi_fast.pipelines",
    "swap": "sefi_fast.pipelines",
    "trace": "sefi_fast.pipelines",
    "load_pipeline": "sefi_fast.pipelines",
    "generate": "sefi_fast.pipelines",
    "train": "sefi_fast.training",
    "train_many": "sefi_fast.training",
    "TrainConfig": "sefi_fast.training",
    "bundled_model_path": "sefi_fast.tiny_world",
    "bundled_subject_image": "sefi_fast.tiny_world",
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

# An installed wheel carries the Triton kernels as sefi_fast/kernels. In a source checkout they
# lie beside the package, so the checkout's root joins the places where submodules are looked for.
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


__getattr__ = lazy_names(__name__, _HOME, _MODULES)


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
