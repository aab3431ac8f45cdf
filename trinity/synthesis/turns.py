"""Turns: an answer that is written as a conversation, as messages."""

import re

ROLES = {
    "user": "user", "question": "user", "problem": "user", "human": "user", "student": "user", "q": "user",
    "assistant": "assistant", "answer": "assistant", "solution": "assistant", "teacher": "assistant", "a": "assistant",
}  # fmt: skip
WORDS = "|".join(role for role in ROLES if len(role) > 1)
LABEL = re.compile(  # as **Answer 2:**; a lone letter is a label as a capital only
    rf"^[ \t>*#-]*(?:\d+[.)][ \t]*)?\**((?i:{WORDS})|[QA])(?:[ \t]*\d+)?\**[ \t]*:\**[ \t]*", re.MULTILINE
)


def turns(answer: str) -> list[dict[str, str]] | None:
    """Messages of user and assistant in turn, from lines such as `Question:` and `**Answer 2:**`; None for an answer that is
    no such conversation: words before it, a side that speaks twice or says nothing, a question without an answer."""
    _, *parts = LABEL.split(answer.strip())
    said = [
        {"role": ROLES[who.lower()], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    wanted = ["user", "assistant"] * (len(said) // 2)
    is_whole = said and [each["role"] for each in said] == wanted and all(each["content"] for each in said)
    return said if is_whole and LABEL.match(answer.strip()) else None
