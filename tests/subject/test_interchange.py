"""Textual Inversion files: what diffusers makes of ours, and what we make of others'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sefi_fast import Subject, attach, detach, export_embedding, import_embedding
from sefi_fast.errors import PromptError, SubjectFileError


def subject_of(
    pipe, stages: int = 1, split: bool = False, encoders: int = 1, vectors: int = 1
) -> Subject:
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    row = table[pipe.tokenizer.convert_tokens_to_ids("cat</w>")].clone()
    generator = torch.Generator().manual_seed(stages)
    noise = torch.randn(stages, 2 if split else 1, vectors, len(row), generator=generator)
    tokens = row + row.std() * noise
    return Subject("<it>", "cat", [tokens] * encoders, [row] * encoders, base_model="random")


def latents(pipe, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, num_inference_steps=3, generator=generator, output_type="latent").images


@pytest.mark.parametrize("vectors", [1, 3])
def test_diffusers_draws_what_the_subject_draws(sd15_pipeline, tmp_path, vectors):
    subject = subject_of(sd15_pipeline, vectors=vectors)
    path = export_embedding(subject, tmp_path / "it.safetensors")
    assert list(load_file(path)) == ["<it>"]
    attach(sd15_pipeline, subject)
    ours = latents(sd15_pipeline, "a photo of a <it>")
    detach(sd15_pipeline)
    sd15_pipeline.load_textual_inversion(str(tmp_path), weight_name="it.safetensors")
    theirs = latents(sd15_pipeline, "a photo of a <it>")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - latents(sd15_pipeline, "a photo of a cat")).abs().max() > 1e-2


@pytest.mark.parametrize("vectors", [1, 4])
def test_what_was_exported_comes_back(sd15_pipeline, tmp_path, vectors):
    subject = subject_of(sd15_pipeline, vectors=vectors)
    path = export_embedding(subject, tmp_path / "it.safetensors")
    assert load_file(path)["<it>"].shape == (vectors, 48)
    back = import_embedding(path, sd15_pipeline, class_word="cat")
    assert back.num_vectors == vectors
    assert (back.placeholder, back.class_word, back.stages, back.split) == ("<it>", "cat", 1, False)
    torch.testing.assert_close(back.tokens[0], subject.tokens[0], rtol=0, atol=0)
    torch.testing.assert_close(back.class_embeddings[0], subject.class_embeddings[0])
    attach(sd15_pipeline, back)


@pytest.mark.parametrize(("stages", "split"), [(5, True), (1, True), (3, False)])
def test_more_than_one_row_must_be_asked_to_be_averaged(sd15_pipeline, tmp_path, stages, split):
    subject = subject_of(sd15_pipeline, stages, split)
    path = tmp_path / "it.safetensors"
    with pytest.raises(ValueError, match="lossy=True"):
        export_embedding(subject, path)
    assert not path.exists()
    export_embedding(subject, path, lossy=True)
    expected = subject.tokens[0].reshape(-1, subject.tokens[0].shape[-1]).mean(0)
    torch.testing.assert_close(load_file(path)["<it>"], expected[None])


def test_two_text_encoders_have_the_names_that_programs_know(sd15_pipeline, tmp_path):
    path = export_embedding(subject_of(sd15_pipeline, encoders=2), tmp_path / "it.safetensors")
    assert set(load_file(path)) == {"clip_l", "clip_g"}
    with pytest.raises(SubjectFileError, match="2 tensors .* 1 text encoders"):
        import_embedding(path, sd15_pipeline, class_word="cat")


def test_the_name_comes_from_the_file_where_it_holds_none(sd15_pipeline, tmp_path):
    width = sd15_pipeline.text_encoder.config.hidden_size
    path = tmp_path / "my cat.safetensors"
    save_file({"emb_params": torch.randn(1, width)}, path)
    assert import_embedding(path, sd15_pipeline, class_word="cat").placeholder == "<my-cat>"
    named = import_embedding(path, sd15_pipeline, class_word="cat", placeholder="<x>")
    assert named.placeholder == "<x>"


def bad_files(folder: Path, width: int) -> dict[str, Path]:
    files = {
        name: folder / f"{name}.safetensors" for name in ("missing", "wide", "rows", "many", "nan")
    }
    save_file({"<it>": torch.randn(1, width + 8)}, files["wide"])
    save_file({"<it>": torch.randn(0, width)}, files["rows"])
    save_file({"<it>": torch.randn(76, width)}, files["many"])
    save_file({"<it>": torch.full((1, width), torch.nan)}, files["nan"])
    files["pickle"] = folder / "it.pt"
    torch.save({"<it>": torch.randn(1, width)}, files["pickle"])
    files["text"] = folder / "text.safetensors"
    files["text"].write_text("an embedding, honestly")
    return files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "not there"),
        ("wide", "another base model"),
        ("rows", "no rows"),
        ("many", "76 rows: wanted 1 to 75"),
        ("nan", "NaN"),
        ("pickle", "can run code"),
        ("text", "no readable safetensors"),
    ],
)
def test_other_files_are_refused_in_words(sd15_pipeline, tmp_path, name, words):
    path = bad_files(tmp_path, sd15_pipeline.text_encoder.config.hidden_size)[name]
    with pytest.raises(SubjectFileError, match=words):
        import_embedding(path, sd15_pipeline, class_word="cat")


def test_bad_arguments(sd15_pipeline, tmp_path):
    subject = subject_of(sd15_pipeline)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export_embedding(subject, tmp_path / "it.pt")
    path = export_embedding(subject, tmp_path / "it.safetensors")
    with pytest.raises(PromptError, match="falls into pieces"):
        import_embedding(path, sd15_pipeline, class_word="a very special cat")
    with pytest.raises(PromptError, match="2 tokens, and 1 stand"):
        import_embedding(path, sd15_pipeline, class_word="red cat")


@pytest.mark.parametrize(
    ("files", "given", "placeholder"),
    [
        # diffusers' textual_inversion_sdxl.py: at its end, and on the way.
        (["learned_embeds:<cat>=l", "learned_embeds_2:<cat>=g"], [0, 1], "<cat>"),
        (["learned_embeds:<cat>=l", "learned_embeds_2:<cat>=g"], [1, 0], "<cat>"),
        (["learned_embeds:<cat>=l", "learned_embeds_2:<cat>=g"], [0], "<cat>"),
        (["learned_embeds:<cat>=l", "learned_embeds_2:<cat>=g"], [1], "<cat>"),
        (["learned_embeds-steps-9:<cat>=l", "learned_embeds_2-steps-9:<cat>=g"], [0], "<cat>"),
        # Its advanced DreamBooth scripts, of two versions; kohya, A1111 and ComfyUI as the first.
        (["cat:clip_l=l,clip_g=g"], [0], "<cat>"),
        (["cat:text_encoders_0=l,text_encoders_1=g"], [0], "<cat>"),
        # Parts of such files, and names that say nothing: the widths do.
        (["one:clip_g=g", "two:clip_l=l"], [0, 1], "<one>"),
        (["cat:emb_params=l", "two:emb_params=g"], [0, 1], "<cat>"),
        (["cat:a=g,b=l"], [0], "b"),
    ],
)
def test_embeddings_of_sdxl_in_every_form(sdxl_pipeline, tmp_path, files, given, placeholder):
    widths = {
        "l": sdxl_pipeline.text_encoder.config.hidden_size,
        "g": sdxl_pipeline.text_encoder_2.config.hidden_size,
    }
    rows = {part: torch.randn(2, width) for part, width in widths.items()}
    assert widths["l"] != widths["g"]
    paths = []
    for file in files:
        name, tensors = file.split(":")
        paths.append(tmp_path / f"{name}.safetensors")
        save_file({t.split("=")[0]: rows[t.split("=")[1]] for t in tensors.split(",")}, paths[-1])
    chosen = [paths[place] for place in given]
    subject = import_embedding(
        chosen if len(chosen) > 1 else chosen[0], sdxl_pipeline, class_word="cat"
    )
    assert (subject.placeholder, subject.num_vectors) == (placeholder, 2)
    for tokens, own in zip(subject.tokens, rows.values(), strict=True):
        assert torch.equal(tokens[0, 0], own)
    attach(sdxl_pipeline, subject)


def test_one_of_two_files_says_to_give_both(sdxl_pipeline, tmp_path):
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<cat>": torch.randn(1, sdxl_pipeline.text_encoder.config.hidden_size)}, path)
    with pytest.raises(SubjectFileError, match="1 tensors .* 2 text encoders.* give both files"):
        import_embedding(path, sdxl_pipeline, class_word="cat")
    with pytest.raises(SubjectFileError, match="no file was given"):
        import_embedding([], sdxl_pipeline, class_word="cat")
