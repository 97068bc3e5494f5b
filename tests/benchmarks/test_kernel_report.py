"""The kernel report: what fails, what is accepted, and how the C++ compiler's log is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kernel_report
import pytest
from kernel_report import Row, failures

SOUND = Row("triton", "forward", "", 90, "bfloat16", 128, 128, 0, 4, 4, blocks_resident=4)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "8 bytes of spills"),
        ({"spill_bytes": 8, "head_dim": 64}, None),  # accepted by EXCEPTIONS
        ({"matrix_instructions": 0, "head_dim": 64, "spill_bytes": 8}, "no matrix instruction"),
        ({"warp_group_instructions": 0}, "no warp-group matrix instruction"),
        ({"warp_group_instructions": 0, "capability": 80}, None),
        ({"warp_group_instructions": 0, "backend": "cuda"}, None),
        ({"matrix_instructions": 0, "warp_group_instructions": 0, "dtype": "float32"}, None),
        ({"serialized": True}, "warp-group matrix instructions are serialized"),
        ({"blocks_resident": 0, "shared_bytes": 9}, "9 bytes of shared memory do not fit"),
    ],
)
def test_the_check_fails_on_problems_of_a_kernel(change: dict[str, Any], lost: str | None) -> None:
    found = failures(SOUND._replace(**change))
    assert [word[: len(lost or "")] for word in found] == ([lost] if lost else [])


def test_the_exit_status_is_that_of_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "kernels.csv"
    for row, status in ((SOUND, 0), (SOUND._replace(spill_bytes=8), 1)):
        monkeypatch.setattr(kernel_report, "compile_all", lambda options, row=row: [row])
        assert kernel_report.main(["--check", "--csv", str(file)]) == status
        assert kernel_report.main([]) == 0
    assert "FAILED: sm_90 triton forward bfloat16 128: 8 bytes of spills" in capsys.readouterr().out
    assert file.read_text().splitlines()[0].startswith("backend,kernel,variant,capability")


def test_a_compiler_s_log_and_a_listing_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_ZN4sefi4cuda3mma20attn_bwd_dkdv_kernelILi80ENS0_4HalfELb1ELb0EEEvNS0_17BackwardE"
    log = (
        f"ptxas info    : Function properties for {name}\n"
        "    16 bytes stack frame, 24 bytes spill stores, 20 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers\n"
    )
    listing = (
        f"\t\tFunction : {name}\n /*0010*/ HMMA.16816.F32 R4, R8, R12, R4 ; /* 0x1 */\n"
        " /*0020*/ HGMMA.64x80x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ; /* 0x2 */\n"
        " /*0030*/ FADD R1, R2, R3 ; /* 0x3 */\n"
    )
    said = {"nvcc": log, "cuobjdump": listing}
    monkeypatch.setattr(kernel_report, "_run", lambda tool, *arguments: said[tool])
    (row,) = kernel_report.compile_cuda(Path("tensor.cu"), 90)
    assert row == Row("cuda", "backward_key_value", "<1, 0>", 90, "float16", 80, 128, 44, 2, 1)


def test_without_nvcc_the_report_says_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert kernel_report.main(["--backends", "cuda", "--arch", "80"]) == 0
    assert "not in this report: no nvcc" in capsys.readouterr().out
