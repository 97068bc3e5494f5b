"""Train the bundled model in processes that are killed with SIGKILL at random moments, and resume.

Every third kill is one between the saving of the subject and the clearing of its checkpoints.

Run as a script: forks every training from one process that has the model in memory, since loading
it takes longer than training. Prints one JSON line: how many trainings were killed, at how many
different steps, and whether each finished subject equals that of an uninterrupted run.
"""

from __future__ import annotations

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

import sefi_fast
from sefi_fast.subject import Subject
from sefi_fast.tiny_world import CLASS_WORD
from sefi_fast.training.checkpoint import CheckpointFolder, folder_of

SETTINGS = {
    "class_word": CLASS_WORD,
    "steps": 12,
    "batch_size": 1,
    "stages": 2,
    "checkpoint_every": 2,
    "ema_decay": 0.9,
    "progress": False,
}


def train(pipe, output, resume=None, killed_after_saving=False):
    if killed_after_saving:
        CheckpointFolder.clear = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
    image = sefi_fast.bundled_subject_image()
    sefi_fast.train(image, model=pipe, output=output, resume=resume, **SETTINGS)


def forked(*arguments) -> int:
    """Train in a child process; its exit status is 0 if that returned."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def steps_there(output: Path) -> list[int]:
    return CheckpointFolder(folder_of(output)).steps()


def main() -> None:
    root, wanted_kills = Path(sys.argv[1]), int(sys.argv[2])
    # Threads do not survive a fork.
    torch.set_num_threads(1)
    logging.getLogger("sefi_fast").setLevel(logging.ERROR)
    pipe = sefi_fast.load_pipeline(None)
    rng = random.Random(wanted_kills)
    whole = root / "whole" / "me.safetensors"
    started = time.perf_counter()
    child = forked(pipe, whole)
    assert os.waitpid(child, 0)[1] == 0
    span = 0.7 * (time.perf_counter() - started)
    wanted = Subject.load(whole).tokens[0]

    kills, runs, resumed, stuck = 0, 0, set(), 0
    while kills < wanted_kills:
        folder = root / f"run{runs}"
        output = folder / "me.safetensors"
        runs += 1
        while True:
            before = steps_there(output)
            late = kills < wanted_kills and kills % 3 == 2
            child = forked(pipe, output, "auto", late)
            if kills < wanted_kills and not late:
                time.sleep(rng.uniform(0, span))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                break
            kills += 1
            there = steps_there(output)
            # What was there before is never lost, unless the whole subject is.
            assert output.exists() or not before or max(there) >= max(before), (before, there)
            resumed.add(max(there, default=0))
            stuck += not there
        assert status == 0, "a training failed instead of going on; its traceback is above"
        assert torch.equal(Subject.load(output).tokens[0], wanted), f"run {runs} differs"
        assert os.listdir(folder) == ["me.safetensors"], os.listdir(folder)
        shutil.rmtree(folder)
    print(json.dumps({"kills": kills, "resumed": sorted(resumed), "stuck": stuck}))


if __name__ == "__main__":
    main()
