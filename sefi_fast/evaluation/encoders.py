"""Scores of pictures by other people's models: CLIP, DINO, a face recogniser; none is shipped."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sefi_fast.errors import ModelError
from sefi_fast.utils.files import expanded

_BATCH = 16


class ClipScorer:
    """Cosine similarities in CLIP's space: picture to text, and picture to picture.

    Args:
        source: folder or hub id, such as "openai/clip-vit-large-patch14".
        device: where it computes.

    Raises:
        ModelError: there is no such model, or it is no CLIP in safetensors.
    """

    def __init__(self, source: str | os.PathLike[str], device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self._device = device
        self._model = _model(CLIPModel, source, "CLIP").to(device)
        self._tokenizer = _loaded(AutoTokenizer, source, "CLIP's tokenizer")
        self._processor = _loaded(AutoImageProcessor, source, "CLIP's image processor")

    @torch.inference_mode()
    def text(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """Similarity of each picture to its own text, -1..1."""
        inputs = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        ids = {name: inputs[name].to(self._device) for name in ("input_ids", "attention_mask")}
        embedded = _pooled(self._model.get_text_features(**ids))
        return _cosines(self._embed(images), embedded)

    @torch.inference_mode()
    def image(self, images: Sequence[Image.Image], reference: Image.Image) -> list[float]:
        """Similarity of each picture to the reference picture, -1..1."""
        return _cosines(self._embed(images), self._embed([reference]))

    def _embed(self, images: Sequence[Image.Image]) -> Tensor:
        batches = _pixels(self._processor, images, self._device)
        found = [_pooled(self._model.get_image_features(pixel_values=batch)) for batch in batches]
        return torch.cat(found)


class DinoScorer:
    """Cosine similarity of pictures by the class token of DINO or DINOv2.

    Args:
        source: folder or hub id, such as "facebook/dinov2-base" or "facebook/dino-vits16".
        device: where it computes.

    Raises:
        ModelError: there is no such model, or it is no vision transformer in safetensors.
    """

    def __init__(self, source: str | os.PathLike[str], device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        self._device = device
        self._model = _model(AutoModel, source, "DINO").to(device)
        self._processor = _loaded(AutoImageProcessor, source, "DINO's image processor")

    @torch.inference_mode()
    def image(self, images: Sequence[Image.Image], reference: Image.Image) -> list[float]:
        """Similarity of each picture to the reference picture, -1..1."""
        return _cosines(self._embed(images), self._embed([reference]))

    def _embed(self, images: Sequence[Image.Image]) -> Tensor:
        # Not the pooler: in DINO's checkpoints that layer was never trained.
        batches = _pixels(self._processor, images, self._device)
        return torch.cat([self._model(pixel_values=b).last_hidden_state[:, 0] for b in batches])


class FaceScorer:
    """Cosine similarity of faces by insightface, whose models are ONNX files.

    Args:
        source: name of an insightface model pack, such as "buffalo_l", or the folder of one.

    Raises:
        ModelError: insightface cannot be imported, or has no such models.
    """

    def __init__(self, source: str | os.PathLike[str] = "buffalo_l") -> None:
        try:
            app = importlib.import_module("insightface.app")
        except ImportError as error:
            raise ModelError(
                f"face scores need insightface, which cannot be imported ({error}): install "
                "insightface and onnxruntime, or leave the face score out"
            ) from error
        where = expanded(source)
        # insightface looks for models/<name> in its root.
        folder = os.path.abspath(where) if os.path.isdir(where) else None
        place: dict[str, Any] = {"name": where}
        if folder is not None:
            parent, name = os.path.split(folder)
            if os.path.basename(parent) != "models":
                raise ModelError(
                    f"{where} does not lie in a folder called 'models', where insightface looks: "
                    "give …/models/<name of the pack>"
                )
            place = {"name": name, "root": os.path.dirname(parent)}
        self._app = app.FaceAnalysis(**place)
        self._app.prepare(ctx_id=0 if torch.cuda.is_available() else -1)

    def image(self, images: Sequence[Image.Image], reference: Image.Image) -> list[float]:
        """Similarity of the largest face of each picture to that of the reference, -1..1.

        A picture without a face scores 0: it does not show the person.

        Raises:
            ModelError: the reference shows no face.
        """
        wanted = self._embed(reference)
        if wanted is None:
            raise ModelError(
                "the reference picture shows no face that insightface finds: give one that does, "
                "or leave the face score out"
            )
        found = (self._embed(image) for image in images)
        return [0.0 if face is None else float(face @ wanted) for face in found]

    def _embed(self, image: Image.Image) -> np.ndarray | None:
        # insightface takes what OpenCV reads: blue first.
        faces = self._app.get(np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1]))
        if not faces:
            return None

        def area(face: Any) -> float:
            left, top, right, bottom = face.bbox
            return float((right - left) * (bottom - top))

        embedding: np.ndarray = max(faces, key=area).normed_embedding
        return embedding


def _model(kind: Any, source: str | os.PathLike[str], what: str) -> Any:
    # Pickles of others are never read.
    return _loaded(kind, source, what, use_safetensors=True).eval()


def _loaded(kind: Any, source: str | os.PathLike[str], what: str, **options: Any) -> Any:
    where = expanded(source)
    try:
        return kind.from_pretrained(where, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{what} cannot be loaded from {where!r} ({first}): give the hub id or the folder of "
            "such a model with safetensors weights"
        ) from error


def _pixels(processor: Any, images: Sequence[Image.Image], device: str) -> list[Tensor]:
    """Pictures as the model wants them, in batches."""
    batches = []
    for start in range(0, len(images), _BATCH):
        part = [image.convert("RGB") for image in images[start : start + _BATCH]]
        batches.append(processor(images=part, return_tensors="pt")["pixel_values"].to(device))
    return batches


def _pooled(found: Any) -> Tensor:
    """transformers 4 gives the projected embedding, 5 an output that holds it."""
    pooled: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return pooled


def _cosines(images: Tensor, others: Tensor) -> list[float]:
    similarity: list[float] = F.cosine_similarity(images.float(), others.float(), dim=-1).tolist()
    return similarity
