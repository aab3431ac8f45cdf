"""Scores with chance and interval, needles in a haystack, exams of a run's weights, and gates that close and open."""

import json
import random
import re
import threading
from pathlib import Path

import pytest
import yaml

from actors.control.ledger import Ledger
from tests.unit.killed_stages import train_here
from tests.unit.test_stages import story
from tests.unit.test_trainer import config_for, texts, trainer_for  # noqa: F401  a fixture
from trinity.checkpoint import latest_checkpoint
from trinity.cli import main
from trinity.config import TaskConfig
from trinity.data.documents import documents
from trinity.errors import ConfigError, Unavailable
from trinity.evaluate import niah
from trinity.evaluate.exam import exam_of
from trinity.evaluate.lm_eval import scores_of
from trinity.evaluate.tasks import measure
from trinity.llm import LLM
from trinity.observability.scores import of_right, of_rows, of_values, table
from trinity.observability.train_log import TrainLog, read_rows

GATE = {"task": "niah", "lengths": [64], "questions": 4}


# -- scores


@pytest.mark.parametrize(
    ("right", "num", "low", "high"),  # of Wilson's interval as statsmodels 0.14 gives it (proportion_confint, "wilson")
    [(8, 10, 0.490, 0.943), (0, 20, 0.0, 0.161), (20, 20, 0.839, 1.0), (50, 100, 0.404, 0.596)],
)
def test_the_interval_is_wilsons(right, num, low, high):
    score = of_right("task", right, num)
    assert (score.low, score.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
    assert of_rows([score.row()]) == [score]


def test_what_is_at_chance_says_so():
    assert of_right("task", 2, 32, chance=1 / 32).is_at_chance
    assert not of_right("task", 16, 32, chance=1 / 32).is_at_chance
    assert not of_right("task", 0, 32).is_at_chance, "nobody knows what guessing gives"
    text = table(
        [of_right("easy", 2, 32, 1 / 32, at_least=0.5), of_values("reward", [1.0, 0.0, 1.0, 0.0], at_least=0.25)]
    )
    assert "| at chance, below 0.5 |" in text
    assert "| passes 0.25" in text
    assert of_values("reward", [float("nan")], at_least=0.0).passes is False


def test_choices_of_lm_eval_have_their_chance():
    quiz = [{"resps": [[-1.0]] * 4, "acc": float(at % 4 == 0), "metrics": ["acc", "acc_norm"]} for at in range(20)]
    words = [{"resps": [["blue"]], "exact_match": 1.0, "metrics": ["exact_match"]}] * 3
    better = {"quiz": {"acc": True}, "words": {"exact_match": True}}
    first, second = scores_of({"samples": {"quiz": quiz, "words": words}, "higher_is_better": better}, at_least=0.5)
    assert (first.task, first.mean, first.chance, first.is_at_chance, first.passes) == ("quiz", 0.25, 0.25, True, False)
    assert (second.task, second.mean, second.chance, second.passes) == ("words, exact_match", 1.0, None, True)
    lower = {"samples": {"text": [{"bits": 2.0, "metrics": ["bits"]}]}, "higher_is_better": {"text": {"bits": False}}}
    assert [score.mean for score in scores_of(lower)] == [2.0]
    with pytest.raises(ConfigError, match="its bits is the better the lower it is"):
        list(scores_of(lower, at_least=1.0))


# -- needles


def count(prompt):
    return len(prompt.split()) + prompt.count("\n")


def test_questions_are_as_long_as_asked_and_their_needles_lie_everywhere():
    asked = niah.questions(16, 200, count)
    depths = []
    for question in asked:
        *lines, key = question.prompt.split("\n")
        assert 200 - 3 * 3 < count(question.prompt) + niah.MAX_TOKENS <= 200
        assert len({line.split()[0] for line in lines}) == len(lines), "each key is there once"
        [found] = [at for at, line in enumerate(lines) if line.split() == [key, question.answer]]
        depths.append(found / len(lines))
    assert depths == sorted(depths)
    assert depths[0] < 0.05
    assert depths[-1] > 0.9
    assert niah.questions(16, 200, count) == asked
    assert niah.questions(16, 200, count, seed=1) != asked
    with pytest.raises(ConfigError, match="niah of 200 tokens has more lines than 30 keys"):
        niah.questions(1, 200, count, num_keys=30)
    with pytest.raises(ConfigError, match="niah of 16 tokens has no room for 4 lines"):
        niah.questions(1, 16, count)


def reader(wanted):
    """Somebody who reads the haystack: the value of the line that begins with the last word."""
    return [
        " " + next(line.split()[1] for line in prompt.split("\n") if line.startswith(prompt.split("\n")[-1] + " "))
        for prompt in wanted.prompts
    ]


def guesser(wanted):
    rng = random.Random(0)
    return [" " + rng.choice(niah.words()[1]) for _ in wanted.prompts]


def test_who_reads_finds_all_and_who_guesses_is_at_chance():
    task = TaskConfig(task="niah", lengths=(100, 200), questions=200, at_least=0.8)
    for score in measure(task, reader, count, 0):
        assert (score.mean, score.passes, score.is_at_chance) == (1.0, True, False)
    for score in measure(task, guesser, count, 0):
        assert (score.passes, score.is_at_chance) == (False, True)
        assert score.low <= niah.CHANCE <= score.high
    assert not niah.is_right(niah.Question("bako", "lemu"), "lemu"), "a word of its own begins with a blank"


def test_texts_to_train_on_answer_themselves(tmp_path):
    niah.main([str(tmp_path / "needles.jsonl"), "--texts", "30", "--lines", "20"])
    found = list(documents([str(tmp_path / "needles.jsonl")]))
    assert len(set(found)) == 30
    assert len({text.count(chr(10)) for text in found}) > 5
    for text in found:
        lines = [line.split() for line in text.splitlines()]
        assert 4 <= len(lines) <= 20
        assert len(set(map(tuple, lines))) == len({key for key, _ in lines}) <= 10, "a key has one value"


# -- exams and gates


class Answers:
    """An Exam that scores what it is told, after every second step."""

    has_gates = True

    def __init__(self, *means):
        self.means, self.asked = list(means), 0

    def is_due(self, position):
        return position > 0 and position % 2 == 0

    def ask(self):
        mean = self.means[min(self.asked, len(self.means) - 1)]
        self.asked += 1
        if isinstance(mean, Exception):
            raise mean
        return [of_right("quiz", mean, 10, at_least=0.5).row()]


def remembered(trainer, folder):
    """-> the placement service's ledger, behind the trainer's pool."""
    ledger, pool = Ledger(folder, threading.Condition()), trainer.pool
    ledger.begin(trainer.version, {})
    pool.ledger.decide = lambda step, attempt, notes: ledger.decide(step, ledger.new_attempt(step - 1), notes)
    pool.ledger.approve = ledger.approve
    return ledger


def test_a_version_is_served_once_it_has_passed_and_nothing_newer_while_one_fails(texts, tmp_path):  # noqa: F811
    trainer = trainer_for(config_for(texts, tmp_path, steps=8))
    ledger, served = remembered(trainer, tmp_path), []
    trainer.examine_with(Answers(9, 2, Unavailable("a shard is away"), 8, 1))
    step = trainer.step

    def watched():
        metrics = step()
        served.append(ledger.serving)
        return metrics

    trainer.step = watched
    trainer.logs = [TrainLog(tmp_path, 8)]
    result = trainer.run()
    #           step 2 waits for its exam, passes; 4 fails, so 5 waits, too; 6 passes at the second try; 8 fails
    assert served == [1, 1, 3, 3, 3, 3, 7, 7]
    assert (ledger.serving, result["version"], trainer.gate.failed) == (7, 8, ["quiz"])
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "scores" in row]
    assert [(row["step"], row["scores"][0]["passes"]) for row in rows] == [(2, True), (4, False), (6, True), (8, False)]


def test_who_goes_on_asks_first(texts, tmp_path):  # noqa: F811
    """A gate that was closed when a worker died is closed afterwards."""
    first = trainer_for(config_for(texts, tmp_path, steps=6))
    for _ in range(3):
        first.step()
    first.save()
    second = trainer_for(config_for(texts, tmp_path, steps=6, resume=True))
    ledger = remembered(second, tmp_path)
    second.examine_with(exam := Answers(1))
    second.run()
    assert (ledger.serving, exam.asked) == (3, 3), (
        "after steps 3, 4 and 6: what it went on from is the last that is served"
    )


GRADES = """
import time

def vowels(answer, row):
    return row["weight"] * sum(letter in "aeiou" for letter in answer) / max(1, len(answer))

def moody(answer, row):
    if row["weight"] == 2:
        time.sleep(60)
    return float("nan") if row["weight"] == 3 else float(row["weight"])
"""


def rewarded(folder, **more):
    """Settings of a task with rewards, its files in that folder."""
    rows = [{"prompt": f"word{n} is", "weight": n} for n in range(1, 6)]
    folder.mkdir(exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "grades.py").write_text(GRADES)
    task = {
        "task": "vowels",
        "rewards": f"{folder}/grades.py:vowels",
        "prompts": f"{folder}/prompts.jsonl",
        "questions": 5,
    }
    return {**task, "max_tokens": 12, **more}


def test_rewards_are_a_task_in_the_loop_and_of_a_server_alike(texts, tmp_path, caplog, capsys):  # noqa: F811
    own = tmp_path / "tasks"
    tasks = [
        rewarded(own, at_least=99.0),
        rewarded(own, task="drawn", temperature=1.0, seed=7),
        rewarded(own, task="moody", rewards=f"{own}/grades.py:moody", reward_timeout_s=1.0, at_least=2.0),
    ]
    config = config_for(texts, tmp_path / "run", steps=1).replace(evaluate={"tasks": tasks})
    trainer = trainer_for(config)
    trainer.examine_with(exam_of(trainer))
    trainer.logs = [TrainLog(tmp_path / "run", 1)]
    trainer.run()
    [scores] = [row["scores"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "scores" in row]
    greedy, drawn, moody = of_rows(scores)
    assert trainer.gate.failed == ["vowels"]
    assert (greedy.num, greedy.num_unjudged, greedy.passes) == (5, 0, False)
    assert greedy.low < greedy.mean < greedy.high
    assert (moody.num, moody.num_unjudged, moody.mean, moody.passes) == (3, 2, pytest.approx(10 / 3), True)
    assert moody.verdict == "2 unjudged, passes 2"
    for why in ("took longer than 1 s", "returned nan, which is no finite number"):
        assert why in caplog.text
    asked = [
        "eval",
        str(latest_checkpoint(tmp_path / "run")),
        "--rewards",
        tasks[0]["rewards"],
        "--prompts",
        tasks[0]["prompts"],
    ]
    for how, want in (((), greedy), (("--temperature", "1", "--seed", "7"), drawn)):
        assert main([*asked, "--max-tokens", "12", *how, "--output", str(tmp_path / "found.json")]) == 0
        [row] = json.loads((tmp_path / "found.json").read_text())["scores"]
        assert (row["mean"], row["num"]) == (want.mean, 5)
    assert drawn.mean != greedy.mean
    assert "| vowels |" in capsys.readouterr().out


def test_exams_ask_the_weights_that_train_and_change_no_bit(texts, tmp_path):  # noqa: F811
    evaluate = {"tasks": [{**GATE, "at_least": 0.0}], "every": 2, "at_start": True}
    losses = []
    for name, more in (("plain", {}), ("asked", evaluate)):
        config = config_for(texts, tmp_path / name, steps=4).replace(evaluate=more)
        trainer = trainer_for(config, num_shards=2)
        trainer.examine_with(exam_of(trainer))
        trainer.logs = [TrainLog(tmp_path / name, 4)]
        losses.append(trainer.run()["loss"])
    assert losses[0] == losses[1]
    rows = [row for row in read_rows(tmp_path / "asked" / "metrics.jsonl") if "scores" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    llm = LLM(latest_checkpoint(tmp_path / "asked"), max_model_len=64, device="cpu", backend="torch")
    asked = niah.questions(4, 64, lambda prompt: len(llm.tokenizer.encode(prompt, add_special=True)))
    said = trainer.exam._texts(niah_wanted := wanted(asked))
    assert said == [done.text for done in llm.generate(list(niah_wanted.prompts), greedy())]


def wanted(asked):
    from trinity.evaluate.asking import Wanted

    return Wanted([question.prompt for question in asked], niah.MAX_TOKENS, "\n")


def greedy():
    from trinity.engine.request import SamplingParams

    return SamplingParams(max_tokens=niah.MAX_TOKENS, temperature=0, stop=("\n",))


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"task": "niahh"}, "lm-eval"),
        ({"task": "niah", "lengths": [4096]}, r"niah of 4,096 tokens; model\.max_position_embeddings is 1,024"),
        ({"task": "niah", "lengths": [8]}, "a question takes 32 tokens or more"),
        ({"task": "quiz", "lengths": [64]}, "only niah has them"),
        ({"task": "quiz", "rewards": "grades:grade"}, "rewards or prompts alone"),
        ({"task": "quiz", "rewards": "no.such:grade", "prompts": "x.jsonl"}, "no.such:grade cannot be imported"),
        ({"task": "quiz", "rewards": "math:sqrt", "prompts": "no/x.jsonl"}, "no/x.jsonl"),
    ],
)
def test_tasks_that_cannot_be_asked_are_named_before_a_step(texts, tmp_path, task, says, capsys):  # noqa: F811
    tree = config_for(texts, tmp_path / "run").model_dump(mode="json", exclude={"serve", "cluster"})
    for name, given in (
        ("run", {"evaluate": {"tasks": [task]}}),
        ("stages", {"stages": [{"name": "a", "evaluate": {"tasks": [task]}}]}),
    ):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree | given))
        assert main(["train", str(tmp_path / f"{name}.yaml")]) == 2
        assert re.search(says, capsys.readouterr().err)


def test_a_stage_below_its_gate_is_not_exported_and_none_follows(texts, tmp_path, monkeypatch, capsys):  # noqa: F811
    code, made = staged(texts, tmp_path, monkeypatch, at_least=0.9)
    assert (code, made) == (2, ["1-TrueBase", "2-long"])
    assert "stage long ends with niah, 64 tokens: 0." in (error := capsys.readouterr().err)
    assert "below 0.9. It is not exported" in error
    assert (tmp_path / "run" / "TrueBase").is_dir()
    assert not (tmp_path / "run" / "Base").exists()
    code, made = staged(texts, tmp_path, monkeypatch, "--resume", at_least=0.9)
    assert (code, made) == (2, []), "who comes again finds it closed"
    code, made = staged(texts, tmp_path, monkeypatch, "--resume", at_least=0.0, steps=4)
    assert (code, made) == (0, ["2-long", "3-Preview"])
    card = Path(tmp_path, "run", "Base", "README.md").read_text()
    assert "| niah, 64 tokens |" in card
    assert "passes 0" in card


def staged(texts, tmp_path, monkeypatch, *flags, at_least, steps=3):  # noqa: F811
    """-> (exit code, stages that ran) of the command, with runs in this process."""
    made = []

    def run_here(config, *given):
        result = train_here(config, *given)
        made.extend([Path(config.train.out_dir).name] if result is not None else [])
        return result

    tree = story(texts, tmp_path)
    tree["stages"][1]["evaluate"] = {"tasks": [{**GATE, "at_least": at_least}]}
    tree["stages"][1]["train"]["steps"] = steps
    monkeypatch.setattr("trinity.commands.train._trained", run_here)
    (tmp_path / "story.yaml").write_text(yaml.safe_dump(tree))
    return main(["train", str(tmp_path / "story.yaml"), *flags]), made


def test_the_command_asks_a_server(texts, tmp_path, capsys):  # noqa: F811
    trainer = trainer_for(config_for(texts, tmp_path))
    trainer.step()
    checkpoint = trainer.save()
    asked = ["eval", str(checkpoint), "--tasks", "niah", "--questions", "4"]
    assert main([*asked, "--lengths", "64,128", "--output", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert "| niah, 64 tokens  |" in shown
    assert "| niah, 128 tokens |" in shown
    rows = json.loads((tmp_path / "found.json").read_text())["scores"]
    assert [row["num"] for row in rows] == [4, 4]
    assert main([*asked, "--lengths", "4096"]) == 2
    assert "niah of 4,096 tokens is longer than the 1,024 that" in capsys.readouterr().err


def test_what_was_withdrawn_is_not_approved(tmp_path):
    ledger = Ledger(tmp_path, threading.Condition())
    ledger.begin(3, {})
    ledger.decide(4, ledger.new_attempt(3), {"is_good": False})
    assert ledger.serving == 3
    ledger.approve(3)  # it has been trained on
    assert ledger.serving == 3
    ledger.approve(4)
    assert ledger.serving == 4
    ledger.quarantine(4)
    ledger.approve(4)
    assert ledger.serving == 3
    assert Ledger(tmp_path, threading.Condition()).serving == 3
