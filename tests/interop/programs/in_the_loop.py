"""Scores and log-likelihoods of lm-eval's tasks as a run's exam asks them. Prints one line of JSON."""

import json
import sys

from trinity.config import TaskConfig
from trinity.evaluate import lm_eval
from trinity.llm import LLM
from trinity.rl.rollout import Rollout


def main(checkpoint: str, include_path: str, max_model_len: str, *tasks: str) -> None:
    rollout = Rollout(
        LLM(checkpoint, max_model_len=int(max_model_len), kv_cache_bytes=8 << 20, backend="torch", device="cpu")
    )
    found = {}
    for task in tasks:
        lm_eval.check_task(task, include_path)
        scores = lm_eval.measure(TaskConfig(task=task, questions=100), rollout, include_path)
        found[task] = [score.row() for score in scores]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
