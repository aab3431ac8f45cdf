"""Ask all questions of input files, and keep what came back in their journals.

Decisions: a shard is an input file, and its rows are made by one process; several are open at a time, so that the end of one
leaves no room unused. Everything but the model's words follows from settings and content: who asks, in which order and how
often it was interrupted cannot be seen in a finished shard. So this is a plain class, here or in an actor of Ray Data.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trinity.checkpoint import small_files
from trinity.config import SynthesisConfig
from trinity.data.documents import documents, files
from trinity.data.formats import opened
from trinity.errors import TrinityError
from trinity.synthesis.asking import Answer, Asker, Failed
from trinity.synthesis.checks import Benchmarks, left_out
from trinity.synthesis.journal import Journal
from trinity.synthesis.passages import passages
from trinity.synthesis.styles import Question, chosen, hash_of, question, templates_of
from trinity.synthesis.turns import turns
from trinity.text.tokenizer import Tokenizer
from trinity.utils.trying import tried

OPEN_SHARDS = 4
T = TypeVar("T")


class Shard(NamedTuple):
    """An input file, and the name of what is made from it."""

    name: str
    file: str

    @property
    def journal(self) -> Path:
        return Path("partial", f"{self.name}.jsonl")


def shards_of(patterns: Sequence[str]) -> list[Shard]:
    """The files that the patterns mean, each once, in their order. Raises DataError."""
    found = dict[str, Shard]()
    for pattern in patterns:
        for file in files(pattern):
            digest = hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()
            found.setdefault(str(file), Shard(f"{file.name.partition('.')[0]}-{digest}", str(file)))
    return list(found.values())


def content_of(file: str) -> str:
    """Digest of a file's bytes. Raises DataError."""
    with opened(files(file)[0]) as stream:
        found = hashlib.sha256()
        while piece := stream.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def tokenizer_of(config: SynthesisConfig) -> Tokenizer:
    """The one that counts a passage's tokens."""
    return Tokenizer.load(small_files(config.input.tokenizer or str(config.server.checkpoint)))


class Planner:
    """The questions of a file, in order, from settings and content alone."""

    def __init__(self, config: SynthesisConfig):
        self.config, self.templates, self.tokenizer = config, templates_of(config), tokenizer_of(config)

    def questions(self, shard: Shard, counts: Counter[str]) -> Iterator[Question]:
        """Everything that is to be asked of a file; `counts` tells of its documents and passages. A passage that is there a
        second time is left out, and asks nothing."""
        config, seen = self.config, set[bytes]()
        for document, text in enumerate(self._documents(shard)):
            counts["documents"] += 1
            for number, passage in enumerate(passages(text, self.tokenizer, config.input.chunk_tokens)):
                why = self._left_out(passage, seen)
                counts[why or "passages"] += 1
                if why is None:
                    for at, style in chosen(self.templates, config.styles_per_passage, passage, config.seed):
                        yield question((document, number), at, style, self.templates[style], passage, config.seed)

    def num_documents(self, shards: Sequence[Shard]) -> int:
        """Read all files to their ends, so that a bad row is named before anything is spent; -> their documents."""
        return sum(1 for shard in shards for _ in self._documents(shard))

    def _documents(self, shard: Shard) -> Iterator[str]:
        yield from documents([shard.file], self.config.input.text_field, self.config.input.max_documents)

    def _left_out(self, passage: str, seen: set[bytes]) -> str | None:
        if len(self.tokenizer.encode(passage.strip())) < self.config.input.min_chunk_tokens:
            return "passages too short"
        digest = hashlib.blake2b(passage.strip().encode("utf-8", "replace"), digest_size=16).digest()
        if digest in seen:
            return "passages seen before"
        seen.add(digest)
        return None


class Maker:
    """Makes whole journals of shards in `folder`. `url`, `key` and `model` are of the server; at most `concurrency` questions
    at a time."""

    def __init__(self, config: SynthesisConfig, url: str, key: str | None, model: str, concurrency: int):
        self.config, self.planner = config, Planner(config)
        self.hashes = {name: hash_of(template) for name, template in self.planner.templates.items()}
        self.benchmarks = Benchmarks.of(config.checks.benchmarks, config.checks.benchmark_ngram)
        self.folder, self.url, self.key, self.model, self.concurrency = (
            Path(config.output.dir),
            url,
            key,
            model,
            concurrency,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make a batch of shards, for Ray Data: columns of Shard in, `name` and `error` (empty: whole) out."""
        shards = [Shard(str(name), str(file)) for name, file in zip(batch["name"], batch["file"], strict=True)]
        error = tried(lambda: asyncio.run(self.make(shards, lambda _: None)), TrinityError)
        said = error.message if isinstance(error, TrinityError) else ""
        return {"name": [shard.name for shard in shards], "error": [said] * len(shards)}

    async def make(self, shards: Sequence[Shard], is_whole: Callable[[Shard], object]) -> None:
        """Ask until every journal is whole, and tell of each. Raises what ends the run; what was answered is kept."""
        async with Asker(self.config.server, self.url, self.key, self.model, self.concurrency) as asker:

            async def each(shard: Shard) -> None:
                await self._make(shard, asker)
                is_whole(shard)

            await shared_out(iter(shards), each, OPEN_SHARDS)

    async def _make(self, shard: Shard, asker: Asker) -> None:
        journal = Journal(self.folder / shard.journal, self.head(shard))
        try:
            if journal.summary:
                return
            counts = Counter[str]()
            missing = (each for each in self.planner.questions(shard, counts) if each.key not in journal)

            async def each(question: Question) -> None:
                journal.add(question.key, self._entry(question, await asker.ask(question), shard))

            await shared_out(missing, each, self.concurrency)
            journal.finish(counts)
        finally:
            journal.close()

    def head(self, shard: Shard) -> dict[str, str]:
        return {"source": shard.file, "sha256": content_of(shard.file)}

    def _entry(self, question: Question, answer: Answer | Failed, shard: Shard) -> dict[str, Any]:
        """Return what the journal keeps of a question: its row or, with the answer, the reason why there is none."""
        document, passage, _ = question.key
        made = {"source": shard.file, "document": document, "passage": passage, "template": question.style}
        made |= {"template_hash": self.hashes[question.style], "model": self.model, "seed": question.seed}
        if isinstance(answer, Failed):
            return {"style": question.style, "reason": "failed", "said": answer.why, "provenance": made}
        made |= {"temperature": question.template.temperature, **answer.facts}
        known = {"style": question.style, "provenance": made}
        reason = left_out(
            answer.text, answer.finish, question.passage, question.template, self.config.checks, self.benchmarks
        )
        row = None if reason else self._row(question, answer.text)
        if row is None:
            return known | {"reason": reason or "no turns", "said": answer.text}
        return known | {"reason": None, "row": row}

    def _row(self, question: Question, answer: str) -> dict[str, Any] | None:
        """The document, or the chat; None for an answer that is none."""
        if self.config.output.rows == "messages":
            said = turns(answer)
            return None if said is None else {"messages": said}
        begun = f"{question.passage.strip()}\n\n" if question.template.with_passage else ""
        return {"text": begun + answer.strip()}


async def shared_out(work: Iterator[T], do: Callable[[T], Awaitable[None]], num: int) -> None:
    """Do all of it, `num` at a time, in the order in which it comes. The first error ends the others."""

    async def some() -> None:
        for each in work:
            await do(each)

    tasks = [asyncio.create_task(some()) for _ in range(num)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
