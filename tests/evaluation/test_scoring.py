"""Finished subjects scored on a model: rows for every image, and nothing drawn twice."""

from __future__ import annotations

import csv

import pytest
import torch
from PIL import Image

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
from sefi_fast.evaluation.scorers import TinyScorer, wanted_by
from sefi_fast.pipelines import generate, load_pipeline
from sefi_fast.prompts.tokenization import class_token_ids
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD, SUBJECT_IDENTITY, SUBJECT_SCENE
from sefi_fast.tiny_world.drawing import Identity, ImageSpec, draw

FAST = {"seeds": 1, "steps": 2, "progress": False}
RED = Identity("red", None, "plain", "long", "tall")


def subject_of(pipe, word: str, model: str | None = None) -> Subject:
    """A subject that draws what a word of the model's vocabulary draws."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    rows = [table[class_token_ids(pipe.tokenizer, one)[0]] for one in (word, CLASS_WORD)]
    tokens = rows[0].expand(1, 2, -1)
    return Subject("<it>", CLASS_WORD, [tokens], [rows[1]], "tiny", {"model": model})


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(None)


@pytest.fixture
def files(pipe, tmp_path):
    paths = []
    for word in (CLASS_WORD, "red"):
        paths.append(tmp_path / f"{word}.safetensors")
        subject_of(pipe, word).save(paths[-1])
    return paths


def test_every_prompt_of_every_subject_and_its_control_is_scored(files, tmp_path):
    pictures = [sefi_fast.bundled_subject_image(), draw(ImageSpec(RED, "snow"), 192)[0]]
    found = evaluate(files, references=pictures, output=tmp_path / "out", **FAST)
    prompts = sum(map(len, TINY_PROMPTS.values()))
    assert len(found.rows) == 2 * 2 * prompts
    assert {row["subject"] for row in found.rows} == {"class word", CLASS_WORD, "red"}
    assert found.scores == ["prompt score", "attributes", "id", "id rank", "id(p)", "leak"]
    # This subject is the class word, so its images are.
    for score in ("prompt score", "attributes"):
        own = [r[score] for r in found.rows if r["subject"] == CLASS_WORD]
        control = [r[score] for r in found.rows if r["subject"] == "class word"]
        assert sum(own) / len(own) == pytest.approx(sum(control) / len(control))
    with open(tmp_path / "out" / "scores.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(found.rows)
    assert float(rows[5]["id"]) == found.rows[5]["id"]
    text = (tmp_path / "out" / "scores.md").read_text(encoding="utf-8")
    assert "| the class word |" in text and "| all subjects, scenes |" in text
    assert {path.name for path in found.files} == {"scores.csv", "scores.md", "sheet.png"}


def test_a_second_run_draws_nothing_and_finds_the_same(files, tmp_path, monkeypatch):
    prompts = ["a photo of a {} in the snow"]
    first = evaluate(files[0], prompts=prompts, output=tmp_path / "out", **FAST)
    monkeypatch.setattr(scoring, "generate", None)
    again = evaluate(files[0], prompts=prompts, output=tmp_path / "out", **FAST)
    assert again.rows == first.rows


def test_other_tokens_or_steps_are_drawn_anew(pipe, tmp_path, monkeypatch):
    calls = []

    def counting(*arguments, **settings):
        calls.append(settings["steps"])
        return generate(*arguments, **settings)

    monkeypatch.setattr(scoring, "generate", counting)
    settings = {"prompts": ["a {} at night"], "output": tmp_path, "seeds": 1, "progress": False}
    evaluate(subject_of(pipe, "red"), steps=1, **settings)
    evaluate(subject_of(pipe, "blue"), steps=1, **settings)
    evaluate(subject_of(pipe, "blue"), steps=2, **settings)
    assert calls == [1, 1, 1, 2, 2]


def test_two_subjects_of_one_placeholder_stand_in_one_prompt(files, tmp_path):
    prompts = {"several": ["a photo of a {} and a {} in the snow"]}
    found = evaluate(files, prompts=prompts, output=tmp_path / "out", **FAST)
    names = {row["subject"] for row in found.rows}
    assert names == {"class word", "creature + red", "red + creature"}
    with pytest.raises(ValueError, match="for two subjects, and there is one"):
        evaluate(files[0], prompts=prompts, output=tmp_path / "out", **FAST)


def test_other_models_score_by_clip_and_dino(
    sd15_pipeline, sd15_folder, clip_folder, dino_folder, tmp_path
):
    table = sd15_pipeline.text_encoder.get_input_embeddings().weight.detach()
    row = table[class_token_ids(sd15_pipeline.tokenizer, "cat")[0]]
    subject = Subject(
        "<it>", "cat", [row.expand(5, 2, -1)], [row], "sd", {"model": str(sd15_folder)}
    )
    picture = sefi_fast.bundled_subject_image()
    found = evaluate(
        subject, prompts=["a {} in the snow"], references=[picture], clip=clip_folder,
        dino=dino_folder, output=tmp_path, seeds=2, steps=1, progress=False,
    )  # fmt: skip
    assert found.scores == ["clip text", "clip image", "dino image", "id(p)"]
    assert len(found.rows) == 4
    for row in found.rows:
        expected = max(0, row["dino image"]) * max(0, row["clip text"])
        assert row["id(p)"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="nothing to score with"):
        evaluate(subject, output=tmp_path, **FAST)


def test_a_pipeline_given_is_left_as_it_was(clip_folder, tmp_path):
    pipe = load_pipeline(None)
    processors, hooks = pipe.unet.attn_processors, dict(pipe.unet._forward_pre_hooks)
    found = evaluate(
        subject_of(pipe, "red"), model=pipe, prompts=["a {}"], clip=clip_folder, output=tmp_path,
        **FAST,
    )  # fmt: skip
    assert found.scores == ["clip text"] and len(found.rows) == 2
    assert "encode_prompt" not in pipe.__dict__
    assert dict(pipe.unet._forward_pre_hooks) == hooks
    after = pipe.unet.attn_processors
    assert {name: type(p) for name, p in after.items()} == {
        name: type(p) for name, p in processors.items()
    }


def test_subjects_of_a_pipeline_given_stay_attached(files, clip_folder, tmp_path):
    pipe = sefi_fast.attach(load_pipeline(None), files[1])
    before = pipe.encode_prompt.subjects
    settings = {"prompts": ["a {}"], "clip": clip_folder, "output": tmp_path / "out", **FAST}
    evaluate(files[:1], model=pipe, **settings)
    assert pipe.encode_prompt.subjects == before


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"references": []}, "0 reference images for 1 subjects"),
        ({"dino": "x"}, "give reference images"),
        ({"prompts": ["a creature"]}, "0 times {}"),
        ({"prompts": ["{} {} {}"]}, "3 times {}"),
    ],
)
def test_what_cannot_be_done_is_told_before_drawing(pipe, tmp_path, wrong, words, monkeypatch):
    monkeypatch.setattr(scoring, "load_pipeline", None)
    with pytest.raises(ValueError, match=words):
        evaluate(subject_of(pipe, "red"), output=tmp_path / "out", **{**FAST, **wrong})
    assert not (tmp_path / "out").exists()


def test_no_subject_is_refused():
    with pytest.raises(ValueError, match="no subject"):
        evaluate([])


def test_the_judge_knows_the_bundled_picture():
    identity, scene = TinyScorer().identity(Image.open(sefi_fast.bundled_subject_image()))
    assert (identity, scene) == (SUBJECT_IDENTITY, SUBJECT_SCENE)


def test_an_identity_can_be_made_of_whatever_the_judge_says():
    scorer = TinyScorer()
    for seed in range(20):
        noise = torch.randint(0, 256, (48, 48, 3), generator=torch.Generator().manual_seed(seed))
        identity, _ = scorer.identity(Image.fromarray(noise.byte().numpy()))
        assert isinstance(identity, Identity)


def test_the_words_of_a_prompt_say_what_is_wanted():
    prompt = "a photo of a tall creature with red spots and a hat at night on the left"
    assert wanted_by(prompt) == {
        "creature": "yes", "scene": "night", "position": "left", "shape": "tall",
        "pattern": "spotted", "second_colour": "red", "hat": "yes",
    }  # fmt: skip
    assert wanted_by("a grey photo of a creature")["style"] == "grey"
    assert wanted_by("A red, striped creature with a ball.") == {
        "creature": "yes", "colour": "red", "pattern": "striped", "ball": "yes",
    }  # fmt: skip
    assert wanted_by("my creature wearing a hat next to a ball") == {
        "creature": "yes", "hat": "yes", "ball": "yes",
    }  # fmt: skip
    every = (prompt for prompts in TINY_PROMPTS.values() for prompt in prompts)
    assert all(len(wanted_by(filled(prompt, [CLASS_WORD]))) > 2 for prompt in every)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a {} riding a bicycle on the moon", "'riding', 'bicycle', 'moon'"),
        ("a {} without a hat", "'without'"),
        ("a {} in a red hat", "'red'"),
        ("a red background with a {}", "'red'"),
        ("a big {} in the snow", "'big'"),
        ("a {} on the beach at night", "'night'"),
        ("a red and blue {}", "'blue'"),
        ("a grey {}", "'grey'"),
    ],
)
def test_what_the_judge_cannot_tell_is_refused_before_drawing(files, tmp_path, prompt, words):
    settings = {"output": tmp_path / "out", **FAST}
    with pytest.raises(PromptError, match=f"obeys {words} in the prompt"):
        evaluate(files[0], prompts=["a {} in the snow", prompt], **settings)
    assert not (tmp_path / "out").exists()


def test_a_prompt_must_leave_something_of_the_subject(files, tmp_path):
    prompt = "a round red {} with blue spots and big ears"
    with pytest.raises(PromptError, match="nothing of the subject is left"):
        evaluate(files[0], prompts=[prompt], output=tmp_path, **FAST)


def test_the_class_word_asks_for_nothing(pipe, tmp_path):
    row = pipe.text_encoder.get_input_embeddings().weight.detach()[
        class_token_ids(pipe.tokenizer, "cute")[0]
    ]
    cute = Subject("<it>", "cute", [row.expand(1, 2, -1)], [row], "tiny", {"model": None})
    found = evaluate(cute, prompts=["a {} in the snow"], output=tmp_path, **FAST)
    assert "prompt score" in found.scores


def test_prompts_follow_the_class_word():
    assert prompts_for("Person") is PERSON_PROMPTS and prompts_for("cat") is THING_PROMPTS
    assert prompts_for(CLASS_WORD, bundled=True) is TINY_PROMPTS
    for classes in (PERSON_PROMPTS, THING_PROMPTS):
        assert {"scenes", "actions", "attributes", "several"} == set(classes)
        for name, sentences in classes.items():
            assert all(s.count("{}") == (2 if name == "several" else 1) for s in sentences)


def test_a_file_of_prompts_has_classes(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a {} first\n\n# scenes\na {} on the moon\na {} and a {}\n", encoding="utf-8")
    assert read_prompts(path) == {
        "prompts": ("a {} first",),
        "scenes": ("a {} on the moon", "a {} and a {}"),
    }
    path.write_text("a {} ok\na cat\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: 'a cat' has 0 times"):
        read_prompts(path)
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xef\xbb\xbf# scenes\na {}\n")
    assert read_prompts(path) == {"scenes": ("a {}",)}
    path.write_bytes("a {} in a caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="prompts.txt cannot be read as UTF-8 text"):
        read_prompts(path)


def test_other_braces_of_a_prompt_stand_as_they_are(files, tmp_path, monkeypatch):
    assert filled("{a} {} {0} {} }{", ["x", "{}"]) == "{a} x {0} {} }{"
    drawn, judged = [], []

    def drawing(pipe, text, **settings):
        drawn.append(text)
        return [Image.new("RGB", (48, 48))]

    def judging(scorer, images, texts, reference):
        judged.extend(texts)
        return TinyScorer.__call__(scorer, images, texts, reference)

    monkeypatch.setattr(scoring, "generate", drawing)
    monkeypatch.setattr(scoring, "TinyScorer", type("J", (TinyScorer,), {"__call__": judging}))
    prompts = ["a {} with a {hat} and {{ball}", "{{}} in the snow"]
    evaluate(files[0], prompts=prompts, output=tmp_path / "out", **FAST)
    control = [f"a {CLASS_WORD} with a {{hat}} and {{{{ball}}", f"{{{CLASS_WORD}}} in the snow"]
    assert drawn[::2] == control
    assert drawn[1] == "a <subject-1> with a {hat} and {{ball}"
    assert judged == [control[0], control[0], control[1], control[1]]


def test_the_command_scores_files(files, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {} in the snow\n", encoding="utf-8")
    out = tmp_path / "out"
    status = main(
        ["evaluate", str(files[0]), "--prompts", str(prompts), "--seeds", "1",
         "--sampling-steps", "1", "-o", str(out), "--quiet",
         "--images", str(sefi_fast.bundled_subject_image())]
    )  # fmt: skip
    assert status == 0
    assert str(out / "scores.md") in capsys.readouterr().out
    assert "| creature |" in (out / "scores.md").read_text(encoding="utf-8")


def test_an_output_that_is_a_file_is_told_before_drawing(files, monkeypatch):
    monkeypatch.setattr(scoring, "load_pipeline", None)
    with pytest.raises(OSError, match="choose another folder"):
        evaluate(files[0], output=files[0], **FAST)


def test_a_missing_clip_is_told(files, tmp_path):
    with pytest.raises(ModelError, match="CLIP"):
        evaluate(files[0], clip=tmp_path / "none", output=tmp_path / "out", **FAST)
