"""The checkpoints of a run: which there are, which to keep, and where a run takes up again.

Decisions: a run goes on from the newest checkpoint in its folder, always: whoever starts it again finds the same one. To go
on from another, that one is made the newest: later ones are moved to `aside-1/` (they stay whole, nothing is deleted), one
of another folder is linked into this one. Both happen once, when the run is started, and before anything else.
"""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trinity.checkpoint.layout import MANIFEST, REPLACED, replaced, step_path
from trinity.checkpoint.read import open_checkpoint
from trinity.checkpoint.write import CheckpointWriter, discard, sync, writing
from trinity.errors import ConfigError


def list_checkpoints(out_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [p.parent for p in Path(out_dir).glob(f"step-*/{MANIFEST}") if _name_of(p.parent)]
    standing = [p for p in found if not p.name.endswith(REPLACED) or p.with_suffix("") not in found]
    return sorted(standing, key=lambda path: int(path.name[5:].removesuffix(REPLACED)))


def latest_checkpoint(out_dir: str | Path) -> Path | None:
    found = list_checkpoints(out_dir)
    return found[-1] if found else None


def kept_generation(out_dir: str | Path, init_from: str | None) -> dict[str, Any] | None:
    """Content of the generation_config.json that a run goes on with: its newest checkpoint's, or that of its first weights."""
    source = latest_checkpoint(out_dir) or init_from
    return open_checkpoint(source).generation if source else None


def step_of(path: str | Path) -> int:
    """Steps of its run after which a checkpoint was saved, those skipped for a bad gradient included."""
    if name := _name_of(Path(path)):
        return int(name[1])
    return int(open_checkpoint(path).state["position"])


def _name_of(path: Path) -> re.Match[str] | None:
    return re.fullmatch(rf"step-(\d+)({re.escape(REPLACED)})?", path.name)


def prune(out_dir: str | Path, newest: int, every: int = 0, in_use: Collection[str | Path] = ()) -> list[Path]:
    """Delete all but the `newest`, those at multiples of `every` steps (0: none) and those `in_use`; -> the deleted.

    For when a save has finished. One that is being deleted is not listed any more; a kill leaves it to the next save.
    """
    spared = {Path(path).resolve() for path in in_use}
    old = [p for p in list_checkpoints(out_dir)[:-newest] if not (every and step_of(p) % every == 0)]
    doomed = [path for path in old if path.resolve() not in spared]
    for path in doomed:
        with writing(path):
            discard(replaced(path))
            discard(path)
    return doomed


def resume_point(out_dir: str | Path, wanted: int | str | None = None) -> Path | None:
    """The checkpoint that `wanted` means: a step of this run or a folder; None: the newest there is, if any.

    Raises ConfigError for one that is not there, that has nothing to resume from, or that another run in `out_dir` excludes.
    """
    if wanted is None:
        return latest_checkpoint(out_dir)
    own = list_checkpoints(out_dir)
    found = next((path for path in own if _means(wanted, path)), None) or Path(str(wanted))
    if not found.is_dir():
        there = ", ".join(p.name for p in own) or "none"
        raise ConfigError(f"train.resume_from {wanted} is no checkpoint; {out_dir} has {there}")
    if own and found not in own:
        raise ConfigError(f"{out_dir} already holds {own[-1].name}; resume from {found} in another train.out_dir")
    if not open_checkpoint(found).has_training_state:
        raise ConfigError(f"{found} has weights only; start from them with train.init_from")
    return found


def _means(wanted: int | str, path: Path) -> bool:
    if isinstance(wanted, int):
        return step_of(path) == wanted
    return wanted == path.name or Path(wanted).resolve() == path.resolve()


def rewind(out_dir: str | Path, point: Path) -> Path | None:
    """Make `point`, of `resume_point`, the newest checkpoint in `out_dir`; -> where later ones are now, if there were any."""
    own = list_checkpoints(out_dir)
    if point not in own:
        _link(point, step_path(out_dir, step_of(point)))
        return None
    later = own[own.index(point) + 1 :]
    return _move_aside(Path(out_dir), later) if later else None


def _move_aside(out_dir: Path, checkpoints: list[Path]) -> Path:
    number = 1
    while (aside := out_dir / f"aside-{number}").exists():
        number += 1
    with writing(aside):
        aside.mkdir()
        for path in reversed(checkpoints):
            os.replace(path, aside / path.name)
        sync(aside)
        sync(out_dir)
    return aside


def _link(source: Path, target: Path) -> None:
    """The checkpoint under a second name: files are shared where the disk can, so that nobody's clean-up takes them away."""
    with CheckpointWriter(target, open_checkpoint(source).version) as writer, writing(target):
        shutil.copytree(source, writer.folder, copy_function=_link_or_copy, dirs_exist_ok=True)
        writer.publish()


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
        sync(Path(target))
