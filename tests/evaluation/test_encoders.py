"""CLIP, DINO and face scores: those of the plain models, and clear errors where there are none."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, Dinov2Model

from sefi_fast.errors import ModelError
from sefi_fast.evaluation.scorers import ClipScorer, DinoScorer, FaceScorer


def pictures(count: int, side: int) -> list[Image.Image]:
    draws = np.random.default_rng(0)
    return [
        Image.fromarray(draws.integers(0, 256, (side, side, 3), dtype=np.uint8))
        for _ in range(count)
    ]


def normalised(images) -> torch.Tensor:
    arrays = np.stack([np.asarray(image) for image in images])
    return (torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def test_dino_is_the_cosine_of_the_class_tokens(dino_folder):
    images = pictures(18, 28)
    model = Dinov2Model.from_pretrained(dino_folder).eval()
    with torch.inference_mode():
        tokens = model(normalised(images)).last_hidden_state[:, 0]
    expected = torch.cosine_similarity(tokens, tokens[3:4])
    found = DinoScorer(dino_folder).image(images, images[3])
    assert found == pytest.approx(expected.tolist(), abs=1e-4)
    assert found[3] == pytest.approx(1, abs=1e-5) and max(found[:3]) < 0.9999


def test_clip_is_the_cosine_of_the_projected_embeddings(clip_folder):
    images = pictures(3, 32)
    texts = ["a red creature", "a photo of a creature in the snow", "hat"]
    scorer = ClipScorer(clip_folder)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.inference_mode():
        inputs = scorer._tokenizer(texts, padding=True, return_tensors="pt")
        out = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=normalised(images),
        )
    expected = (out.image_embeds * out.text_embeds).sum(-1)
    assert scorer.text(images, texts) == pytest.approx(expected.tolist(), abs=1e-4)
    alike = out.image_embeds @ out.image_embeds[1]
    assert scorer.image(images, images[1]) == pytest.approx(alike.tolist(), abs=1e-4)


def test_pictures_of_any_size_and_mode_are_taken(dino_folder):
    image = pictures(1, 60)[0]
    found = DinoScorer(dino_folder).image([image.convert("RGBA"), image.convert("L")], image)
    assert found[0] == pytest.approx(1, abs=1e-5) and found[1] < 1


@pytest.mark.parametrize("scorer", [ClipScorer, DinoScorer])
def test_a_folder_without_a_model_is_told(scorer, tmp_path):
    with pytest.raises(ModelError, match="safetensors weights"):
        scorer(tmp_path)


def test_pickled_weights_are_not_read(dino_folder, tmp_path):
    model = Dinov2Model.from_pretrained(dino_folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="DINO cannot be loaded"):
        DinoScorer(tmp_path)


class _Recogniser:
    """Stands in for insightface: a face is a box and its mean colour, blue first."""

    made: list[dict] = []

    def __init__(self, **place) -> None:
        self.made.append(place)

    def prepare(self, ctx_id: int) -> None:
        self.ready = ctx_id

    def get(self, pixels: np.ndarray) -> list[SimpleNamespace]:
        if pixels.max() == 0:
            return []
        colour = pixels.reshape(-1, 3).mean(0)
        large = SimpleNamespace(
            bbox=np.array([0, 0, 9, 9]), normed_embedding=colour / np.linalg.norm(colour)
        )
        small = SimpleNamespace(bbox=np.array([0, 0, 1, 1]), normed_embedding=np.eye(3)[0])
        return [small, large]


@pytest.fixture
def insightface(monkeypatch):
    package, app = ModuleType("insightface"), ModuleType("insightface.app")
    app.FaceAnalysis = _Recogniser
    monkeypatch.setitem(sys.modules, "insightface", package)
    monkeypatch.setitem(sys.modules, "insightface.app", app)
    _Recogniser.made.clear()


def solid(*colour: int) -> Image.Image:
    return Image.new("RGB", (20, 20), colour)


def test_the_largest_face_counts_and_none_is_zero(insightface):
    found = FaceScorer().image([solid(200, 0, 0), solid(0, 0, 90), solid(0, 0, 0)], solid(9, 0, 0))
    assert found == pytest.approx([1, 0, 0])
    with pytest.raises(ModelError, match="no face"):
        FaceScorer().image([solid(9, 9, 9)], solid(0, 0, 0))


def test_a_pack_is_found_by_name_or_by_folder(insightface, tmp_path):
    FaceScorer("antelopev2")
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    FaceScorer(folder)
    assert _Recogniser.made == [{"name": "antelopev2"}, {"name": "mine", "root": str(tmp_path)}]
    with pytest.raises(ModelError, match="folder called 'models'"):
        FaceScorer(tmp_path)


def test_without_insightface_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(ModelError, match="install insightface"):
        FaceScorer()
