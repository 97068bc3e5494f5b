"""The package imported more than once in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import sefi_fast

PROGRAM = """
import gc, importlib, sys
import torch

def modules():
    return [name for name in sys.modules if name.partition(".")[0] == "sefi_fast"]

def result():
    from sefi_fast import fused_cross_attention
    from sefi_fast.errors import BackendError
    query = torch.arange(80.0).reshape(1, 2, 4, 10).sin().requires_grad_()
    key = torch.arange(60.0).reshape(1, 2, 3, 10).cos()
    output = fused_cross_attention(query, key, key).output
    output.sum().backward()
    try:
        fused_cross_attention(query, key, key, backend="unknown")
    except BackendError:
        return output.detach(), query.grad

wanted = result()
import sefi_fast.ops.torch_library
for name in ("sefi_fast", "sefi_fast.ops", "sefi_fast.ops.torch_library"):
    importlib.reload(sys.modules[name])
found = [result()]
for path in sys.argv[1:]:
    for name in modules():
        del sys.modules[name]
    del sefi_fast
    gc.collect()
    sys.path.insert(0, path)
    import sefi_fast
    assert sefi_fast.__file__.startswith(path)
    found.append(result())
for each in found:
    assert all(torch.equal(one, other) for one, other in zip(each, wanted))
del sys.modules["sefi_fast.ops.torch_library"]
vars(torch.ops.sefi_fast)["schemas"] = ("another() -> ()",)
try:
    import sefi_fast.ops.torch_library
except ImportError as error:
    print(error)
"""


def test_a_second_import_works_from_the_same_path_and_from_another(tmp_path):
    package = Path(sefi_fast.__file__).parent
    other = tmp_path / "other"
    other.mkdir()
    (other / "sefi_fast").symlink_to(package)
    command = [sys.executable, "-c", PROGRAM, str(package.parent), str(other)]
    # A program imports from its folder first, where the sources may lie without the native core.
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "another version of sefi_fast" in run.stdout
