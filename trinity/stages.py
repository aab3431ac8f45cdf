"""Stages of a run, one after the other: pretraining, annealing, a longer context, chats.

Decisions: a stage is a run of its own, in a folder of its own, that begins from the last checkpoint of the stage before. So a
kill costs what it costs any run, and in a switch nothing. What goes on is all of the optimizer's state, unless the stage says
`train.carry: weights` or trains other parts than the one before; data, length, batch, schedule and context are its own. All
stages are checked before the first step, and their data made ready (preparing.py).
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from trinity.checkpoint import step_path
from trinity.checkpoint.export import check_target
from trinity.config import NEW_IN_STAGE, Config, differences, merge
from trinity.errors import ConfigError
from trinity.evaluate.tasks import check

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
OWN = ("name", "export")
SECTIONS = ("model", "data", "train", "preferences", "rl", "distill", "optim", "evaluate", "placement")


class Stage(NamedTuple):
    """`config` is that of its run; `export` the folder of its weights at the end, if it has one."""

    name: str
    config: Config
    export: Path | None

    @property
    def checkpoint(self) -> Path:
        """The one that it ends with."""
        return step_path(self.config.train.out_dir, self.config.train.steps)


def read_stages(tree: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages that a file's `stages` names, in their order, over its other settings. Raises ConfigError, DataError."""
    base = {key: value for key, value in tree.items() if key != "stages"}
    given = tree["stages"]
    if not isinstance(given, list) or not given:
        raise ConfigError("stages is a list of sections, each with a name; leave it out for a run of one stage")
    found: list[Stage] = []
    for number, own in enumerate(given, 1):
        name = _checked_name(own, number, [stage.name for stage in found])
        found.append(_stage(base, own, f"{number}-{name}", name, found[-1] if found else None))
    for stage in found:
        check(stage.config.evaluate, stage.config.train.seq_len, stage.config.model.max_position_embeddings)
    for before, stage in pairwise(found):
        _check_follows(before, stage)
    _check_exports(found)
    return tuple(found)


def _checked_name(own: Any, number: int, taken: list[str]) -> str:
    if not isinstance(own, Mapping):
        raise ConfigError(f"stage {number} is {own!r}; a stage is a section of settings with a name")
    name = own.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(
            f"stage {number} is called {name!r}; a name has 1 to 64 letters, digits, dots, dashes and lines"
        )
    if name in taken:
        raise ConfigError(f"two stages are called {name!r}; give each a name of its own")
    if unknown := [str(key) for key in own if key not in (*OWN, *SECTIONS)]:
        near = get_close_matches(unknown[0], (*OWN, *SECTIONS), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join((*OWN, *SECTIONS))}"
        raise ConfigError(f"stage {name!r} has an unknown setting {unknown[0]!r}; {hint}")
    if not isinstance(own.get("export", ""), str | bool):
        raise ConfigError(f"stage {name!r} has export {own['export']!r}; give the name of a folder, or false for none")
    return name


def _stage(base: dict[str, Any], own: Mapping[str, Any], folder: str, name: str, before: Stage | None) -> Stage:
    sections = {key: value for key, value in own.items() if key in SECTIONS}
    tree = merge(_without_replaced(base, sections.get("data")), sections)
    out_dir = Path(Config.from_tree(merge(base, {})).train.out_dir)
    tree["train"] = {**tree.get("train", {}), "out_dir": str(out_dir / folder)}
    if before is not None:
        tree["model"] = {**before.config.model.model_dump(), **_fields(sections.get("model", {}), name)}
        carry = "all" if _trained(Config.from_tree(tree)) == _trained(before.config) else "weights"
        tree["train"] |= {"init_from": str(before.checkpoint)}
        tree["train"] |= {"carry": sections.get("train", {}).get("carry", carry)}
    export = own.get("export", name)
    return Stage(name, Config.from_tree(tree), out_dir / str(export) if export else None)


def _check_follows(before: Stage, stage: Stage) -> None:
    """Raise ConfigError where a stage could not go on from what the one before it ends with."""
    was, config = before.config, stage.config
    if differs := config.model.differs_from(was.model, NEW_IN_STAGE):
        raise ConfigError(
            f"stage {stage.name!r} is of another architecture than {before.name!r}, whose weights it begins with: "
            f"{', '.join(differs)}; a stage may change {', '.join(NEW_IN_STAGE)}"
        )
    one, other = was.optim.lora, config.optim.lora
    if one.rank and other.rank and one != other:
        raise ConfigError(
            f"stage {stage.name!r} goes on with the adapter of {before.name!r}, and has other optim.lora: "
            f"{'; '.join(differences(one.model_dump(), other.model_dump()))}; take the same"
        )
    if config.train.carry == "all" and _trained(was) != _trained(config):
        raise ConfigError(
            f"stage {stage.name!r} trains otherwise than {before.name!r} (optim.lora, freeze or matrices), so that there is no "
            "optimizer state to go on with; leave train.carry out, or say weights"
        )


def _trained(config: Config) -> tuple[object, ...]:
    """Settings that the optimizer's state depends on."""
    return config.optim.lora, config.optim.freeze, config.optim.matrices


def _check_exports(stages: Sequence[Stage]) -> None:
    """Raise ConfigError where two stages would write one folder, or something else is there."""
    taken = {Path(stage.config.train.out_dir): stage.name for stage in stages}
    for stage in stages:
        if stage.export is None:
            continue
        if stage.export in taken:
            raise ConfigError(
                f"stage {stage.name!r} exports {stage.export}, which is of stage {taken[stage.export]!r}; name another"
            )
        check_target(stage.export)
        taken[stage.export] = stage.name


def _without_replaced(base: dict[str, Any], data: Any) -> dict[str, Any]:
    """The file's settings without its files, where the stage has a mixture, and the other way round."""
    given = data.keys() if isinstance(data, Mapping) else ()
    replaced = [*(("train", "val") if "sources" in given else ()), *(("sources",) if "train" in given else ())]
    kept = base.get("data", {})
    return {**base, "data": {key: value for key, value in kept.items() if key not in replaced}} if replaced else base


def _fields(given: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping) or "preset" in given:
        raise ConfigError(
            f"stage {name!r} has a model of its own; a later stage may change fields of the first one's alone"
        )
    return given
