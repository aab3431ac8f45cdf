"""A tiny model that has learned eight sentences, a server of it, and the scores that transformers gives.

Harnesses choose the ending that a model finds most likely; eight endings are asked of each beginning, chance is one in eight.
"""

import random
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from tests.unit.test_trainer import config_for, trainer_for
from trinity.commands.eval import served as in_process
from trinity.config import EngineConfig
from trinity.llm import LLM

NAME = "learned"
PAIRS = {
    "sky": "blue", "grass": "green", "snow": "white", "coal": "black",
    "blood": "red", "gold": "yellow", "rose": "pink", "night": "dark",
}  # fmt: skip
CONTEXTS = [f"the {thing} is" for thing in PAIRS]
ENDINGS = [f" {colour}" for colour in PAIRS.values()]
STEPS = 50
MIN_RIGHT = 6  # of eight: 50 steps give all of them


def learned(folder: Path) -> Path:
    """The checkpoint of a model trained on the sentences, in random order."""
    texts, order = folder / "texts", random.Random(0)
    texts.mkdir()
    for number in range(24):
        sentences = [f"the {thing} is {colour}." for thing, colour in PAIRS.items()] * 6
        order.shuffle(sentences)
        (texts / f"{number}.txt").write_text(" ".join(sentences))
    config = config_for(texts, folder / "run", steps=STEPS, seq_len=64, global_batch_size=8, micro_batch_size=8)
    trainer = trainer_for(config)
    for _ in range(STEPS):
        trainer.step()
    return trainer.save()


@asynccontextmanager
async def served(checkpoint: Path, max_model_len: int = 64, **serve):
    """A gateway over an engine in this process, whose passes are shorter than a few prompts."""
    settings = EngineConfig(
        max_model_len=max_model_len, kv_cache_bytes=8 << 20, max_num_seqs=16, max_num_batched_tokens=24
    )
    llm = LLM(checkpoint, engine=settings, backend="torch", device="cpu")
    async with in_process(llm, NAME, **serve) as gateway:
        yield gateway


def offline(checkpoint: Path):
    """-> a function of context and ending ids: log-likelihood and whether greedy decoding gives them, by transformers."""
    from transformers import AfmoeForCausalLM

    model = AfmoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    @torch.inference_mode()
    def score(context: list[int], ending: list[int]) -> tuple[float, bool]:
        logprobs_TV = model(torch.tensor([context + ending])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        values_T = logprobs_TV.gather(1, torch.tensor(ending)[:, None])
        return values_T.double().sum().item(), logprobs_TV.argmax(-1).tolist() == ending

    return score
