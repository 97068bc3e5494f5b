"""The command that measures how often the LoRA for two creatures draws what its prompts say."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evals.studies.prompts import identity_words
from evals.studies.two_subjects import generate_pair, pair_pipeline
from sefi_fast.evaluation import Panel, contact_sheet
from sefi_fast.tiny_world import SAMPLING
from sefi_fast.tiny_world.drawing import SCENES, Identity, held_out_identities
from sefi_fast.tiny_world.judge import IDENTITY_ATTRIBUTES, Judge
from sefi_fast.tiny_world.pairs import halves_of

WAYS = ("one sentence", "a sentence for each half")


def held_out_pairs(count: int, seed: int = 0) -> list[tuple[Identity, Identity]]:
    """Pairs of different identities that neither the model nor its LoRA has seen, at most 33."""
    chosen = held_out_identities()
    random.Random(seed).shuffle(chosen)
    return list(zip(chosen[: 2 * count : 2], chosen[1 : 2 * count : 2], strict=True))


def measure(out: Path, *, count: int = 24, seed: int = 0) -> dict[str, Any]:
    """Draw pairs spelled out in words, judge the halves, write pair-rates.json and pairs.png.

    Args:
        out: folder; made when missing.
        count: pairs, 1 to 33, one picture each and way of asking.
        seed: of the pairs and the noise.

    Returns:
        What pair-rates.json holds: way → half → attribute → share of pictures that have it right.
    """
    pairs, judge = held_out_pairs(count, seed), Judge.load()
    pipe = pair_pipeline(torch.float32)
    report: dict[str, Any] = {}
    rows = []
    for way in WAYS:
        pictures = []
        for k, (first, second) in enumerate(pairs):
            pictures += generate_pair(
                pipe,
                (f"a {identity_words(first)}", f"a {identity_words(second)}"),
                SCENES[k % len(SCENES)],
                [seed + k],
                by_halves=way == WAYS[1],
                **SAMPLING,
            )
        report[way] = {}
        for place, half in enumerate(("left", "right")):
            labels = [found.labels for found in judge([halves_of(p)[place] for p in pictures])]
            right = {"creature": [found["creature"] == "yes" for found in labels]}
            for name in IDENTITY_ATTRIBUTES:
                wanted = [pair[place].value(name) for pair in pairs]
                right[name] = [f[name] == w for f, w in zip(labels, wanted, strict=True)]
            report[way][half] = {name: round(sum(r) / count, 3) for name, r in right.items()}
        panels = [Panel(picture, "") for picture in pictures]
        rows += [(way if k == 0 else "", panels[k : k + 6]) for k in range(0, min(12, count), 6)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "pair-rates.json").write_text(json.dumps(report, indent=2) + "\n")
    contact_sheet(rows, title="two creatures, first seeds").save(out / "pairs.png")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m evals.tiny_world.pair_rates``."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.tiny_world.pair_rates", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of pair-rates.json")
    parser.add_argument("--count", type=int, default=24, help="pairs, 1 to 33 (default: 24)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 1 <= options.count <= 33:
        parser.error(f"--count is {options.count}; there are 33 pairs of held-out identities")
    for way, by_half in measure(**vars(options)).items():
        for half, rates in by_half.items():
            print(f"{way}, {half}: " + ", ".join(f"{n} {r:.2f}" for n, r in rates.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
