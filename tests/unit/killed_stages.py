"""Runs in stages that are killed: `python killed_stages.py FOLDER NUM SEED`, in a process that forks one for each kill.

A child runs the command of a file with stages, training in its own process, and kills itself right before its k-th file
operation; its successors go on with --resume, some of them killed as well. Whatever was hit, data, steps, saves or a switch of
stages, the checkpoints and exports at the end must be those of a run that nobody killed. Prints what was killed as JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch
import yaml

from tests.unit.killed_saves import CHANGES, WRITES, files_of
from tests.unit.test_stages import story
from tests.unit.test_trainer import trainer_for
from trinity.cli import main as command
from trinity.commands import train as staged
from trinity.evaluate.exam import exam_of
from trinity.launch import check_out_dir, rewound
from trinity.observability.train_log import TrainLog

KILLS = 3  # of one run, at most
OWN = ("TrueBase", "Base", "Preview", "1-TrueBase/step-000002", "2-long/step-000003", "3-Preview/step-000002")


def main(folder, num, seed):
    torch.set_num_threads(1)
    os.fsync = lambda handle: None
    (texts := folder / "texts").mkdir()
    for n in range(12):
        (texts / f"{n}.txt").write_text(" ".join(f"word{(n * i) % 37} is {i * n}" for i in range(100)))
    (folder / "story.yaml").write_text(yaml.safe_dump(story(texts, folder)))
    staged._trained = train_here
    log, rng, hit = folder / "operations", random.Random(seed), []
    assert attempt(folder, log, None) == 0
    want, names = outcome(folder), log.read_text().splitlines()
    for _ in range(num):
        shutil.rmtree(folder / "run")
        for _ in range(rng.randint(1, KILLS)):
            at = rng.randrange(len(names))
            if attempt(folder, log, at) == 0:
                break
            hit.append(log.read_text().splitlines()[-1] if at else "")
        assert attempt(folder, log, None) == 0
        found = outcome(folder)
        assert found == want, sorted(name for name in want if found.get(name) != want[name])
    print(json.dumps([len(names), hit]))


def train_here(config, served, cluster, num_workers):
    """A stage in this process, in the place of Ray's."""
    point = check_out_dir(config)
    if point is not None and not rewound(config, point):
        return None
    trainer = trainer_for(config)
    trainer.examine_with(exam_of(trainer))
    trainer.logs = [TrainLog(config.train.out_dir, config.train.steps)]
    return trainer.run()


def attempt(folder, log, at):
    """-> the signal that ended the command, or 0. `at`: the file operation before which it dies."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
        die_at(at, log, folder / "run")
        os._exit(command(["train", str(folder / "story.yaml"), "--resume"]))
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status)


def die_at(num, log, run):
    """Note each operation in the run's folder, and be killed before the `num`-th."""
    seen, out = [], os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def hook(event, arguments):
        if not (event in CHANGES or (event == "open" and arguments[2] & WRITES)):
            return
        if not isinstance(arguments[0], str | Path) or not str(arguments[0]).startswith(str(run)):
            return
        if len(seen) == num:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(event)
        os.write(out, f"{event} {Path(arguments[0]).relative_to(run)}\n".encode())

    sys.addaudithook(hook)


def outcome(folder):
    """The bytes of what a story ends with: last checkpoints and exports."""
    return {name: files_of(folder / "run" / name) for name in OWN}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
