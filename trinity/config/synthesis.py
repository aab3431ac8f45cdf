"""The settings of synthetic data: what is read, who is asked, by which prompts, what is kept, where it goes."""

from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trinity.config.serve import ClusterConfig
from trinity.config.tree import section
from trinity.config.yaml import Frozen, at_home, merge, parse_flags, read_yaml

PASSAGE = "text"  # the placeholder of the passage, which every prompt has
REFUSALS = (
    "i'm sorry", "i am sorry", "i apologize", "i cannot", "i can't", "i can not", "i'm unable", "i am unable", "i won't",
    "as an ai", "as a language model", "as a large language model", "i'm not able to", "i am not able to",
)  # fmt: skip
Share = Annotated[float, Field(ge=0, le=1)]


class Template(Frozen):
    """A prompt with named placeholders in braces: `{text}` is the passage, the others are names in `values`, of which each
    passage gets one by chance. Literal braces are doubled."""

    prompt: str
    system: str = ""
    values: dict[str, tuple[str, ...]] = Field(default={}, description="what a placeholder may stand for")
    temperature: float = Field(default=0.7, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=1024, ge=1)
    length_ratio: tuple[float, float] = Field(
        default=(0.1, 5.0), description="characters of answer over passage: least, most"
    )
    with_passage: bool = Field(default=False, description="the document that is made begins with the passage")
    has_turns: bool = Field(default=False, description="lines such as `Question:` and `Answer:` say who speaks")

    @model_validator(mode="after")
    def _check(self) -> "Template":
        wanted = {name for text in (self.prompt, self.system) for name in placeholders(text)}
        known = {PASSAGE, *self.values}
        if unknown := sorted(wanted - known):
            raise ValueError(
                f"placeholder {{{unknown[0]}}} is not known, only {', '.join(sorted(known))}; add it to values"
            )
        if PASSAGE not in set(placeholders(self.prompt)):
            raise ValueError(f"the prompt has no {{{PASSAGE}}}, where the passage goes")
        if unused := sorted(known - wanted):
            raise ValueError(f"values has {unused[0]}, which no placeholder names")
        if empty := [name for name, values in self.values.items() if not values]:
            raise ValueError(f"values has nothing for {empty[0]}")
        if not 0 <= self.length_ratio[0] < self.length_ratio[1]:
            raise ValueError(f"length_ratio {list(self.length_ratio)} is no least and most")
        return self


def placeholders(text: str) -> Iterator[str]:
    """Names in braces of a text. Raises ValueError for what is no plain name: an attribute, an index, a format."""
    for _, name, form, conversion in Formatter().parse(text):
        if name is not None:
            if not name.isidentifier() or form or conversion:
                raise ValueError(
                    f"{{{name}}} is no placeholder; give a plain name in braces, and double literal braces"
                )
            yield name


class InputConfig(Frozen):
    """Documents to begin from, as `data` of training has them, and how they are cut."""

    paths: tuple[str, ...]
    text_field: str = "text"
    max_documents: int | None = Field(default=None, ge=1, description="of each file")
    tokenizer: str | None = Field(default=None, description="counts tokens; default: that of server.checkpoint")
    chunk_tokens: int = Field(
        default=512, ge=16, description="a passage has so many at most, and ends with a paragraph"
    )
    min_chunk_tokens: int = Field(default=32, ge=1, description="shorter passages are left out")

    _at_home = field_validator("tokenizer")(at_home)

    @field_validator("paths", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "InputConfig":
        if not self.paths:
            raise ValueError("paths is empty; name files, folders or globs")
        if self.min_chunk_tokens > self.chunk_tokens:
            raise ValueError(f"min_chunk_tokens {self.min_chunk_tokens} is more than chunk_tokens {self.chunk_tokens}")
        return self


class AskedConfig(Frozen):
    """The one who generates: any server of the OpenAI API, or a checkpoint that is served in this process meanwhile."""

    url: str | None = Field(default=None, description="such as http://127.0.0.1:8000, or with its path up to /v1")
    checkpoint: str | None = None
    model: str | None = Field(default=None, description="default: the first that the server lists")
    api: Literal["chat", "completions"] = Field(
        default="chat", description="completions: for models that know no chats"
    )
    api_key_file: str | None = Field(default=None, description="default: TRINITY_API_KEY")
    max_tokens: int | None = Field(default=None, ge=1, description="of an answer, whatever more a template says")
    priority: int | None = Field(default=100, description="higher is later; null: not sent, for servers that refuse it")
    concurrency: int = Field(default=16, ge=1, description="requests at a time, over all workers")
    timeout_s: float = Field(default=600, gt=0, description="of one answer")
    patience_s: float = Field(default=600, ge=0, description="for a server that is away or full, before the run ends")

    _at_home = field_validator("checkpoint", "api_key_file")(at_home)

    @field_validator("url")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("should begin with http:// or https://")
        return value and value.rstrip("/").removesuffix("/v1")

    @model_validator(mode="after")
    def _check(self) -> "AskedConfig":
        if (self.url is None) == (self.checkpoint is None):
            raise ValueError("give either url, a server's address, or checkpoint, which is then served here")
        return self


class ChecksConfig(Frozen):
    """Conditions for an answer to be kept; null switches a check off."""

    same_script: Share | None = Field(default=0.7, description="share of the answer's letters in the passage's scripts")
    refusals: tuple[str, ...] = Field(default=REFUSALS, description="phrases that no answer begins with")
    max_repetition: Share | None = Field(default=0.3, description="share of 4-grams that were there before")
    max_copied: Share | None = Field(default=0.8, description="share of the answer's 8-grams that are the passage's")
    whole: bool = Field(default=True, description="answers that max_tokens cut off are left out")
    benchmarks: tuple[str, ...] = Field(default=(), description="files whose questions may not be in answers")
    benchmark_ngram: int = Field(default=13, ge=4, description="so many words in a row are a question's")

    @field_validator("refusals")
    @classmethod
    def _say_something(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not phrase.strip() for phrase in value):
            raise ValueError("a phrase is empty; every answer would begin with it")
        return value


class DedupConfig(Frozen):
    """Which of equal and nearly equal documents stay: the first, in the order of files and rows."""

    exact: bool = True
    near: float | None = Field(default=0.8, gt=0, le=1, description="Jaccard similarity of 5-grams; null: none")


class OutputConfig(Frozen):
    dir: str = "runs/synthetic"
    rows: Literal["text", "messages"] = Field(default="text", description="messages: chats, of templates with turns")
    packing: Literal["", ".gz", ".zst"] = ".zst"

    _at_home = field_validator("dir")(at_home)


class SynthesisConfig(Frozen):
    """Everything that `trinity synthesize` takes."""

    input: InputConfig
    server: AskedConfig
    styles: tuple[str, ...] = Field(description="names of templates: built-in ones, and those below")
    styles_per_passage: int | None = Field(default=None, ge=1, description="by chance; default: every style")
    templates: dict[str, Template] = Field(default={}, description="of one's own, by their names")
    checks: ChecksConfig = ChecksConfig()
    dedup: DedupConfig = DedupConfig()
    output: OutputConfig = OutputConfig()
    seed: int = 0
    workers: int = Field(default=0, ge=0, description="of Ray Data; 0: this process")
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("styles")
    @classmethod
    def _are_some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("should name one style or more, each once")
        return value

    @model_validator(mode="after")
    def _check(self) -> "SynthesisConfig":
        if self.input.tokenizer is None and self.server.checkpoint is None:
            raise ValueError("with server.url, input.tokenizer must say by which tokens passages are cut")
        if self.workers and self.server.checkpoint and self.cluster.address != "local":
            raise ValueError(
                "a checkpoint is served on this machine's loopback only; start a server and give server.url"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, flags: tuple[str, ...] | list[str] = ()) -> "SynthesisConfig":
        """Read a file, with flags such as `--server.url` over it. Raises ConfigError that names key and remedy."""
        tree = {name: value for name, value in read_yaml(path).items() if value != {}}  # null is as good as nothing
        return section(cls, "", merge(tree, parse_flags(flags)))

    @property
    def of_rows(self) -> dict[str, Any]:
        """The plain settings that decide what the rows of a shard are; a run goes on with equal ones alone."""
        tree = self.model_dump(mode="json", exclude={"workers", "cluster", "server"})
        tree["server"] = self.server.model_dump(mode="json", include={"model", "api", "checkpoint", "max_tokens"})
        del tree["input"]["paths"], tree["output"]["dir"]
        return tree
