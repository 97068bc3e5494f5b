"""CLIP, DINO and face scores equal those of the plain models, and their errors are clear."""

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


def noise_images(count: int, side: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shape = (side, side, 3)
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


def normalised(images) -> torch.Tensor:
    arrays = np.stack([np.asarray(image) for image in images])
    return (torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


@torch.inference_mode()
def test_dino_is_the_cosine_of_class_tokens(dino_folder):
    images = noise_images(18, 28)
    model = Dinov2Model.from_pretrained(dino_folder).eval()
    tokens = model(normalised(images)).last_hidden_state[:, 0]
    expected = torch.cosine_similarity(tokens, tokens[3:4])
    found = DinoScorer(dino_folder).image(images, images[3])
    assert found == pytest.approx(expected.tolist(), abs=1e-4)
    assert found[3] == pytest.approx(1, abs=1e-5) and max(found[:3]) < 0.9999


@torch.inference_mode()
def test_clip_is_the_cosine_of_projected_embeddings(clip_folder):
    images, text = noise_images(3, 32), "a photo of a creature in the snow"
    scorer, model = ClipScorer(clip_folder), CLIPModel.from_pretrained(clip_folder).eval()
    ids = scorer._tokenizer([text], return_tensors="pt")
    out = model(**ids, pixel_values=normalised(images))
    expected = (out.image_embeds @ out.text_embeds.T)[:, 0]
    assert scorer.text(images, text) == pytest.approx(expected.tolist(), abs=1e-4)
    alike = out.image_embeds @ out.image_embeds[1]
    assert scorer.image(images, images[1]) == pytest.approx(alike.tolist(), abs=1e-4)


def test_images_of_any_size_and_mode_are_scored(dino_folder):
    image = noise_images(1, 60)[0]
    found = DinoScorer(dino_folder).image([image.convert("RGBA"), image.convert("L")], image)
    assert found[0] == pytest.approx(1, abs=1e-5) and found[1] < 1


@pytest.mark.parametrize("scorer", [ClipScorer, DinoScorer])
def test_a_folder_without_a_model_or_with_pickles_is_refused(scorer, dino_folder, tmp_path):
    with pytest.raises(ModelError, match="safetensors weights"):
        scorer(tmp_path)
    model = Dinov2Model.from_pretrained(dino_folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        scorer(tmp_path)


class _Recogniser:
    """A stand-in for insightface: a face is a box and its mean color, blue first."""

    made: list[dict] = []

    def __init__(self, **pack) -> None:
        self.made.append(pack)

    def prepare(self, ctx_id: int) -> None:
        self.ready = ctx_id

    def get(self, pixels: np.ndarray) -> list[SimpleNamespace]:
        if pixels.max() == 0:
            return []
        color = pixels.reshape(-1, 3).mean(0) / np.linalg.norm(pixels.reshape(-1, 3).mean(0))
        faces = (([0, 0, 1, 1], np.eye(3)[0]), ([0, 0, 9, 9], color))
        return [SimpleNamespace(bbox=np.array(b), normed_embedding=e) for b, e in faces]


@pytest.fixture
def insightface(monkeypatch):
    app = ModuleType("insightface.app")
    app.FaceAnalysis = _Recogniser
    monkeypatch.setitem(sys.modules, "insightface", ModuleType("insightface"))
    monkeypatch.setitem(sys.modules, "insightface.app", app)
    _Recogniser.made.clear()


def solid(*color: int) -> Image.Image:
    return Image.new("RGB", (20, 20), color)


def test_the_largest_face_counts_and_no_face_scores_zero(insightface):
    found = FaceScorer().image([solid(200, 0, 0), solid(0, 0, 90), solid(0, 0, 0)], solid(9, 0, 0))
    assert found == pytest.approx([1, 0, 0])
    with pytest.raises(ModelError, match="no face"):
        FaceScorer().image([solid(9, 9, 9)], solid(0, 0, 0))


def test_a_face_model_is_found_by_name_or_folder(insightface, tmp_path):
    FaceScorer("antelopev2")
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    FaceScorer(folder)
    assert _Recogniser.made == [{"name": "antelopev2"}, {"name": "mine", "root": str(tmp_path)}]
    with pytest.raises(ModelError, match="folder called 'models'"):
        FaceScorer(tmp_path)


def test_without_insightface_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(ModelError, match="Install insightface"):
        FaceScorer()
