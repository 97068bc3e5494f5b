"""Manifests of every kind, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sefi_fast.training.manifest import COLUMNS, ManifestError, model_of, read_subjects
from sefi_fast.training.subject_state import SubjectSpec


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("rex.png", "mia two.jpg"):
        Image.new("RGB", (32, 32)).save(folder / name)
    return folder


def problems_of(subjects: object, model: object = None) -> str:
    with pytest.raises(ManifestError) as caught:
        read_subjects(subjects, model)
    return str(caught.value)


def test_a_folder_with_class_words_beside_the_pictures(pictures: Path) -> None:
    (pictures / "rex.txt").write_text("dog\n")
    (pictures / ".hidden.png").write_bytes(b"")
    (pictures / "notes.md").write_text("no image")
    mia, rex = read_subjects(pictures)
    assert (rex.image, rex.class_word, rex.name, rex.placeholder) == (
        pictures / "rex.png",
        "dog",
        "rex",
        "<rex>",
    )
    assert (mia.name, mia.placeholder, mia.class_word) == ("mia two", "<mia-two>", None)


def test_csv_and_jsonl_say_the_same(pictures: Path) -> None:
    table = pictures / "all.csv"
    table.write_text(
        "\ufeffimage, class_word ,name,placeholder,seed,scene,mask,model\n"
        "rex.png,dog,Rex,<r>,7,in the forest,rex.png,some/model\n"
        "\n"
        '"mia two.jpg",cat,,,,"at home, on a sofa",,\n',
        encoding="utf-8",
    )
    lines = pictures / "all.jsonl"
    rows = [
        {
            "image": "rex.png",
            "class_word": "dog",
            "name": "Rex",
            "placeholder": "<r>",
            "seed": 7,
            "scene": "in the forest",
            "mask": "rex.png",
            "model": "some/model",
        },
        {"image": "mia two.jpg", "class_word": "cat", "scene": "at home, on a sofa", "seed": None},
    ]
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    tabs = pictures / "all.tsv"
    tabs.write_text("image\tname\tseed\nrex.png\tRex\t7\n")
    seen = [
        [tuple(getattr(entry, name) for name in COLUMNS) for entry in read_subjects(path)]
        for path in (table, lines)
    ]
    assert seen[0] == seen[1]
    rex, mia = read_subjects(table)
    assert (rex.seed, rex.mask, rex.where) == (7, pictures / "rex.png", "all.csv line 2")
    assert (mia.seed, mia.scene, mia.where) == (None, "at home, on a sofa", "all.csv line 4")
    assert model_of([mia, rex]) == "some/model"
    assert read_subjects(tabs)[0].seed == 7


def test_a_list_of_anything(pictures: Path) -> None:
    given = [
        str(pictures / "rex.png"),
        {"image": pictures / "mia two.jpg", "class_word": "cat"},
        Image.new("RGB", (32, 32)),
        SubjectSpec(image=np.zeros((32, 32, 3), np.uint8), name="array", placeholder="<a>", seed=3),
    ]
    entries = read_subjects(given)
    assert [entry.name for entry in entries] == ["rex", "mia two", "subject-000003", "array"]
    assert (entries[3].placeholder, entries[3].seed) == ("<a>", 3)
    with pytest.raises(TypeError, match="folder, a .csv"):
        read_subjects({"image": "rex.png"})


def test_every_problem_with_its_line(pictures: Path) -> None:
    table = pictures / "bad.csv"
    table.write_text(
        "image,name,seed\n"
        "rex.png,,-1\n"
        "rex.png,a/b,\n"
        "gone.png,,\n"
        "rex.png,a,1,2\n"
        ",x,\n"
        "rex.png,one,\n"
        "mia two.jpg,ONE,\n"
    )
    told = problems_of(table)
    for words in (
        "bad.csv line 2: seed must be a whole number",
        "bad.csv line 3: the name 'a/b' is not a file name",
        f"bad.csv line 4: there is no image at {pictures / 'gone.png'}",
        "line 5 has 4 values for 3 columns",
        "bad.csv line 6: it has no image",
        "bad.csv line 8: the name 'ONE' is that of bad.csv line 7 already",
        "nothing was begun",
    ):
        assert words in told
    lines = pictures / "bad.jsonl"
    lines.write_text('{"image": "rex.png", "color": 1}\n[]\n{\n{"image": "rex.png", "name": 3}\n')
    told = problems_of(lines)
    for words in (
        "bad.jsonl line 1: unknown column 'color'",
        "line 2 must be a JSON object",
        "line 3 is not JSON",
        "bad.jsonl line 4: name must be text, got 3",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("image,klass\nrex.png,dog\n", "line 1: unknown column 'klass'"),
        ("name\nrex\n", "line 1: there is no column 'image'"),
        ("image,image\nrex.png,dog\n", "line 1: a column is named twice"),
        ('image\n"rex.png\n', "line 2 is not CSV"),
    ],
)
def test_bad_headers(pictures: Path, header: str, words: str) -> None:
    table = pictures / "bad.csv"
    table.write_text(header)
    assert words in problems_of(table)


def test_a_folder_from_a_phone(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every image that can be read is an entry; the others are named."""
    for name in ("a.JFIF", "b.avif", "c.JPE", "d.Apng", "e.jp2", "f.ppm"):
        (pictures / name).write_bytes(b"")
    for name in ("._hidden.jpg", "notes.md", ".DS_Store", "film.mov"):
        (pictures / name).write_bytes(b"")
    assert len(read_subjects(pictures)) == 8 and not caplog.records
    others = ["g.HEIC", "h.dng", "i.svg", "j\x1b[31m.psd", "k.pdf", "l.CR2", "m.jxl"]
    for name in others:
        (pictures / name).write_bytes(b"")
    assert len(read_subjects(pictures)) == 8
    told = caplog.text
    assert "7 images" in told and "\x1b" not in told
    assert all(name in told for name in others if name.isprintable())
    only = pictures / "only"
    only.mkdir()
    (only / "g.HEIC").write_bytes(b"")
    assert "only g.HEIC" in problems_of(only)


def test_a_class_word_beside_a_picture_is_a_short_file(pictures: Path) -> None:
    (pictures / "rex.txt").write_bytes(b"dog" * 2**20)
    assert "rex.txt cannot be read" in problems_of(pictures)


def test_an_image_that_is_not_a_file_is_a_problem_of_its_line(pictures: Path) -> None:
    (pictures / "loop.png").symlink_to(pictures / "loop.png")
    for name in ("loop.png", "x" * 300, "a\0b", "/dev/zero", str(pictures)):
        told = problems_of([{"image": str(pictures / name)}])
        assert re.search("subject 1: (there is no image|image: The path .* null character)", told)


def test_nothing_to_learn(pictures: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    for text in ("", "image,name\n"):
        empty.write_text(text)
        assert "empty.csv is empty" in problems_of(empty)
    assert "the list of subjects is empty" in problems_of([])
    (tmp_path / "none").mkdir()
    assert "holds no image" in problems_of(tmp_path / "none")
    assert "there is no manifest" in problems_of(tmp_path / "gone.csv")
    assert "it is an image; give the folder" in problems_of(pictures / "rex.png")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8" in problems_of(binary)


def test_many_problems_are_cut_short(pictures: Path) -> None:
    table = pictures / "bad.csv"
    table.write_text("image\n" + "gone.png\n" * 30)
    told = problems_of(table)
    assert told.count("gone.png") == 10 and "and 20 more" in told


def test_mixed_base_models(pictures: Path) -> None:
    lines = pictures / "mixed.jsonl"
    rows = [
        {"image": "rex.png", "name": name, "model": model}
        for name, model in (("a", "one"), ("b", None), ("c", "two"))
    ]
    lines.write_text("\n".join(map(json.dumps, rows)))
    told = problems_of(lines)
    assert "mixed.jsonl line 3 names the base model 'two', mixed.jsonl line 1 'one'" in told
    told = problems_of(lines, model="two")
    assert "mixed.jsonl line 1 names the base model 'one', the run 'two'" in told
    assert "line 3" not in told


def test_an_empty_class_word_beside_a_picture(pictures: Path) -> None:
    (pictures / "rex.txt").write_text("\n")
    assert "rex.txt must hold one line" in problems_of(pictures)


def test_an_image_or_a_mask_that_is_no_text_is_told_with_the_rest(pictures: Path) -> None:
    lines = pictures / "bad.jsonl"
    rows = [{"image": 3}, {"image": "rex.png", "mask": ["a"], "seed": -1}, {"image": "gone.png"}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    told = problems_of(lines)
    for words in (
        "bad.jsonl line 1: image must be the path of an image, got 3",
        "bad.jsonl line 2: mask must be the path of an image, got ['a']",
        "bad.jsonl line 2: seed must be",
        "bad.jsonl line 3: there is no image",
    ):
        assert words in told
    assert "subject 1: image must be the path of an image, got 3" in problems_of([{"image": 3}])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "a.jsonl",
            '{"image": "rex.png", "class_word": "\\ud800"}',
            "half a character",
        ),
        ("a.jsonl", '{"image": "rex.png", "name": "a\\udc80"}', "half a character"),
        ("a.jsonl", '{"image": "\\ud800"}', "line 1: image: The path \\ud800 holds half a"),
        ("a.jsonl", '{"image": "' + "x" * 5000 + '"}', "line 1: there is no image at"),
        ("a.jsonl", '{"image": "a\\u0000b"}', "line 1: image: The path a\\x00b holds a null"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON: it is nested too deeply"),
        ("a.jsonl", '{"image": "rex.png", "image": "x"}', "'image' stands in it twice"),
        ("a.jsonl", '{"image": "rex.png", "seed": NaN}', "NaN in it is not a finite number"),
        ("a.jsonl", '{"image": "rex.png", "seed": 1e3}', "seed must be a whole number"),
        (
            "a.jsonl",
            '{"image": "rex.png", "seed": ' + "9" * 10_000 + "}",
            "more than 32 characters",
        ),
        ("a.jsonl", '{"image": "rex.png", "scene": ' + "[0]," * 9 + "}", "line 1 is not JSON"),
        ("a.jsonl", "{}\n" * 100_000, "and 991 more"),
        ("a.jsonl", "{\n" * 100_000, "and 991 more"),
        ("a.csv", "image\n" + "rex.png,1\n" * 100_000, "and 991 more"),
        ("a.csv", ",".join(f"c{n}" for n in range(100_000)), "unknown column"),
        ("a.csv", "image," + "seed," * 100_000, "a column is named twice"),
        ("a.csv", "image\n" + '"' + "x" * 200_000 + '"', "line 2 is not CSV"),
        ("a.csv", "image,class_word\nrex.png,\0" + "x" * 100_000, ""),
    ],
)
def test_hostile_lines_are_told(pictures: Path, name: str, text: str, told: str) -> None:
    path = pictures / name
    path.write_text(text, encoding="utf-8")
    if told:
        message = problems_of(path)
        assert told in message
        assert len(message) < 2100
        assert message.isprintable() or "\n" in message


def test_only_files_are_read(pictures: Path) -> None:
    os.mkfifo(pictures / "a.csv")
    with pytest.raises(ManifestError, match="not a regular file"):
        read_subjects(pictures / "a.csv")
    os.mkfifo(pictures / "pipe.png")
    with pytest.raises(ManifestError, match="there is no image at"):
        read_subjects([pictures / "pipe.png"])
    (pictures / "rex.txt").write_text("x" * 70_000)
    with pytest.raises(ManifestError, match="at most 65,536 are read"):
        read_subjects(pictures)


def test_placeholders_of_file_names_are_whole_and_distinct(tmp_path: Path) -> None:
    names = ["cafe\u0301", "😀", "😁", "हिन्दी", "rex 1", "rex-1", "rex\u00a01", "a.b", "a b", "a-b"]
    for name in names:
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    entries = read_subjects(tmp_path)
    assert len({entry.placeholder for entry in entries}) == len(names)
    by_name = {entry.name: entry.placeholder for entry in entries}
    assert by_name["café"] == "<café>" and by_name["हिन्दी"] == "<हिन्दी>"
    assert by_name["rex-1"] == "<rex-1>" and by_name["rex 1"] == "<rex:1>"


def test_a_placeholder_that_was_given_is_kept_and_not_given_twice(pictures: Path) -> None:
    given = [{"image": pictures / "rex.png", "name": name} for name in ("a b", "c", "d")]
    given[1]["placeholder"] = given[2]["placeholder"] = "<a-b>"
    assert [e.placeholder for e in read_subjects(given)] == ["<a:b>", "<a-b>", "<a-b>"]


@pytest.mark.parametrize("column", ["name", "placeholder", "class_word", "scene"])
def test_text_of_a_line_is_composed_and_whole(pictures: Path, column: str) -> None:
    row = {"image": "rex.png", column: "cafe\u0301"}
    path = pictures / "all.jsonl"
    path.write_text(json.dumps(row))
    assert getattr(read_subjects(path)[0], column) == "café"
    path.write_text(json.dumps({**row, column: "a\ud800"}))
    assert f"line 1: {column}: The text 'a\\ud800' holds half" in problems_of(path)


def test_a_home_folder_in_a_line_is_expanded(tmp_path: Path, monkeypatch: object) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (32, 32)).save(tmp_path / "rex.png")
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "all.csv"
    path.write_text("image,mask,model\n~/rex.png,~/rex.png,~/sd\n")
    (entry,) = read_subjects("~/sub/all.csv")
    assert entry.image == entry.mask == tmp_path / "rex.png"
    assert entry.model == str(tmp_path / "sd")
    path.write_text("image\n~nosuchuser/rex.png\n")
    assert "line 2: image: The path ~nosuchuser/rex.png" in problems_of(path)


def test_one_long_problem_hides_no_other(pictures: Path) -> None:
    path = pictures / "all.jsonl"
    rows = [{"image": "rex.png", "x" * 100_000: 1}, {"image": "rex.png", "seed": -1}]
    path.write_text("\n".join(map(json.dumps, rows)))
    said = problems_of(path)
    assert len(said) < 2000 and "line 2: seed must be" in said


def test_b3_each_problem_is_one_line(tmp_path):
    path = tmp_path / "subjects.jsonl"
    path.write_text("\n".join(json.dumps({"image": "\n" * 30 + name}) for name in ("a", "b")))
    lines = problems_of(path).splitlines()
    assert len(lines) == 3 and r"\n\na" in lines[1] and r"\n\nb" in lines[2]
