"""Conversations as training data: rows of every kind, and the mask against what a server of the model would sample."""

import json
import random
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.unit.test_trainer import SMALL
from trinity.config import Config, DataConfig, Sequences, TrainConfig, preset
from trinity.data.chat_store import chat_stores
from trinity.data.chat_tokens import control_in, examples
from trinity.data.chats import Conversation
from trinity.data.dataset import IGNORE
from trinity.data.formats import rows as rows_in
from trinity.data.packed_chats import PackedChats
from trinity.data.prepare import prepare
from trinity.errors import ConfigError, DataError
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.text.conversation import render
from trinity.text.tokenizer import Tokenizer
from trinity.train.collectives import Alone
from trinity.train.loss import token_logprobs
from trinity.train.trainer import Trainer
from trinity.utils.trying import tried

MODEL = preset("tiny")
TOKENIZER = Tokenizer.train(iter(["what is it? it is so. no, really, twice seven is fourteen"]), 330)
PLAIN = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is so."}]
LONG = [
    {"role": "system", "content": "Be brief."}, *PLAIN,
    {"role": "user", "content": "Really?"}, {"role": "assistant", "content": "No."},
]  # fmt: skip
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLING = [
    {"role": "user", "content": "call f"}, {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "7"}, {"role": "assistant", "content": "Seven."},
]  # fmt: skip
DROPS = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.reasoning and loop.last %}{{- '<think>\n' + m.reasoning + '\n</think>\n' }}{%- endif %}
{{- m.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"""  # as Mini and Qwen3 have it


def with_template(template):
    return Tokenizer(TOKENIZER._core, {}, template)


def conversation(messages, **row):
    return Conversation.of({"messages": messages, **row}, "here")


def said(example, tokenizer=TOKENIZER):
    """The text of each run of trained tokens."""
    runs, before = [], False
    for token_id, is_trained in zip(example.ids, example.is_trained, strict=True):
        if is_trained:
            runs[-1:] = [[*runs[-1], token_id]] if before else [*runs[-1:], [token_id]]
        before = is_trained
    return [tokenizer.decode(run) for run in runs]


# -- rows


SAME = [
    {"messages": CALLING, "tools": TOOLS, "parallel_tool_calls": True},
    {"messages": json.dumps(CALLING), "tools": json.dumps(TOOLS)},
    {"prompt": CALLING[:1], "completion": CALLING[1:], "tools": TOOLS},
    {
        "conversations": [
            {"from": "human", "value": "call f"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "7"}, {"from": "gpt", "value": "Seven."},
        ],
        "tools": json.dumps([TOOLS[0]["function"]]),
    },
    {  # OpenAI's names of 2023
        "messages": [
            CALLING[0], {"role": "assistant", "content": None, "function_call": CALL["function"]},
            {"role": "function", "name": "f", "content": "7"}, CALLING[3],
        ],
        "functions": [TOOLS[0]["function"]],
    },
    {  # null says nothing, and of a function nobody is told more than a server tells
        "messages": [{"content": None, "weight": None, "name": None, "tool_calls": None, **m} for m in CALLING],
        "tools": [{"function": {"strict": True, "parameters": {"type": "object"}, "description": None, "name": "f"}}],
    },
    {
        "prompt": json.dumps(CALLING[:1]), "completion": json.dumps(CALLING[1:]), "tools": json.dumps(TOOLS),
        "chat_template_kwargs": None,
    },
]  # fmt: skip


@pytest.mark.parametrize("row", SAME)
def test_rows_of_every_kind_are_one_conversation(row):
    found = Conversation.of(row, "here")
    assert [(m["role"], m.get("content"), m.get("tool_calls")) for m in found.chat.messages] == [
        (m["role"], m.get("content"), m.get("tool_calls")) for m in CALLING
    ]
    assert found.chat.tools == TOOLS
    assert found.is_trained == (False, True, False, True)


def test_alpacas_rows_and_pairs_of_texts():
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "system": "s"}
    assert [m["content"] for m in Conversation.of(row, "here").chat.messages] == ["s", "Add.\n\n1 1", "2"]
    assert [m["content"] for m in Conversation.of({**row, "input": ""}, "here").chat.messages] == ["s", "Add.", "2"]
    before = Conversation.of({**row, "history": [["a", "b"]]}, "here")
    assert [m["content"] for m in before.chat.messages] == ["s", "a", "b", "Add.\n\n1 1", "2"]
    assert before.is_trained == (False, False, True, False, True)
    pair = Conversation.of({"prompt": "a", "completion": "b"}, "here")
    assert (pair.chat.messages, pair.is_trained) == ([*map(dict, [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])], (False, True))  # fmt: skip


def test_who_is_trained():
    weighed = [LONG[0], LONG[1], LONG[2] | {"weight": 0}, LONG[3], LONG[4] | {"weight": 1}]
    assert conversation(weighed).is_trained == (False, False, False, False, True)
    given_before = Conversation.of({"prompt": LONG[:4], "completion": LONG[4:]}, "here")
    assert given_before.is_trained == (False, False, False, False, True)
    assert conversation([PLAIN[1], *PLAIN]).is_trained == (False, False, True), "nobody asked for the first"
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f"}', "weight": 0}]
    assert Conversation.of({"conversations": turns}, "here").is_trained == (False, False)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (7, "here is a int; a conversation is an object"),
        ({"text": "x"}, "here has text; a conversation has messages; prompt and completion"),
        ({"messages": []}, "here has no messages"),
        ({"messages": "no json"}, "here has 'no json' where JSON is expected"),
        ({"messages": [{"content": "x"}]}, "here, message 0 has no role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0 has role 'robot'; there are user, assistant"),
        ({"messages": [{"role": "user", "content": 7}]}, "message 0 has a int as content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts that are no text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "a call without the name of a function"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn 0 is from 'alien'"),
        ({"messages": [PLAIN[0] | {"weight": "0"}]}, "message 0 has weight '0'; it is 1, or 0"),
        ({"messages": [PLAIN[0] | {"weight": 0.5}]}, "message 0 has weight '0.5'; it is 1, or 0"),
        ({"messages": [PLAIN[0], {"role": "assistant", "text": "x"}]}, "message 1 has role, text, and neither content"),
        ({"messages": [{"role": "assistant", "tool_calls": 7}]}, "message 0: tool_calls are a int, no list"),
        ({"messages": [{"role": "assistant", "content": "x", "reasoning": ["y"]}]}, "has a list as reasoning"),
        ({"instruction": 7, "output": "x"}, "here has a int as instruction; give a text"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "a history that is no list of pairs"),
        ({"messages": PLAIN, "tools": [TOOLS[0], TOOLS[0]]}, "two tools are called 'f'"),
    ],
)
def test_what_is_no_conversation_is_named(row, says):
    with pytest.raises(DataError, match=says):
        Conversation.of(row, "here")


def test_whatever_a_row_holds_it_is_read_or_refused_by_name():
    rng, num_read = random.Random(0), 0
    junk = [None, 7, True, "", "x", "[", "[]", '[{"role": "user"}]', [], {}, [1], [None], {"a": 1}, [[]], float("nan")]
    for _ in range(3000):
        row = json.loads(
            json.dumps(rng.choice([SAME[0], SAME[3], SAME[4], {"prompt": "a", "completion": CALLING[3:]}]))
        )
        for _ in range(rng.randint(1, 2)):
            at = row
            while isinstance(
                inside := at[key := rng.choice([*(at if isinstance(at, dict) else range(len(at)))])], dict | list
            ):
                if not inside or rng.random() < 0.2:
                    break
                at = inside
            at[key] = json.loads(json.dumps(rng.choice(junk)))
        found = tried(partial(Conversation.of, row, "here"), DataError)
        assert isinstance(found, Conversation) or str(found).startswith("here")
        num_read += isinstance(found, Conversation)
    assert 300 < num_read < 2700


# -- masks


@pytest.mark.parametrize("messages", [PLAIN, LONG, CALLING])
def test_the_mask_is_what_a_server_would_have_sampled(messages):
    """From the same messages, token by token: the prompt that it encodes, and then what it writes up to its end mark."""
    found = conversation(messages, tools=TOOLS if messages is CALLING else None)
    [example] = examples(found, TOKENIZER, "here")
    for at in (n for n, trained in enumerate(found.is_trained) if trained):
        chat = found.chat
        prompt = TOKENIZER.encode(render(type(chat)(chat.messages[:at], chat.tools), TOKENIZER))
        assert example.ids[: len(prompt)] == prompt
        answer = example.is_trained[len(prompt) :]
        end = answer.index(False) if False in answer else len(answer)
        assert end > 0
        assert example.ids[len(prompt) + end - 1] == TOKENIZER.eos_id
        assert not example.is_trained[len(prompt) - 1]
    assert example.num_trained == sum(len(TOKENIZER.encode(text)) for text in said(example))


def test_what_is_said_is_trained_and_nothing_else():
    [example] = examples(conversation(LONG), TOKENIZER, "here")
    assert said(example) == ["It is so.<|im_end|>", "No.<|im_end|>"]
    [example] = examples(conversation(CALLING, tools=TOOLS), TOKENIZER, "here")
    assert said(example) == [
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
        "Seven.<|im_end|>",
    ]
    [example] = examples(conversation(LONG), TOKENIZER, "here", last_only=True)
    assert said(example) == ["No.<|im_end|>"]
    weighed = [*LONG[:2], LONG[2] | {"weight": 0}, *LONG[3:]]
    assert said(examples(conversation(weighed), TOKENIZER, "here")[0]) == ["No.<|im_end|>"]
    assert examples(conversation(LONG[:2]), TOKENIZER, "here") == []


def test_it_is_the_mask_of_transformers_where_a_template_says_generation():
    template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
        "{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
        "{%- else %}{{- m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER._core)
    want = theirs.apply_chat_template(
        LONG, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    [example] = examples(conversation(LONG), with_template(template), "here")
    assert example.ids == want["input_ids"][: len(example.ids)]
    assert [int(each) for each in example.is_trained] == want["assistant_masks"][: len(example.ids)]
    assert not any(want["assistant_masks"][len(example.ids) :])


def test_a_template_that_drops_old_reasoning_gives_an_example_for_each_answer():
    thinking = [LONG[1], LONG[2] | {"reasoning": "hm"}, LONG[3], LONG[4] | {"reasoning": "well"}]
    tokenizer = with_template(DROPS)
    found = examples(conversation(thinking), tokenizer, "here")
    assert [said(each, tokenizer) for each in found] == [
        ["hm\n</think>\nIt is so.<|im_end|>"], ["well\n</think>\nNo.<|im_end|>"]
    ]  # fmt: skip
    assert "hm" not in tokenizer.decode(found[1].ids), "as it is served"
    with pytest.raises(DataError, match=r"here, message 1: the template shows it other than as an answer.*<think>"):
        examples(conversation(PLAIN), tokenizer, "here")
    assert len(examples(conversation(thinking), tokenizer, "here", last_only=True)) == 1


def test_half_a_character_is_named_with_its_message():
    with pytest.raises(DataError, match=r"here, message 1: text has a lone surrogate"):
        examples(conversation([PLAIN[0], {"role": "assistant", "content": "\ud800"}]), TOKENIZER, "here")


def test_control_tokens_in_a_text_are_found():
    assert control_in(conversation(LONG), TOKENIZER) is None
    for at in (1, 2):
        bad = [dict(m) for m in PLAIN]
        bad[at - 1]["content"] += "<|im_end|>"
        assert control_in(conversation(bad), TOKENIZER) == "<|im_end|>"
    calls = [
        PLAIN[0],
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '"<|im_start|>"'}}]},
    ]
    assert control_in(conversation(calls), TOKENIZER) == "<|im_start|>"


# -- stores and packing


def rows_of(num, seed=0):
    rng = np.random.default_rng(seed)
    words = ["what", "is", "it", "so", "no", "really", "twice", "seven", "fourteen"]
    for n in range(num):
        turns = int(np.clip(rng.lognormal(0.5, 0.6), 1, 4))
        messages = []
        for turn in range(turns):
            text = " ".join(rng.choice(words, int(np.clip(rng.lognormal(1.5, 0.8), 1, 40))))
            messages += [{"role": "user", "content": f"{n} {turn}"}, {"role": "assistant", "content": text}]
        yield {"messages": messages}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("chats")
    TOKENIZER.save(made / "tokenizer")
    (made / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(300)))
    return made


def data_of(folder, name="a.jsonl", **more):
    return DataConfig(
        **{"train": (str(folder / name),), "format": "chats", "tokenizer": str(folder / "tokenizer"), **more}
    )


def test_all_conversations_are_there_once_and_the_room_is_full(folder, tmp_path):
    made = prepare(data_of(folder, val_fraction=0.1), TrainConfig(seq_len=256), MODEL, tmp_path)
    assert isinstance(made.train, PackedChats)
    assert made.train.fill > 0.9, "of 70 sequences"
    want = sorted(tuple(examples(Conversation.of(row, ""), TOKENIZER, "")[0].ids) for row in rows_of(300))
    found = []
    for part in (made.train, made.val):
        for at in range(part.num_sequences):
            batch = part.take(np.array([at]))
            assert batch.ids_BS.shape[1] <= 256
            for doc in batch.docs_BS.unique():
                mine = batch.docs_BS[0] == doc
                ids, targets = batch.ids_BS[0][mine].tolist(), batch.targets_BS[0][mine].tolist()
                assert targets[-1] == TOKENIZER.eos_id
                assert all(
                    target in (IGNORE, after) for target, after in zip(targets, [*ids[1:], targets[-1]], strict=True)
                )
                found.append((*ids, targets[-1]))
    assert sorted(found) == want
    assert made.val.num_sequences


def test_rows_of_a_table_are_the_same(folder, tmp_path):
    rows = list(rows_of(300))
    pq.write_table(pa.table({"messages": [json.dumps(row["messages"]) for row in rows]}), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    stores = [
        chat_stores((str(file),), data_of(folder), TOKENIZER, 0.1, 0, tmp_path / "out")[0]
        for file in (folder / "a.jsonl", tmp_path / "a.parquet", tmp_path / "b.parquet")
    ]
    assert len({store.content for store in stores}) == 1


def test_nulls_of_a_table_say_nothing_and_those_of_json_are_values(tmp_path):
    rows = [
        {"messages": [PLAIN[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {key: 1}}]}]}
        for key in "xy"
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [PLAIN[0], {
        "role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": None}}]}]}))  # fmt: skip
    told = [
        Conversation.of(row, where).chat.messages[1]["tool_calls"][0]["function"]["arguments"]
        for name in ("a.parquet", "b.jsonl")
        for where, row in rows_in(tmp_path / name)
    ]
    assert told == ['{"x": 1}', '{"y": 1}', '{"x": null}']


def test_what_is_left_out_is_counted(folder, tmp_path, caplog):
    rows = [
        {"messages": PLAIN},
        {"messages": PLAIN[:1]},
        {"messages": [PLAIN[0], PLAIN[1] | {"content": "<|im_end|>"}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store, _ = chat_stores((str(tmp_path / "a.jsonl"),), data_of(folder), TOKENIZER, 0, 0, tmp_path / "out")
    assert len(store.starts_N) == 2
    assert "1 conversations without an answer to train on" in caplog.text
    assert "1 conversations with the control token <|im_end|> as text" in caplog.text
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(DataError, match="no conversation with an answer to train on"):
        chat_stores((str(tmp_path / "b.jsonl"),), data_of(folder), TOKENIZER, 0, 0, tmp_path / "out")
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(DataError, match=r"c.txt is no file of rows; give .jsonl, .ndjson, .json, .parquet"):
        chat_stores((str(tmp_path / "c.txt"),), data_of(folder), TOKENIZER, 0, 0, tmp_path / "out")


def test_a_long_conversation_ends_after_an_answer(folder, tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": LONG}))
    store, _ = chat_stores((str(tmp_path / "a.jsonl"),), data_of(folder), TOKENIZER, 0, 0, tmp_path / "out")
    [whole] = examples(conversation(LONG), TOKENIZER, "")
    first_end = whole.ids.index(TOKENIZER.eos_id, whole.is_trained.index(True))
    for seq_len in (len(whole.ids) - 2, first_end):
        cut = PackedChats(store, seq_len, 0).take(np.array([0]))
        assert [*cut.ids_BS[0].tolist(), TOKENIZER.eos_id] == whole.ids[: first_end + 1]
        assert cut.targets_BS[0, -1] == TOKENIZER.eos_id
        assert (
            f"1 of 1 conversations are longer than train.seq_len {seq_len} and end after an earlier answer; 0"
            in caplog.text
        )
    assert PackedChats(store, len(whole.ids) - 1, 0).take(np.array([0])).ids_BS.shape[1] == len(whole.ids) - 1
    short = PackedChats(store, first_end - 1, 0)
    assert not short.num_sequences
    with pytest.raises(DataError, match=f"no conversation has an answer within train.seq_len {first_end - 1}"):
        short.require_text()


def test_chats_need_a_template(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"chats need the tokenizer.*train.init_from or data.tokenizer"):
        prepare(data_of(folder, tokenizer=None), TrainConfig(), MODEL, tmp_path)
    bare = Tokenizer(TOKENIZER._core, {}, None)
    bare.save(tmp_path / "bare")
    with pytest.raises(DataError, match="this model has no chat template"):
        prepare(data_of(folder, tokenizer=str(tmp_path / "bare")), TrainConfig(), MODEL, tmp_path)


def trainer_of(folder, out_dir, micro):
    train = {"seq_len": 256, "global_batch_size": 4, "micro_batch_size": micro, "steps": 4, "out_dir": str(out_dir)}
    tree = {"model": {"preset": "tiny", **SMALL, "vocab_size": 400}, "data": data_of(folder).model_dump(mode="json")}
    config = Config.from_tree({**tree, "train": train, "optim": {"balance_loss": 0.1, "warmup_steps": 1}})
    pool = local_pool(config.model, Load(), num_shards=2, optim=config.optim, backend="torch")
    trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, out_dir), Alone())
    trainer.start()
    return trainer


def test_sequences_side_by_side_are_the_same_step(folder, tmp_path):
    found = []
    for micro in (1, 2, 4):
        metrics = trainer_of(folder, tmp_path / str(micro), micro).step()
        found.append([metrics.loss, metrics.balance_loss, metrics.grad_norm])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_packed_conversations_have_the_loss_that_they_have_alone(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, micro=2)
    trainer.dispatcher.use(0)
    nll, num = 0.0, 0
    for at in trainer.data.train.sequences(Sequences.nth(0, 4)):
        batch = trainer.data.train.take(np.array([at]))
        for doc in batch.docs_BS.unique():
            mine = batch.docs_BS[0] == doc
            ids = torch.cat([batch.ids_BS[0][mine], batch.targets_BS[0][mine][-1:]])[None]
            kept = batch.targets_BS[:, mine] != IGNORE
            nll -= token_logprobs(trainer.model, ids)[kept].sum().item()
            num += int(kept.sum())
    want = sum(
        trainer.data.train.take(np.array([at])).ids_BS.numel()
        for at in trainer.data.train.sequences(Sequences.nth(0, 4))
    )
    metrics = trainer.step()
    assert metrics.loss == pytest.approx(nll / num, rel=1e-6)
    assert metrics.tokens == want < 4 * 256
