"""The surface that people write into scripts and files: commands, flags, settings. It changes on purpose or not at all.

`surface.txt` is its record. `python -m tests.unit.test_surface` writes it anew; the diff belongs to the change's review,
and a setting that got another name belongs into RENAMED of trinity/config/tree.py.
"""

import argparse
import difflib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trinity.cli import parser
from trinity.config import Config, SynthesisConfig
from trinity.config.model import ModelConfig
from trinity.config.tree import RENAMED
from trinity.errors import ConfigError

RECORD = Path(__file__).with_name("surface.txt")
REMEDY = "if that was meant: python -m tests.unit.test_surface"


def surface() -> list[str]:
    families = (settings(kind, f"model ({name}).") for name, kind in sorted(ModelConfig.families.items()))
    own = settings(SynthesisConfig, "synthesize: ")  # of a file of its own
    return [*commands(parser()), *settings(Config, ""), *itertools.chain(*families), *own]


def commands(sub: argparse.ArgumentParser) -> Iterator[str]:
    """A line for each command, positional argument and flag, in the order of the help."""
    yield sub.prog
    for action in sub._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from commands(each)
        elif not isinstance(action, argparse._HelpAction):
            yield f"{sub.prog} {argument(action)}"


def argument(action: argparse.Action) -> str:
    facts = {
        "nargs": action.nargs or None,
        "type": action.type and action.type.__name__.strip("_"),
        "choices": action.choices and list(action.choices),
        "default": None if action.default == argparse.SUPPRESS else plain(action.default),
        "required": action.required or None,
        "action": None if isinstance(action, argparse._StoreAction) else type(action).__name__.strip("_"),
    }
    name = ", ".join(action.option_strings) or action.dest
    return " ".join([name, *(f"{key}={value!r}" for key, value in facts.items() if value is not None)])


def plain(value: Any) -> Any:
    """Enumerations by their values: their names are ours alone."""
    return [getattr(each, "value", each) for each in value] if isinstance(value, list | tuple) else value


def settings(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """A line for each setting: its dotted name, type, bounds and default."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if prefix + name == "model":
            continue
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from settings(kind, f"{prefix}{name}.")
            continue
        if (inner := section_in(kind)) is not None:
            yield from settings(inner, f"{prefix}{name}{'[]' * (get_origin(kind) is tuple)}.")
        else:
            yield f"{prefix}{name}: {type_of(field)} = {field.get_default()!r}"


def section_in(kind: Any) -> type[BaseModel] | None:
    """The section that a setting has several of, or one or none."""
    found = [each for each in get_args(kind) if isinstance(each, type) and issubclass(each, BaseModel)]
    return found[0] if found and get_origin(kind) is not dict else None


def type_of(field: FieldInfo) -> str:
    kind = field.annotation
    name = kind.__name__ if type(kind) is type else str(kind).replace("typing.", "")
    name = re.sub(r"FieldInfo\(.*?metadata=\[(.*?)\]\)", r"\1", name)
    return " ".join([name, *(str(bound) for bound in field.metadata)])


def test_the_surface_is_the_recorded_one():
    changes = list(
        difflib.unified_diff(RECORD.read_text().splitlines(), surface(), "recorded", "now", lineterm="", n=0)
    )
    assert not changes, "\n".join([*changes, REMEDY])


def test_the_record_has_both_halves():
    lines = RECORD.read_text().splitlines()
    assert "trinity serve source required=True" in lines
    assert "train.steps: int Ge(ge=1) = 1000" in lines
    assert "placement.autoscale.enabled: bool = False" in lines
    assert "model (glm4_moe).topk_group: int Gt(gt=0) = 1" in lines
    assert not [line for line in lines if "/" in line.partition("=")[0]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("train.num_in_flight", "train.num_overlapped_microbatches"),
        ("engine.num_in_flight", "engine.num_overlapped_microbatches"),
        ("train.runaway_nats", "train.loss_spike_threshold"),
        ("serve.num_engines", "engine.replicas"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(old, new):
    with pytest.raises(ConfigError, match=f"unknown setting '{old}'; it is called '{new}' now"):
        Config.load(None, [f"--{old}", "2"], model="tiny")


def test_new_names_are_settings_and_old_ones_are_not():
    names = {line.partition(":")[0] for line in settings(Config, "")}
    assert set(RENAMED.values()) <= names
    assert not set(RENAMED) & names


if __name__ == "__main__":
    RECORD.write_text("\n".join(surface()) + "\n")
