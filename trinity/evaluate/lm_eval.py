"""Scores that lm-eval found, with the chance level of its tasks of several choices."""

from collections.abc import Iterator, Mapping
from typing import Any

from trinity.observability.scores import Score, of_right

METRIC = "acc,none"  # lm-eval's name of the share of questions whose likeliest choice is right


def with_chance(results: Mapping[str, Any]) -> Iterator[Score]:
    """Scores of the tasks that offer choices, of which somebody who guesses has one in so many right."""
    for task, found in results["results"].items():
        samples = results.get("samples", {}).get(task, [])
        if METRIC in found and samples and all(len(sample["resps"]) > 1 for sample in samples):
            chance = sum(1 / len(sample["resps"]) for sample in samples) / len(samples)
            yield of_right(task, round(found[METRIC] * len(samples)), len(samples), chance)
