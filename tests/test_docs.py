"""The documents: links resolve, commands parse, Python blocks run."""

from __future__ import annotations

import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest

import sefi_fast
from sefi_fast.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs").is_dir(), reason="needs the documents, which a wheel leaves out"
)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shell = [code for language, code in BLOCK.findall(text) if language in ("sh", "bash")]
        for line in "\n".join(shell).replace("\\\n", " ").splitlines():
            found += re.findall(r"(?:^|&& )sefi-fast (.+?)(?= && |$)", line)
        found += re.findall(r"`sefi-fast ([^`\n]+)`", text)
    # Fragments: "…" stands for more, and the bare name of a command is not a call.
    return sorted({one for one in found if "…" not in one and " " in one and "|" not in one})


def test_there_are_commands_to_check():
    assert len(commands()) >= 6


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    _parser().parse_args(shlex.split(command, comments=True))


def python_blocks(page: Path) -> str:
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    code = "\n".join(code for language, code in blocks if language == "python")
    model = str(sefi_fast.bundled_model_path())
    return code.replace("path/or/hub-id", model).replace('"person"', '"creature"')


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(sefi_fast.bundled_subject_image(), folder / "me.jpg")
    for name in ("me", "cat"):
        sefi_fast.train(
            folder / "me.jpg", model=sefi_fast.bundled_model_path(), class_word="creature",
            placeholder=f"<{name}>", output=folder / f"{name}.safetensors", steps=1, batch_size=1,
            progress=False,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")],
    ids=lambda page: page.name,
)  # fmt: skip
def test_python_blocks_run(page, subjects, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, with two training steps and few images."""
    for path in subjects.iterdir():
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    few = {"steps": 2, "batch_size": 1, "progress": False}
    monkeypatch.setattr(sefi_fast, "train", partial(sefi_fast.train, **few, resume=False))
    monkeypatch.setattr(sefi_fast, "train_many", partial(sefi_fast.train_many, **few))
    exec(compile(python_blocks(page), str(page), "exec"), {})
