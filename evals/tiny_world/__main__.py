"""Make the bundled model, its judge and its LoRA, and measure how well they obey prompts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from evals.tiny_world.judge_training import train_judge
from evals.tiny_world.loop import Settings
from evals.tiny_world.rates import measure, measure_pairs
from evals.tiny_world.train import STAGES, make_model
from evals.tiny_world.two_creatures import train_two_creatures
from sefi_fast.tiny_world import SAMPLING


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that is named. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m evals.tiny_world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, help: str, out: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=help)
        one.add_argument("--out", type=Path, required=True, help=out)
        return one

    def add_training(
        one: argparse.ArgumentParser, minutes: float, images: int, seed: int, threads: int
    ) -> None:
        for option, default, words in (
            ("minutes", minutes, "training time"),
            ("images", images, "drawn images"),
            ("seed", seed, "seed of all random choices"),
            ("threads", threads, "CPU threads"),
        ):
            words = f"{words} (default: {default})"
            one.add_argument(f"--{option}", type=type(default), default=default, help=words)
        one.add_argument("--device", default="cpu", help="cpu (default) or cuda")

    cores = os.cpu_count() or 1
    model = add("model", "train the bundled model", "folder of the pipeline")
    add_training(model, 30.0, 26_000, 0, cores)
    model.add_argument("--work", type=Path, help="folder of the stages (default: OUT.work)")
    model.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE")
    judge = add("judge", "train the judge", "safetensors file")
    add_training(judge, 2.5, 16_000, 1, 1)
    lora = add("lora", "train the LoRA for two creatures", "safetensors file")
    add_training(lora, 25.0, 12_000, 0, cores)
    lora.add_argument("--rank", type=int, default=32, help="of the additions (default: 32)")
    rates = add("rates", "measure how often prompts are obeyed", "folder of rates.json, sheet.png")
    rates.add_argument("--model", type=Path, help="pipeline folder (default: the bundled one)")
    rates.add_argument("--count", type=int, default=66, help="prompts per set (default: 66)")
    rates.add_argument("--steps", type=int, default=SAMPLING["steps"])
    rates.add_argument("--guidance", type=float, default=SAMPLING["guidance"])
    pairs = add("pair-rates", "measure the LoRA", "folder of pair-rates.json, pairs.png")
    pairs.add_argument("--count", type=int, default=24, help="pairs, 1 to 33 (default: 24)")
    for one in (rates, pairs):
        one.add_argument("--seed", type=int, default=0)

    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    for name in ("minutes", "threads", "rank", "count", "steps"):
        if options.get(name, 1) <= 0:
            parser.error(f"--{name} must be above 0")
    if options.get("images", 128) < 128:
        parser.error("--images must be at least 128")
    if command == "pair-rates" and options["count"] > 33:
        parser.error(f"--count is {options['count']}. There are 33 pairs of held-out identities.")
    if "minutes" in options:
        torch.set_num_threads(threads := options.pop("threads"))
        settings = {name: options.pop(name) for name in ("seed", "device")}
        options["settings"] = Settings(60 * options.pop("minutes"), **settings)
    if command == "model":
        make_model(processes=threads, **options)
    elif command == "judge":
        for name, share in train_judge(**options).items():
            print(f"{name:14s} {share:.3f}")
    elif command == "lora":
        print(f"loss {train_two_creatures(**options):.4f}")
    elif command == "rates":
        report = measure(**options)
        for name, by_attribute in report["sets"].items():
            found = (
                f"{n} {rate['rate']:.2f} ({rate['prompts']})" for n, rate in by_attribute.items()
            )
            print(f"{name}: " + ", ".join(found))
        print("ceiling: " + ", ".join(f"{n} {rate:.2f}" for n, rate in report["ceiling"].items()))
        print(f"{report['seconds per image']} s per image")
    else:
        for way, by_half in measure_pairs(**options).items():
            for half, shares in by_half.items():
                print(f"{way}, {half}: " + ", ".join(f"{n} {r:.2f}" for n, r in shares.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
