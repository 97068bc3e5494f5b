"""Score images with CLIP, DINO, a face model or the judge of the tiny world."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sefi_fast.errors import ModelError, PromptError, first_line
from sefi_fast.tiny_world.captions import CLASS_WORD, PATTERN_NOUNS
from sefi_fast.tiny_world.drawing import ACCESSORIES, POSITIONS, SCENES, Identity, identities
from sefi_fast.tiny_world.judge import ATTRIBUTES, IDENTITY_ATTRIBUTES, Judge, Judgement
from sefi_fast.utils.files import expanded


@dataclass(frozen=True)
class AskedAttributes:
    """The attributes that a prompt asks for.

    Attributes:
        wanted: attribute of the judge → the value asked for.
        change: attributes of the identity that the prompt overrides, with their values.
    """

    wanted: dict[str, str] = field(hash=False)
    change: dict[str, str] = field(hash=False, default_factory=dict)


@dataclass(frozen=True)
class ImageScore:
    """What the judge says of one picture drawn for a prompt.

    Attributes:
        prompt: 1 if every attribute that the prompt asks for is there, else 0.
        share: share of those attributes that are there.
        id: mean probability of the identity's values, over the identity attributes that the prompt
            leaves alone, 0..1.
        rank: share of all other identities for which that mean is lower, ties counted half; 0.5
            for a picture that shows no identity in particular.
        id_p: ID counted only as far as the prompt is obeyed: ``id · prompt``. The authors name
            such a score and give no formula; this is our reading.
        leak: 1 if the scene is the training picture's, though another was asked for, else 0.
    """

    prompt: float
    share: float
    id: float
    rank: float
    id_p: float
    leak: float

    def as_dict(self) -> dict[str, float]:
        """All scores by name."""
        return asdict(self)


SCORES = tuple(ImageScore.__dataclass_fields__)


def score_image(
    judgement: Judgement, prompt: AskedAttributes, identity: Identity, reference_scene: str
) -> ImageScore:
    """Score a picture that was drawn for a prompt with this identity as its subject.

    Args:
        judgement: what the judge says of the picture.
        prompt: what was asked for.
        identity: the subject's.
        reference_scene: the scene of the picture that the subject was learnt from.
    """
    labels = judgement.labels
    hits = [labels[name] == value for name, value in prompt.wanted.items()]
    kept = [name for name in IDENTITY_ATTRIBUTES if name not in prompt.change]
    own, others = _likeness(judgement, identity, tuple(kept))
    rank = float(np.mean((others < own) + 0.5 * (others == own)))
    obeyed = float(all(hits))
    leaks = labels["scene"] == reference_scene and prompt.wanted.get("scene") != reference_scene
    return ImageScore(
        prompt=obeyed,
        share=sum(hits) / len(hits),
        id=own,
        rank=rank,
        id_p=own * obeyed,
        leak=float(leaks),
    )


def _likeness(
    judgement: Judgement, identity: Identity, names: tuple[str, ...]
) -> tuple[float, np.ndarray]:
    """Mean probability of an identity's values, and of those of every other identity."""
    table = _table(names)
    own = np.array([_place(identity, name) for name in names])
    chances = [np.array(list(judgement.probabilities[name].values())) for name in names]
    likeness = np.mean(
        [chance[column] for chance, column in zip(chances, table.T, strict=True)], axis=0
    )
    mine = float(np.mean([chance[place] for chance, place in zip(chances, own, strict=True)]))
    # Identities that differ in nothing but the changed attribute look the same here.
    return mine, likeness[(table != own).any(axis=1)]


@cache
def _table(names: tuple[str, ...]) -> np.ndarray:
    """Place of each identity's value in each attribute, int64 [identities, attributes]."""
    return np.array([[_place(one, name) for name in names] for one in identities()])


def _place(identity: Identity, name: str) -> int:
    return ATTRIBUTES[name].index(identity.value(name))


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
        raise ModelError(
            f"{what} cannot be loaded from {where!r} ({first_line(error)}): give the "
            "hub id or the folder of such a model with safetensors weights"
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


_PATTERNS = {noun: pattern for pattern, noun in PATTERN_NOUNS.items()}
_PICTURES = ("photo", "picture", "image", "drawing")
_NOUNS: dict[str, tuple[str, ...]] = {
    CLASS_WORD: ("colour", "shape", "pattern"),
    "ears": ("ears",),
    **dict.fromkeys(_PATTERNS, ("second_colour",)),
    **dict.fromkeys(_PICTURES, ("style",)),
    **dict.fromkeys((*ACCESSORIES, *SCENES, "background"), ()),
}
"""Attributes that words before a noun ask for; of accessories and scenes the judge tells none."""
_ASK_NOTHING = {
    *("a", "an", "the", "my", "this", "that", "one", "of", "in", "on", "at", "with", "and"),
    *("next", "to", "wearing", "holding", "background", "ears"),
    *_PICTURES,
    CLASS_WORD,
}


class TinyScorer:
    """The judge as a scorer of subjects that were learnt from one picture."""

    def __init__(self) -> None:
        self._judge = Judge.load()

    def identity(self, picture: Image.Image) -> tuple[Identity, str]:
        """Whom a picture shows, and the scene."""
        labels = self._judge([picture])[0].labels
        colour, second, pattern = (labels[n] for n in ("colour", "second_colour", "pattern"))
        # They are judged apart, but an identity has a pattern and its colour, or neither.
        if pattern == "plain" or second in ("none", colour):
            return Identity(colour, None, "plain", labels["ears"], labels["shape"]), labels["scene"]
        return Identity(colour, second, pattern, labels["ears"], labels["shape"]), labels["scene"]

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], reference: Image.Image
    ) -> list[ImageScore]:
        """Score pictures, each drawn for its own prompt, against the subject of the reference.

        Raises:
            PromptError: as `asked_by`.
        """
        identity, scene = self.identity(reference)
        return [
            score_image(judgement, asked_by(prompt), identity, scene)
            for judgement, prompt in zip(self._judge(images), prompts, strict=True)
        ]


def asked_by(prompt: str) -> AskedAttributes:
    """What a prompt asks for, in the judge's terms.

    Args:
        prompt: the sentence, with `CLASS_WORD` where the subject stands.

    Raises:
        PromptError: a word of it asks for something that the judge does not tell, so that every
            picture would count as obedient; or it leaves nothing of the subject's identity.
    """
    wanted = wanted_by(prompt)
    change = {name: value for name, value in wanted.items() if name in IDENTITY_ATTRIBUTES}
    if len(change) == len(IDENTITY_ATTRIBUTES):
        raise PromptError(
            f"the prompt {prompt!r} asks for another {', '.join(change)}: nothing of the subject "
            "is left to be recognised by; leave one of them out"
        )
    return AskedAttributes(wanted, change)


def wanted_by(prompt: str) -> dict[str, str]:
    """Attribute of the judge → the value that the words of a prompt ask for.

    Raises:
        PromptError: as `asked_by`.
    """
    words = re.findall(r"\w+", prompt.lower())
    wanted = {"creature": "yes"}
    untold = []
    for place, word in enumerate(words):
        asked = _asks_for(word, next((noun for noun in words[place + 1 :] if noun in _NOUNS), ""))
        for name, value in asked.items():
            # Two scenes, or two colours of one thing: the judge tells one.
            if wanted.setdefault(name, value) != value:
                untold.append(word)
        if not asked and word not in _ASK_NOTHING:
            untold.append(word)
    if untold:
        raise PromptError(
            f"the bundled model's judge cannot tell whether a picture obeys {_quoted(untold)} in "
            f"the prompt {prompt!r}. It tells one scene ({', '.join(SCENES)}), one position "
            f"({', '.join(POSITIONS)}), the accessories {', '.join(ACCESSORIES)}, and of the "
            "creature colour, shape, ears, stripes and spots: leave other words out"
        )
    return wanted


def _asks_for(word: str, noun: str) -> dict[str, str]:
    """What a word asks for that stands before this noun; nothing if that cannot be told."""
    if word in ACCESSORIES:
        return {word: "yes"}
    if word in _PATTERNS:
        return {"pattern": _PATTERNS[word]}
    for name in ("scene", "position", *_NOUNS.get(noun, ())):
        if word in ATTRIBUTES[name]:
            return {name: word}
    return {}


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(words)))
