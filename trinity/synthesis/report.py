"""Counts of a run's questions and of what became of them, by style, from the records of finished shards."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

KEPT = "kept"
TOKENS = ("prompt_tokens", "completion_tokens")


class Tally:
    """Counts of one shard. `record` is what its file keeps."""

    def __init__(self, passages: Mapping[str, int]):
        self.passages, self.styles, self.tokens = dict(passages), dict[str, Counter[str]](), Counter[str]()

    def add(self, entry: Mapping[str, Any], reason: str | None) -> None:
        self.styles.setdefault(entry["style"], Counter())[reason or KEPT] += 1
        for name in TOKENS:
            self.tokens[name] += entry["provenance"].get(name) or 0

    @property
    def record(self) -> dict[str, Any]:
        styles = {style: dict(sorted(counts.items())) for style, counts in sorted(self.styles.items())}
        return {"input": self.passages, "styles": styles, "tokens": dict(self.tokens)}


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """Say how many were asked, kept and left out, and why, by style and in all."""
    given, tokens, styles = Counter[str](), Counter[str](), dict[str, Counter[str]]()
    for record in records:
        given.update(record["input"])
        tokens.update(record["tokens"])
        for style, counts in record["styles"].items():
            styles.setdefault(style, Counter()).update(counts)
    total = sum(styles.values(), Counter[str]())
    lines = [f"{'style':<16}{'asked':>10}{'kept':>10}{'left out':>10}   why"]
    lines += [_line(style, counts) for style, counts in (*sorted(styles.items()), ("all", total))]
    read = ", ".join(f"{num:,} {what}" for what, num in sorted(given.items()))
    spent = ", ".join(f"{tokens[name]:,} {name.replace('_', ' ')}" for name in TOKENS)
    return "\n".join([*lines, f"read: {read or 'nothing'}", f"spent: {spent}"])


def _line(style: str, counts: Counter[str]) -> str:
    left = {why: num for why, num in counts.items() if why != KEPT}
    why = ", ".join(f"{why} {num:,}" for why, num in sorted(left.items(), key=lambda each: (-each[1], each[0])))
    return f"{style:<16}{counts.total():>10,}{counts[KEPT]:>10,}{sum(left.values()):>10,}   {why}".rstrip()
