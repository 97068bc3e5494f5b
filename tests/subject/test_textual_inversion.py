"""Textual Inversion files: diffusers reads ours, and files of other programs become subjects."""

from __future__ import annotations

import pytest
import torch
from pipelines.sampling import sample
from safetensors.torch import load_file, save, save_file

from sefi_fast import Subject, attach, detach, export_embedding, import_embedding
from sefi_fast.errors import PromptError, SubjectFileError


def subject_of(pipe, stages=1, split=False, encoders=1, vectors=1) -> Subject:
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    row = table[pipe.tokenizer.convert_tokens_to_ids("cat</w>")].clone()
    generator = torch.Generator().manual_seed(stages)
    noise = torch.randn(stages, 2 if split else 1, vectors, len(row), generator=generator)
    tokens = row + row.std() * noise
    return Subject("<it>", "cat", [tokens] * encoders, [row] * encoders, base_model="random")


@pytest.mark.parametrize("vectors", [1, 3])
def test_an_export_means_the_same_to_diffusers_and_comes_back(sd15_pipeline, tmp_path, vectors):
    pipe, subject = sd15_pipeline, subject_of(sd15_pipeline, vectors=vectors)
    path = export_embedding(subject, tmp_path / "it.safetensors")
    assert {name: x.shape for name, x in load_file(path).items()} == {"<it>": (vectors, 48)}
    back = import_embedding(path, pipe, class_word="cat")
    assert (back.placeholder, back.class_word, back.stages, back.split) == ("<it>", "cat", 1, False)
    assert torch.equal(back.tokens[0], subject.tokens[0])
    assert torch.equal(back.class_embeddings[0], subject.class_embeddings[0])
    attach(pipe, back)
    ours = sample(pipe, "a photo of a <it>")
    detach(pipe)
    pipe.load_textual_inversion(str(tmp_path), weight_name="it.safetensors")
    theirs = sample(pipe, "a photo of a <it>")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - sample(pipe, "a photo of a cat")).abs().max() > 1e-2


@pytest.mark.parametrize(("stages", "split"), [(5, True), (1, True), (3, False)])
def test_more_than_one_row_is_averaged_only_if_asked(sd15_pipeline, tmp_path, stages, split):
    subject = subject_of(sd15_pipeline, stages, split)
    path = tmp_path / "it.safetensors"
    with pytest.raises(ValueError, match="lossy=True"):
        export_embedding(subject, path)
    assert not path.exists()
    export_embedding(subject, path, lossy=True)
    expected = subject.tokens[0].reshape(-1, subject.tokens[0].shape[-1]).mean(0)
    torch.testing.assert_close(load_file(path)["<it>"], expected[None])


def test_two_text_encoders_have_the_names_that_programs_know(sd15_pipeline, tmp_path):
    path = tmp_path / "it.safetensors"
    export_embedding(subject_of(sd15_pipeline, encoders=2), path)
    assert set(load_file(path)) == {"clip_l", "clip_g"}
    with pytest.raises(ValueError, match="embeddings of 3 text encoders"):
        export_embedding(subject_of(sd15_pipeline, encoders=3), path)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export_embedding(subject_of(sd15_pipeline), tmp_path / "it.pt")


def test_the_placeholder_comes_from_the_file_name_if_the_file_has_none(sd15_pipeline, tmp_path):
    path = tmp_path / "my cat.safetensors"
    save_file({"emb_params": torch.randn(1, 48)}, path)
    assert import_embedding(path, sd15_pipeline, class_word="cat").placeholder == "<my-cat>"
    named = import_embedding(path, sd15_pipeline, class_word="cat", placeholder="<x>")
    assert named.placeholder == "<x>"


@pytest.mark.parametrize(
    ("name", "content", "class_word", "message"),
    [
        ("a.safetensors", None, "cat", "No such file"),
        ("a.safetensors", torch.randn(1, 56), "cat", "another base model"),
        ("a.safetensors", torch.randn(0, 48), "cat", "no rows"),
        ("a.safetensors", torch.randn(76, 48), "cat", "76 rows: wanted 1 to 75"),
        ("a.safetensors", torch.full((1, 48), torch.nan), "cat", "NaN"),
        ("a.safetensors", b"an embedding, honestly", "cat", "not a readable safetensors"),
        ("a.safetensors", {"a": torch.randn(1, 48), "b": torch.randn(1, 48)}, "cat", "2 tensors"),
        ("a.safetensors", torch.randn(1, 48), "a very special cat", "falls into pieces"),
        ("a.safetensors", torch.randn(1, 48), "red cat", "2 tokens"),
        ("a.pt", b"a pickle", "cat", "can run code"),
    ],
)
def test_other_files_and_class_words_are_refused(
    sd15_pipeline, tmp_path, name, content, class_word, message
):
    if isinstance(content, torch.Tensor):
        content = {"<it>": content}
    if content is not None:
        (tmp_path / name).write_bytes(save(content) if isinstance(content, dict) else content)
    with pytest.raises((SubjectFileError, PromptError), match=message):
        import_embedding(tmp_path / name, sd15_pipeline, class_word=class_word)


def save_parts(pipe, folder, files: list[str]) -> dict[str, torch.Tensor]:
    """Save "file:name=part,name=part" of parts l and g (a second l: three rows); return both."""
    rows = {"l": torch.randn(2, pipe.text_encoder.config.hidden_size)}
    rows["g"] = torch.randn(2, pipe.text_encoder_2.config.hidden_size)
    for file in files:
        name, tensors = file.split(":")
        pairs = (pair.split("=") for pair in tensors.split(","))
        save_file({key: rows[part] for key, part in pairs}, folder / f"{name}.safetensors")
    return rows


TWINS = ["learned_embeds:<cat>=l", "learned_embeds_2:<cat>=g"]


@pytest.mark.parametrize(
    ("files", "given", "placeholder"),
    [
        # diffusers' textual_inversion_sdxl.py: at its end, and during training.
        (TWINS, [0, 1], "<cat>"),
        (TWINS, [1, 0], "<cat>"),
        (TWINS, [0], "<cat>"),
        (TWINS, [1], "<cat>"),
        (["learned_embeds-steps-9:<cat>=l", "learned_embeds_2-steps-9:<cat>=g"], [0], "<cat>"),
        # Its advanced DreamBooth scripts, of two versions; kohya, A1111 and ComfyUI as the first.
        (["cat:clip_l=l,clip_g=g"], [0], "<cat>"),
        (["cat:text_encoders_0=l,text_encoders_1=g"], [0], "<cat>"),
        # Parts of such files, and names without meaning: the widths decide.
        (["one:clip_g=g", "two:clip_l=l"], [0, 1], "<one>"),
        (["cat:emb_params=l", "two:emb_params=g"], [0, 1], "<cat>"),
        (["cat:a=g,b=l"], [0], "b"),
    ],
)
def test_embeddings_of_sdxl_in_every_form(sdxl_pipeline, tmp_path, files, given, placeholder):
    rows = save_parts(sdxl_pipeline, tmp_path, files)
    paths = [tmp_path / f"{files[place].split(':')[0]}.safetensors" for place in given]
    chosen = paths if len(paths) > 1 else paths[0]
    subject = import_embedding(chosen, sdxl_pipeline, class_word="cat")
    assert (subject.placeholder, subject.num_vectors) == (placeholder, 2)
    for tokens, own in zip(subject.tokens, rows.values(), strict=True):
        assert torch.equal(tokens[0, 0], own)
    attach(sdxl_pipeline, subject)


def test_incomplete_or_ambiguous_embeddings_of_sdxl_are_refused(sdxl_pipeline, tmp_path):
    pipe = sdxl_pipeline
    save_parts(pipe, tmp_path, ["learned_embeds:<cat>=l", "other:<cat>=g"])
    first, other = tmp_path / "learned_embeds.safetensors", tmp_path / "other.safetensors"
    save_file({"<cat>": torch.randn(3, pipe.text_encoder_2.config.hidden_size)}, other)
    for paths, message in [
        ([], "no file was given"),
        (first, "1 tensors .* 2 text encoders.* give both files"),
        ([first, other], "2 and 3 rows"),
    ]:
        with pytest.raises(SubjectFileError, match=message):
            import_embedding(paths, pipe, class_word="cat")
    pipe.text_encoder_2, pipe.tokenizer_2 = pipe.text_encoder, pipe.tokenizer
    save_file({name: torch.randn(1, pipe.text_encoder.config.hidden_size) for name in "ab"}, other)
    with pytest.raises(SubjectFileError, match="either fits both text encoders"):
        import_embedding(other, pipe, class_word="cat")
