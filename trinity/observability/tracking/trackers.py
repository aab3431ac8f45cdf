"""The trackers that there are: a file, and three libraries, each imported when its name is in `track.to`.

Decisions: libraries find their servers and keys as they always do (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, a login
of before); none of it passes through our settings. They get neither the terminal's output nor code nor figures of the machine.
"""

import importlib
import json
import re
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TextIO
from uuid import uuid4

from trinity.errors import ConfigError
from trinity.observability.tracking.base import TrackedRun, Tracker
from trinity.utils.trying import tried

ILLEGAL = re.compile(r"[^\w\-. /:]")  # in names of MLflow
MLFLOW_VALUE, MLFLOW_BATCH = (
    500,
    100,
)  # characters of a parameter, and parameters of one call, that any of its servers takes


def tracker(name: str) -> Tracker:
    """The tracker of that name in `track.to`. Raises ConfigError where it needs what is not installed, or a login."""
    return KINDS[name]()


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"track.to names {name.partition('.')[0]}, which cannot be imported ({error}): "
            f"pip install 'trinity-moe[{name.partition('.')[0]}]', or leave it out"
        ) from None


class Jsonl:
    """Lines of a file of its own, jsonl.jsonl: settings, then each step's numbers, marks between them."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def begin(self, run: TrackedRun, known_as: str | None) -> str:
        self._file = (run.folder / "jsonl.jsonl").open("w" if known_as is None else "a", encoding="utf-8")
        name = known_as or uuid4().hex
        self._write({"run": name, "name": run.name, "project": run.project, "tags": run.tags, "settings": run.settings})
        return name

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._write({"step": step, **values})

    def mark(self, what: str, step: int) -> None:
        self._write({"step": step, "mark": what})

    def finish(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


class Trackio:
    """trackio >= 0.43, where a run goes on by its name: so the name gets an end of its own."""

    def __init__(self) -> None:
        self._library = _library("trackio")
        self._run: Any = None

    def begin(self, run: TrackedRun, known_as: str | None) -> str:
        name, resume = (known_as, "allow") if known_as else (f"{run.name}-{uuid4().hex[:6]}", "never")
        config = {**run.settings, "tags": list(run.tags)}
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        self._run = self._library.init(project=run.project, name=name, config=config, resume=resume, **quiet)
        return name

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def mark(self, what: str, step: int) -> None:
        self._run.alert(title=what, level=self._library.AlertLevel.INFO, step=step)

    def finish(self) -> None:
        self._run.finish()


class Wandb:
    """wandb >= 0.31. Offline it writes a folder for each time the run goes on, which `wandb sync` puts together."""

    def __init__(self) -> None:
        self._library = _library("wandb")
        self._run: Any = None
        if self._library.setup().settings.mode == "online" and tried(self._has_no_key, Exception) is True:
            raise ConfigError("track.to names wandb, which has no key here: `wandb login`, or WANDB_MODE=offline")

    def _has_no_key(self) -> bool:
        """Raises where its server is not to be reached, which is no reason not to train."""
        return not self._library.login(prompt=False)

    def begin(self, run: TrackedRun, known_as: str | None) -> str:
        self._run = self._library.init(
            project=run.project,
            name=run.name,
            id=known_as or uuid4().hex,
            tags=list(run.tags),
            config=dict(run.settings),
            dir=str(run.folder),
            resume="allow",
            reinit="create_new",
            settings=self._library.Settings(
                console="off", disable_code=True, disable_git=True, x_disable_stats=True, x_disable_meta=True
            ),
        )
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def mark(self, what: str, step: int) -> None:
        self._run.summary[what] = step

    def finish(self) -> None:
        self._run.finish()


def _legal(name: str) -> str:
    """The name with lines for characters that MLflow refuses."""
    return ILLEGAL.sub("_", name)[:250]


class Mlflow:
    """mlflow >= 3. Its server names the run; a setting that was told once is never told otherwise."""

    def __init__(self) -> None:
        self._entities, client = _library("mlflow.entities"), _library("mlflow").MlflowClient
        self._client, self._id = client(), ""

    def begin(self, run: TrackedRun, known_as: str | None) -> str:
        if known_as is not None:
            self._id = known_as
            self._client.update_run(known_as, status="RUNNING")
            return known_as
        tags = {"mlflow.note.content": "tags: " + ", ".join(run.tags)} if run.tags else {}
        tags |= dict.fromkeys(run.tags, "true")
        found = self._client.create_run(self._experiment(run.project), tags=tags, run_name=run.name)
        self._id = found.info.run_id
        params = [self._entities.Param(key, str(value)[:MLFLOW_VALUE]) for key, value in run.settings.items()]
        for first in range(0, len(params), MLFLOW_BATCH):
            self._client.log_batch(self._id, params=params[first : first + MLFLOW_BATCH])
        return self._id

    def _experiment(self, project: str) -> str:
        found = self._client.get_experiment_by_name(project)
        return str(self._client.create_experiment(project) if found is None else found.experiment_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        now_ms = int(1000 * time.time())
        metrics = [self._entities.Metric(_legal(key), float(value), now_ms, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def mark(self, what: str, step: int) -> None:
        self._client.set_tag(self._id, _legal(what), str(step))

    def finish(self) -> None:
        self._client.set_terminated(self._id)


KINDS: dict[str, Callable[[], Tracker]] = {"jsonl": Jsonl, "trackio": Trackio, "wandb": Wandb, "mlflow": Mlflow}
