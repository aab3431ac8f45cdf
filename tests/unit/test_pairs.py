"""Rows of pairs: what is the prompt, what the answers, and what is trained of them."""

import json

import pytest

from tests.unit.test_chats import CALLING, LONG, PLAIN, TOKENIZER, TOOLS, said
from trinity.config import DataConfig, TrainConfig, preset
from trinity.data.pairs import answer_stores, answers_of
from trinity.data.prepare import recipes
from trinity.errors import DataError

OTHER = [{"role": "assistant", "content": "It is not."}]


def read(tmp_path, *rows):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(answers_of([str(tmp_path / "pairs.jsonl")], TOKENIZER))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PLAIN[:1], "chosen": PLAIN[1:], "rejected": OTHER},
        {"prompt": "What is it?", "chosen": "It is so.", "rejected": "It is not."},
        {"chosen": PLAIN, "rejected": [PLAIN[0], *OTHER], "tools": None},
        {"prompt": "What is it?", "chosen": PLAIN, "rejected": [PLAIN[0], *OTHER]},  # both have the prompt, too
        {"prompt": json.dumps(PLAIN[:1]), "chosen": json.dumps(PLAIN[1:]), "rejected": json.dumps(OTHER)},
        {"input": {"messages": PLAIN[:1], "tools": None}, "preferred_output": PLAIN[1:], "non_preferred_output": OTHER},
    ],
)
def test_rows_of_every_kind_are_one_pair(tmp_path, row):
    [(chosen, rejected)] = read(tmp_path, row)
    assert (said(chosen), said(rejected)) == (["It is so.<|im_end|>"], ["It is not.<|im_end|>"])
    prompt = chosen.ids[: chosen.is_trained.index(True)]
    assert rejected.ids[: rejected.is_trained.index(True)] == prompt


def test_only_what_is_preferred_is_trained(tmp_path):
    """An assistant's earlier turns are part of the prompt, and a tool's words between two are nobody's."""
    [(chosen, _)] = read(tmp_path, {"chosen": LONG, "rejected": [*LONG[:4], *OTHER]})
    assert said(chosen) == ["No.<|im_end|>"]
    [(chosen, rejected)] = read(tmp_path, {"chosen": CALLING, "rejected": [CALLING[0], *OTHER], "tools": TOOLS})
    assert [text.startswith("<tool_call>") for text in said(chosen)] == [True, False]
    assert said(rejected) == ["It is not.<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (7, "is a int; it is an object"),
        ({"chosen": "x"}, "pairs.jsonl:1 has chosen; it is to have chosen and rejected"),
        ({"chosen": "x", "rejected": "y"}, "answers that are texts and no prompt"),
        ({"chosen": PLAIN, "rejected": PLAIN[:1]}, "an answer without a message of the assistant's"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "has the label 'good'; it is true"),
    ],
)
def test_what_is_no_pair_is_named(tmp_path, row, says):
    with pytest.raises(DataError, match=says):
        read(tmp_path, row)


def test_control_tokens_leave_a_pair_out(tmp_path, caplog):
    bad = {"prompt": "a", "chosen": "b<|im_end|>", "rejected": "c"}
    assert len(read(tmp_path, bad, {**bad, "chosen": "b"})) == 1
    assert "left out are 1 rows with control tokens as text" in caplog.text


def test_pairs_stay_together_in_a_store_made_of_shards_that_were_made_before(tmp_path):
    """As `trinity prepare` makes them; whatever share is held out, no pair is parted."""
    rows = [{"prompt": f"{n}?", "chosen": f"so {n}", "rejected": f"not {n}"} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    TOKENIZER.save(tmp_path / "tokenizer")
    tokenizer = str(tmp_path / "tokenizer")
    data = DataConfig(train=(str(tmp_path / "pairs.jsonl"),), format="pairs", tokenizer=tokenizer)
    model = preset("tiny").model_copy(update={"vocab_size": TOKENIZER.vocab_size})
    [(recipe, files, cache)] = recipes(data, TrainConfig(), model, tmp_path / "run")
    made = [recipe.made(each, cache).folder for each in files]
    for fraction in (0.0, 1e-9, 0.3, 0.499):
        train, val = answer_stores(data.train, data, TOKENIZER, fraction, 0, tmp_path / "run" / "data")
        assert list(cache.folder.glob("shard-*")) == made, "none is made again"
        texts = [document(store, n) for store in (train, val) for n in range(len(store.starts_N) - 1)]
        assert len(texts) == 42
        assert len(train.starts_N) % 2 == len(val.starts_N) % 2 == 1
        for wanted, unwanted in zip(texts[::2], texts[1::2], strict=True):
            assert wanted.replace("so", "not") == unwanted


def document(store, n):
    return TOKENIZER.decode(list(store.tokens[store.starts_N[n] : store.starts_N[n + 1]]))
