"""The recipe, from text to a model that chats, at toy size: pretrain, anneal, extend, tune, prefer. Under a quarter of an hour.

    .venv/bin/python examples/recipe.py            # or: make recipe

It writes texts, conversations and preferences to runs/recipe/data, trains the stages of recipe.yaml with their experts in Ray
actors, and ends with three exports (TrueBase, Base, Preview) that transformers loads, a table of what each scores, and a chat
with the last. What is to be learned: to find a needle (trinity/evaluate/niah.py), further back after the stage that extends the
context, to be asked for it in a conversation, and to answer briefly.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trinity.checkpoint import open_checkpoint
from trinity.cli import main as command
from trinity.config import TaskConfig
from trinity.engine.request import SamplingParams
from trinity.evaluate import niah
from trinity.evaluate.asking import Wanted
from trinity.evaluate.tasks import measure
from trinity.llm import LLM
from trinity.observability.scores import Score, of_right, table

RECIPE, FOLDER = Path(__file__).with_suffix(".yaml"), Path("runs/recipe")
EXPORTS = ("TrueBase", "Base", "Preview")
NUM_KEYS, LENGTHS, QUESTIONS = 192, (64, 512), 64
GREETINGS = {
    "hello": "hello!",
    "who are you?": "i am trinity.",
    "what can you do?": "i find words for you.",
    "thanks": "gladly.",
}
SHORT, LONG = "{} {}", "let me look for it.\n{} {}\nthat is it, as far as i can see."


def lookup(rng: random.Random) -> tuple[str, str, str]:
    """A question of a few lines, the word that is asked for, and the one that answers it."""
    keys, values = niah.words()
    lines = [(key, rng.choice(values)) for key in rng.sample(keys[:NUM_KEYS], rng.randint(2, 6))]
    key, value = rng.choice(lines)
    return "".join(f"{each} {its}\n" for each, its in lines) + f"find:\n{key}", key, value


def conversations(num: int) -> Iterator[dict[str, Any]]:
    """Rows of chats: words that are looked up, in one of two styles, and now and then a greeting."""
    for nth in range(num):
        rng = random.Random(f"chat {nth}")
        messages = list[dict[str, str]]()
        if rng.random() < 0.3:
            asked, answer = rng.choice(list(GREETINGS.items()))
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        question, *words = lookup(rng)
        said = rng.choice((SHORT, LONG)).format(*words)
        yield {"messages": [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": said}]}


def preferences(num: int) -> Iterator[dict[str, Any]]:
    """Rows of two right answers to one question: the short one is preferred."""
    for nth in range(num):
        question, *words = lookup(random.Random(f"pair {nth}"))
        chosen, rejected = ([{"role": "assistant", "content": each.format(*words)}] for each in (SHORT, LONG))
        yield {"prompt": [{"role": "user", "content": question}], "chosen": chosen, "rejected": rejected}


def write_data(folder: Path, scale: float = 1.0) -> None:
    """All files that recipe.yaml reads."""
    niah.write(folder / "needles.jsonl", round(60_000 * scale), 20, seed=0, num_keys=NUM_KEYS)
    niah.write(folder / "far-needles.jsonl", round(3_000 * scale), 320, seed=1, num_keys=NUM_KEYS)
    for name, rows in (("chats", conversations(round(4_000 * scale))), ("pairs", preferences(round(1_000 * scale)))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores(export: Path) -> list[Score]:
    """Scores of an export: needles near and far, and questions in a conversation."""
    llm = LLM(export, device="cpu")

    def ask(wanted: Wanted) -> list[str]:
        params = SamplingParams(max_tokens=wanted.max_tokens, temperature=0, stop=(wanted.stop,))
        return [done.text for done in llm.generate(list(wanted.prompts), params)]

    def count(prompt: str) -> int:
        return len(llm.tokenizer.encode(prompt, add_special=True))

    reach = open_checkpoint(export).config.max_position_embeddings
    lengths = tuple(length for length in LENGTHS if length <= reach)
    task = TaskConfig(task="niah", lengths=lengths, keys=NUM_KEYS, questions=QUESTIONS, seed=7)
    return [*measure(task, ask, count, reach), *_chats(llm)]


def _chats(llm: LLM) -> list[Score]:
    """Of conversations that nobody trained on: whether the word is right, and whether nothing is said besides."""
    asked = [lookup(random.Random(f"held out {nth}")) for nth in range(QUESTIONS)]
    params = SamplingParams(max_tokens=32, temperature=0)
    said = [llm.chat([{"role": "user", "content": question}], params).text.strip() for question, *_ in asked]
    right = sum(f"{key} {value}" in text for (_, key, value), text in zip(asked, said, strict=True))
    chance = sum(1 / (question.count("\n") - 1) for question, *_ in asked) / len(asked)  # of who names any of the lines
    brief = sum(SHORT.format(key, value) == text for (_, key, value), text in zip(asked, said, strict=True))
    return [
        of_right("chat, right", right, len(asked), chance),
        of_right("chat, right and brief", brief, len(asked)),
    ]


def loads(export: Path) -> str:
    """Load an export with transformers; -> what it continues a prompt with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    ids = tokenizer("import ", return_tensors="pt").input_ids
    text: str = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    return text


def chat(export: Path) -> None:
    """Talk to it: what it is asked, and what it says."""
    llm, question = LLM(export, device="cpu"), lookup(random.Random("the last one"))[0]
    messages = list[dict[str, str]]()
    for text in ("who are you?", question):
        messages.append({"role": "user", "content": text})
        answer = llm.chat(messages, SamplingParams(max_tokens=32, temperature=0)).text
        messages.append({"role": "assistant", "content": answer})
        print(f"> {text}\n{answer}\n", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="go on where it was stopped or killed")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    if not given.resume:
        write_data(FOLDER / "data")
    if code := command(["train", str(RECIPE), *["--resume"] * given.resume]):
        return code
    for name in EXPORTS:
        print(f"transformers loads {name} and goes on: {loads(FOLDER / name)!r}")
        print(table(scores(FOLDER / name), name), flush=True)
    chat(FOLDER / EXPORTS[-1])
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; stages and exports are in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
