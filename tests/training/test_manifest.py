"""Manifests of every kind, the errors of those that cannot be used, and their shares."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sefi_fast.training.manifest import (
    COLUMNS,
    ManifestError,
    Shard,
    current_shard,
    model_of,
    read_subjects,
)
from sefi_fast.training.subject_state import SubjectSpec


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("rex.png", "mia two.jpg"):
        Image.new("RGB", (32, 32)).save(folder / name)
    return folder


def problems_of(subjects: object, model: object = None) -> str:
    with pytest.raises(ManifestError) as caught:
        read_subjects(subjects, model)
    return str(caught.value)


def json_lines(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_folder_with_class_words_next_to_the_images(images: Path) -> None:
    (images / "rex.txt").write_text("dog\n")
    (images / ".hidden.png").write_bytes(b"")
    (images / "notes.md").write_text("no image")
    mia, rex = read_subjects(images)
    found = (rex.image, rex.class_word, rex.name, rex.placeholder)
    assert found == (images / "rex.png", "dog", "rex", "<rex>")
    assert (mia.name, mia.placeholder, mia.class_word) == ("mia two", "<mia-two>", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dog" * 2**20, "at most 65,536 are read"),
        (b"\xff\xfe", "rex.txt cannot be read as UTF-8"),
        (b"\n", "rex.txt must hold one line"),
        (b"a\nb", "rex.txt must hold one line"),
    ],
)
def test_a_class_word_next_to_an_image_is_one_short_line(images, content, message) -> None:
    (images / "rex.txt").write_bytes(content)
    assert message in problems_of(images)


def test_csv_and_jsonl_give_the_same_subjects(images: Path) -> None:
    table = images / "all.csv"
    table.write_text(
        "\ufeffimage, class_word ,name,placeholder,seed,scene,mask,model\n"
        "rex.png,dog,Rex,<r>,7,in the forest,rex.png,some/model\n"
        "\n"
        '"mia two.jpg",cat,,,,"at home, on a sofa",,\n',
        encoding="utf-8",
    )
    lines = json_lines(
        images / "all.jsonl",
        {
            "image": "rex.png", "class_word": "dog", "name": "Rex", "placeholder": "<r>",
            "seed": 7, "scene": "in the forest", "mask": "rex.png", "model": "some/model",
        },
        {"image": "mia two.jpg", "class_word": "cat", "scene": "at home, on a sofa", "seed": None},
    )  # fmt: skip
    seen = [
        [tuple(getattr(spec, name) for name in COLUMNS) for spec in read_subjects(path)]
        for path in (table, lines)
    ]
    assert seen[0] == seen[1]
    rex, mia = read_subjects(table)
    assert (rex.seed, rex.mask, rex.where) == (7, images / "rex.png", "all.csv line 2")
    assert (mia.seed, mia.scene, mia.where) == (None, "at home, on a sofa", "all.csv line 4")
    assert model_of([mia, rex]) == "some/model"
    tabs = images / "all.tsv"
    tabs.write_text("image\tname\tseed\nrex.png\tRex\t7\n")
    assert read_subjects(tabs)[0].seed == 7


def test_a_list_of_all_kinds(images: Path) -> None:
    given = [
        str(images / "rex.png"),
        {"image": images / "mia two.jpg", "class_word": "cat"},
        Image.new("RGB", (32, 32)),
        SubjectSpec(image=np.zeros((32, 32, 3), np.uint8), name="array", placeholder="<a>", seed=3),
    ]
    specs = read_subjects(given)
    assert [spec.name for spec in specs] == ["rex", "mia two", "subject-000003", "array"]
    assert (specs[3].placeholder, specs[3].seed) == ("<a>", 3)
    with pytest.raises(TypeError, match=r"folder, a \.csv"):
        read_subjects({"image": "rex.png"})


PROBLEMS = {
    "bad.csv": (
        "image,name,seed,placeholder\nrex.png,,-1\nrex.png,a/b,\ngone.png,,\nrex.png,a,1,<a>,2\n"
        ",x,\nrex.png,one,\nmia two.jpg,ONE,\nrex.png,y,,a b\n",
        (
            "bad.csv line 2: seed must be a whole number",
            "bad.csv line 3: the name 'a/b' is not a file name",
            "bad.csv line 4: there is no image at",
            "line 5 has 5 values for 4 columns",
            "bad.csv line 6: it has no image",
            "bad.csv line 8: the name 'ONE' is that of bad.csv line 7 already",
            "bad.csv line 9: placeholder: placeholder must be one word",
            "nothing was begun",
        ),
    ),
    "bad.jsonl": (
        '{"image": "rex.png", "color": 1}\n[]\n{\n{"image": "rex.png", "name": 3}\n{"image": 3}\n'
        '{"image": "rex.png", "mask": ["a"], "seed": -1}\n{"image": "rex.png", "name": "'
        + "x" * 121
        + '"}\n',
        (
            "bad.jsonl line 1: unknown column 'color'",
            "line 2 must be a JSON object",
            "line 3 is not JSON",
            "bad.jsonl line 4: name must be text, got 3",
            "bad.jsonl line 5: image must be the path of an image, got 3",
            "bad.jsonl line 6: mask must be the path of an image, got ['a']",
            "bad.jsonl line 6: seed must be",
            "is longer than 120 bytes",
        ),
    ),
    "klass.csv": ("image,klass\nrex.png,dog\n", ("line 1: unknown column 'klass'",)),
    "name.csv": ("name\nrex\n", ("line 1: there is no column 'image'",)),
    "twice.csv": ("image," + "seed," * 100_000, ("line 1: a column is named twice",)),
    "quote.csv": ('image\n"rex.png\n', ("line 2 is not CSV",)),
    "long.csv": ("image\n" + "gone.png\n" * 30, ("and 20 more",)),
    "empty.csv": ("", ("empty.csv is empty",)),
    "header.csv": ("image,name\n", ("header.csv is empty",)),
    "text.txt": ("rex.png", ("text.txt is not a manifest",)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_is_listed_with_its_line(images: Path, name: str) -> None:
    text, messages = PROBLEMS[name]
    (images / name).write_text(text)
    found = problems_of(images / name)
    assert all(message in found for message in messages), found
    assert found.count("gone.png") <= 10


def test_a_folder_from_a_phone(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every image that can be read is a subject; the others are named."""
    for name in ("a.JFIF", "b.avif", "c.JPE", "d.Apng", "e.jp2", "f.ppm"):
        (images / name).write_bytes(b"")
    for name in ("._hidden.jpg", "notes.md", ".DS_Store", "film.mov"):
        (images / name).write_bytes(b"")
    assert len(read_subjects(images)) == 8 and not caplog.records
    others = ["g.HEIC", "h.dng", "i.svg", "j\x1b[31m.psd", "k.pdf", "l.CR2", "m.jxl"]
    for name in others:
        (images / name).write_bytes(b"")
    assert len(read_subjects(images)) == 8
    assert "7 images" in caplog.text and "\x1b" not in caplog.text
    assert all(name in caplog.text for name in others if name.isprintable())
    only = images / "only"
    only.mkdir()
    (only / "g.HEIC").write_bytes(b"")
    assert "only g.HEIC" in problems_of(only)


def test_an_image_that_is_not_a_file_is_a_problem_of_its_line(images: Path) -> None:
    (images / "loop.png").symlink_to(images / "loop.png")
    os.mkfifo(images / "pipe.png")
    for name in ("loop.png", "pipe.png", "x" * 300, "/dev/zero", str(images)):
        assert "subject 1: there is no image" in problems_of([{"image": str(images / name)}])
    assert "subject 1: image: The path a\\x00b holds a null" in problems_of([{"image": "a\0b"}])


def test_sources_without_subjects(images: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for source, message in (
        ([], "the list of subjects is empty"),
        (tmp_path / "none", "holds no image"),
        (tmp_path / "gone.csv", "there is no manifest"),
        (images / "rex.png", "it is an image; give the folder"),
        (tmp_path / "binary.csv", "cannot be read as UTF-8"),
        (tmp_path / "pipe.csv", "not a regular file"),
    ):
        assert message in problems_of(source)


def test_mixed_base_models(images: Path) -> None:
    models = (("a", "one"), ("b", None), ("c", "two"))
    rows = [{"image": "rex.png", "name": name, "model": model} for name, model in models]
    lines = json_lines(images / "mixed.jsonl", *rows)
    message = "mixed.jsonl line 3 names the base model 'two', mixed.jsonl line 1 'one'"
    assert message in problems_of(lines)
    found = problems_of(lines, model="two")
    assert "mixed.jsonl line 1 names the base model 'one', the run 'two'" in found
    assert "line 3" not in found


HOSTILE = [
    ("a.jsonl", '{"image": "rex.png", "class_word": "\\ud800"}', "unpaired surrogate"),
    ("a.jsonl", '{"image": "rex.png", "name": "a\\udc80"}', "unpaired surrogate"),
    ("a.jsonl", '{"image": "\\ud800"}', "line 1: image: The path \\ud800 holds an unpaired"),
    ("a.jsonl", '{"image": "' + "x" * 5000 + '"}', "line 1: there is no image at"),
    ("a.jsonl", "[" * 100_000, "line 1 is not JSON: it is nested too deeply"),
    ("a.jsonl", '{"image": "rex.png", "image": "x"}', "'image' stands in it twice"),
    ("a.jsonl", '{"image": "rex.png", "seed": NaN}', "NaN in it is not a finite number"),
    ("a.jsonl", '{"image": "rex.png", "seed": 1e3}', "seed must be a whole number"),
    ("a.jsonl", '{"image": "rex.png", "seed": ' + "9" * 10_000 + "}", "more than 32 characters"),
    ("a.jsonl", '{"' + "x" * 100_000 + '": 1}\n{"image": "a", "seed": -1}', "line 2: seed must be"),
    ("a.jsonl", '{"image": "\\n\\n\\na"}\n{"image": "\\n\\n\\nb"}', r"\n\n\nb"),
    ("a.jsonl", "{}\n" * 100_000, "and 991 more"),
    ("a.csv", "image\n" + "rex.png,1\n" * 100_000, "and 991 more"),
    ("a.csv", "image\n" + '"' + "x" * 200_000 + '"', "line 2 is not CSV"),
]


@pytest.mark.parametrize(("name", "text", "message"), HOSTILE)
def test_hostile_lines_are_listed(images: Path, name: str, text: str, message: str) -> None:
    (images / name).write_text(text, encoding="utf-8")
    found = problems_of(images / name)
    assert message in found and len(found) < 2100
    assert all(line.isprintable() for line in found.splitlines())


def test_placeholders_of_file_names_are_whole_and_distinct(tmp_path: Path) -> None:
    names = ["cafe\u0301", "😀", "😁", "हिन्दी", "rex 1", "rex-1", "rex\u00a01", "a.b", "a b", "a-b"]
    for name in names:
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    by_name = {spec.name: spec.placeholder for spec in read_subjects(tmp_path)}
    assert len(set(by_name.values())) == len(names)
    assert by_name["café"] == "<café>" and by_name["हिन्दी"] == "<हिन्दी>"
    assert by_name["rex-1"] == "<rex-1>" and by_name["rex 1"] == "<rex:1>"
    given = [{"image": tmp_path / "a b.png", "name": name} for name in ("a b", "c", "d")]
    given[1]["placeholder"] = given[2]["placeholder"] = "<a-b>"
    assert [e.placeholder for e in read_subjects(given)] == ["<a:b>", "<a-b>", "<a-b>"]


@pytest.mark.parametrize("column", ["name", "placeholder", "class_word", "scene"])
def test_text_of_a_line_is_composed_and_whole(images: Path, column: str) -> None:
    row = {"image": "rex.png", column: "cafe\u0301"}
    path = json_lines(images / "all.jsonl", row)
    assert getattr(read_subjects(path)[0], column) == "café"
    json_lines(path, {**row, column: "a\ud800"})
    assert f"line 1: {column}: The text 'a\\ud800' holds an unpaired" in problems_of(path)


def test_a_home_folder_in_a_line_is_expanded(tmp_path: Path, monkeypatch: object) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (32, 32)).save(tmp_path / "rex.png")
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "all.csv"
    path.write_text("image,mask,model\n~/rex.png,~/rex.png,~/sd\n")
    (spec,) = read_subjects("~/sub/all.csv")
    assert spec.image == spec.mask == tmp_path / "rex.png"
    assert spec.model == str(tmp_path / "sd")
    path.write_text("image\n~nosuchuser/rex.png\n")
    assert "line 2: image: The path ~nosuchuser/rex.png" in problems_of(path)


def test_every_item_goes_to_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(range(7))
    shares = [Shard(index, 3).share(items) for index in range(3)]
    assert sorted(sum(shares, [])) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert current_shard() == Shard(0, 1, None)
