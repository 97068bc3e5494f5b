"""Scores of two subjects in one image, and the command that compares ways to ask for them."""

from __future__ import annotations

import csv

import pytest
from PIL import Image

from evals.studies import compare_two_subjects
from evals.studies.__main__ import main
from evals.studies.two_subjects import score_halves
from sefi_fast.errors import ModelError
from sefi_fast.tiny_world import SAMPLING
from sefi_fast.tiny_world.drawing import Identity
from sefi_fast.tiny_world.judge import ATTRIBUTES, IDENTITY_ATTRIBUTES, Judgement

FIRST = Identity("red", None, "plain", "big", "round")
SECOND = Identity("blue", "white", "spotted", "long", "round")


def shown(identity: Identity | None, **changed: str) -> Judgement:
    """A judgement that is sure of this identity, except for the changes."""
    sure = {name: values[0] for name, values in ATTRIBUTES.items()}
    if identity is not None:
        sure |= {"creature": "yes"} | {name: identity.value(name) for name in IDENTITY_ATTRIBUTES}
    sure |= changed
    return Judgement(
        {name: {v: float(v == sure[name]) for v in values} for name, values in ATTRIBUTES.items()}
    )


@pytest.mark.parametrize(
    ("left", "right", "ordered", "expected"),
    [
        (shown(FIRST), shown(SECOND), True, (1, 1, 1, 0)),
        # The two share their shape alone.
        (shown(SECOND), shown(FIRST), True, (1, 0.2, 0, 1)),
        (shown(SECOND), shown(FIRST), False, (1, 1, 1, 0)),
        (shown(FIRST, ears="long"), shown(SECOND), True, (1, 0.9, 7 / 8, 1 / 8)),
        (shown(FIRST, ears="pointy"), shown(SECOND), True, (1, 0.9, 7 / 8, 0)),
        (shown(FIRST), shown(None), True, (0, 0.6, 0.5, 0)),
    ],
)
def test_each_half_is_scored_by_its_own_subject(left, right, ordered, expected):
    found = score_halves((left, right), (FIRST, SECOND), ordered=ordered)
    assert found == pytest.approx(expected)


def test_without_peft_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("evals.studies.two_subjects.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install peft"):
        compare_two_subjects(output=tmp_path / "evidence")
    assert not any(tmp_path.iterdir())


def test_the_command_compares_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SAMPLING, "steps", 2)
    command = ["two", "--identities", "2", "--seeds", "1", "--steps", "2"]
    command += ["--batch-size", "2", "-o", str(tmp_path), "--quiet"]
    assert main(command) == 0
    files = [tmp_path / name for name in ("two.csv", "two.md", "two-sheet.png")]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    assert len(ways) == 5 and len(rows) == 5 * 2 * 2
    assert all(0 <= float(row["confused"]) <= 1 - float(row["own"]) + 1e-9 for row in rows)
    table = [line for line in files[1].read_text().splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ways
    with Image.open(files[2]) as sheet:
        assert sheet.width > 6 * 192
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    first = files[0].read_bytes()
    assert main(command) == 0 and files[0].read_bytes() == first
    assert len(trained) == 2
    assert trained == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


@pytest.mark.parametrize("wrong", [{"identities": 1}, {"seeds": 0}])
def test_bad_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least"):
        compare_two_subjects(**wrong)


@pytest.mark.parametrize(
    "arguments", [["two", "--prompts", "3"], ["two", "--workers", "3"], ["two", "lambda"]]
)
def test_options_of_other_studies_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "the study two runs alone" in capsys.readouterr().err
