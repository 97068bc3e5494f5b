"""What `import sefi_fast` gives at once, without waiting for what is not used."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import sefi_fast

LOW = ["errors", "ops", "prompts", "subject"]
PARTS = [*LOW, "pipelines", "training", "evaluation", "tiny_world"]


def test_a_part_that_documents_name_needs_no_import_of_its_own():
    code = (
        "import sys, sefi_fast\nprint('torch' in sys.modules)\nsefi_fast.evaluation.contact_sheet"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_there(name):
    assert isinstance(getattr(sefi_fast, name), ModuleType) and name in dir(sefi_fast)


def test_a_name_that_is_none_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'evaluator'"):
        sefi_fast.evaluator  # noqa: B018
