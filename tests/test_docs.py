"""The documents: links lead somewhere, commands parse, names in code blocks exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sefi_fast.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs").is_dir(), reason="needs the documents, which a wheel leaves out"
)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
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
    # Fragments: "…" stands for more, a bare name of a command is no call.
    return sorted({one for one in found if "…" not in one and " " in one and "|" not in one})


def test_there_are_commands_to_check():
    assert len(commands()) >= 11


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    _parser().parse_args(shlex.split(command, comments=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_names_in_code_blocks_exist():
    """Where nothing of the package is imported but itself and what the block imports."""
    blocks = []
    for page in PAGES:
        for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                imports = re.findall(r"^(?:import|from) sefi_fast.*$", code, re.MULTILINE)
                imports.insert(0, "import sefi_fast")  # some blocks go on from the one above
                names = list(dict.fromkeys(re.findall(r"\bsefi_fast(?:\.\w+)+", code)))
                blocks.append([page.name, "\n".join(imports), names])
    assert sum(len(names) for _, _, names in blocks) >= 10
    # What takes long is imported once; each block then has a process to itself.
    script = (
        "import json, os, sys, diffusers\n"
        "for page, imports, names in json.loads(sys.argv[1]):\n"
        "    if os.fork() == 0:\n"
        "        scope = {}\n"
        "        exec(imports, scope)\n"
        "        [eval(name, scope) for name in names]\n"
        "        os._exit(0)\n"
        "    if os.wait()[1] != 0:\n"
        "        sys.exit(f'{page}: {names}')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, json.dumps(blocks)], cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
