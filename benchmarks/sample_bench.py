"""Speed of sampling with subjects and with a trace against the bare pipeline's, and of attaching.

python benchmarks/sample_bench.py
python benchmarks/sample_bench.py --model FOLDER --class-word person --device cuda --steps 30
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
for _place in (str(_ROOT), str(_ROOT / "benchmarks")):
    if _place not in sys.path:
        sys.path.append(_place)

import torch  # noqa: E402
from _measure import Effort, Timing, interleaved  # noqa: E402
from _rates import device_name  # noqa: E402
from _record import Target  # noqa: E402
from _report import environment, table, targets_table, time_text, write_json  # noqa: E402

from sefi_fast import Subject, attach, detach, generate, load_pipeline, trace  # noqa: E402
from sefi_fast.utils.malloc import keep_freed_memory  # noqa: E402

COUNTS = (1, 10, 100)
STAGES = 5
# "No slower" within what a run in turns can tell on a quiet machine.
NO_SLOWER, TRACE_SHARE = 0.98, 0.95


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and rounds")
    parser.add_argument("--model", help="folder, hub id or file; default: the bundled tiny model")
    parser.add_argument("--class-word", help="what the subject is; default: the bundled model's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps an image")
    parser.add_argument("--images", type=int, default=4, help="images at once")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    return parser.parse_args(arguments)


def make_subject(pipe: Any, class_word: str, placeholder: str, seed: int) -> Subject:
    """An untrained subject near its class word: sampling takes the same time with any tokens."""
    tokenizer, table_ = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    (word,) = tokenizer(class_word, add_special_tokens=False).input_ids
    row = table_.weight[word].detach().float().cpu()
    noise = torch.randn(STAGES, 2, len(row), generator=torch.Generator().manual_seed(seed))
    tokens = row + 0.1 * row.std() * noise
    return Subject(placeholder, class_word, [tokens], [row], base_model="benchmark")


def sampling(
    pipe: Any, class_word: str, options: argparse.Namespace
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Seconds of one call in turns: bare, subject attached but unused, subject drawn, traced."""
    subject = make_subject(pipe, class_word, "<me>", 0)
    bare, attached = pipe, _twin(pipe)
    attach(attached, subject)
    cuda = str(options.device).startswith("cuda")

    def draw(pipe: Any, word: str) -> Callable[[], Any]:
        def call() -> Any:
            images = generate(
                pipe, f"a photo of a {word}", n=options.pictures, steps=options.steps, guidance=3.0
            )
            if cuda:
                torch.cuda.synchronize()
            return images

        return call

    def traced() -> Any:
        with trace(attached, ["<me>", "photo"]) as found:
            images = draw(attached, "<me>")()
        found.maps  # noqa: B018
        return images

    calls = {
        "bare pipeline": draw(bare, class_word),
        "attached, class word drawn": draw(attached, class_word),
        "attached, subject drawn": draw(attached, "<me>"),
        "subject drawn and two words traced": traced,
    }
    timings = interleaved(calls, Effort(0.0, 0.0, options.rounds))
    detach(attached)
    return timings, {"pictures": options.pictures, "steps": options.steps}


def _twin(pipe: Any) -> Any:
    """A second pipeline over copies of the models that attaching touches, the rest shared."""
    parts = dict(pipe.components)
    parts["unet"] = copy.deepcopy(parts["unet"])
    twin = type(pipe)(**parts, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    return twin


def attaching(pipe: Any, class_word: str, rounds: int) -> dict[int, dict[str, float]]:
    """Median seconds of loading so many subject files, attaching them, taking all off again."""
    found: dict[int, dict[str, float]] = {}
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
            found[count] = {name: sorted(values)[rounds // 2] for name, values in samples.items()}
    return found


def targets_of(timings: dict[str, Timing]) -> list[Target]:
    """No slower than the bare pipeline; a trace under a twentieth of the sampling time."""
    bare = timings["bare pipeline"].median
    drawn = timings["attached, subject drawn"].median
    traced = timings["subject drawn and two words traced"].median
    return [
        ("sampling", "times the bare pipeline's speed", bare / drawn, NO_SLOWER),
        ("sampling", "times the untraced speed", drawn / traced, TRACE_SHARE),
    ]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark; returns what the JSON holds."""
    if options.model is not None and options.class_word is None:
        raise ValueError("--class-word is missing: say in one word what the model may draw")
    if options.quick:
        options.steps, options.rounds, options.pictures = 4, 3, 1
    pipe = load_pipeline(options.model, device=options.device)
    pipe.set_progress_bar_config(disable=True)
    class_word = options.class_word or "creature"
    timings, settings = sampling(pipe, class_word, options)
    loading = attaching(pipe, class_word, options.rounds)
    bare = timings["bare pipeline"].median
    rows = [
        [name, time_text(timing.median), f"{bare / timing.median:.3f}", f"{timing.spread:.0%}"]
        for name, timing in timings.items()
    ]
    print(f"{options.pictures} image(s), {options.steps} steps, guidance 3")
    print(table(["call", "seconds", "xbare", "spread"], rows))
    rows = [
        [f"{count} subject(s)", *(time_text(seconds) for seconds in parts.values())]
        for count, parts in loading.items()
    ]
    print("\n" + table(["", "load", "attach", "detach"], rows))
    print(targets_table(targets_of(timings)))
    device = torch.device(options.device)
    report = {
        "benchmark": "sample_bench",
        "device": device_name(device),
        "environment": environment(device),
        "settings": {**settings, "model": "bundled" if options.model is None else "given"},
        "sampling": {name: timing._asdict() for name, timing in timings.items()},
        "attaching": {str(count): parts for count, parts in loading.items()},
    }
    folder = options.output or _ROOT / "benchmarks" / "results" / device_name(device)
    write_json(folder / "sample_bench.json", report)
    print(f"wrote {os.path.relpath(folder / 'sample_bench.json')}")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 for bad arguments."""
    keep_freed_memory()
    try:
        run(parse(arguments))
    except ValueError as error:
        print(f"sample_bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
