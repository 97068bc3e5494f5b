"""Train the bundled model in processes that are killed with SIGKILL at random moments, and resume.

Every third kill is one between the saving of the subject and the clearing of its checkpoints.

Run as a script: forks every training from one process that has the model in memory, since loading
it takes longer than training. Prints one JSON line: how many trainings were killed, at how many
different steps, and whether each finished subject equals that of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

SETTINGS = {
    "steps": 12,
    "batch_size": 1,
    "stages": 2,
    "checkpoint_every": 2,
    "ema_decay": 0.9,
    "progress": False,
}


def learn(pipe, output, **arguments):
    from sefi_fast.tiny_world import CLASS_WORD, bundled_subject_image
    from sefi_fast.training import train

    return train(
        bundled_subject_image(),
        model=pipe,
        class_word=CLASS_WORD,
        output=output,
        **{**SETTINGS, **arguments},
    )


def learn_killed_after_saving(pipe, output):
    from sefi_fast.training.checkpoint import CheckpointFolder

    CheckpointFolder.clear = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
    learn(pipe, output, resume="auto")


def forked(act) -> int:
    """Runs `act` in a child process; its exit status is 0 if it returned."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def steps_there(output: Path) -> list[int]:
    from sefi_fast.training.checkpoint import CheckpointFolder, folder_of

    return CheckpointFolder(folder_of(output)).steps()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Threads do not survive a fork.
    torch.set_num_threads(1)
    logging.getLogger("sefi_fast").setLevel(logging.ERROR)
    from sefi_fast.pipelines import load_pipeline
    from sefi_fast.subject import Subject

    pipe = load_pipeline(None)
    rng = random.Random(options.seed)
    whole = options.folder / "whole" / "me.safetensors"
    started = time.perf_counter()
    child = forked(lambda: learn(pipe, whole))
    assert os.waitpid(child, 0)[1] == 0
    span = 0.7 * (time.perf_counter() - started)
    wanted = Subject.load(whole).tokens[0]

    kills, runs, resumed, stuck = 0, 0, set(), 0
    while kills < options.kills:
        folder = options.folder / f"run{runs}"
        output = folder / "me.safetensors"
        runs += 1
        finished = False
        while not finished:
            before = steps_there(output)
            if kills < options.kills and kills % 3 == 2:
                child = forked(lambda output=output: learn_killed_after_saving(pipe, output))
            else:
                child = forked(lambda output=output: learn(pipe, output, resume="auto"))
            if kills < options.kills and kills % 3 != 2:
                time.sleep(rng.uniform(0, span))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                kills += 1
                there = steps_there(output)
                # What was there before is never lost, unless the whole subject is.
                assert output.exists() or not before or max(there) >= max(before), (before, there)
                resumed.add(max(there, default=0))
                stuck += not there
                continue
            assert status == 0, "a training failed instead of going on; its traceback is above"
            finished = True
        assert torch.equal(Subject.load(output).tokens[0], wanted), f"run {runs} differs"
        assert os.listdir(folder) == ["me.safetensors"], os.listdir(folder)
        shutil.rmtree(folder)
    print(json.dumps({"kills": kills, "runs": runs, "resumed": sorted(resumed), "stuck": stuck}))


if __name__ == "__main__":
    main()
