"""`trinity synthesize CONFIG`: documents in, questions to a model, checked answers with their provenance out."""

import argparse
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path

from trinity.commands.eval import server_of
from trinity.config import SynthesisConfig, api_key, setup_environment
from trinity.errors import ConfigError
from trinity.synthesis.asking import Card, card_at
from trinity.synthesis.maker import Maker, Planner, shards_of
from trinity.synthesis.report import table
from trinity.synthesis.run import Made, Run, made_here
from trinity.utils.terminal import say

NUM_SHOWN = 3


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    config = SynthesisConfig.load(arguments.config, flags)
    planner = Planner(config)
    if arguments.dry_run:
        show(planner)
        return 0
    key, job = _key(config.server.api_key_file), Run(config)
    say(f"{planner.num_documents(job.missing):,} documents are to be asked about")
    if config.workers:  # before a server of a checkpoint imports Ray
        setup_environment(config.cluster.auth, is_local=config.cluster.address == "local")
    with _interrupted_by_sigterm(), _server(config) as url:
        card = card_at(url, config.server.model, key)
        check_room(planner, card)
        with job.owned(card.name), _made(config, url, key, card.name) as made:
            try:
                job.synthesize(made)
            finally:
                print(table(job.records()))
    return 0


def show(planner: Planner) -> None:
    """Print the first questions of a run; nobody is asked."""
    shards = shards_of(planner.config.input.paths)
    questions = ((shard, each) for shard in shards for each in planner.questions(shard, Counter()))
    for shard, each in islice(questions, NUM_SHOWN * len(planner.templates)):
        document, passage, _ = each.key
        chance = f"temperature {each.template.temperature:g}, seed {each.seed}"
        print(f"=== {each.style}: {shard.file}, document {document}, passage {passage}; {chance}")
        print("\n\n".join(filter(None, (each.system, each.prompt))))


def check_room(planner: Planner, card: Card) -> None:
    """Raise ConfigError where passage, prompt and answer do not fit the model together."""
    for style, template in planner.templates.items():
        around = len(planner.tokenizer.encode(template.system + template.prompt))
        needs = around + planner.config.input.chunk_tokens + template.max_tokens
        if card.max_model_len is not None and needs > card.max_model_len:
            raise ConfigError(
                f"style {style!r} needs {needs:,} tokens (prompt {around:,}, input.chunk_tokens "
                f"{planner.config.input.chunk_tokens:,}, answer {template.max_tokens:,}); {card.name} takes "
                f"{card.max_model_len:,}: lower input.chunk_tokens or server.max_tokens"
            )


def _server(config: SynthesisConfig) -> AbstractContextManager[str]:
    """The address of the server: the user's, or one in this process for as long."""
    return nullcontext(config.server.url) if config.server.url else server_of(str(config.server.checkpoint))


@contextmanager
def _made(config: SynthesisConfig, url: str, key: str | None, model: str) -> Iterator[Made]:
    """Give what makes journals: this process, or workers of Ray Data in a cluster that is joined meanwhile."""
    if not config.workers:
        maker = Maker(config, url, key, model, config.server.concurrency)
        yield lambda shards: made_here(maker, shards)
        return
    from actors.cluster import joined
    from actors.jobs.synthesize import made_by_workers

    with joined(config.cluster):
        yield lambda shards: made_by_workers(config, url, key, model, shards)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM is a Ctrl-C in the block: shards that are finished stay, journals too, and the same command goes on."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGINT itself may be ignored
    try:
        yield
    except KeyboardInterrupt:
        say("stopped; what is made is kept, and the same command goes on")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _key(file: str | None) -> str | None:
    if file is None:
        return api_key()
    if not Path(file).is_file():
        raise ConfigError(f"key file {file} does not exist; set server.api_key_file")
    return Path(file).read_text().strip()
