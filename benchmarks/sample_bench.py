"""Speed of sampling with subjects and with a trace, against the bare pipeline, and of attaching.

python benchmarks/sample_bench.py
python benchmarks/sample_bench.py --model FOLDER --class-word person --device cuda --steps 30
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common.options import choose_device, exit_status
from common.report import Row, Target, table, targets_table, time_text, write_report
from common.timing import Effort, Timing, interleaved

from sefi_fast import (
    Subject,
    attach,
    detach,
    generate,
    load_pipeline,
    trace,
)

COUNTS = (1, 10, 100)
STAGES = 5
BARE, SUBJECT = "bare pipeline", "attached, subject"
TRACED = "attached, subject and two words traced"
# "No slower" within the noise of interleaved runs on a quiet machine.
NO_SLOWER, TRACE_SHARE = 0.98, 0.95


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and rounds")
    parser.add_argument("--model", help="folder, hub id or file; default: the bundled tiny model")
    parser.add_argument("--class-word", help="a word the model knows; default: the bundled model's")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if available")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps an image")
    parser.add_argument("--images", type=int, default=4, help="images at once")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    return parser.parse_args(arguments)


def make_subject(pipe: Any, class_word: str, placeholder: str, seed: int) -> Subject:
    """Return an untrained subject near its class word: tokens do not change the time."""
    tokenizer, table_ = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    (word,) = tokenizer(class_word, add_special_tokens=False).input_ids
    row = table_.weight[word].detach().float().cpu()
    noise = torch.randn(STAGES, 2, len(row), generator=torch.Generator().manual_seed(seed))
    tokens = row + 0.1 * row.std() * noise
    return Subject(placeholder, class_word, [tokens], [row], base_model="benchmark")


def sampling(
    pipe: Any, class_word: str, options: argparse.Namespace, device: torch.device
) -> dict[str, Timing]:
    """Time one call: bare, subject attached but unused, subject generated, and traced."""
    subject = make_subject(pipe, class_word, "<me>", 0)
    bare, attached = pipe, _twin(pipe)
    attach(attached, subject)

    def images_of(pipe: Any, word: str) -> Callable[[], Any]:
        def call() -> Any:
            images = generate(
                pipe, f"a photo of a {word}", n=options.images, steps=options.steps, guidance=3.0
            )
            if device.type == "cuda":
                torch.cuda.synchronize()
            return images

        return call

    def traced() -> Any:
        with trace(attached, ["<me>", "photo"]) as found:
            images = images_of(attached, "<me>")()
        found.maps  # noqa: B018
        return images

    calls = {
        BARE: images_of(bare, class_word),
        "attached, class word": images_of(attached, class_word),
        SUBJECT: images_of(attached, "<me>"),
        TRACED: traced,
    }
    timings = interleaved(calls, Effort(0.0, 0.0, options.rounds))
    detach(attached)
    return timings


def _twin(pipe: Any) -> Any:
    """Return a second pipeline: copies of the models that attaching changes, the rest shared."""
    parts = dict(pipe.components)
    parts["unet"] = copy.deepcopy(parts["unet"])
    twin = type(pipe)(**parts, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    return twin


def attaching(pipe: Any, class_word: str, rounds: int) -> list[Row]:
    """Return rows of median seconds to load, attach and detach each number of subject files."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.safetensors" for number in range(max(COUNTS))]
        for number, path in enumerate(paths):
            make_subject(pipe, class_word, f"<s{number}>", number).save(path)
        for count in COUNTS:
            samples: dict[str, list[float]] = {"load": [], "attach": [], "detach": []}
            for _ in range(rounds):
                marks = [time.perf_counter()]
                subjects = [Subject.load(path) for path in paths[:count]]
                marks.append(time.perf_counter())
                attach(pipe, subjects)
                marks.append(time.perf_counter())
                detach(pipe)
                marks.append(time.perf_counter())
                for name, start, end in zip(samples, marks, marks[1:], strict=False):
                    samples[name].append(end - start)
            rows += [
                {"call": name, "subjects": count, "seconds": median(values), "rounds": rounds}
                for name, values in samples.items()
            ]
    return rows


def targets_of(timings: dict[str, Timing]) -> list[Target]:
    """Return the targets: as fast as the bare pipeline; a trace costs at most 5 %."""
    bare, subject, traced = (timings[name].median for name in (BARE, SUBJECT, TRACED))
    return [
        ("sampling", "times the bare pipeline's speed", bare / subject, NO_SLOWER),
        ("sampling", "times the untraced speed", subject / traced, TRACE_SHARE),
    ]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the whole benchmark; return the content of its files."""
    if options.model is not None and options.class_word is None:
        raise ValueError("--class-word is missing: give a word that the model knows")
    if options.quick:
        options.steps, options.rounds, options.images = 4, 3, 1
    device = choose_device(options.device)
    pipe = load_pipeline(options.model, device=str(device))
    pipe.set_progress_bar_config(disable=True)
    class_word = options.class_word or "creature"
    timings = sampling(pipe, class_word, options, device)
    rows: list[Row] = [
        {
            "call": name,
            "seconds": timing.median,
            "fastest_seconds": timing.fastest,
            "spread": timing.spread,
            "rounds": timing.rounds,
        }
        for name, timing in timings.items()
    ]
    rows += attaching(pipe, class_word, options.rounds)
    bare = timings[BARE].median
    cells = [
        [name, time_text(timing.median), f"{bare / timing.median:.3f}", f"{timing.spread:.0%}"]
        for name, timing in timings.items()
    ]
    print(f"{options.images} image(s), {options.steps} steps, guidance 3")
    print(table(["call", "seconds", "xbare", "spread"], cells))
    cells = [
        [row["call"], f"{row['subjects']} subject(s)", time_text(row["seconds"])]
        for row in rows[len(timings) :]
    ]
    print("\n" + table(["call", "", "seconds"], cells))
    print(targets_table(targets_of(timings)))
    report = {
        "benchmark": "sample_bench",
        "settings": {
            "images": options.images,
            "steps": options.steps,
            "model": "bundled" if options.model is None else "given",
        },
        "results": rows,
    }
    write_report(report, device, options.output)
    return report


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status."""
    options = parse(arguments)
    return exit_status("sample_bench", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
