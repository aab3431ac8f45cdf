"""Styles: prompt templates, and the question that a passage becomes by one of them.

Decisions: a built-in style is a template like a user's own, who may give one of the same name. What is left to chance (values
of placeholders, the seed of sampling, which styles a passage gets) follows from the run's seed and the passage's text alone,
so that a passage is asked the same whenever, wherever and in whatever order it is read.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

from trinity.config import PASSAGE, SynthesisConfig, Template
from trinity.errors import ConfigError

BUILT_IN: dict[str, Template] = {
    "rephrase": Template(
        prompt="Rewrite the following text in other words, {manner}. Keep every fact, number and name.\n"
        "Write the new text only, without introduction or comment.\n\n{text}",
        values={"manner": (
            "in clear prose as in an encyclopedia", "in plain words for somebody who is new to the subject",
            "concisely, for an expert", "as a lively magazine would",
        )},
        temperature=0.8,
        length_ratio=(0.3, 3.0),
    ),
    "qa": Template(
        prompt="Ask questions about the following text, and answer each from it: {kind}.\n"
        "Begin each question with `Question:` and each answer with `Answer:`, and write nothing else.\n\n{text}",
        values={"kind": (
            "some that are answered in a few words", "some that need a reason or an explanation",
            "some that compare or connect what is said at different places",
        )},
        temperature=0.7,
        with_passage=True,
        has_turns=True,
    ),
    "table": Template(
        prompt="Put the facts of the following text into a table in Markdown, with a heading for each column, and write one "
        "sentence below that says what the table shows. Write nothing else.\n\n{text}",
        temperature=0.5,
        length_ratio=(0.05, 5.0),
    ),
    "tutorial": Template(
        prompt="Write a tutorial, step by step, {reader}, that teaches what the following text is about. Use its facts and no "
        "others, and give an example where one helps.\n\n{text}",
        values={"reader": ("for a beginner", "for a student who knows the basics", "for a practitioner in a hurry")},
        temperature=0.8,
        length_ratio=(0.3, 8.0),
    ),
    "math": Template(
        prompt="Make a problem that needs several steps of calculation or logic from the following text, and solve it step by "
        "step. Begin the problem with `Problem:` and the solution with `Solution:`, and write nothing else.\n\n{text}",
        temperature=0.7,
        length_ratio=(0.05, 8.0),
        has_turns=True,
    ),
    "dialogue": Template(
        prompt="Turn the following text into a conversation: {who} asks, and somebody who knows answers with the facts of the "
        "text. Begin each line of the one who asks with `User:`, of the one who answers with `Assistant:`, and write nothing "
        "else.\n\n{text}",
        values={"who": ("a curious child", "a student", "a colleague", "a sceptic")},
        temperature=0.9,
        length_ratio=(0.2, 8.0),
        has_turns=True,
    ),
}  # fmt: skip


class Question(NamedTuple):
    """A passage as a style asks about it; `key` is its place: document, passage, style."""

    key: tuple[int, int, int]
    style: str
    template: Template
    passage: str
    system: str
    prompt: str
    seed: int


def templates_of(config: SynthesisConfig) -> dict[str, Template]:
    """The templates of a run's styles, in their order. Raises ConfigError for one that there is not, or that makes no chats."""
    known = BUILT_IN | config.templates
    if unknown := [name for name in config.styles if name not in known]:
        raise ConfigError(f"styles has {unknown[0]!r}; there are {', '.join(known)}, and what templates adds")
    if unused := [name for name in config.templates if name not in config.styles]:
        raise ConfigError(f"templates has {unused[0]!r}, which styles does not name; add it there or leave it out")
    if config.styles_per_passage is not None and config.styles_per_passage > len(config.styles):
        raise ConfigError(f"styles_per_passage is {config.styles_per_passage}; there are {len(config.styles)} styles")
    found = {name: _within(known[name], config.server.max_tokens) for name in config.styles}
    mute = [name for name, template in found.items() if not template.has_turns]
    if config.output.rows == "messages" and mute:
        raise ConfigError(
            f"style {mute[0]!r} has no turns of a chat; leave it out, set has_turns in its template, or set output.rows text"
        )
    return found


def _within(template: Template, most: int | None) -> Template:
    return template if most is None else template.model_copy(update={"max_tokens": min(most, template.max_tokens)})


def hash_of(template: Template) -> str:
    """Hexadecimal digest of all that a template says."""
    return _digest(json.dumps(template.model_dump(mode="json"), sort_keys=True)).hex()


def chosen(templates: Mapping[str, Template], num: int | None, passage: str, seed: int) -> list[tuple[int, str]]:
    """(number, style) of those that a passage is asked by: all of them, or `num` by chance."""
    named = list(enumerate(templates))
    return named if num is None else sorted(random.Random(_digest(f"{seed} styles {passage}")).sample(named, num))


def question(place: tuple[int, int], number: int, style: str, template: Template, passage: str, seed: int) -> Question:
    """The question of that passage and style. `place` is (document, passage)."""
    drawn = _digest(f"{seed} {style} {hash_of(template)} {passage}")
    chance = random.Random(drawn)
    values: dict[str, Any] = {name: chance.choice(each) for name, each in sorted(template.values.items())}
    values[PASSAGE] = passage.strip("\n")
    return Question(
        key=(*place, number),
        style=style,
        template=template,
        passage=passage,
        system=template.system.format(**values),
        prompt=template.prompt.format(**values),
        seed=int.from_bytes(drawn[:4], "little") >> 1,
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
