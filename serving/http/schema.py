"""Requests of the OpenAI API, checked strictly: a bool is no number, "1" is no 1, NaN and Infinity are no JSON.

Decisions: a field that is null counts as absent, as OpenAI clients send it. Fields without influence on the answer are
accepted and ignored (IGNORED); fields that would change it and are not implemented are accepted at their neutral value
and otherwise refused with the reason (REFUSED); any other unknown name is refused with the nearest known one, because
an option dropped in silence is worse than an error. Bounds of sampling are the engine's own (SamplingParams), for both
edges alike.
"""

import difflib
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator

from serving.http.chat import MAX_MESSAGES, Conversation, Messages
from serving.http.strict import Refusals, Strict
from serving.http.structured import with_response_format
from trinity.config import Role, check_adapter_name
from trinity.engine import samples
from trinity.engine.request import MAX_LISTED_TOKENS, SamplingParams
from trinity.errors import InvalidRequest

MAX_PROMPTS = 64
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)

IGNORED = {
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("prediction", "parallel_tool_calls", "request_id"),
}
GUIDED = "is called structured_outputs: {{{!r}: ...}} now"
REFUSED: Refusals = {
    "suffix": (("",), "suffix is not implemented; this model completes from the left"),
    "tools": (([],), "tools are for /v1/chat/completions"),
    "tool_choice": (("none", "auto"), "tools are for /v1/chat/completions"),
    "functions": (([],), "functions are tools today; send them as tools"),
    "function_call": (("none", "auto"), "functions are tools today; send tool_choice"),
    "modalities": ((["text"],), "only text is implemented"),
    "audio": ((), "audio is not implemented"),
    "web_search_options": ((), "web search is not implemented"),
    "reasoning_effort": ((), "reasoning is for /v1/chat/completions"),
    "verbosity": (("medium",), "verbosity is not implemented; ask for it in a message"),
    "chat_template": ((), "templates from clients are refused; the model's own is used"),
    "chat_template_kwargs": (({},), "chat templates are for /v1/chat/completions"),
    "continue_final_message": ((False,), "messages are for /v1/chat/completions"),
    "spaces_between_special_tokens": (
        (True,),
        "a byte-level tokenizer has its spaces in the tokens; none are put between",
    ),
    "use_beam_search": ((False,), "beam search is not implemented"),
    "length_penalty": ((1, 1.0), "beam search is not implemented"),
    "guided_json": ((), GUIDED.format("json")),
    "guided_regex": ((), GUIDED.format("regex")),
    "guided_choice": ((), GUIDED.format("choice")),
    "guided_grammar": ((), GUIDED.format("grammar")),
    "guided_whitespace_pattern": ((), GUIDED.format("whitespace_pattern")),
    "guided_decoding_backend": ((), "there is one backend; leave it out"),
}

# At these doors without effect, beside IGNORED.
IGNORED_BY_RESPONSES = frozenset({"max_tool_calls", "prompt_cache_options", "stream_options", "client_metadata"})
IGNORED_BY_MESSAGES = frozenset({"cache_control", "context_management", "diagnostics", "inference_geo", "speed"})

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# The first complaint ends the check: of a million wrong elements nobody reads the second.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
OURS = {"trace"}  # for programs in the engine's process, not for clients
SAMPLING = frozenset(SamplingParams.model_fields) - {"max_tokens", "logprobs"} - OURS


# Fields of a chat that other doors take as they are.
CARRIED = SAMPLING - {"n", "best_of", "prompt_logprobs"} | {"chat_template_kwargs"}


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(default=False, description="with include_usage: in every chunk")
    include_obfuscation: bool = Field(default=False, description="ignored: padding against traffic analysis")


class Generation(Strict):
    """Fields that completions and chat completions have in common. `sampling` gathers the flat sampling fields of the body."""

    sampling: SamplingParams = SamplingParams()
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = Field(default=False, description="in log-probabilities: token_id:123 for a text")
    return_routed_experts: bool = False

    @property
    def n(self) -> int:
        return self.sampling.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.include_usage and self.stream_options.continuous_usage_stats

    def params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """Parameters of all continuations of a prompt (trinity/engine/samples.py draws each)."""
        seed = (
            samples.drawn_seed() if self.sampling.seed is None else self.sampling.seed
        )  # so that nobody copies them again
        more = {"max_tokens": max_tokens, "logprobs": logprobs, "trace": self.return_routed_experts, "seed": seed}
        return self.sampling.model_copy(update=more)


class CompletionRequest(Generation):
    """POST /v1/completions"""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    max_tokens: int | None = Field(default=None, ge=0, le=2**31)
    echo: bool = False
    add_special_tokens: bool = True
    logprobs: int | None = Field(default=None, ge=0, le=20)

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt. Raises InvalidRequest for none and for too many."""
        whole = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        prompts: Any = [self.prompt] if whole else self.prompt
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise InvalidRequest(f"{len(prompts)} prompts in one request; send 1 to {MAX_PROMPTS}", param="prompt")
        return list(prompts)

    def params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """Parameters as before; with `echo`, `logprobs` is about the prompt, too."""
        found = super().params(max_tokens, logprobs)
        if not self.echo or logprobs is None:
            return found
        return found.model_copy(update={"prompt_logprobs": max(logprobs, found.prompt_logprobs or 0)})


class ChatRequest(Conversation, Generation):
    """POST /v1/chat/completions"""

    max_tokens: int | None = Field(default=None, ge=0, le=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=0, le=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_special_tokens: bool = False
    parallel_tool_calls: bool = True
    include_reasoning: bool = True

    @property
    def most_calls(self) -> int | None:
        return None if self.parallel_tool_calls else 1

    def bound(self, params: SamplingParams, form: str | None) -> SamplingParams:
        """Parameters with the grammar of calls, where there is one; `form` is the name of the model's format of calls."""
        found = self.calls_constraint(form, self.parallel_tool_calls, params.structured_outputs)
        return params if found is None else params.model_copy(update={"structured_outputs": found})

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Conversation):
    """POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages = Field(default=[], min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = Field(default=None, description="default: true for a prompt, false for messages")


class DetokenizeRequest(Strict):
    """POST /detokenize"""

    model: str | None = None
    tokens: TokenIds


class RolesRequest(Strict):
    """POST /engine_roles"""

    roles: list[Role] = Field(min_length=1, max_length=1024)


class UnloadAdapterRequest(Strict):
    """vLLM's fields."""

    IGNORES = frozenset({"lora_int_id"})

    lora_name: str = Field(min_length=1, max_length=128)


class LoadAdapterRequest(UnloadAdapterRequest):
    """An adapter's name, and its folder or its name on the Hub."""

    IGNORES = UnloadAdapterRequest.IGNORES | {"base_model_name"}
    REFUSES: ClassVar[Refusals] = {"load_inplace": ((False,), "an adapter is unloaded before another has its name")}

    lora_path: str = Field(min_length=1, max_length=4096)

    @field_validator("lora_name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return check_adapter_name(value)

    @field_validator("lora_path")
    @classmethod
    def _check_path(cls, value: str) -> str:
        if not value.startswith(("/", "~")) and not HUB_NAME.fullmatch(value):
            raise ValueError(
                "give an absolute path, or ORG/NAME on the Hub: a server has no folder of its own to start from"
            )
        return value


M = TypeVar("M", bound=Strict)


def parse(kind: type[M], body: bytes) -> M:
    """A request from the bytes of a body. Raises InvalidRequest that names the field, the value and the bound."""
    return of_tree(kind, load_object(body))


def of_tree(kind: type[M], tree: dict[str, Any]) -> M:
    """A request from the object that its body is."""
    tree = {key: value for key, value in tree.items() if value is not None}
    ignored = frozenset(tree) & (IGNORED | kind.IGNORES) - _names(kind)
    tree = _known_fields(kind, tree)
    if "sampling" in kind.model_fields:
        flat = {key: tree.pop(key) for key in SAMPLING & tree.keys()}
        tree["sampling"] = sampling_params(with_response_format(flat, tree.pop("response_format", None)))
    if "carried" in kind.model_fields:
        tree["carried"] = {key: tree.pop(key) for key in CARRIED & tree.keys()}
    value = validated(kind, tree)
    value._ignored = ignored
    return value


def validated(kind: type[M], tree: dict[str, Any]) -> M:
    """A request from its fields. For both edges."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _first(error) from None


def sampling_params(fields: dict[str, Any]) -> SamplingParams:
    """SamplingParams from fields as clients write them: logit_bias with text keys, top_k -1 for off. For both edges."""
    bias = fields.get("logit_bias")
    if isinstance(bias, dict) and len(bias) <= MAX_LISTED_TOKENS:
        if not all(re.fullmatch("[0-9]{1,10}", str(key)) for key in bias):
            raise InvalidRequest("logit_bias: keys must be token ids", param="logit_bias")
        fields = {**fields, "logit_bias": {int(key): value for key, value in bias.items()}}
    if fields.get("top_k") == -1:
        fields = {**fields, "top_k": 0}
    return SamplingParams.parse(**fields)


def load_object(body: bytes) -> dict[str, Any]:
    """A JSON object, without duplicate keys, NaN, lone surrogates or nesting beyond the interpreter's limit."""
    try:
        tree = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if b"\\u" in body:
            json.dumps(tree, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("the body holds half of a surrogate pair, which is not text") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {_reason(error)}") from None
    if not isinstance(tree, dict):
        raise InvalidRequest("the body must be a JSON object")
    return tree


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)[:200]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("an object names the same key twice")
    return out


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _names(kind: type[BaseModel]) -> frozenset[str]:
    """The names of fields that a body of this kind may have."""
    known = frozenset(kind.model_fields)
    gathered = {"sampling": SAMPLING | {"response_format"}, "carried": CARRIED}
    return (known - gathered.keys()).union(*(names for field, names in gathered.items() if field in known))


def _known_fields(kind: type[Strict], tree: dict[str, Any]) -> dict[str, Any]:
    """The fields of `kind`; harmless extras are dropped, others refused."""
    known, refused = _names(kind), {**REFUSED, **kind.REFUSES}
    for key in tree.keys() - known - IGNORED - kind.IGNORES:
        neutral, why = refused.get(key, ((), _unknown(key, known)))
        if not any(type(tree[key]) is type(value) and tree[key] == value for value in neutral):
            raise InvalidRequest(why, param=key[:100])
    return {key: value for key, value in tree.items() if key in known}


def _unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key[:100], list(known), n=1)
    return f"unknown field {key[:100]!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _first(error: ValidationError) -> InvalidRequest:
    """The first complaint as a sentence; the branches of a union become one."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    if path[:1] == ["prompt"] and len(path) > 1:
        message = "must be a string, a list of strings, a list of token ids, or a list of such lists"
        return InvalidRequest(f"prompt {message}", param="prompt")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"{'.'.join(path)[:100]}: unknown field; leave it out", param=".".join(path)[:100])
    value = first.get("input")
    got = f" (got {value!r})" if isinstance(value, str | int | float) and len(repr(value)) <= 80 else ""
    message = first["msg"].replace("Input should", "should").removeprefix("Value error, ")
    return InvalidRequest(f"{path[0] if path else 'body'}: {message}{got}", param=".".join(path)[:100] or None)
