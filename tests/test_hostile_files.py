"""Every reader of subjects, manifests, configs and checkpoints ends in one of our errors."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from subject.making import make_subject

from evals.studies.tasks import Protocol, Task
from sefi_fast import import_embedding
from sefi_fast.errors import ConfigError, SefiError, SubjectFileError
from sefi_fast.evaluation.prompts import read_prompts
from sefi_fast.subject import Subject
from sefi_fast.training import CheckpointError, TrainConfig
from sefi_fast.training.checkpoint import Checkpoint, CheckpointFolder, read_checkpoint
from sefi_fast.training.manifest import ManifestError, Shard, read_subjects
from sefi_fast.training.monitor import History
from sefi_fast.training.summary import Summary
from sefi_fast.utils.tensor_file import pack_tensors, unpack_tensors

TEXTS = [
    "", " ", "0", "-1", "1", "2", "05", "5.0", "1e3", "NaN", "Infinity", "-Infinity", "1e999",
    "true", "null", "[]", "{}", '"', "two words", "<me>", "\x1b[31m", "\0", "\u202e", "😀", "٣",
    "1:30", "0x10", "~", "&a", "*a", "<<", "? a", "- b",
    "!!int 3", "!!int ''", "!!bool x", "!!timestamp x", "!!float x", "1_", "+", ".", "._",
    "!!python/name:os.system",
    "9" * 30, "9" * 5000, "x" * 100_000, "[" * 2000, "{" * 2000, '{"a":' * 200, "[[]]" * 50,
    '{"a": 1, "a": 2}', '{"steps": NaN}', '{"model": []}', "\\ud800", "é" * 1000, "a,b\tc\n",
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def text_of(dice: random.Random) -> str:
    found = dice.choice(TEXTS)
    return found if dice.random() < 0.7 else dice.choice(TEXTS)[:50] + found


def tensor_of(dice: random.Random) -> torch.Tensor:
    shape = [dice.choice([0, 1, 1, 2, 4, 48]) for _ in range(dice.randint(0, 5))]
    value = dice.choice([0.0, 1.0, -1.0, 3e4, float("nan"), float("inf")])
    return torch.full(shape, 0.0).fill_(value).to(dice.choice(DTYPES))


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Return the content with some bytes changed, removed, inserted or cut off."""
    changed = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(changed) or 1)
        piece = bytes(dice.randrange(256) for _ in range(dice.choice([1, 1, 8])))
        changed[place : place + dice.choice([0, 1, 8, 100])] = piece
    return bytes(changed[: dice.choice([len(changed), len(changed), dice.randrange(999)])])


def tensor_file(content: bytes, dice: random.Random, *, checksum: bool) -> bytes:
    """Return a sound file with changed, removed or added metadata and tensors, or a damaged one."""
    if dice.random() < 0.3:
        return damaged(content, dice)
    metadata, tensors = unpack_tensors(content, checksum=checksum)
    for changed, make in ((metadata, text_of), (tensors, tensor_of)):
        for _ in range(dice.choice([0, 1, 1, 3])):
            name = dice.choice([*changed, text_of(dice)])
            if dice.random() < 0.3:
                changed.pop(name, None)
            else:
                changed[name] = make(dice)
    return pack_tensors(tensors, metadata, checksum=checksum)


def value_of(dice: random.Random) -> object:
    return dice.choice(
        [None, True, -1, 0, 3, 10**12, 1.5, [], {}, ["a {}"], [16], {"a": [1]}, text_of(dice)]
    )


def manifest_file(dice: random.Random) -> bytes:
    columns = ["image", "class_word", "name", "placeholder", "seed", "scene", "mask", "model"]
    lines = []
    for number in range(dice.randint(1, 6)):
        row = {"image": "a.png", "name": f"n{number}"}
        for _ in range(dice.randint(0, 3)):
            row[dice.choice([*columns, text_of(dice)])] = value_of(dice)
        lines.append(json.dumps(row) if dice.random() < 0.9 else text_of(dice))
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return damaged(content, dice) if dice.random() < 0.3 else content


def table_file(dice: random.Random) -> bytes:
    rows = [["image", "name", "class_word", "scene"]]
    rows += [["a.png", f"n{number}", "dog", ""] for number in range(dice.randint(1, 4))]
    for _ in range(dice.choice([0, 1, 1, 3])):
        row = dice.choice(rows)
        row[dice.randrange(4)] = text_of(dice)
    content = "\n".join(",".join(row) for row in rows).encode()
    return damaged(content, dice) if dice.random() < 0.3 else content


def config_file(dice: random.Random) -> bytes:
    names = [*TrainConfig().as_dict(), "image", "preset", text_of(dice)]
    values = {dice.choice(names): value_of(dice) for _ in range(dice.randint(1, 5))}
    if dice.random() < 0.5:
        lines = [f"{name}: {text_of(dice)}" for name in values]
    else:
        lines = [json.dumps(values)]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return damaged(content, dice) if dice.random() < 0.3 else content


def read_whole_checkpoint(path: Path) -> None:
    found = read_checkpoint(path)
    try:
        History.from_state_dict(found.part("history"))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def make_checkpoint() -> Checkpoint:
    history = History([0.5] * 3, [0.1] * 3, [1.0, 2.0, 3.0], [(2, [Image.new("RGB", (8, 8))])])
    tensors = {f"history.{name}": x for name, x in history.state_dict().items()}
    tensors["engine.step"] = torch.tensor(3)
    settings, identity = TrainConfig().as_dict(), {"placeholder": "<me>"}
    return Checkpoint(3, settings, identity, tensors)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Content of sound files, which the cases change."""
    folder = tmp_path_factory.mktemp("sound")
    make_subject(2, True, (4,)).save(folder / "s.safetensors")
    return {
        "subjects": (folder / "s.safetensors").read_bytes(),
        "checkpoints": CheckpointFolder(folder).write(make_checkpoint()).read_bytes(),
    }


# The name of a file, how to make it if not from a sound one, its reader and the reader's error.
KINDS: dict[str, tuple[str, Callable | None, Callable, type[Exception]]] = {
    "subjects": ("s.safetensors", None, Subject.load, SubjectFileError),
    "checkpoints": ("c.safetensors", None, read_whole_checkpoint, CheckpointError),
    "manifests": ("m.jsonl", manifest_file, read_subjects, ManifestError),
    "tables": ("m.csv", table_file, read_subjects, ManifestError),
    "configs": ("c.yaml", config_file, TrainConfig.load, ConfigError),
    "JSON configs": ("c.json", config_file, TrainConfig.load, ConfigError),
}


@pytest.mark.parametrize("count", [pytest.param(100), pytest.param(5000, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_hostile_files(tmp_path: Path, sound: dict[str, bytes], kind: str, count: int) -> None:
    name, make, read, error = KINDS[kind]
    if make is None:
        make = partial(tensor_file, sound[kind], checksum=kind == "checkpoints")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    path, refused = tmp_path / name, 0
    for seed in range(count):
        content = make(random.Random(seed))
        path.write_bytes(content)
        started = time.process_time()
        try:
            read(path)
        except error as raised:
            refused += 1
            assert isinstance(raised, SefiError)
            assert len(str(raised)) < 2100, f"seed {seed}"
            str(raised).encode()
        except Exception as raised:
            raise AssertionError(f"seed {seed}: {content[:200]!r}") from raised
        assert time.process_time() - started < 5, f"seed {seed}"
    assert count * 0.2 < refused < count


READERS = {
    "subject": (Subject.load, ".safetensors"),
    "embedding": (lambda path: import_embedding(path, None, class_word="cat"), ".safetensors"),
    "checkpoint": (read_checkpoint, ".safetensors"),
    "config": (TrainConfig.load, ".yaml"),
    "JSON config": (TrainConfig.load, ".json"),
    "manifest": (read_subjects, ".jsonl"),
    "table": (read_subjects, ".csv"),
    "prompts": (read_prompts, ".txt"),
}


def huge(path: Path) -> None:
    with open(path, "wb") as stream:
        stream.truncate(2**40)


NOT_FILES = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "folder": os.mkdir,
    "huge": huge,
}


@pytest.mark.parametrize("make", NOT_FILES)
@pytest.mark.parametrize("reader", list(READERS))
def test_anything_but_a_file_of_limited_size_is_refused_at_once(tmp_path, reader, make):
    read, suffix = READERS[reader]
    path = tmp_path / f"a{suffix}"
    NOT_FILES[make](path)
    started = time.process_time()
    with pytest.raises((SefiError, OSError)) as raised:
        read(path)
    assert str(path) in str(raised.value) or raised.value.filename == str(path)
    assert time.process_time() - started < 2


def test_no_reader_runs_code_from_a_file():
    source = Path(__file__).parents[1] / "sefi_fast"
    unsafe = re.compile(r"pickle\.load|(?<!safetensors\.)torch\.load\(|allow_pickle|yaml\.unsafe")
    for path in source.rglob("*.py"):
        assert not unsafe.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"[" * 100_000, b"\xff", b'{"protocol": 1}', b"NaN"]
)
def test_damaged_results_of_a_study_are_ignored(tmp_path, content):
    protocol = Protocol(1, 1, 1, 1.0, "fp32", 0, "model")
    task = Task(tmp_path, SimpleNamespace(key="v", name="v"), (0,), protocol)
    task.result(0).parent.mkdir(parents=True)
    task.result(0).write_bytes(content)
    assert task.load(0) is None


@pytest.mark.parametrize("line", ["{", "3", "{}", '{"state": "learnt"}', "[" * 100_000])
def test_a_damaged_part_of_a_summary_is_kept_and_reported(tmp_path, caplog, line):
    summaries = [Summary(tmp_path, Shard(index, 2)) for index in range(2)]
    summaries[0].write([{"number": 0, "state": "trained"}])
    part = tmp_path / ".summary.jsonl.2-of-2"
    part.write_text(line)
    summaries[0].join()
    assert "part of it is damaged" in caplog.text
    assert part.read_text() == line
