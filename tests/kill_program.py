"""Kills a training at random moments, resumes it each time, and says where the kills met it.

Arguments: dataset, output folder, number of kills. The parent imports everything once and forks, so that a
start costs a second.
"""

import json
import multiprocessing
import random
import sys
import time
from pathlib import Path

from tests.training_runs import tiny_run
from vega_policy.training.train import choose_checkpoint, make_accelerator, make_trainer, train

STEPS, SAVE_EVERY = 240, 4


def config(root: Path, output: Path):
    """The run; the same at each start."""
    return tiny_run(root, output, steps=STEPS, save_every=SAVE_EVERY, keep_last=2, resume=True)


def start(root: Path, output: Path, learning) -> None:
    """Resume the run, and set `learning` right before the first step."""
    run = config(root, output)
    accelerator = make_accelerator(cpu=True, precision="no")
    trainer = make_trainer(run, accelerator, choose_checkpoint(run, accelerator))
    learning.set()
    trainer.fit()


def kill_once(context, root: Path, output: Path, moment: random.Random, *, in_write: bool) -> str:
    """Starts the run and kills it; returns `write` if a checkpoint was being written, else `step`."""
    learning = context.Event()
    child = context.Process(target=start, args=(root, output, learning))
    child.start()
    assert learning.wait(300)
    checkpoints = output / "checkpoints"
    if in_write:
        while child.is_alive() and not list(checkpoints.glob(".[0-9]*.partial")):
            pass
        time.sleep(moment.uniform(0, 0.03))
    else:
        time.sleep(moment.uniform(0, 0.5))
    assert child.is_alive(), "the run was complete before it could be killed: more steps are needed"
    child.kill()
    child.join()
    return "write" if list(checkpoints.glob(".[0-9]*.partial")) else "step"


def main() -> None:
    """Kill the run repeatedly, let it finish, then train it once without interruption."""
    root, output, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    context = multiprocessing.get_context("fork")
    moment = random.Random(0)
    met, steps = [], []
    for number in range(kills):
        met.append(kill_once(context, root, output / "killed", moment, in_write=number % 2 == 1))
        newest = max((int(p.name) for p in (output / "killed" / "checkpoints").glob("[0-9]*")), default=0)
        steps.append(newest)
    train(config(root, output / "killed"))
    train(config(root, output / "straight"))
    counts = {"kills": kills, "in_write": met.count("write"), "checkpoints": steps}
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
