"""`import sefi_fast` is quick, and gives every part at first use."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import sefi_fast


def test_import_leaves_torch_alone_and_a_part_needs_no_import_of_its_own():
    code = (
        "import sys, sefi_fast\nprint('torch' in sys.modules)\nsefi_fast.evaluation.contact_sheet"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", dir(sefi_fast))
def test_every_listed_name_exists(name):
    found = getattr(sefi_fast, name)
    assert isinstance(found, ModuleType) == (name in sefi_fast._MODULES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'evaluator'"):
        sefi_fast.evaluator  # noqa: B018
