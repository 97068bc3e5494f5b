"""export and import on the command line: there, back, and read by diffusers."""

from __future__ import annotations

import pytest
import torch
from pipelines.sampling import sample, subject_for
from safetensors.torch import load_file, save_file

from sefi_fast.cli import main
from sefi_fast.pipelines import attach, detach
from sefi_fast.subject import Subject


@pytest.fixture
def saved(sd15_pipeline, tmp_path):
    """Saves a subject of so many stages, split or tied, and gives its file."""

    def save(stages: int, split: bool) -> str:
        file = tmp_path / "it.safetensors"
        subject_for(sd15_pipeline, stages=stages, split=split).save(file)
        return str(file)

    return save


def test_diffusers_reads_what_export_wrote(sd15_pipeline, saved, tmp_path, capsys):
    pipe, file = sd15_pipeline, saved(1, False)
    assert main(["export", file, "-o", str(tmp_path / "embedding.safetensors")]) == 0
    assert "load_textual_inversion" in capsys.readouterr().out
    attach(pipe, file)
    ours = sample(pipe, "a photo of a <it>")
    detach(pipe)
    pipe.load_textual_inversion(str(tmp_path), weight_name="embedding.safetensors")
    theirs = sample(pipe, "a photo of a <it>")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_import_makes_a_subject_of_what_was_exported(saved, sd15_folder, tmp_path):
    file = saved(1, False)
    embedding, back = tmp_path / "embedding.safetensors", tmp_path / "back.safetensors"
    assert main(["export", file, "-o", str(embedding)]) == 0
    command = ["import", str(embedding), "-m", str(sd15_folder), "--class-word", "cat"]
    assert main([*command, "-o", str(back)]) == 0
    found, wanted = Subject.load(back), Subject.load(file)
    assert (found.placeholder, found.class_word) == ("<it>", "cat")
    assert torch.equal(found.tokens[0], wanted.tokens[0])
    assert main([*command, "-o", str(back), "--placeholder", "<me>"]) == 0
    assert Subject.load(back).placeholder == "<me>"
    # It draws without being told its model again.
    drawn = ["generate", "a <me>", "-s", str(back), "--steps", "1", "-n", "1"]
    assert main([*drawn, "-o", str(tmp_path / "pictures")]) == 0


def test_import_takes_a_file_for_each_text_encoder(sdxl_pipeline, tmp_path):
    sdxl_pipeline.save_pretrained(tmp_path / "model")
    files = [str(tmp_path / f"learned_embeds{end}.safetensors") for end in ("", "_2")]
    for file, encoder in zip(
        files, (sdxl_pipeline.text_encoder, sdxl_pipeline.text_encoder_2), strict=True
    ):
        save_file({"<cat>": torch.ones(1, encoder.config.hidden_size)}, file)
    output = tmp_path / "cat.safetensors"
    command = ["import", "-m", str(tmp_path / "model"), "--class-word", "cat", "-o", str(output)]
    assert main([*command, *files]) == 0
    assert len(Subject.load(output).tokens) == 2


def test_stages_are_averaged_only_when_asked(saved, tmp_path, capsys):
    file, embedding = saved(5, True), tmp_path / "embedding.safetensors"
    assert main(["export", file, "-o", str(embedding)]) == 1
    assert "--mean-of-stages" in capsys.readouterr().err
    assert not embedding.exists()
    assert main(["export", file, "-o", str(embedding), "--mean-of-stages"]) == 0
    assert "less like the subject" in capsys.readouterr().out
    mean = Subject.load(file).tokens[0].mean((0, 1))
    torch.testing.assert_close(load_file(embedding)["<it>"], mean)


def test_wrong_files_are_told_and_nothing_is_left(saved, sd15_folder, tmp_path, capsys):
    file = saved(1, False)
    assert main(["export", "missing.safetensors", "-o", str(tmp_path / "e.safetensors")]) == 1
    assert main(["export", file, "-o", str(tmp_path / "e.pt")]) == 1
    command = ["import", "-m", str(sd15_folder), "--class-word", "cat"]
    assert main([*command, str(tmp_path / "no.pt"), "-o", str(tmp_path / "s.safetensors")]) == 1
    assert "can run code" in capsys.readouterr().err
    assert main([*command, file, "-o", file]) == 1
    assert "would be overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["it.safetensors"]
