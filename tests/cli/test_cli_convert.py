"""`sefi-fast export` and `import`: a subject becomes an embedding and returns."""

from __future__ import annotations

import pytest
import torch
from pipelines.sampling import subject_for
from safetensors.torch import load_file, save_file

from sefi_fast.cli import main
from sefi_fast.subject import Subject


def test_an_exported_subject_is_imported_again(sd15_pipeline, sd15_folder, tmp_path, capsys):
    file, embedding, back = (str(tmp_path / f"{x}.safetensors") for x in ("it", "e", "back"))
    subject_for(sd15_pipeline, stages=1, split=False).save(file)
    assert main(["export", file, "-o", embedding]) == 0
    assert "load_textual_inversion" in capsys.readouterr().out
    command = ["import", embedding, "-m", str(sd15_folder), "--class-word", "cat", "-o", back]
    assert main(command) == 0
    found, wanted = Subject.load(back), Subject.load(file)
    assert (found.placeholder, found.class_word) == ("<it>", "cat")
    assert torch.equal(found.tokens[0], wanted.tokens[0])
    assert main([*command, "--placeholder", "<me>"]) == 0
    assert Subject.load(back).placeholder == "<me>"
    # The subject names its model.
    generate = ["generate", "a <me>", "-s", back, "--steps", "1", "-n", "1"]
    assert main([*generate, "-o", str(tmp_path / "images")]) == 0


def test_import_takes_a_file_for_each_text_encoder(sdxl_pipeline, tmp_path):
    sdxl_pipeline.save_pretrained(tmp_path / "model")
    files = [str(tmp_path / f"learned_embeds{end}.safetensors") for end in ("", "_2")]
    encoders = (sdxl_pipeline.text_encoder, sdxl_pipeline.text_encoder_2)
    for file, encoder in zip(files, encoders, strict=True):
        save_file({"<cat>": torch.ones(1, encoder.config.hidden_size)}, file)
    output = tmp_path / "cat.safetensors"
    command = ["import", "-m", str(tmp_path / "model"), "--class-word", "cat", "-o", str(output)]
    assert main([*command, *files]) == 0
    assert len(Subject.load(output).tokens) == 2


def test_stages_are_averaged_only_if_asked(sd15_pipeline, tmp_path, capsys):
    file, embedding = str(tmp_path / "it.safetensors"), tmp_path / "e.safetensors"
    subject_for(sd15_pipeline, stages=5, split=True).save(file)
    assert main(["export", file, "-o", str(embedding)]) == 1
    assert "--mean-of-stages" in capsys.readouterr().err
    assert not embedding.exists()
    assert main(["export", file, "-o", str(embedding), "--mean-of-stages"]) == 0
    assert "less like the subject" in capsys.readouterr().out
    mean = Subject.load(file).tokens[0].mean((0, 1))
    torch.testing.assert_close(load_file(embedding)["<it>"], mean)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["export", "missing.safetensors", "-o", "e.safetensors"], "missing.safetensors"),
        (["import", "no.pt", "--class-word", "cat", "-o", "s.safetensors"], "can run code"),
    ],
)
def test_wrong_files_leave_nothing(tmp_path, monkeypatch, capsys, command, words):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
