"""`trinity eval CHECKPOINT|URL --tasks NAMES`: our own tasks and lm-eval's, asked of a server over the OpenAI API.

Decisions: lm-eval is called as its own users call it, so its numbers are those of any other model. A checkpoint gets a server
in this process, on a loopback port of its own; what is measured is what is served. Multiple choice goes to /v1/completions,
with `--chat` questions that are answered in words go to /v1/chat/completions.
"""

import argparse
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity.config import TaskConfig, section
from trinity.data.prompts import chat_of
from trinity.errors import ConfigError, ModelNotFound, TrinityError, Unavailable
from trinity.evaluate.asking import Wanted
from trinity.evaluate.lm_eval import scores_of
from trinity.evaluate.rewarded import RewardTask
from trinity.evaluate.tasks import OWN, measure
from trinity.observability.scores import Score, table
from trinity.rl.rewards import Rewards

if TYPE_CHECKING:
    from serving.gateway import Gateway
    from trinity.llm import LLM

USUAL_LENGTH = 1024  # of a question to a server that does not say what it takes
MODELS = {  # of lm-eval, and where they send what they ask
    False: ("local-completions", "/v1/completions"),
    True: ("local-chat-completions", "/v1/chat/completions"),
}


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    names = [name for name in arguments.tasks.split(",") if name]
    rewarded = rewarded_by(arguments)
    own, others = [name for name in names if name in OWN], [name for name in names if name not in OWN]
    if others and find_spec("lm_eval") is None:
        raise ConfigError(
            f"{others[0]} is none of our own tasks ({', '.join(OWN)}), and lm-eval is not installed here; "
            "pip install 'trinity-moe[eval]'"
        )
    is_url = arguments.source.startswith(("http://", "https://"))
    with nullcontext(arguments.source.rstrip("/")) if is_url else server_of(arguments.source) as url:
        key = _key(arguments.api_key_file) if is_url else None
        found = [*own_scores(own, url, arguments, key), *reward_scores(rewarded, url, arguments, key)]
        results = evaluate(others, url, arguments, key) if others or not (names or rewarded) else None
    report(found, results, arguments.output)
    return 0


def own_scores(tasks: Sequence[str], url: str, arguments: argparse.Namespace, key: str | None) -> list[Score]:
    """Scores of our own tasks. Raises ConfigError for a question that is longer than the server takes."""
    if not tasks:
        return []
    card = card_of(url, arguments.model, key)
    most = card.get("max_model_len") or USUAL_LENGTH
    lengths = tuple(int(each) for each in arguments.lengths.split(",")) if arguments.lengths else (most,)
    if too_long := [length for length in lengths if length > most]:
        raise ConfigError(
            f"niah of {too_long[0]:,} tokens is longer than the {most:,} that {card['id']} is served with"
        )
    asker = ServerAsker(url, card["id"], key, arguments.batch_size)
    settings = [
        TaskConfig(task=name, lengths=lengths, questions=arguments.questions, keys=arguments.keys) for name in tasks
    ]
    return [score for task in settings for score in measure(task, asker.texts, asker.num_tokens, most)]


def rewarded_by(arguments: argparse.Namespace) -> TaskConfig | None:
    """The task of --rewards. Raises ConfigError for functions that cannot be asked."""
    if not (arguments.rewards or arguments.prompts):
        return None
    own = {
        name: getattr(arguments, name)
        for name in ("rewards", "prompts", "questions", "max_tokens", "temperature", "seed")
    }
    name = ", ".join(spec.rpartition(":")[2] for spec in arguments.rewards or ()) or "rewards"
    task = section(
        TaskConfig, "evaluate.tasks", {"task": name, **{key: value for key, value in own.items() if value is not None}}
    )
    Rewards(task).check()
    return task


def reward_scores(task: TaskConfig | None, url: str, arguments: argparse.Namespace, key: str | None) -> Iterator[Score]:
    """The score of --rewards. Raises ConfigError for prompts that are longer than the server takes."""
    if task is None:
        return
    card = card_of(url, arguments.model, key)
    asker = ServerAsker(url, card["id"], key, arguments.batch_size)
    rewarded = RewardTask(task, asker.prompt_ids)
    rewarded.check(card.get("max_model_len") or USUAL_LENGTH)
    yield rewarded.score(asker.texts)


class ServerAsker:
    """Completions and counts of tokens by a server."""

    def __init__(self, url: str, model: str, key: str | None, batch_size: int):
        import httpx

        self._client, self._model = httpx.Client(base_url=url, headers=_headers(key), timeout=3600), model
        self._batch_size = batch_size

    def texts(self, wanted: Wanted) -> list[str]:
        """An `Ask`. What is drawn has a seed of its own, so it goes alone."""
        asked = {
            "model": self._model,
            "max_tokens": wanted.max_tokens,
            "temperature": wanted.temperature,
            "stop": wanted.stop,
        }
        if wanted.temperature:
            bodies = [{**asked, "prompt": each, "seed": wanted.seed + at} for at, each in enumerate(wanted.prompts)]
        else:
            starts = range(0, len(wanted.prompts), self._batch_size)
            bodies = [{**asked, "prompt": list(wanted.prompts[at : at + self._batch_size])} for at in starts]
        with ThreadPoolExecutor(self._batch_size if wanted.temperature else 1) as threads:  # they only wait
            answers = threads.map(lambda body: self._post("/v1/completions", body), bodies)
            return [choice["text"] for answer in answers for choice in answer["choices"]]

    def prompt_ids(self, row: dict[str, Any], where: str) -> list[int]:
        """An `IdsOf`: a row's prompt as the server would have it."""
        if (chat := chat_of(row, where)) is None:
            asked = {"prompt": row["prompt"], "add_special_tokens": True}
        else:
            given = {"messages": chat.messages, "tools": chat.tools, "chat_template_kwargs": chat.arguments}
            asked = {name: value for name, value in given.items() if value}
        found: list[int] = self._post("/tokenize", {"model": self._model, **asked})["tokens"]
        return found

    def num_tokens(self, prompt: str) -> int:
        """Tokens of a prompt as the server counts them."""
        return int(self._post("/tokenize", {"model": self._model, "prompt": prompt})["count"])

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.post(path, json=body)
        if answer.status_code != 200:
            raise TrinityError(f"the server answered {answer.status_code} to {path}: {answer.text[:200]}")
        found: dict[str, Any] = answer.json()
        return found


@contextmanager
def server_of(checkpoint: str) -> Iterator[str]:
    """URL of a server of that checkpoint, in this process for as long."""
    from anyio.from_thread import start_blocking_portal

    from trinity.llm import LLM

    llm, name = LLM(checkpoint), Path(checkpoint).resolve().name
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(served(llm, name)) as gateway:
        yield gateway.addresses[0]


@asynccontextmanager
async def served(llm: "LLM", name: str, **serve: Any) -> AsyncIterator["Gateway"]:
    """A gateway to its engine, in this event loop. The engine ends with it."""
    from serving.engine import LocalClient
    from serving.frontend import Frontend
    from serving.gateway import Gateway
    from trinity.config import ServeConfig
    from trinity.engine.async_engine import AsyncEngine

    client = LocalClient(AsyncEngine(llm.engine), llm.tokenizer, name)
    config = ServeConfig(**{"http_port": 0, "grpc_port": 0} | serve)
    gateway = Gateway(Frontend(client, llm.tokenizer, await client.info(), config))
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()
        client.engine.close()


def evaluate(tasks: Sequence[str], url: str, arguments: argparse.Namespace, key: str | None) -> dict[str, Any]:
    """Findings of lm-eval. Raises ConfigError for tasks that it does not know."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=arguments.include_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown or not tasks:
        raise ConfigError(f"lm-eval knows no task {', '.join(unknown) or '(none given)'}; see `lm-eval ls tasks`")
    model, model_args = asked_of(url, arguments, key)
    found: dict[str, Any] = simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=manager.match_tasks(tasks),
        task_manager=manager,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        batch_size=1 if arguments.chat else arguments.batch_size,
        apply_chat_template=arguments.chat,
    )
    return found


def asked_of(url: str, arguments: argparse.Namespace, key: str | None) -> tuple[str, dict[str, Any]]:
    """lm-eval's name for this kind of server, and its arguments."""
    card = card_of(url, arguments.model, key)
    model, path = MODELS[arguments.chat]
    found = {"model": card["id"], "base_url": url + path, "timeout": 3600}
    if card.get("max_model_len"):
        found["max_length"] = card["max_model_len"]
    if not arguments.chat and (first := first_token(url, key)) is not None:
        found["custom_prefix_token_id"] = first
    if key:
        found |= {"auth_token": key, "header": {"Authorization": f"Bearer {key}"}}
    return model, found


def card_of(url: str, name: str | None, key: str | None) -> dict[str, Any]:
    """The server's card of that model, or of the first that it lists."""
    import httpx

    try:
        answer = httpx.get(f"{url}/v1/models", headers=_headers(key), timeout=30)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"no server at {url} ({error}); start one with `trinity serve`") from None
    if answer.status_code != 200:
        raise TrinityError(f"the server answered {answer.status_code} when asked for its models: {answer.text[:200]}")
    cards: list[dict[str, Any]] = answer.json()["data"]
    found = next((card for card in cards if name in (None, card["id"])), None)
    if found is None:
        raise ModelNotFound(f"model {name!r} is not served at {url}; there is {[card['id'] for card in cards]}")
    return found


def first_token(url: str, key: str | None) -> int | None:
    """Id of the token that texts begin with, which lm-eval would not see where it is 0; None where the server does not say."""
    import httpx

    with httpx.Client(base_url=url, headers=_headers(key), timeout=30) as client:
        info = client.get("/tokenizer_info")
        name = info.json().get("bos_token") if info.status_code == 200 else None
        if name is None:
            return None
        answer = client.post("/tokenize", json={"prompt": name, "add_special_tokens": False})
    ids = answer.json()["tokens"] if answer.status_code == 200 else []
    return int(ids[0]) if len(ids) == 1 else None


def report(scores: Sequence[Score], results: dict[str, Any] | None, output: str | None) -> None:
    """Print our table and lm-eval's; with a file's name, write everything there, lm-eval's questions with their answers."""
    found: dict[str, Any] = {"scores": [score.row() for score in scores]}
    if results is not None:
        from lm_eval.utils import make_table

        print(make_table(results))
        scores, found = [*scores, *scores_of(results)], {**found, **results}
    if scores:
        print(table(scores))
    if output:
        Path(output).write_text(json.dumps(found, indent=2, ensure_ascii=False, default=str))


def _headers(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def _key(file: str | None) -> str | None:
    from trinity.config import api_key

    if file is None:
        return api_key()
    if not Path(file).is_file():
        raise ConfigError(f"key file {file} does not exist")
    return Path(file).read_text().strip()
