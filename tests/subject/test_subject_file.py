"""The subject file: exact, small, written whole or not at all; every damage is reported."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from subject.making import make_subject

from sefi_fast.errors import SubjectFileError
from sefi_fast.subject import Subject


def rewrite(path: Path, metadata=None, tensors=None, drop=()) -> None:
    """Change parts of a subject file, which stays a sound safetensors file."""
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
def test_a_subject_is_loaded_as_it_was_saved_bit_for_bit(tmp_path, split, widths, vectors):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    names = {"placeholder": "<ich-ü>", "class_word": "Person", "base_model": "x"}
    subject = make_subject(3, split, widths, vectors=vectors, **names)
    subject.settings["model"] = "caf\udce9"
    subject.save(path)
    loaded = Subject.load(str(path))
    assert (loaded.stages, loaded.split, loaded.num_vectors) == (3, split, vectors)
    for name in (*names, "settings", "library_version"):
        assert getattr(loaded, name) == getattr(subject, name)
    for name in ("tokens", "class_embeddings"):
        for old, new in zip(getattr(subject, name), getattr(loaded, name), strict=True):
            assert torch.equal(old, new)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("shape", "size", "is_exact"),
    [
        ((5, True, (768,), 0, 1), 36_000, True),
        ((5, True, (768,), 0, 4), 66_000, False),
        ((10, True, (768, 1280), 0, 1), 100_000, False),
        ((100, True, (48,), 0, 75), 1_500_000, False),
    ],
)
def test_large_subjects_are_saved_in_half_precision(tmp_path, shape, size, is_exact):
    subject = make_subject(*shape)
    subject.save(tmp_path / "s.safetensors")
    assert (tmp_path / "s.safetensors").stat().st_size <= size
    for old, new in zip(
        subject.tokens, Subject.load(tmp_path / "s.safetensors").tokens, strict=True
    ):
        assert torch.equal(old if is_exact else old.half().float(), new)


def test_the_history_is_kept_as_a_summary(tmp_path):
    history = SimpleNamespace(
        loss=[1.0] * 18 + [0.2, 0.4], subject_loss=[4.0] * 20, seconds=[float(i) for i in range(20)]
    )
    make_subject(history=history).save(tmp_path / "s.safetensors")
    loaded = Subject.load(tmp_path / "s.safetensors")
    assert loaded.history is None
    expected = {"steps": 20, "final_loss": 0.3, "final_subject_loss": 4.0, "seconds": 19.0}
    assert loaded.summary == expected
    history = SimpleNamespace(loss=[float("nan")], subject_loss=[], seconds=[])
    make_subject(history=history).save(tmp_path / "s.safetensors")
    assert Subject.load(tmp_path / "s.safetensors").summary == {"steps": 1}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"x": object()}, "settings cannot be kept as JSON"),
        ({"x": float("nan")}, "settings cannot be kept as JSON"),
        ({"a": 10**40}, "could not be loaded"),
        ({"a": "x" * 5_000_000}, "could not be loaded"),
        ({1: "a", "1": "b"}, "could not be loaded|cannot be kept"),
    ],
)
def test_a_subject_that_could_not_be_loaded_is_not_saved(saved, held, message):
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=message):
        make_subject(settings=held).save(saved)
    large = make_subject(10, True, (768, 1280))
    large.tokens[0][0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"reach 1e\+06, beyond float16"):
        large.save(saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


WRONG_TEXT = [
    ({"format": "lora"}, "not of a subject"),
    ({"format_version": "3"}, "Update sefi_fast"),
    ({"format_version": "one"}, "format_version"),
    *(
        ({name: text}, f"its {name} is '{text[:3]}")
        for name, texts in {
            "stages": ["4", "-5", "30720", "1e2", "٣", "9" * 5000],
            "split": ["false", "maybe", "3"],
            "num_vectors": ["2", "many", "999999999"],
            "text_encoders": ["2", "0", "999999999"],
        }.items()
        for text in texts
    ),
    ({"settings": "[1]"}, "settings is not a JSON object"),
    ({"settings": "{"}, "settings cannot be read as JSON"),
    ({"settings": "[" * 100_000}, "nested too deeply"),
    ({"settings": '{"a":' + "[" * 900 + "]" * 900 + "}"}, "nested more than 32 levels"),
    ({"settings": '{"steps": ' + "9" * 100_000 + "}"}, "more than 32 characters"),
    ({"settings": '{"steps": NaN}'}, "NaN in it is not a finite number"),
    ({"settings": '{"steps": 1e999}'}, "1e999 in it is not a finite number"),
    ({"settings": '{"steps": 1, "steps": 2}'}, "'steps' stands in it twice"),
    ({"summary": "3"}, "summary"),
    ({"library_version": "9" * 8_000_000}, "header of at most"),
    ({"placeholder": "two words"}, "placeholder"),
    ({"placeholder": ""}, "placeholder"),
    ({"class_word": "  "}, "class_word"),
]
TEXTS = [
    "format_version", "stages", "split", "num_vectors", "text_encoders", "settings", "summary",
    "base_model", "library_version",
]  # fmt: skip
SHAPE = torch.zeros(5, 2, 1, 48)
WRONG_TENSORS = [
    ({"tokens.0": torch.zeros(5, 2, 1, 47)}, "does not fit"),
    ({"tokens.0": torch.zeros(5, 3, 1, 48)}, "tokens must be"),
    ({"tokens.0": torch.zeros(5, 2, 48)}, "shape"),
    ({"tokens.0": torch.zeros(480)}, "shape"),
    ({"tokens.0": SHAPE.int()}, "int32"),
    ({"tokens.0": SHAPE.double()}, "float64"),
    ({"tokens.0": SHAPE * float("nan")}, "NaN"),
    ({"tokens.0": SHAPE + float("inf")}, "infinity"),
    ({"tokens.0": SHAPE[..., :0], "class_embedding.0": torch.zeros(1, 0)}, "tokens must be"),
    ({"tokens.0": torch.zeros(101, 2, 1, 48)}, "at most 100 stages"),
    ({"class_embedding.0": torch.zeros(48)}, "shape"),
    ({"class_embedding.0": torch.zeros(2, 48)}, "does not fit"),
    ({"more": torch.zeros(1)}, "wanted"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"metadata": metadata}, message) for metadata, message in WRONG_TEXT),
        *(({"drop": [name]}, f": its {name} is missing") for name in TEXTS),
        *(({"tensors": tensors}, message) for tensors, message in WRONG_TENSORS),
        *(({"drop": [name]}, "wanted") for name in ("tokens.0", "class_embedding.0")),
        ({"drop": ["tokens.0", "class_embedding.0"]}, "each text encoder"),
    ],
)
def test_a_wrong_file_is_refused(saved, changes, message):
    rewrite(saved, **changes)
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
        (b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}', "valid"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "valid"),
    ],
)
def test_a_hostile_header_is_refused(saved, header, message):
    if isinstance(header, int):
        saved.write_bytes(header.to_bytes(8, "little") + saved.read_bytes()[8:])
    else:
        saved.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(SubjectFileError, match=message):
        Subject.load(saved)


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_other_files_are_refused_and_never_unpickled(tmp_path):
    path, mark = tmp_path / "a.safetensors", tmp_path / "harmed"
    for content, message in [
        (safetensors.torch.save({"lora_A": torch.zeros(4, 4)}), "not of a subject"),
        (pickle.dumps(Harmful(mark)), "not a readable safetensors"),
        (b"", "ends too soon"),
    ]:
        path.write_bytes(content)
        with pytest.raises(SubjectFileError, match=message):
            Subject.load(path)
    assert not mark.exists()
    with open(path, "wb") as stream:
        stream.truncate(70 * 2**20)
    for other, message in [
        (path, "at most 67,108,864 are read"),
        (tmp_path, "is a folder"),
        (tmp_path / "missing.safetensors", "No such file"),
    ]:
        with pytest.raises(SubjectFileError, match=message):
            Subject.load(other)
