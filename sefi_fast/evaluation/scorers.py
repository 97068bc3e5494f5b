"""Score images with CLIP, DINO or a face model."""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sefi_fast.errors import ModelError, first_line
from sefi_fast.utils.files import expanded

_BATCH = 16


class _EmbeddingScorer(ABC):
    """Cosine similarity of a transformers model's image embeddings."""

    def __init__(self, kind: Any, source: str | os.PathLike[str], name: str, device: str) -> None:
        from transformers import AutoImageProcessor

        self._device = device
        # Pickles of others are never read.
        model = _load(kind, source, name, use_safetensors=True)
        self._model = model.to(device).eval()
        self._processor = _load(AutoImageProcessor, source, f"{name}'s image processor")

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of prepared images."""

    @torch.inference_mode()
    def image(self, images: Sequence[Image.Image], reference: Image.Image) -> list[float]:
        """Return the similarity of each image to the reference image, -1..1."""
        return _cosines(self._embed(images), self._embed([reference]))

    def _embed(self, images: Sequence[Image.Image]) -> Tensor:
        parts = []
        for start in range(0, len(images), _BATCH):
            batch = [image.convert("RGB") for image in images[start : start + _BATCH]]
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]
            parts.append(self._features(pixels.to(self._device)))
        return torch.cat(parts)


class ClipScorer(_EmbeddingScorer):
    """Cosine similarities in CLIP's space: image to text, and image to image.

    Args:
        source: folder or hub id, such as "openai/clip-vit-large-patch14".
        device: device of the model.

    Raises:
        ModelError: the model does not exist, or is not a CLIP model in safetensors.
    """

    def __init__(self, source: str | os.PathLike[str], device: str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel

        super().__init__(CLIPModel, source, "CLIP", device)
        self._tokenizer = _load(AutoTokenizer, source, "CLIP's tokenizer")

    @torch.inference_mode()
    def text(self, images: Sequence[Image.Image], text: str) -> list[float]:
        """Return the similarity of each image to a text, -1..1."""
        inputs = self._tokenizer([text], truncation=True, return_tensors="pt")
        ids = {name: inputs[name].to(self._device) for name in ("input_ids", "attention_mask")}
        return _cosines(self._embed(images), _pooled(self._model.get_text_features(**ids)))

    def _features(self, pixels: Tensor) -> Tensor:
        return _pooled(self._model.get_image_features(pixel_values=pixels))


class DinoScorer(_EmbeddingScorer):
    """Cosine similarity of images by the class token of DINO or DINOv2.

    Args:
        source: folder or hub id, such as "facebook/dinov2-base" or "facebook/dino-vits16".
        device: device of the model.

    Raises:
        ModelError: the model does not exist, or is not a vision transformer in safetensors.
    """

    def __init__(self, source: str | os.PathLike[str], device: str = "cpu") -> None:
        from transformers import AutoModel

        super().__init__(AutoModel, source, "DINO", device)

    def _features(self, pixels: Tensor) -> Tensor:
        # DINO's checkpoints have an untrained pooler.
        features: Tensor = self._model(pixel_values=pixels).last_hidden_state[:, 0]
        return features


class FaceScorer:
    """Cosine similarity of faces by insightface, whose models are ONNX files.

    Args:
        source: name of an insightface model pack, such as "buffalo_l", or its folder.

    Raises:
        ModelError: insightface cannot be imported, or has no such models.
    """

    def __init__(self, source: str | os.PathLike[str] = "buffalo_l") -> None:
        try:
            app = importlib.import_module("insightface.app")
        except ImportError as error:
            raise ModelError(
                f"insightface, which face scores need, cannot be imported ({error}). Install "
                "insightface and onnxruntime, or leave the face score out."
            ) from error
        pack = {"name": expanded(source)}
        if os.path.isdir(pack["name"]):
            # insightface looks for models/<name> in its root.
            parent, name = os.path.split(os.path.abspath(pack["name"]))
            if os.path.basename(parent) != "models":
                raise ModelError(
                    f"{pack['name']} is not in a folder called 'models', where insightface looks. "
                    "Give …/models/<name of the pack>."
                )
            pack = {"name": name, "root": os.path.dirname(parent)}
        self._app = app.FaceAnalysis(**pack)
        self._app.prepare(ctx_id=0 if torch.cuda.is_available() else -1)

    def image(self, images: Sequence[Image.Image], reference: Image.Image) -> list[float]:
        """Return the similarity of each image's largest face to that of the reference, -1..1.

        An image without a face does not show the person and scores 0.

        Raises:
            ModelError: the reference shows no face.
        """
        wanted = self._embed(reference)
        if wanted is None:
            raise ModelError(
                "insightface finds no face in the reference image. Give an image with a face, or "
                "leave the face score out."
            )
        found = (self._embed(image) for image in images)
        return [0.0 if face is None else float(face @ wanted) for face in found]

    def _embed(self, image: Image.Image) -> np.ndarray | None:
        # insightface expects OpenCV's order of channels, blue first.
        faces = self._app.get(np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1]))
        if not faces:
            return None

        def area(face: Any) -> float:
            left, top, right, bottom = face.bbox
            return float((right - left) * (bottom - top))

        embedding: np.ndarray = max(faces, key=area).normed_embedding
        return embedding


def _load(kind: Any, source: str | os.PathLike[str], name: str, **options: Any) -> Any:
    place = expanded(source)
    try:
        return kind.from_pretrained(place, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{name} cannot be loaded from {place!r} ({first_line(error)}). Give the hub id or the "
            "folder of such a model with safetensors weights."
        ) from error


def _pooled(found: Any) -> Tensor:
    """Return the projected embedding, which transformers 5 wraps in an output."""
    pooled: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return pooled


def _cosines(images: Tensor, others: Tensor) -> list[float]:
    similarity: list[float] = F.cosine_similarity(images.float(), others.float(), dim=-1).tolist()
    return similarity
