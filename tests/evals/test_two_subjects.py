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
from sefi_fast.tiny_world.judge import ATTRIBUTES, Judgement

FIRST = Identity("red", None, "plain", "big", "round")
SECOND = Identity("blue", "white", "spotted", "long", "round")


def shown(identity: Identity | None, **changed: str) -> Judgement:
    """A judge who is sure of this identity, but for what is changed."""
    sure = {name: values[0] for name, values in ATTRIBUTES.items()}
    sure["creature"] = "no" if identity is None else "yes"
    if identity is not None:
        for name in ("colour", "second_colour", "pattern", "ears", "shape"):
            sure[name] = getattr(identity, name) or "none"
    sure |= changed
    return Judgement(
        {
            name: {value: float(value == sure[name]) for value in values}
            for name, values in ATTRIBUTES.items()
        }
    )


def test_each_in_its_half_is_all_right_and_nothing_confused():
    score = score_halves((shown(FIRST), shown(SECOND)), (FIRST, SECOND), ordered=True)
    assert (score.both, score.id, score.own, score.confused) == (1, 1, 1, 0)


def test_exchanged_halves_count_only_where_an_order_was_asked_for():
    halves = (shown(SECOND), shown(FIRST))
    asked = score_halves(halves, (FIRST, SECOND), ordered=True)
    # They share the shape alone.
    assert (asked.id, asked.own, asked.confused) == (pytest.approx(0.2), 0, 1)
    free = score_halves(halves, (FIRST, SECOND), ordered=False)
    assert (free.id, free.own, free.confused) == (1, 1, 0)


def test_one_attribute_of_the_other_is_an_eighth_confused():
    halves = (shown(FIRST, ears="long"), shown(SECOND))
    score = score_halves(halves, (FIRST, SECOND), ordered=True)
    assert (score.own, score.confused) == (7 / 8, 1 / 8)
    neither = score_halves(
        (shown(FIRST, ears="pointy"), shown(SECOND)), (FIRST, SECOND), ordered=True
    )
    assert (neither.own, neither.confused) == (7 / 8, 0)


def test_an_empty_half_is_no_pair():
    score = score_halves((shown(FIRST), shown(None)), (FIRST, SECOND), ordered=True)
    assert (score.both, score.own, score.confused) == (0, 0.5, 0)


def test_without_peft_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("evals.studies.two_subjects.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install peft"):
        compare_two_subjects(output=tmp_path / "evidence")
    assert not any(tmp_path.iterdir())


def test_the_command_compares_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SAMPLING, "steps", 2)
    command = ["two", "--identities", "2", "--seeds", "1", "--steps", "2"]
    command += ["--batch-size", "2", "-o", str(tmp_path), "--quiet"]
    assert main(command) == 0
    files = [tmp_path / name for name in ("two.md", "two.csv", "two-sheet.png")]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    assert len(ways) == 5 and len(rows) == 5 * 2 * 2
    assert all(0 <= float(row["confused"]) <= 1 - float(row["own"]) + 1e-9 for row in rows)
    table = [line for line in files[0].read_text().splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ways
    with Image.open(files[2]) as sheet:
        assert sheet.width > 6 * 192
    learnt = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(learnt) == 2
    first = files[1].read_bytes()
    assert main(command) == 0
    assert files[1].read_bytes() == first
    assert learnt == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_bad_numbers_are_told():
    with pytest.raises(ValueError, match="identities must be at least 2, got 1"):
        compare_two_subjects(identities=1)
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        compare_two_subjects(seeds=0)


@pytest.mark.parametrize(
    "arguments", [["two", "--prompts", "3"], ["two", "--workers", "3"], ["two", "lambda"]]
)
def test_options_of_other_studies_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "the study two runs alone" in capsys.readouterr().err
