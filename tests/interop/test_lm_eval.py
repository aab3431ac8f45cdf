"""lm-eval itself, unmodified, against our server: every item scores as it does offline. `make interop-lm-eval` installs it.

Offline is lm-eval's own `hf` model over the same checkpoint in float32. The tasks are made here; nothing is downloaded.
"""

import asyncio
import json
import os
from pathlib import Path

import pytest

from tests.serve.scored import CONTEXTS, ENDINGS, MIN_RIGHT, NAME, PAIRS, learned, served
from trinity.checkpoint.export import card_of, export

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("LM_EVAL_PYTHON", ROOT / ".venv-lm-eval/bin/python"))
pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="lm-eval is not installed: make interop-lm-eval"),
]
CHOICES = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/colours.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
WORDS = """
task: colours_in_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/colours.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{endings[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, temperature: 0}}
metric_list:
  - metric: exact_match
"""
TEXTS = """
task: colours_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


QUESTIONS = """
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
num_fewshot: 2
doc_to_text: "Question: {{{{question}}}}\nAnswer:"
doc_to_choice: "{{{{choices.text}}}}"
doc_to_target: "{{{{choices.label.index(key)}}}}"
fewshot_config: {{sampler: first_n}}
metric_list:
  - metric: acc
  - metric: acc_norm
"""  # as ARC and HellaSwag ask: examples before the question, answers of several tokens and unlike lengths


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What a stage of a run ends with: an export."""
    folder = tmp_path_factory.mktemp("learned")
    return export(learned(folder), folder / "Base", card_of("Base", {}, ""))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with tasks of lm-eval and what they ask."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = [{"context": text, "endings": ENDINGS, "answer": at} for at, text in enumerate(CONTEXTS)]
    texts = [{"text": ". ".join(f"the {a} is {b}" for a, b in list(PAIRS.items())[at : at + 3])} for at in range(4)]
    endings = [
        f"{colour}. the {other} is {PAIRS[other]}"
        for other, colour in zip(reversed(PAIRS), PAIRS.values(), strict=True)
    ]
    choices = {"text": [*endings[:3], "blue", *endings[3:]], "label": [*"ABCDEFGHI"]}
    questions = [
        {"question": f"{text}?", "choices": choices, "key": "ABCDEFGHI"[at + (at > 2)]}
        for at, text in enumerate(CONTEXTS)
    ]
    for name, lines in (("colours", docs), ("texts", texts), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in (("colours", CHOICES), ("words", WORDS), ("rolling", TEXTS), ("questions", QUESTIONS)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


async def harness(*arguments):
    """Run lm-eval's own program, offline."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    child = await asyncio.create_subprocess_exec(
        str(PYTHON),
        "-m",
        *map(str, arguments),
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await child.communicate()
    assert child.returncode == 0, said.decode()[-4000:]
    return said.decode()


async def samples(folder, tasks, task, model, model_args, *more):
    """What each request of that task got, by document and place."""
    args = ",".join(f"{key}={value}" for key, value in model_args.items())
    asked = ["--model", model, "--model_args", args, "--tasks", task, "--include_path", tasks, *more]
    await harness("lm_eval", "run", *asked, "--output_path", folder, "--log_samples")
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["doc_id"]: line for line in lines}


def scores(found):
    """(log-likelihood, greedy) of each request."""
    flat = [reply[0] for at in sorted(found) for reply in found[at]["resps"]]
    return [(float(value), str(greedy) == "True") for value, greedy in flat]


def over_http(gateway, **more):
    return {"model": NAME, "base_url": f"{gateway.addresses[0]}/v1/completions", "max_length": 64, **more}


def offline(checkpoint, max_length=63):
    return {"pretrained": checkpoint, "dtype": "float32", "max_length": max_length, "add_bos_token": False}


@pytest.mark.parametrize("more", [{}, {"num_concurrent": 4}], ids=str)
async def test_each_item_over_http_is_as_it_is_offline(checkpoint, tasks, tmp_path, more):
    want = await samples(tmp_path / "hf", tasks, "colours", "hf", offline(checkpoint), "--device", "cpu")
    async with served(checkpoint) as gateway:
        args = over_http(gateway, **more)
        got = await samples(tmp_path / "http", tasks, "colours", "local-completions", args, "--batch_size", "8")
    assert len(scores(got)) == len(CONTEXTS) * len(ENDINGS)
    assert [value for value, _ in scores(got)] == pytest.approx([value for value, _ in scores(want)], abs=1e-4)
    assert [greedy for _, greedy in scores(got)] == [greedy for _, greedy in scores(want)]
    right = sum(line["acc"] for line in got.values())
    assert right == sum(line["acc"] for line in want.values()) >= MIN_RIGHT, "chance is one of eight"


async def test_questions_after_examples_score_alike_offline_over_http_and_in_a_run(checkpoint, tasks, tmp_path):
    want = await samples(tmp_path / "hf", tasks, "questions", "hf", offline(checkpoint, 255), "--device", "cpu")
    async with served(checkpoint, max_model_len=256) as gateway:
        args = over_http(gateway, max_length=256)
        got = await samples(tmp_path / "http", tasks, "questions", "local-completions", args, "--batch_size", "8")
    assert [value for value, _ in scores(got)] == pytest.approx([value for value, _ in scores(want)], abs=1e-4)
    for metric in ("acc", "acc_norm"):
        assert [got[at][metric] for at in sorted(got)] == [want[at][metric] for at in sorted(want)]
    said = await harness("tests.interop.programs.in_the_loop", checkpoint, tasks, 256, "questions")
    [score] = json.loads(said.splitlines()[-1])["questions"]
    assert score["mean"] * len(want) == pytest.approx(sum(line["acc"] for line in want.values()))


async def test_whole_texts_have_the_same_likelihood(checkpoint, tasks, tmp_path):
    """The token before a text is said: lm-eval's remote tokenizer takes a first token with the id 0, as ours is, for none."""
    want = await samples(tmp_path / "hf", tasks, "colours_rolling", "hf", offline(checkpoint), "--device", "cpu")
    async with served(checkpoint) as gateway:
        args = over_http(gateway, custom_prefix_token_id=0)
        got = await samples(tmp_path / "http", tasks, "colours_rolling", "local-completions", args)
    values = [[float(found[at]["resps"][0][0]) for at in sorted(found)] for found in (got, want)]
    assert values[0] == pytest.approx(values[1], abs=1e-3)


async def test_conversations_are_answered(checkpoint, tasks, tmp_path):
    async with served(checkpoint) as gateway:
        args = {"model": NAME, "base_url": f"{gateway.addresses[0]}/v1/chat/completions", "max_length": 64}
        asked = (tmp_path, tasks, "colours_in_words", "local-chat-completions", args, "--apply_chat_template")
        got = await samples(*asked)
    assert len(got) == len(CONTEXTS)
    assert all(isinstance(line["resps"][0][0], str) for line in got.values())


async def test_trinity_eval_says_what_the_harness_says(checkpoint, tasks, tmp_path):
    """Of a checkpoint, which gets a server, and of a server's address."""
    async with served(checkpoint, api_key="secret") as gateway:
        (tmp_path / "key").write_text("secret\n")
        for source, more in ((checkpoint, ()), (gateway.addresses[0], ("--api-key-file", tmp_path / "key"))):
            output = tmp_path / "found.json"
            asked = ["--tasks", "colours", "--include-path", tasks, "--output", output, *more]
            said = await harness("trinity.cli", "eval", source, *asked)
            found = json.loads(output.read_text())
            assert found["results"]["colours"]["acc,none"] >= MIN_RIGHT / len(CONTEXTS)
            assert "|colours|" in said


async def test_a_runs_exam_scores_as_the_harness_does(checkpoint, tasks):
    """What is asked of weights while they train, without a server: choices, words, whole texts."""
    names = ("colours", "colours_in_words", "colours_rolling")
    said = await harness("tests.interop.programs.in_the_loop", checkpoint, tasks, 64, *names)
    found = json.loads(said.splitlines()[-1])
    args = offline(checkpoint)
    for name, metric in zip(names, ("acc", "exact_match", "bits_per_byte"), strict=True):
        want = await asked_offline(checkpoint, tasks, name, args)
        [score] = found[name]
        assert score["mean"] == pytest.approx(want[f"{metric},none"], abs=1e-3), name
    [choices] = found["colours"]
    assert choices["chance"] == 1 / len(ENDINGS)
    assert choices["low"] > choices["chance"]


async def asked_offline(checkpoint, tasks, task, model_args):
    """lm-eval's own results of a task by transformers."""
    args = ",".join(f"{key}={value}" for key, value in model_args.items())
    output = tasks / f"results-{task}"
    asked = ["--model", "hf", "--model_args", args, "--tasks", task, "--include_path", tasks, "--device", "cpu"]
    await harness("lm_eval", "run", *asked, "--output_path", output)
    (file,) = output.rglob("results_*.json")
    return json.loads(file.read_text())["results"][task]
