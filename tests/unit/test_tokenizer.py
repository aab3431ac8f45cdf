"""Tokenizers: every text comes back, streams show whole characters, transformers agrees, templates are caged."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AfmoeConfig, AutoTokenizer

from trinity.errors import CheckpointError, ConfigError, InvalidRequest
from trinity.text import tokenizer
from trinity.text.chat_template import render_chat
from trinity.text.detokenizer import IncrementalDecoder
from trinity.text.tokenizer import MARKERS, MAX_TEMPLATE_CHARS, SPECIALS, Tokenizer, train_tokenizer

CORPUS = [Path(module.__file__).read_text() for module in (json, subprocess)] + [
    "家族写真を見る 👩‍👩‍👧 naïve 12345678 ½ x²"
]
TOKENIZER = Tokenizer.train(iter(CORPUS), 700)
IDS = st.lists(st.integers(-2, TOKENIZER.vocab_size + 3))
TEXTS = st.lists(st.text() | st.binary().map(lambda b: b.decode("utf-8", "replace")) | st.sampled_from(SPECIALS)).map(
    "".join
)
USER = [{"role": "user", "content": "hi"}]
CALL = {"function": {"name": "add", "arguments": {"a": "é<'"}}}


@given(TEXTS)
def test_every_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", "\0", "👩‍👩‍👧‍👦", "\ufeff\u200d", "\r\n\r\n\t ", "1" * 100_000, " " * 100_000 + "x", "<|im_end|>" * 3]
)
def test_hard_texts_come_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_long_text_is_encoded_in_pieces(monkeypatch):
    text = "".join(CORPUS)
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", 1000)
    pieces = [TOKENIZER.encode(text[i : i + 1000]) for i in range(0, len(text), 1000)]
    assert TOKENIZER.encode(text, add_special=True) == [0, *itertools.chain(*pieces)]


@given(IDS)
def test_decode_agrees_with_the_tokenizers_library(ids):
    library = tokenizers.Tokenizer.from_str(TOKENIZER.to_json())
    known = [i for i in ids if 0 <= i < TOKENIZER.vocab_size]
    assert TOKENIZER.decode(ids) == library.decode(known, skip_special_tokens=False)
    assert TOKENIZER.decode(ids, skip_special=True) == library.decode(known, skip_special_tokens=True)


@given(IDS, st.booleans())
def test_pushes_and_flush_are_the_decoded_text(ids, skip_special):
    decoder = IncrementalDecoder(TOKENIZER, skip_special)
    assert "".join([decoder.push(i) for i in ids]) + decoder.flush() == TOKENIZER.decode(ids, skip_special)


@given(TEXTS)
def test_a_stream_never_shows_part_of_a_character(text):
    decoder, shown = IncrementalDecoder(TOKENIZER), ""
    for i in TOKENIZER.encode(text):
        shown += decoder.push(i)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""


def test_emoji_split_over_tokens_comes_whole():
    ids = TOKENIZER.encode("🦜")
    assert len(ids) > 1
    decoder = IncrementalDecoder(TOKENIZER)
    assert [decoder.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🦜"]
    decoder.push(ids[0])
    assert decoder.flush() == "\ufffd"


def test_special_ids_are_the_familys():
    assert [TOKENIZER.bos_id, TOKENIZER.eos_id] == [0, 3]
    assert [TOKENIZER.encode(name) for name in SPECIALS] == [[i] for i in range(13)]
    assert SPECIALS[12] == "<|pad|>"
    assert TOKENIZER.special_ids.isdisjoint(TOKENIZER.encode("".join(MARKERS)))
    assert (
        TOKENIZER.decode(TOKENIZER.encode("<|im_start|><think>x</think><|im_end|>"), skip_special=True)
        == "<think>x</think>"
    )
    assert TOKENIZER.encode("a", add_special=True) == [0, *TOKENIZER.encode("a")]


@given(st.integers(0, 10**40))
def test_digits_are_cut_in_threes_from_the_right(number):
    pieces = train_tokenizer(iter(["x"]), 269).pre_tokenizer.pre_tokenize_str(str(number))
    assert [piece for piece, _ in pieces] == f"{number:,}".split(",")


def test_pieces_of_mixed_text():
    pieces = train_tokenizer(iter(["x"]), 269).pre_tokenizer.pre_tokenize_str("v1234 写真12 don't (foo) \n\n  bar")
    assert (
        "|".join(p for p, _ in pieces).replace("Ġ", " ").replace("Ċ", "\n")
        == "v|1|234| |åĨĻçľŁ|12| don|'t| (|foo|)| \n\n| | bar"
    )


def test_training_is_deterministic_whatever_the_number_of_threads():
    code = "import sys, trinity.text.tokenizer as t; print(t.train_tokenizer(iter([sys.stdin.read()]), 900).to_str())"
    runs = [
        subprocess.run([sys.executable, "-c", code], input="\n".join(CORPUS), text=True, env=env, capture_output=True)
        for env in ({"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "3"})
    ]
    assert runs[0].stdout == runs[1].stdout
    assert Tokenizer(tokenizers.Tokenizer.from_str(runs[0].stdout), {}, None).vocab_size == 900


def test_small_vocabularies():
    assert Tokenizer.train(iter(["abab"]), 5000).vocab_size < 280
    with pytest.raises(ConfigError, match="vocab_size 100 < 269"):
        train_tokenizer(iter(["x"]), 100)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InvalidRequest, match="character 2"):
        TOKENIZER.encode("ab\ud800")


# --- files ----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_again(tmp_path):
    TOKENIZER.save(tmp_path / "a")
    for source in (tmp_path / "a", tmp_path / "a" / "tokenizer.json"):
        loaded = Tokenizer.load(source)
        loaded.save(tmp_path / "b")
        for file in (tmp_path / "a").iterdir():
            assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_transformers_loads_it_and_agrees(tmp_path):
    TOKENIZER.save(tmp_path)
    AfmoeConfig().save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 3, 12)
    for text in [*CORPUS, "<|im_start|>user\nhi<|im_end|>"]:
        assert theirs(text).input_ids == TOKENIZER.encode(text, add_special=True)
        assert theirs.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "add"}}]])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_render_as_in_transformers(tmp_path, tools, add_generation_prompt):
    TOKENIZER.save(tmp_path)
    messages = [
        {"role": "system", "content": "be brief"},
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, tools, add_generation_prompt=add_generation_prompt, tokenize=False)
    assert render_chat(TOKENIZER.chat_template, messages, add_generation_prompt, tools) == expected


def test_plain_chatml():
    expected = "<|begin_of_text|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(TOKENIZER.chat_template, USER) == expected


def test_older_spellings_of_the_config(tmp_path):
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    config = {
        "eos_token": {"content": "<|end_of_text|>"},
        "chat_template": templates,
        "auto_map": {"AutoTokenizer": "x.py"},
    }
    _config(config)(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.chat_template) == (1, None, "yes")
    loaded.save(tmp_path / "out")
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def _config(content):
    """Spoils tokenizer_config.json, with no older file that would overrule it."""
    text = content if isinstance(content, str) else json.dumps(content)

    def spoil(folder):
        (folder / "special_tokens_map.json").unlink()
        (folder / "tokenizer_config.json").write_text(text)

    return spoil


def _template(value):
    def spoil(folder):
        (folder / "chat_template.jinja").unlink()
        _config({"chat_template": value})(folder)

    return spoil


def _word_level(folder):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), CheckpointError, "tokenizer.json is missing"),
        (lambda d: (d / "tokenizer.json").write_text("{"), CheckpointError, "is not a tokenizer.json"),
        (lambda d: (d / "tokenizer.json").write_bytes(b"\xff"), CheckpointError, "cannot read .*tokenizer.json"),
        (lambda d: (d / "tokenizer_config.json").write_text("["), CheckpointError, "is not JSON"),
        (lambda d: (d / "tokenizer_config.json").write_text("[]"), CheckpointError, "found list"),
        (_config({"bos_token": "<s>"}), CheckpointError, "no token '<s>'"),
        (_word_level, CheckpointError, "only byte-level"),
        (_config("[" * 100_000), CheckpointError, "is not JSON"),
        (_config('{"a": ' + "1" * 5000 + "}"), CheckpointError, "is not JSON"),
        (_config({"bos_token": [1]}), CheckpointError, r"names \[1\] as a token"),
        (_config({"eos_token": {"content": 5}}), CheckpointError, "names 5 as a token"),
        (_config({"eos_token": "a" * 9999}), CheckpointError, "no token 'a{100}'"),
        (_template(5), CheckpointError, "is a int; a text is wanted"),
        (_template([{"name": "default", "template": ["a"]}]), CheckpointError, "is a list"),
        (_template({"default": "a"}), CheckpointError, "is a dict"),
        (_template("a" * (MAX_TEMPLATE_CHARS + 1)), CheckpointError, "has 1,048,577 characters"),
        (
            lambda d: (d / "chat_template.jinja").write_bytes(b"\xff"),
            CheckpointError,
            "cannot read .*chat_template.jinja",
        ),
        (lambda d: os.truncate(d / "chat_template.jinja", 1 << 40), CheckpointError, "has 1,099,511,627,776 bytes"),
        (lambda d: os.truncate(d / "tokenizer_config.json", 1 << 40), CheckpointError, "has 1,099,511,627,776 bytes"),
    ],
)
def test_bad_files_are_named(tmp_path, spoil, error, says):
    TOKENIZER.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=says):
        Tokenizer.load(tmp_path)


def test_missing_path_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
