"""Saves that are killed: `python killed_saves.py FOLDER`, a process of its own because it forks one for each kill.

A child saves a checkpoint over others and prunes, and kills itself right before its k-th file operation, for every k; then
others are killed by the kernel in the middle of a file. After each, what is on the disk must be whole checkpoints.
Prints the names of the operations as JSON; an assertion that fails ends it.
"""

import json
import os
import resource
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from tests.unit.checkpoint_files import contents, model_and_pool, save
from trinity.checkpoint import list_checkpoints, open_checkpoint, prune, step_of, step_path
from trinity.text.tokenizer import Tokenizer

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR
SIZES = (0, 1, 100, 300, 4096, 5000, 20_000)  # bytes of a file at which the kernel steps in
OLD, NEW, NEXT = 1, 2, 3  # seeds


def main(folder):
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # slow, and nothing to a process that is killed: what it wrote, the kernel has
    tokenizer = Tokenizer.train(iter(["some text"]), 300)
    made = {seed: (*model_and_pool(seed), tokenizer) for seed in (OLD, NEW, NEXT)}
    known = set()
    for step, seed in ((1, OLD), (2, OLD), (2, NEW), (3, NEXT)):
        path = save(step_path(folder / f"known-{seed}", step), step, *made[seed])
        assert contents(path)
        known.add(files_of(path))  # the same bytes load alike
    operations = []
    for steps in ((1, 2), (2,)):  # the one that is replaced has an elder, or is all there is
        before = folder / f"before-{len(steps)}"
        for step in steps:
            shutil.copytree(folder / f"known-{OLD}" / f"step-{step:06d}", before / f"step-{step:06d}")
        leave_behind(before)
        operations.append(kill_everywhere(before, folder / "run", made, known))
    print(json.dumps(operations))


def leave_behind(before):
    """What earlier savers died over."""
    for name in ("step-000002.0123abcd.partial", "step-000001.0123abcd.deleted"):
        (before / name / "training").mkdir(parents=True)
        (before / name / "config.json").write_text("{")


def kill_everywhere(before, run, made, known):
    log = run.with_suffix(".log")
    for size in SIZES:
        assert attempt(before, run, made, partial(die_at_size, size)) == signal.SIGXFSZ
        check(run, made, known)
    num = 0
    while attempt(before, run, made, partial(die_at_operation, num, log)):
        check(run, made, known)
        num += 1
    check(run, made, known)
    return log.read_text().splitlines()


def attempt(before, run, made, doom):
    """-> the signal that ended a save of step 2 in `run`, or 0."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(before, run)
    child = os.fork()
    if child == 0:
        doom()
        save_and_prune(run, 2, made[NEW])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status)


def save_and_prune(run, step, what):
    save(step_path(run, step), step, *what)
    prune(run, newest=1)


def die_at_size(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def die_at_operation(num, log):
    seen, out = [], os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def operation(name):
        if len(seen) == num:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(name)
        os.write(out, f"{name}\n".encode())

    def hook(event, arguments):
        if event in CHANGES or (event == "open" and arguments[2] & WRITES):
            operation(event)

    os.fsync = lambda handle: operation("fsync")
    sys.addaudithook(hook)


def check(run, made, known):
    """Whole checkpoints, the old or the new one of each step, with readers changing nothing; and the next save works."""
    names = sorted(os.listdir(run))
    listed = list_checkpoints(run)
    assert listed, names
    for path in listed:
        open_checkpoint(path).verify()
        assert open_checkpoint(path).version == step_of(path)
        assert files_of(path) in known, f"{path} is neither the old nor the new checkpoint"
    assert sorted(os.listdir(run)) == names
    save_and_prune(run, 3, made[NEXT])
    assert os.listdir(run) == ["step-000003"]


def files_of(path):
    return tuple(sorted((str(p.relative_to(path)), p.read_bytes()) for p in path.rglob("*") if p.is_file()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
