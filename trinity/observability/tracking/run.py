"""The trackers of a run, from before its first step to after its last.

Decisions: they live in the process of the command, which goes through all stages and outlives workers that are killed; it
has the login of the person who started it. So one run at a tracker is all stages of a file, with steps that keep counting.
A run that goes on goes on there, too; one that is begun anew, or set back (train.resume_from), is a new one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trinity.config import Config, TrackConfig
from trinity.errors import ConfigError
from trinity.observability.run_history import RunHistory
from trinity.observability.tracking.base import TrackedRun
from trinity.observability.tracking.feeder import Feeder, close
from trinity.observability.tracking.trackers import tracker

FOLDER = "track"  # in the run's folder
SECRET = re.compile(r"(^|[._])(key|secret|password|credentials?|token)$")
LOGIN = re.compile(r"://[^/\s]*@")  # user and password within an address
HIDDEN = "(set)"


@contextmanager
def tracked(settings: TrackConfig, root: Path, told: Mapping[str, Any], goes_on: bool) -> Iterator[None]:
    """Inside the block the trackers hear of the run in `root`. Raises ConfigError before, where one cannot be used.

    `told` are its settings; `goes_on`: with what lies in the folder.
    """
    if not settings.to:
        yield
        return
    folder = root / FOLDER
    run = TrackedRun(folder, settings.project, settings.name or root.resolve().name, settings.tags, told)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another train.out_dir") from None
    found = [(name, tracker(name)) for name in settings.to]
    feeders = [Feeder(name, each, run, RunHistory(root, goes_on), goes_on) for name, each in found]
    for feeder in feeders:
        feeder.start()
    try:
        yield
    finally:
        close(feeders)


def told_of(configs: Sequence[tuple[str, Config]]) -> dict[str, Any]:
    """Settings of a run's stages by dotted names: of each after the first, what is otherwise there. What only serving needs is
    left out, and nothing that looks like a key is shown."""
    (_, first), *later = configs
    base = _flat(first)
    found = dict(base)
    for name, config in later:
        changed = {key: value for key, value in _flat(config).items() if base.get(key) != value}
        found |= {f"stages.{name}.{key}": value for key, value in changed.items()}
    return found


def _flat(config: Config) -> dict[str, Any]:
    return dict(_leaves(config.model_dump(mode="json", exclude={"serve", "track"}), ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _shown(f"{prefix}{key}", value)


def _shown(name: str, value: Any) -> Any:
    if value is not None and SECRET.search(name):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: _shown(f"{name}.{key}", each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shown(name, each) for each in value]
    return LOGIN.sub(f"://{HIDDEN}@", value) if isinstance(value, str) else value
