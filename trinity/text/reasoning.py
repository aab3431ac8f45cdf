"""Reasoning: what a model writes between <think> and </think> before it answers.

Decision: an answer starts inside it if the rendered prompt ends inside it, as the template of a thinking model has it end; a
marker in an earlier turn says nothing about this one.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trinity.text.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"
MARKERS = (THINK, END_THINK)


def is_in_template(template: str | None) -> bool:
    """Does the template show reasoning? Then the model was made to write it."""
    return template is not None and any(marker in template for marker in MARKERS)


def starts_inside(prompt_ids: Sequence[int], tokenizer: "Tokenizer", marker_by_id: Mapping[int, str]) -> bool:
    """Does the turn that the prompt ends with (what follows its last special token) end inside reasoning?"""
    turn = list[int]()
    for token_id in reversed(prompt_ids):
        if (marker := marker_by_id.get(token_id)) in MARKERS:
            return marker == THINK
        if token_id in tokenizer.special_ids:
            break
        turn.append(token_id)
    if len([marker for marker in marker_by_id.values() if marker in MARKERS]) == len(MARKERS):
        return False
    text = tokenizer.decode(turn[::-1])
    return text.rfind(THINK) > text.rfind(END_THINK)
