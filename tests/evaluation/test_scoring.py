"""Trained subjects scored on a model: rows for every image, and no image generated twice."""

from __future__ import annotations

import csv
import subprocess
import sys
from types import SimpleNamespace

import pytest

import sefi_fast
from sefi_fast.cli import main
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.evaluation import evaluate, scoring
from sefi_fast.evaluation.prompts import (
    PERSON_PROMPTS,
    THING_PROMPTS,
    TINY_PROMPTS,
    filled,
    prompts_for,
    read_prompts,
)
from sefi_fast.pipelines import generate, load_pipeline
from sefi_fast.prompts.tokenization import class_token_ids
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.tiny_world.drawing import Identity, ImageSpec, draw

FAST = {"seeds": 1, "steps": 2, "progress": False}
SNOW = ["a photo of a {} in the snow"]


def subject_of(pipe, word: str, class_word: str = CLASS_WORD, model: str | None = None) -> Subject:
    """A subject whose images are those of a word of the model's vocabulary."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    row, base = (table[class_token_ids(pipe.tokenizer, one)[0]] for one in (word, class_word))
    return Subject("<it>", class_word, [row.expand(1, 2, -1)], [base], "tiny", {"model": model})


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(None)


@pytest.fixture
def files(pipe, tmp_path):
    paths = [tmp_path / f"{word}.safetensors" for word in (CLASS_WORD, "red")]
    for path in paths:
        subject_of(pipe, path.stem).save(path)
    return paths


def test_every_prompt_of_every_subject_and_its_control_is_scored(files, tmp_path):
    tall = ImageSpec(Identity("red", None, "plain", "long", "tall"), "snow")
    references = [sefi_fast.bundled_subject_image(), draw(tall, 192)[0]]
    found = evaluate(files, references=references, output=tmp_path / "out", **FAST)
    assert len(found.rows) == 2 * 2 * sum(map(len, TINY_PROMPTS.values()))
    assert {row["subject"] for row in found.rows} == {"class word", CLASS_WORD, "red"}
    assert found.scores == ["prompt score", "attributes", "id", "id rank", "id(p)", "leak"]
    for score in ("prompt score", "attributes"):  # This subject is the class word.
        assert found.mean(score, CLASS_WORD) == pytest.approx(found.mean(score, "class word"))
    with open(tmp_path / "out" / "scores.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(found.rows) and float(rows[5]["id"]) == found.rows[5]["id"]
    text = (tmp_path / "out" / "scores.md").read_text(encoding="utf-8")
    assert "| the class word |" in text and "| all subjects, scenes |" in text
    assert {path.name for path in found.files} == {"scores.csv", "scores.md", "sheet.png"}


def test_images_are_generated_once_for_the_same_tokens_and_steps(pipe, tmp_path, monkeypatch):
    calls = []

    def counting(*arguments, **settings):
        calls.append(settings["steps"])
        return generate(*arguments, **settings)

    monkeypatch.setattr(scoring, "generate", counting)
    settings = {"prompts": SNOW, "output": tmp_path, "seeds": 1, "progress": False}
    first = evaluate(subject_of(pipe, "red"), steps=1, **settings)
    assert evaluate(subject_of(pipe, "red"), steps=1, **settings).rows == first.rows
    evaluate(subject_of(pipe, "blue"), steps=1, **settings)
    evaluate(subject_of(pipe, "blue"), steps=2, **settings)
    assert calls == [1, 1, 1, 2, 2]


def test_two_subjects_of_one_placeholder_share_a_prompt(files, tmp_path):
    prompts = {"several": ["a photo of a {} and a {} in the snow"]}
    settings = {"prompts": prompts, "output": tmp_path / "out", **FAST}
    references = [sefi_fast.bundled_subject_image()] * 2
    found = evaluate(files, references=references, **settings)
    assert {r["subject"] for r in found.rows} == {"class word", "creature + red", "red + creature"}
    assert found.scores == ["prompt score", "attributes"]
    with pytest.raises(ValueError, match="for two subjects, and one was given"):
        evaluate(files[0], **settings)


def test_other_models_are_scored_by_clip_and_dino_without_the_tiny_world(
    sd15_pipeline, sd15_folder, clip_folder, dino_folder, tmp_path
):
    subject = subject_of(sd15_pipeline, "cat", "cat", str(sd15_folder))
    settings = {"prompts": ["a {} in the snow"], "output": tmp_path, "seeds": 2, "steps": 1}
    found = evaluate(
        subject, references=[sefi_fast.bundled_subject_image()], clip=clip_folder,
        dino=dino_folder, progress=False, **settings,
    )  # fmt: skip
    assert found.scores == ["clip text", "clip image", "dino image", "id(p)"]
    assert len(found.rows) == 4
    for row in found.rows:
        expected = max(0, row["dino image"]) * max(0, row["clip text"])
        assert row["id(p)"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="nothing to score with"):
        evaluate(subject, **settings)
    code = (
        "import sys, sefi_fast.evaluation.scoring; sys.exit('sefi_fast.tiny_world' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_face_score_is_the_identity_where_there_is_one(
    pipe, clip_folder, tmp_path, monkeypatch
):
    faces = SimpleNamespace(image=lambda images, reference: [0.5] * len(images))
    monkeypatch.setattr(scoring, "FaceScorer", lambda pack: faces)
    found = evaluate(
        subject_of(pipe, "red"), model=load_pipeline(None), prompts=["a {}"], clip=clip_folder,
        face="pack", references=[sefi_fast.bundled_subject_image()], output=tmp_path, **FAST,
    )  # fmt: skip
    assert found.scores == ["clip text", "clip image", "face", "id(p)"]
    for row in found.rows:
        assert row["id(p)"] == pytest.approx(0.5 * max(0, row["clip text"]), abs=1e-4)


def test_a_ready_pipeline_keeps_its_parts_and_its_subjects(files, clip_folder, tmp_path):
    pipe = load_pipeline(None)
    processors = {name: type(one) for name, one in pipe.unet.attn_processors.items()}
    hooks = dict(pipe.unet._forward_pre_hooks)
    settings = {"prompts": ["a {}"], "clip": clip_folder, "output": tmp_path / "out", **FAST}
    found = evaluate(files[0], model=pipe, **settings)
    assert found.scores == ["clip text"] and len(found.rows) == 2
    assert "encode_prompt" not in pipe.__dict__
    assert dict(pipe.unet._forward_pre_hooks) == hooks
    assert {name: type(one) for name, one in pipe.unet.attn_processors.items()} == processors
    sefi_fast.attach(pipe, files[1])
    before = pipe.encode_prompt.subjects
    evaluate(files[:1], model=pipe, **settings)
    assert pipe.encode_prompt.subjects == before
    with pytest.raises(ValueError, match="A ready pipeline was given"):
        evaluate(files[0], model=pipe, vae="x", **settings)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"subjects": []}, ValueError, "no subject"),
        ({"seeds": 0}, ValueError, "seeds must be at least 1"),
        ({"references": []}, ValueError, "0 reference images for 1 subjects"),
        ({"dino": "x"}, ValueError, "Give references"),
        ({"prompts": ["a creature"]}, ValueError, "has {} 0 times"),
        ({"prompts": ["{} {} {}"]}, ValueError, "has {} 3 times"),
        ({"prompts": [*SNOW, "a {} on the moon"]}, PromptError, "obeys 'moon'"),
        ({"clip": "/no/model"}, ModelError, "CLIP"),
        ({"output": __file__}, OSError, "choose another folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    pipe, tmp_path, wrong, error, words, monkeypatch
):
    monkeypatch.setattr(scoring, "load_pipeline", None)
    given = {"subjects": subject_of(pipe, "red"), "output": tmp_path / "out", **FAST, **wrong}
    with pytest.raises(error, match=words):
        evaluate(**given)
    assert not (tmp_path / "out").exists()


def test_prompts_follow_the_class_word():
    assert prompts_for("Person") is PERSON_PROMPTS and prompts_for("cat") is THING_PROMPTS
    assert prompts_for(CLASS_WORD, bundled=True) is TINY_PROMPTS
    assert filled("{a} {} {0} {} }{", ["x", "{}"]) == "{a} x {0} {} }{"
    for classes in (PERSON_PROMPTS, THING_PROMPTS):
        assert {"scenes", "actions", "attributes", "several"} == set(classes)
        for name, sentences in classes.items():
            assert all(s.count("{}") == (2 if name == "several" else 1) for s in sentences)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a {} first\n\n# scenes\na {} there\na {} and a {}\n",
         {"prompts": ("a {} first",), "scenes": ("a {} there", "a {} and a {}")}),
        ("\ufeff# scenes\na {}\n", {"scenes": ("a {}",)}),
        ("a {} ok\na cat\n", "line 2: 'a cat' has {} 0 times"),
        ("# nothing\n", "holds no prompt"),
        ("a {} in a caf\udce9", "prompts.txt cannot be read as UTF-8 text"),
    ],
)  # fmt: skip
def test_a_file_of_prompts_has_classes(tmp_path, content, expected):
    path = tmp_path / "prompts.txt"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    if isinstance(expected, dict):
        assert read_prompts(path) == expected
    else:
        with pytest.raises(PromptError, match=expected):
            read_prompts(path)


def test_the_command_scores_files(files, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text(SNOW[0], encoding="utf-8")
    arguments = ["--prompts", prompts, "--seeds", 1, "--sampling-steps", 1, "-o", out, "--quiet",
                 "--images", sefi_fast.bundled_subject_image()]  # fmt: skip
    assert main(["evaluate", str(files[0]), *map(str, arguments)]) == 0
    assert str(out / "scores.md") in capsys.readouterr().out
    assert "| creature |" in (out / "scores.md").read_text(encoding="utf-8")
