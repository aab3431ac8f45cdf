"""`trinity bench serve --speculation`: what drafts spare where a text repeats itself, and what they cost where it does not.

The demo's model, or another checkpoint's, in an engine with drafts and one without: edits of code, records of the same shape,
quotations (speculation_prompts.py), all taken at their likeliest, and prose that is drawn. A pass is a step of the engine.
Decisions: both engines have the same requests and take turns pass by pass, so that what else the machine does slows both; who
goes first changes with each pass. Each round's engines are new and have seen nothing. The texts of both are compared, token by
token: another one ends the bench. Processor time is compared besides the clock's: it holds on a busy machine.
A model is trained for it as the demo's is, in this process, once: it is kept in the folder of the reports. It is small: at its
likeliest it falls into loops soon, and what is measured is that its own text repeats itself. What drafts come to on text that
people wrote is told apart, without a model: sources of Python's library, their second halves after their first.
"""

import argparse
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity.bench.report import Report, Table, ratio
from trinity.bench.speculation_prompts import EDIT, JSON, PROSE, QUOTE
from trinity.config import Config, EngineConfig, num_cpus
from trinity.errors import TrinityError
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from trinity.engine.engine import Engine
    from trinity.text.tokenizer import Tokenizer

USUAL: dict[str, Any] = {"rounds": 5, "concurrency": [1, 8], "output_len": 160, "steps": 200}
QUICK: dict[str, Any] = {"rounds": 1, "concurrency": [1, 2], "output_len": 12, "steps": 2}
LOADS = {"code edit": EDIT, "records": JSON, "quotation": QUOTE, "prose": PROSE}
DRAWN, COLD, COLD_LEN = "prose", "cold start", 16
ON, OFF = "with drafts", "without"
PASSES, RATE, NEVER = 1.6, 1.2, 0.98
SOURCES = ("calendar.py", "codecs.py", "colorsys.py", "fractions.py", "heapq.py", "ipaddress.py", "stat.py")
SOURCE_CHARS, LEAST = 6000, 0.15  # as likely as this a draft is computed where one sequence runs alone


def flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--speculation",
        action="store_true",
        help="instead of URL: prompts whose answers repeat themselves, and prose, with drafts and without, in turns",
    )
    add("--checkpoint", help="with --speculation: of this model (default: one trained for it as the demo's is)")


@dataclass
class Turn:
    """Measurements of one engine at one load."""

    cpu_s: float = 0.0
    seconds: float = 0.0
    num_passes: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    answers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.answers.values()))

    def step(self, engine: "Engine") -> None:
        cpu_s, started_s = time.process_time(), time.perf_counter()
        deltas = engine.step()
        self.cpu_s, self.seconds = (
            self.cpu_s + time.process_time() - cpu_s,
            self.seconds + time.perf_counter() - started_s,
        )
        self.num_passes += 1
        for delta in deltas:
            self.answers[delta.request_id] = self.answers.get(delta.request_id, ()) + delta.token_ids

    def end(self, engine: "Engine") -> None:
        stats = engine.stats()
        self.num_drafted, self.num_accepted = (
            self.num_drafted + stats.num_drafted,
            self.num_accepted + stats.num_accepted,
        )


Turns = dict[str, list[Turn]]


def measure(arguments: argparse.Namespace) -> Report:
    given = QUICK if arguments.quick else USUAL
    rounds, length = arguments.rounds or given["rounds"], arguments.output_len or given["output_len"]
    source = arguments.checkpoint or trained(Path(arguments.out) / f"demo-{given['steps']}", given["steps"])
    report, rows, model = Report("serve-speculation"), [], Model(str(source), length)
    for load in (*LOADS, COLD):
        for num in given["concurrency"] if load != COLD else [1]:
            found = model.rounds(load, num, rounds)
            rows += [_row(load, num, arm, turns) for arm, turns in found.items()]
            _compare(report, load, num, found)
            plain = {arm: [vars(turn) | {"answers": {}} for turn in turns] for arm, turns in found.items()}
            report.results.append({"load": load, "concurrency": num, **plain})
    columns = ("load", "at once", "arm", "passes", "tokens/s", "tokens / CPU s", "drafted", "came true")
    report.tables.append(Table(f"{source}, {length} tokens an answer, on {num_cpus()} cores", columns, tuple(rows)))
    report.tables.append(_of_people(model.tokenizer))
    return report


def trained(folder: Path, steps: int) -> Path:
    """A model that was trained for so many steps as the demo's, with the same data and settings; found again if it is there."""
    from trinity.checkpoint import latest_checkpoint
    from trinity.data.prepare import prepare
    from trinity.pool.local import local_pool
    from trinity.rpc.messages import Load
    from trinity.train.collectives import Alone
    from trinity.train.trainer import Trainer

    if (found := latest_checkpoint(folder)) is not None:
        return found
    say(f"training a model of preset tiny for {steps} steps, as the demo does, into {folder}: some minutes")
    config = Config.from_tree({"model": "tiny", "train": {"out_dir": str(folder), "steps": steps}})
    pool = local_pool(config.model, Load(), optim=config.optim)
    trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, folder), Alone())
    trainer.start()
    return Path(trainer.run()["checkpoint"])


class Model:
    """A checkpoint's model, and engines for it that know nothing yet."""

    def __init__(self, source: str, length: int):
        import torch

        from trinity.checkpoint import open_checkpoint
        from trinity.engine.weights import FixedWeights
        from trinity.pool.local import local_pool
        from trinity.rpc.messages import Load

        torch.set_num_threads(num_cpus())
        found = open_checkpoint(source)
        pool = local_pool(found.config, Load(source, training=False))
        self.weights = FixedWeights(found.load_model(pool.dispatcher(found.version), "cpu"), found.version)
        self.config, self.tokenizer, self._length = found.config, found.tokenizer, length

    def rounds(self, load: str, num: int, rounds: int) -> Turns:
        """Turns of both arms, which had the same answers; one more round before the first that counts."""
        found: Turns = {ON: [], OFF: []}
        for _ in range(1 + rounds):
            turns = self._turns(load, num)
            if turns[ON].answers != turns[OFF].answers:
                raise TrinityError(f"{load}: the same prompts have other answers with drafts; this is a bug")
            for arm, turn in turns.items():
                found[arm].append(turn)
        counted = {arm: turns[1:] for arm, turns in found.items()}
        say(f"{load}, {num} at once: {_ratio(counted, 'num_passes'):.2f} times fewer passes with drafts")
        return counted

    def _turns(self, load: str, num: int) -> dict[str, Turn]:
        turns = {ON: Turn(), OFF: Turn()}
        for requests in self._asked(load, num):
            engines = {arm: self._engine(arm == ON, num) for arm in turns}
            for engine in engines.values():
                for request in requests:
                    engine.add(*request)
            for arm in _in_turns(engines):
                turns[arm].step(engines[arm])
            for arm, engine in engines.items():
                turns[arm].end(engine)
        return turns

    def _engine(self, has_drafts: bool, num: int) -> "Engine":
        from trinity.engine.engine import Engine

        settings = EngineConfig(
            num_threads=num_cpus(),
            max_num_seqs=num,
            kv_cache_bytes=1 << 28,
            max_draft_tokens=EngineConfig().max_draft_tokens if has_drafts else 0,
        )
        return Engine(self.weights, self.config, settings, self.tokenizer)

    def _asked(self, load: str, num: int) -> list[list[tuple[str, list[int], Any]]]:
        """Requests of a load, those of each engine: one engine for all prompts; at a cold start one for each."""
        from trinity.engine.request import SamplingParams

        texts = [text for each in LOADS.values() for text in each] if load == COLD else LOADS[load]
        length, temperature = COLD_LEN if load == COLD else self._length, 1.0 if load in (DRAWN, COLD) else 0.0
        wanted: dict[str, Any] = {"max_tokens": length, "temperature": temperature, "ignore_eos": True}
        prompts = [f"# {i}\n{text}" for i in range(-(-num // len(texts))) for text in texts]
        asked = [
            (str(i), self.tokenizer.encode(text), SamplingParams(seed=i, **wanted)) for i, text in enumerate(prompts)
        ]
        return [[each] for each in asked] if load == COLD else [asked]


def _in_turns(engines: dict[str, "Engine"]) -> Iterator[str]:
    """Names of engines that have work, in turns; who goes first changes."""
    names = list(engines)
    while any(engine.has_work for engine in engines.values()):
        yield from (name for name in names if engines[name].has_work)
        names.reverse()


def _of_people(tokenizer: "Tokenizer") -> Table:
    """Tokens a pass with drafts on text that is given, whoever computes it."""
    from trinity.engine.drafts import Drafter, Memory, Trust

    rows, prior, most = [], Trust(), EngineConfig().max_draft_tokens
    for name in SOURCES:
        ids = tokenizer.encode((Path(sysconfig.get_path("stdlib")) / name).read_text()[:SOURCE_CHARS])
        drafter, half, num = Drafter(Memory(), Trust(prior)), len(ids) // 2, 0
        for token in ids[:half]:
            drafter.push(token, is_answer=False)
        left = ids[half:]
        while left:
            draft = drafter.draft(most, LEAST)
            right = next((n for n, pair in enumerate(zip(draft, left, strict=False)) if pair[0] != pair[1]), len(draft))
            for token in left[: right + 1]:
                drafter.push(token)
            left, num = left[right + 1 :], num + 1
        rows.append((name, len(ids) - half, num, (len(ids) - half) / num))
    return Table("Text that people wrote, without a model", ("file", "tokens", "passes", "tokens a pass"), tuple(rows))


def _ratio(found: Turns, name: str) -> float:
    """Amount that it took without drafts, for what it took with them: the median of the rounds."""
    return ratio([getattr(turn, name) for turn in found[OFF]], [getattr(turn, name) for turn in found[ON]])


def _row(load: str, num: int, arm: str, turns: list[Turn]) -> tuple[Any, ...]:
    def total(name: str) -> float:
        return float(sum(getattr(turn, name) for turn in turns))

    tokens, passes, drafted = total("num_tokens"), total("num_passes"), total("num_drafted")
    rates = tokens / total("seconds"), tokens / total("cpu_s")
    true = total("num_accepted") / drafted if drafted else "-"
    return (load, num, arm, passes / len(turns), *rates, drafted / len(turns), true)


def _compare(report: Report, load: str, num: int, found: Turns) -> None:
    """Hold the arms against each other: a gain where the text repeats itself and one is asked at a time; nowhere a loss."""
    repeats, where = load not in (DRAWN, COLD) and num == 1, f"{load}, {num} at once"
    if repeats:
        report.target(f"{where}: passes without / with drafts", _ratio(found, "num_passes"), at_least=PASSES)
    bound = RATE if repeats else NEVER
    report.target(f"{where}: tokens/s with / without", _ratio(found, "seconds"), at_least=bound)
    report.target(f"{where}: tokens per CPU second with / without", _ratio(found, "cpu_s"), at_least=bound)
