"""A score: a mean of answers, what guessing would give, and the interval that so few answers leave open.

Sources: Wilson's interval of a proportion (J. Am. Stat. Assoc. 22, 1927), of other means the normal one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

Z = 1.96  # of 95 % of a normal distribution
COLUMNS = ("task", "score", "95 %", "chance", "answers", "")


@dataclass(frozen=True)
class Score:
    """`mean` of `num` answers lies between `low` and `high` with 95 %. `chance`: the mean of who guesses; None: not known.
    `at_least`: the bound of the task's gate, if it has one. `num_unjudged`: answers beside these that nobody could judge."""

    task: str
    mean: float
    low: float
    high: float
    num: int
    chance: float | None = None
    at_least: float | None = None
    num_unjudged: int | None = None

    @property
    def is_at_chance(self) -> bool:
        """Say whether somebody who guesses might have had it."""
        return self.chance is not None and self.low <= self.chance

    @property
    def passes(self) -> bool:
        """Say whether its gate is open. What is not a number passes none."""
        return self.at_least is None or self.mean >= self.at_least

    @property
    def verdict(self) -> str:
        """Words on what the number does not say itself."""
        gate = "" if self.at_least is None else f"{'passes' if self.passes else 'below'} {self.at_least:g}"
        unjudged = f"{self.num_unjudged} unjudged" if self.num_unjudged else ""
        return ", ".join(filter(None, ("at chance" if self.is_at_chance else "", unjudged, gate)))

    @property
    def sentence(self) -> str:
        """The score in words."""
        chance = "" if self.chance is None else f", chance {self.chance:.2f}"
        found = f"{self.task}: {self.mean:.2f} ({self.low:.2f} to {self.high:.2f}{chance})"
        return f"{found}, {self.verdict}" if self.verdict else found

    def row(self) -> dict[str, Any]:
        """Plain values, with whether the gate is open where there is one."""
        found = {key: value for key, value in asdict(self).items() if value is not None}
        return found if self.at_least is None else {**found, "passes": self.passes}


def of_rows(rows: Iterable[Mapping[str, Any]]) -> list[Score]:
    """The inverse of `row`, of several."""
    return [Score(**{key: _number(value) for key, value in row.items() if key != "passes"}) for row in rows]


def _number(value: Any) -> Any:
    """The value; nan where a log has null."""
    return math.nan if value is None else value


def of_right(task: str, num_right: int, num: int, chance: float | None = None, at_least: float | None = None) -> Score:
    """Score of `num` answers, each right or wrong."""
    share = num_right / num
    centre = (share + Z**2 / (2 * num)) / (1 + Z**2 / num)
    reach = Z / (1 + Z**2 / num) * math.sqrt(share * (1 - share) / num + Z**2 / (4 * num**2))
    return Score(task, share, max(0.0, centre - reach), min(1.0, centre + reach), num, chance, at_least)


def of_rewards(task: str, rewards: Sequence[float | None], at_least: float | None = None) -> Score:
    """Score of rewards, of which some answers have none. Where none has, it is not a number."""
    there = [reward for reward in rewards if reward is not None]
    found = of_values(task, there, at_least) if there else Score(task, math.nan, math.nan, math.nan, 0, None, at_least)
    return replace(found, num_unjudged=len(rewards) - len(there))


def of_values(task: str, values: Sequence[float], at_least: float | None = None) -> Score:
    """Score of what each answer is worth."""
    num = len(values)
    mean = math.fsum(values) / num
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, num - 1))
    reach = Z * spread / math.sqrt(num)
    return Score(task, mean, mean - reach, mean + reach, num, None, at_least)


def table(scores: Iterable[Score], title: str = "Scores") -> str:
    """Scores as Markdown; what is at chance says so."""
    cells = [COLUMNS, *map(_cells, scores)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"### {title}", "", lines[0], rule, *lines[1:], ""])


def _cells(score: Score) -> tuple[str, ...]:
    chance = "" if score.chance is None else f"{score.chance:.3f}"
    interval = f"{score.low:.3f} to {score.high:.3f}"
    return (score.task, f"{score.mean:.3f}", interval, chance, str(score.num), score.verdict)
