"""Reinforcement learning on a live pool of experts: a tiny model learns to close brackets.

    .venv/bin/python examples/balanced_brackets.py --seeds 0 1 2    # --ray: experts in two Ray actors; a minute or two a seed

First it reads lines in which two of five brackets at the end are random. Then, in each step, it completes 16 lines 8 times
each; a completion is worth 1 if it closes all brackets of its line in order, else 0. Draws runs/balanced_brackets.png.

    .venv/bin/python examples/balanced_brackets.py --data runs/brackets && .venv/bin/trinity train docs/train-rl.yaml

The same from the command line: `--data` writes lines and prompts, `grade` is the reward function that the file names.
What only this program needs is imported where it is used, so that a process for rewards starts quickly.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trinity.config import Config
    from trinity.pool.pool import ExpertPool

PAIRS = {"(": ")", "[": "]", "{": "}"}
NUM_PROMPTS, GROUP = 16, 8
TREE = {  # 269 words: the special tokens and the bytes. After the text steps, learning rates stay at a tenth of their peak.
    "model": {"preset": "tiny", "vocab_size": 269, "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 3},
    "train": {"steps": 120, "seq_len": 32, "global_batch_size": NUM_PROMPTS * GROUP, "micro_batch_size": 32},
    "engine": {"max_num_seqs": NUM_PROMPTS * GROUP},
}


def brackets(rng: random.Random, share_random: float = 0.0) -> tuple[str, str]:
    """The beginning of a line, and what closes it."""
    length, text, still_open = rng.randrange(4, 10), "", ""
    while len(text) + len(still_open) < length:
        if still_open and rng.random() < 0.4:
            text, still_open = text + still_open[0], still_open[1:]
        else:
            text += rng.choice("([{")
            still_open = PAIRS[text[-1]] + still_open
    return text, "".join(rng.choice(")]}") if rng.random() < share_random else char for char in still_open)


def reward(line: str) -> float:
    still_open = ""
    for char in line:
        if char not in PAIRS and char != still_open[:1]:
            return 0.0
        still_open = PAIRS[char] + still_open if char in PAIRS else still_open[1:]
    return float(not still_open)


def grade(answer: str, row: dict[str, str]) -> float:
    """A reward function of `trinity rl`: how good an answer to the prompt of that row is."""
    return reward(row["prompt"] + answer)


def write_data(folder: Path, seed: int = 0) -> None:
    """Lines to read, of which many are wrong, and beginnings to complete."""
    rng = random.Random(seed)
    lines = [{"text": "".join(brackets(rng, share_random=0.4))} for _ in range(4000)]
    prompts = [{"prompt": brackets(rng)[0]} for _ in range(2000)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("lines", lines), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(config: "Config", pool: "ExpertPool", num_steps: int) -> list[float]:
    """-> the mean reward of each step."""
    from trinity.data.prepare import prepare
    from trinity.engine.request import SamplingParams
    from trinity.rl.policy_trainer import PolicyTrainer, group_advantages
    from trinity.rl.rollout import Rollout
    from trinity.train.collectives import Alone

    rng = random.Random(config.train.seed)
    texts = [{"text": "".join(brackets(rng, share_random=0.4))} for _ in range(4000)]
    Path(config.data.train[0]).write_text("\n".join(map(json.dumps, texts)))
    data = prepare(config.data, config.train, config.model, config.train.out_dir)
    trainer = PolicyTrainer(config, pool, data, Alone())
    trainer.start()
    for _ in range(config.train.steps):
        trainer.step()
    rollout, rewards = Rollout.following(trainer), []  # the same weights: what a step commits, the next rollout uses
    for step in range(num_steps):
        prompts = [brackets(rng)[0] for _ in range(NUM_PROMPTS)]
        sampling = [SamplingParams(max_tokens=16, seed=rng.getrandbits(32)) for _ in prompts]
        samples = rollout.generate(prompts, sampling, num_samples=GROUP)
        lines = [prompts[i // GROUP] + sample.text for i, sample in enumerate(samples)]
        worth = [reward(line) * (s.finish_reason == "stop") for line, s in zip(lines, samples, strict=True)]
        trainer.learn(samples, group_advantages(worth, GROUP))
        rewards.append(sum(worth) / len(worth))
        print(f"step {step + 1}: mean reward {rewards[-1]:.2f}, as in {lines[0]}", flush=True)
    return rewards


@contextmanager
def pool_of(config: "Config", in_ray: bool) -> "Iterator[ExpertPool]":
    from trinity.config import setup_environment
    from trinity.pool.local import local_pool
    from trinity.rpc.messages import Load

    if not in_ray:
        yield local_pool(config.model, Load(), optim=config.optim)
        return
    setup_environment(config.cluster.auth, is_local=True)  # before Ray is imported
    from actors import pool as pools
    from actors.cluster import joined

    settings, namespace = config.placement, config.cluster.namespace
    with joined(config.cluster):
        yield pools.create(settings, namespace, config.model, config.optim, config.train.out_dir)
        pools.destroy(settings.pool, namespace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--data", type=Path, help="write lines and prompts into this folder, and stop")
    arguments, curves = parser.parse_args(), []
    if arguments.data:
        return write_data(arguments.data)
    import numpy as np
    import torch

    from trinity.config import Config
    from trinity.train.plots import reward_curves_png

    torch.set_num_threads(1)  # for so small a model: two would wait for one another most of the time
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            own = {"data": {"train": [f"{folder}/lines.jsonl"]}, "train": {"seed": seed, "out_dir": folder}}
            config = Config.from_tree(TREE).replace(**own)
            with pool_of(config, arguments.ray) as pool:
                curves.append(run(config, pool, arguments.steps))
    print(reward_curves_png(np.array(curves), "runs/balanced_brackets.png"))


if __name__ == "__main__":
    main()
