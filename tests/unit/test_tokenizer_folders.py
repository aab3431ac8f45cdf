"""Tokenizers as the world writes them into folders: the ids that transformers gives, or refused by name."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from trinity.config import Config
from trinity.data.prepare import prepare
from trinity.errors import CheckpointError, ConfigError
from trinity.text.chat_template import CHATML, render_chat
from trinity.text.tokenizer import Tokenizer

TEXT = "<|begin_of_text|> def main() <|extra|> <|im_end|> <think> hello   wörld 12345678 <|more|> " * 20
TOKENS, CONFIG, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
EXTRA = {
    "content": "<|extra|>",
    "lstrip": True,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
    "special": True,
}
MORE = {**EXTRA, "content": "<|more|>"}
PAD = {"pad_to_multiple_of": None, "pad_id": 12, "pad_type_id": 0, "pad_token": "<|pad|>"}
PADDING = {"strategy": {"Fixed": 640}, "direction": "Right", **PAD}
ODD = {  # file -> what is changed in it; None: the file is not there
    "truncated": {TOKENS: {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}}},
    "padded": {TOKENS: {"padding": PADDING}},
    "without a post-processor": {TOKENS: {"post_processor": None}},
    "without bos": {TOKENS: {"post_processor": None}, CONFIG: {"bos_token": None}, MAP: None},
    "bos in the map alone": {CONFIG: {"bos_token": None}},
    "without a config": {CONFIG: None},
    "without a map": {MAP: None},
    "tokens of a config that says all": {CONFIG: {"added_tokens_decoder": {"900": EXTRA, "30": MORE}}},
    "a config that says all and a map": {CONFIG: {"added_tokens_decoder": {"900": EXTRA}}, MAP: {"pad_token": "<|more|>"}},
    "an older file of tokens": {"added_tokens.json": {"<|extra|>": 900, "<|more|>": 30}},
    "an older file that does not count": {"added_tokens.json": {"<|more|>": 30}, CONFIG: {"added_tokens_decoder": {}}},
    "additional special tokens": {CONFIG: {"additional_special_tokens": ["<|more|>", "<|extra|>"]}},
    "extra special tokens": {CONFIG: {"extra_special_tokens": ["<|extra|>", "<think>"]}},
    "special tokens with roles": {CONFIG: {"extra_special_tokens": {"image_token": "<|extra|>"}}},
    "a role of the model's own": {CONFIG: {"image_token": "<|extra|>"}},
    "a pad token that is new": {CONFIG: {"pad_token": "<|more|>"}, MAP: None},
    "special tokens are text": {CONFIG: {"split_special_tokens": True}},
    "bos is not wanted": {CONFIG: {"add_bos_token": False}},
    "eos is wanted": {CONFIG: {"add_eos_token": True}},
    "another class": {CONFIG: {"tokenizer_class": "LlamaTokenizerFast"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    Tokenizer.train(iter(["def main(): return tokens of some text, 12345 and héllo wörld " * 40]), 400).save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "afmoe"}))
    return folder


def spoiled(plain, target, changes):
    shutil.copytree(plain, target, dirs_exist_ok=True)
    for name, values in changes.items():
        file = target / name
        if values is None:
            file.unlink()
        else:
            file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))
    return target


@pytest.mark.parametrize("name", ODD)
def test_ids_are_those_of_transformers(plain, tmp_path, name):
    folder = spoiled(plain, tmp_path, ODD[name])
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    ids = theirs(TEXT)["input_ids"]
    assert ours.encode(TEXT, add_special=True) == ids
    assert ours.encode(TEXT) == theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token or "", theirs.eos_token or "")
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.vocab_size == len(theirs)
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.encode(TEXT, add_special=True), again.bos_token, again.eos_token) == (
        ([*ids], ours.bos_token, ours.eos_token)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({CONFIG: {"bos_token": "<s>"}, MAP: None}, "no token '<s>'"),
        ({CONFIG: {"eos_token": ["<|im_end|>"]}, MAP: None}, "as a token; a text is wanted"),
        ({CONFIG: {"added_tokens_decoder": {"x": EXTRA}}}, "not a mapping of ids to tokens"),
        ({CONFIG: {"added_tokens_decoder": {"1": "<|extra|>"}}}, "not a mapping of ids to tokens"),
        ({"added_tokens.json": {"<|extra|>": "900"}}, "not a mapping of tokens to ids"),
        ({CONFIG: {"extra_special_tokens": 7}}, "a list of tokens is wanted"),
        ({CONFIG: {"extra_special_tokens": [f"<|{i}|>" for i in range(100_000)]}}, "65,536 may be added"),
    ],
)
def test_what_no_tokenizer_has_is_refused(plain, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(spoiled(plain, tmp_path, changes))


def test_a_chat_without_bos_begins_with_its_first_message(plain, tmp_path):
    own = Tokenizer.load(spoiled(plain, tmp_path, ODD["without bos"]))
    text = render_chat(CHATML, [{"role": "user", "content": "hi"}], bos_token=own.bos_token, eos_token=own.eos_token)
    assert text.startswith("<|im_start|>user\nhi")


def test_documents_begin_with_bos_where_there_is_one(plain, tmp_path):
    """And end with eos: without one nobody could tell where."""
    words = tmp_path / "words.txt"
    words.write_text("some words " * 50)
    lengths, firsts = {}, {}
    for name in ("without a map", "without bos"):
        folder = spoiled(plain, tmp_path / name, ODD[name])
        prepared = prepare(*settings(words, folder), tmp_path / "out")
        lengths[name] = len(prepared.train.store.tokens)
        firsts[name] = int(prepared.train.store.tokens[0])
    assert firsts == {"without a map": 0, "without bos": prepared.tokenizer.encode("some words")[0]}
    assert lengths["without a map"] == lengths["without bos"] + 1
    nameless = spoiled(plain, tmp_path / "nameless", {CONFIG: {"eos_token": None}, MAP: None})
    with pytest.raises(ConfigError, match="names no token that ends a document"):
        prepare(*settings(words, nameless), tmp_path / "out")


def settings(words, tokenizer):
    config = Config.load(None, ["--train.seq_len=16", "--data.val_fraction=0"], model="tiny")
    return (
        config.data.model_copy(update={"train": (str(words),), "tokenizer": str(tokenizer)}),
        config.train,
        config.model,
    )
