"""A random model under grammars, and schemas as programs write them."""

import enum
from typing import Annotated, Literal, Optional

import torch
from pydantic import BaseModel, Field

from trinity.checkpoint import CheckpointWriter, write_tensors
from trinity.config import EngineConfig, preset
from trinity.llm import LLM
from trinity.models.afmoe.model import Afmoe
from trinity.models.rules.init import init_expert
from trinity.text.grammar.vocabulary import Vocabulary
from trinity.text.tokenizer import Tokenizer

TEXT = '{"name": "Ann", "size": 12.5, "tags": [true, null]} the quick brown fox; def f(x): return x + 1\n'
VOCAB = 384
SETTINGS = EngineConfig(max_model_len=1024, kv_cache_bytes=8 << 20, max_num_seqs=8)


def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter([TEXT * 50]), 360)


def vocabulary(own: Tokenizer) -> Vocabulary:
    return Vocabulary.of(own.token_bytes, own.added_ids.values(), (own.eos_id,), VOCAB)


def checkpoint(folder, own: Tokenizer):
    config = preset("tiny").model_copy(update={"vocab_size": VOCAB, "num_hidden_layers": 2, "num_experts": 2})
    config = config.model_validate({**config.model_dump(), "layer_types": (), "num_experts_per_tok": 1})
    torch.manual_seed(0)
    model = Afmoe(config, experts=None)
    writer = CheckpointWriter(folder, 7)
    parts = list(write_tensors(writer.folder, "model-backbone", model.tensors().items()))
    tensors = {
        f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight": weight
        for layer in config.moe_layers
        for e in range(config.num_experts)
        for name, weight in zip(("gate", "up", "down"), init_expert(config, layer, e, 0, torch.float32), strict=True)
    }
    parts += write_tensors(writer.folder, "model-experts", tensors.items())
    return writer.finish(parts, config, own, {})


def random_llm(folder, **settings) -> LLM:
    return LLM(folder, engine=SETTINGS.model_copy(update=settings), backend="reference", device="cpu")


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    x: int
    y: float


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[Annotated[str, Field(max_length=8)]] = Field(max_length=3)


class Owner(BaseModel):
    name: str = Field(max_length=12)
    pet: Cat | Dog = Field(discriminator="kind")
    color: Color | None = None
    places: list[Point] = Field(max_length=2)


class Tree(BaseModel):
    value: int
    left: Optional["Tree"] = None


class Event(BaseModel):
    on: Annotated[str, Field(json_schema_extra={"format": "date"})]
    scores: dict[str, float] = Field(max_length=2)
    flags: tuple[bool, int]
    note: Annotated[str, Field(pattern="^[a-f]{2,4}$")]


SCHEMAS = {
    **{kind.__name__: kind.model_json_schema() for kind in (Point, Owner, Tree, Event)},
    "enum": {"enum": ["a", 1, None, {"b": [2]}]},
    "const": {"const": "only this"},
    "definitions": {"$ref": "#/definitions/n", "definitions": {"n": {"type": "integer", "minimum": -5, "maximum": 5}}},
    "oneOf": {"oneOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 3}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
    "several types": {"type": ["integer", "null", "boolean"]},
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
    "exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "unknown format": {"type": "string", "format": "color", "maxLength": 5},
}
