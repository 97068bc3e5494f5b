"""The subject file: exact, small, whole or not at all, and every damage is told."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subject.making import make_subject

from sefi_fast.errors import SubjectFileError
from sefi_fast.subject import Subject


def rewrite(path: Path, metadata=None, tensors=None, drop=()) -> None:
    """Changes parts of a subject file, keeping it a sound safetensors file."""
    with safetensors.safe_open(path, "pt") as opened:
        old = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        kept = {**opened.metadata(), **(metadata or {})}
    old.update(tensors or {})
    path.write_bytes(
        safetensors.torch.save(
            {name: tensor for name, tensor in old.items() if name not in drop},
            {name: text for name, text in kept.items() if name not in drop},
        )
    )


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "me.safetensors"
    make_subject().save(path)
    return path


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("widths", [(48,), (48, 80)])
@pytest.mark.parametrize("vectors", [1, 3])
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, split, widths, vectors):
    subject = make_subject(
        3, split, widths, vectors=vectors, placeholder="<ich-ü>", class_word="Person"
    )
    subject.save(tmp_path / "a.safetensors")
    loaded = Subject.load(str(tmp_path / "a.safetensors"))
    assert (loaded.stages, loaded.split, loaded.num_vectors) == (3, split, vectors)
    for name in ("placeholder", "class_word", "base_model", "settings", "library_version"):
        assert getattr(loaded, name) == getattr(subject, name)
    for old, new in zip(subject.tokens, loaded.tokens, strict=True):
        assert torch.equal(old, new)
    for old, new in zip(subject.class_embeddings, loaded.class_embeddings, strict=True):
        assert torch.equal(old, new)


def test_one_subject_is_one_file_byte_for_byte(tmp_path):
    contents = set()
    for number in range(8):
        make_subject().save(tmp_path / f"{number}.safetensors")
        contents.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(contents) == 1
    Subject.load(tmp_path / "0.safetensors").save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() in contents


def test_sizes(tmp_path):
    path = tmp_path / "s.safetensors"
    make_subject(5, True, (768,)).save(path)
    assert path.stat().st_size <= 36_000
    assert Subject.load(path).tokens[0].dtype == torch.float32

    make_subject(5, True, (768,), vectors=4).save(path)
    assert path.stat().st_size <= 66_000
    large = make_subject(10, True, (768, 1280))
    large.save(path)
    assert path.stat().st_size <= 100_000
    loaded = Subject.load(path)
    for old, new in zip(large.tokens, loaded.tokens, strict=True):
        assert torch.equal(old.half().float(), new)


def test_tokens_beyond_float16_are_not_saved_as_infinity(tmp_path):
    large = make_subject(10, True, (768, 1280))
    large.tokens[0][0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="float16"):
        large.save(tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_history_is_kept_as_a_summary(tmp_path):
    history = SimpleNamespace(
        loss=[1.0] * 18 + [0.2, 0.4], subject_loss=[4.0] * 20, seconds=[float(i) for i in range(20)]
    )
    make_subject(history=history).save(tmp_path / "s.safetensors")
    loaded = Subject.load(tmp_path / "s.safetensors")
    assert loaded.history is None
    assert loaded.summary == {
        "steps": 20,
        "final_loss": 0.3,
        "final_subject_loss": 4.0,
        "seconds": 19.0,
    }


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(saved, monkeypatch):
    before = saved.read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        make_subject(seed=1).save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_settings_that_json_cannot_hold_are_told(tmp_path):
    with pytest.raises(ValueError, match="settings"):
        make_subject(settings={"x": object()}).save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="settings"):
        make_subject(settings={"x": float("nan")}).save(tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_save_makes_the_folder(tmp_path):
    make_subject().save(tmp_path / "new" / "folder" / "me.safetensors")
    assert Subject.load(tmp_path / "new" / "folder" / "me.safetensors").placeholder == "<me>"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "lora"}, "holds no subject"),
        ({"format_version": "3"}, "update sefi_fast"),
        ({"format_version": "one"}, "format_version"),
        ({"stages": "4"}, "shape"),
        ({"stages": "-5"}, "stages"),
        ({"stages": "9" * 5000}, "stages"),
        ({"split": "false"}, "shape"),
        ({"split": "maybe"}, "split"),
        ({"split": "3"}, "split"),
        ({"num_vectors": "2"}, "shape"),
        ({"num_vectors": "many"}, "num_vectors"),
        ({"text_encoders": "2"}, "wanted"),
        ({"text_encoders": "0"}, "a whole number from 1 to 4"),
        ({"text_encoders": "999999999"}, "a whole number from 1 to 4"),
        ({"stages": "30720"}, "a whole number from 1 to 100"),
        ({"stages": "1e2"}, "a whole number"),
        ({"stages": "٣"}, "a whole number"),
        ({"num_vectors": "999999999"}, "a whole number from 1 to 75"),
        ({"settings": "[1]"}, "settings"),
        ({"settings": "{"}, "settings"),
        ({"settings": "[" * 100_000}, "nested too deeply"),
        ({"settings": '{"a":' + "[" * 900 + "]" * 900 + "}"}, "nested more than 32 levels"),
        ({"settings": '{"steps": ' + "9" * 100_000 + "}"}, "more than 32 characters"),
        ({"settings": '{"steps": NaN}'}, "NaN in it is not a finite number"),
        ({"settings": '{"steps": 1e999}'}, "1e999 in it is not a finite number"),
        ({"settings": '{"steps": 1, "steps": 2}'}, "'steps' stands in it twice"),
        ({"settings": '{"model": 3}'}, "the model in its settings is not text"),
        ({"summary": "3"}, "summary"),
        ({"library_version": "9" * 8_000_000}, "header of at most"),
        ({"placeholder": "two words"}, "placeholder"),
        ({"placeholder": ""}, "placeholder"),
        ({"class_word": "  "}, "class word"),
    ],
)
def test_wrong_metadata_is_told(saved, metadata, message):
    rewrite(saved, metadata)
    with pytest.raises(SubjectFileError, match=message) as raised:
        Subject.load(saved)
    assert str(saved) in str(raised.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (2**60, "header of at most"),
        (2**64 - 1, "header of at most"),
        (b"[" * 5000, "nested too deeply"),
        (b'{"__metadata__": {"format": 1}}', "metadata is not text"),
        (b'{"__metadata__": []}', "header is not one"),
        (b"null", "header is not one"),
        (b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}', "sound"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "sound"),
    ],
)
def test_hostile_headers_are_told(saved, header, message):
    if isinstance(header, int):
        saved.write_bytes(header.to_bytes(8, "little") + saved.read_bytes()[8:])
    else:
        saved.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(SubjectFileError, match=message):
        Subject.load(saved)


def test_a_subject_that_is_saved_can_be_loaded(tmp_path):
    path = tmp_path / "s.safetensors"
    make_subject(100, True, (48,), vectors=75).save(path)
    assert Subject.load(path).tokens[0].shape == (100, 2, 75, 48)
    make_subject(settings={"model": "caf\udce9"}).save(path)
    assert Subject.load(path).settings == {"model": "caf\udce9"}
    for counts in ({"stages": 101}, {"vectors": 76}, {"widths": (4,) * 5}):
        with pytest.raises(ValueError, match="at most 100 stages|1 to 4"):
            make_subject(**counts)
    before = path.read_bytes()
    for held in ({"a": 10**40}, {"a": "x" * 5_000_000}, {1: "a", "1": "b"}):
        with pytest.raises(ValueError, match="could not be loaded|cannot be kept"):
            make_subject(settings=held).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "name",
    [
        "format_version",
        "stages",
        "split",
        "num_vectors",
        "settings",
        "base_model",
        "library_version",
    ],
)
def test_missing_metadata_is_told(saved, name):
    rewrite(saved, drop=[name])
    with pytest.raises(SubjectFileError, match=f"{name} is missing"):
        Subject.load(saved)


@pytest.mark.parametrize(
    ("tensors", "drop", "message"),
    [
        ({"tokens.0": torch.zeros(5, 2, 1, 47)}, [], "width"),
        ({"tokens.0": torch.zeros(5, 3, 1, 48)}, [], "shape"),
        ({"tokens.0": torch.zeros(5, 2, 48)}, [], "shape"),
        ({"tokens.0": torch.zeros(480)}, [], "shape"),
        ({"tokens.0": torch.zeros(5, 2, 1, 48, dtype=torch.int32)}, [], "int32"),
        ({"tokens.0": torch.zeros(5, 2, 1, 48, dtype=torch.float64)}, [], "float64"),
        ({"tokens.0": torch.full((5, 2, 1, 48), float("nan"))}, [], "NaN"),
        ({"tokens.0": torch.full((5, 2, 1, 48), float("inf"))}, [], "infinity"),
        (
            {"tokens.0": torch.zeros(5, 2, 1, 0), "class_embedding.0": torch.zeros(1, 0)},
            [],
            "shape",
        ),
        ({"class_embedding.0": torch.zeros(48)}, [], "shape"),
        ({"class_embedding.0": torch.zeros(2, 48)}, [], "more than 1 tokens"),
        ({"more": torch.zeros(1)}, [], "wanted"),
        ({}, ["tokens.0"], "wanted"),
        ({}, ["class_embedding.0"], "wanted"),
    ],
)
def test_wrong_tensors_are_told(saved, tensors, drop, message):
    rewrite(saved, tensors=tensors, drop=drop)
    with pytest.raises(SubjectFileError, match=message):
        Subject.load(saved)


@pytest.mark.parametrize("rank", [0, 1])
def test_files_of_the_first_format_are_read(saved, rank):
    subject = Subject.load(saved)
    first = {
        "tokens.0": subject.tokens[0].squeeze(2),
        "class_embedding.0": subject.class_embeddings[0].squeeze(0),
    }
    if rank == 0:
        first["class_embedding.0"] = torch.tensor(1.0)
    rewrite(saved, {"format_version": "1"}, first, drop=["num_vectors"])
    if rank == 0:
        with pytest.raises(SubjectFileError, match="class_embedding.0 has shape"):
            Subject.load(saved)
        return
    again = Subject.load(saved)
    assert again.num_vectors == 1
    assert torch.equal(again.tokens[0], subject.tokens[0])
    assert torch.equal(again.class_embeddings[0], subject.class_embeddings[0])


def test_other_files_are_told(tmp_path):
    lora = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"lora_A": torch.zeros(4, 4)}, lora)
    pickled = tmp_path / "embeds.pt"
    torch.save({"<me>": torch.zeros(768)}, pickled)
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    huge = tmp_path / "huge.safetensors"
    with open(huge, "wb") as stream:
        stream.truncate(70 * 2**20)
    for path, message in [
        (lora, "holds no subject"),
        (pickled, "no readable safetensors"),
        (empty, "ends too soon"),
        (huge, "at most 67,108,864 are read"),
        (tmp_path, "is a folder"),
        (tmp_path / "missing.safetensors", "does not exist"),
    ]:
        with pytest.raises(SubjectFileError, match=message):
            Subject.load(path)


def test_loading_never_unpickles(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harmed"),))

    path = tmp_path / "bad.safetensors"
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(SubjectFileError):
        Subject.load(path)
    assert not (tmp_path / "harmed").exists()


@pytest.fixture(scope="module")
def sound_bytes(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "s.safetensors"
    make_subject(2, True, (4,)).save(path)
    return path, path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_subject_file_error_or_harmless(sound_bytes, data):
    path, sound = sound_bytes
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    kept = data.draw(st.one_of(st.just(len(sound)), st.integers(0, len(sound))))
    path.write_bytes(bytes(damaged[:kept]))
    try:
        subject = Subject.load(path)
    except SubjectFileError as error:
        assert str(path) in str(error)
    else:
        assert kept == len(sound)
        assert subject.tokens[0].shape == (2, 2, 1, 4)
        assert torch.isfinite(subject.tokens[0]).all()
