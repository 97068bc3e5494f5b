"""Compare settings on the tiny world."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.studies import compare_two_subjects, run_study
from evals.studies.variants import STUDIES
from sefi_fast.cli.options import add_config_fields, config_overrides, report
from sefi_fast.errors import SefiError
from sefi_fast.utils.files import user_path
from sefi_fast.utils.malloc import keep_freed_memory_on_cpu

_NOT_OF_TWO = ("prompts", "sampling_steps", "variants", "workers", "batch_subjects")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the studies that are named. Return 0, 1 for an error, or 128 + the signal's number."""
    parser = argparse.ArgumentParser(prog="python -m evals.studies", description=__doc__)
    parser.add_argument(
        "study", nargs="+", metavar="NAME",
        help=f"{', '.join(STUDIES)} or all; or two: two subjects in one image",
    )  # fmt: skip
    parser.add_argument("--identities", type=int, default=12, help="(default: 12)")
    parser.add_argument("--prompts", type=int, help="prompts per identity (default: 12)")
    parser.add_argument("--seeds", type=int, default=4, help="images per prompt (default: 4)")
    parser.add_argument("--sampling-steps", type=int, help="denoising steps of an image")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these variants")
    parser.add_argument("--workers", type=int, help="processes (default: 1)")
    parser.add_argument(
        "--batch-subjects", type=int, metavar="N",
        help="identities trained in one batch (default: 4)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=user_path, default="evidence", help="folder (default: evidence)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_config_fields(parser)
    options = parser.parse_args(arguments)
    common = {
        "output": options.output,
        "identities": options.identities,
        "seeds": options.seeds,
        "progress": not options.quiet,
        **config_overrides(options),
    }
    given = {n: value for n in _NOT_OF_TWO if (value := getattr(options, n)) is not None}
    if "two" in options.study and (len(options.study) > 1 or given):
        parser.error("the study two runs alone, without " + ", ".join(_NOT_OF_TWO))
    keep_freed_memory_on_cpu()
    files: Sequence[Path]
    failures: Sequence[str] = ()
    try:
        if "two" in options.study:
            files = compare_two_subjects(**common)
        else:
            found = run_study(options.study, **common, **given)
            files, failures = found.files, found.failures
    except (SefiError, ValueError) as error:
        print(f"evals.studies: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"evals.studies: {error or 'stopped'}", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    for path in files:
        report(path)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
