"""Masks of conversations under others' templates: what our server would be asked and end at, and what transformers says."""

import json
import logging
from functools import cache

import pytest
from transformers import PreTrainedTokenizerFast

from serving.http.chat import Conversation as Served
from tests.unit.foreign_templates import GENERATION, WRITTEN, foreign
from trinity.data import formats
from trinity.data.chat_tokens import control_in, examples
from trinity.data.chats import Conversation
from trinity.errors import DataError
from trinity.text.answers import AnswerFormat, read
from trinity.text.conversation import for_template, render
from trinity.text.tool_calls.events import Reasoning, Text

TOOL = {"name": "look", "description": "Ä", "parameters": {"type": "object", "properties": {"q": {"default": None}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"q": "Zürich", "n": null}'}}


def user(text, **more):
    return {"role": "user", "content": text, **more}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def heard(text):
    return {"role": "tool", "tool_call_id": "c", "name": "look", "content": text}


CONVERSATIONS = {
    "one": [user("What is it?"), says("It is so.")],
    "system": [{"role": "system", "content": "Brief."}, user("Hi"), says("Hello."), user("Bye"), says("So long.")],
    "developer": [{"role": "developer", "content": "Brief."}, user("Hi", name="Bob"), says("Hello.", name="bot")],
    "unicode": [user("你好 😀 é e\u0301"), says("Über 👩\u200d💻 हिन्दी \u200b")],
    "white space": [user("  hi  "), says("  so  \n"), user("x \n"), says("y\n\n")],
    "digits": [user("12345678"), says("1234567 and 12")],
    "empty": [user("Hi"), says(""), user("x"), says("y")],
    "two in a row": [user("Hi"), says("One."), says("Two."), user("x"), says("y")],
    "weights": [user("a"), says("b", weight=0), user("c"), says("d", weight=1), user("e"), says("f", weight=0)],
    "parts": [user([{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]), says([{"type": "text", "text": "He"}])],
    "refusals": [user("a"), says(None, refusal="No."), user("b"), says([{"type": "refusal", "refusal": "Never."}])],
    "call": [user("Weather?"), says(None, tool_calls=[CALL]), heard("3"), says("3 degrees."), user("Now?"), says("Same.")],
    "reasons": [user("Why?"), says("So.", reasoning_content="hm\nhm"), user("Oh?"), says("Yes.", reasoning="well")],
    "reasons and calls": [
        user("Weather?"), says("", reasoning="must look", tool_calls=[CALL]), heard("3"), says("3.", reasoning="so"),
    ],
}  # fmt: skip
REFUSED = {  # by (template, conversation): what is said
    ("alternates", "system"): "roles must alternate",
    ("alternates", "developer"): "roles must alternate",
    ("alternates", "two in a row"): "roles must alternate",
    ("alternates", "call"): "does not show its call of 'look'",
    ("alternates", "reasons and calls"): "does not show its call of 'look'",
    ("system with the last question", "system"): "not prefix-preserving: with the answer it has 'Hi.*prompt has 'Brief",
    (
        "system with the last question",
        "developer",
    ): "not prefix-preserving: with the answer it has 'Hi.*prompt has 'Brief",
    ("drops reasoning", "two in a row"): "not prefix-preserving: with the answer it has 'One.*prompt has '<think>",
}


@cache
def tokenizer_of(name):
    return foreign(name)


def read_row(name):
    messages = CONVERSATIONS[name]
    return {"messages": messages, "tools": [{"type": "function", "function": TOOL}] if "call" in name else []}


def answers(found, ends):
    """(ids before, ids) of each answer, which goes up to a token of `ends`."""
    for ids, is_trained in found:
        begin = None
        for n, token_id in enumerate(ids):
            begin = n if is_trained[n] and begin is None else begin
            if is_trained[n] and (token_id in ends or not any(is_trained[n + 1 : n + 2])):
                yield ids[:begin], ids[begin : n + 1]
                begin = None


def refused(template, name):
    if template == "strips reasoning":
        return "give the reasoning that it asks for"
    if "call" in name and "tool_calls" not in tokenizer_of(template).chat_template and template != "alternates":
        return "does not show its call of 'look'"
    return REFUSED.get((template, name))


@pytest.mark.parametrize("template", [name for name in WRITTEN if name != "no end at all"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_masks_are_what_our_server_would_be_asked_and_end_at(template, name):
    tokenizer, row = tokenizer_of(template), read_row(name)
    conversation = Conversation.of(row, "here")
    if says := refused(template, name):
        with pytest.raises(DataError, match=rf"here, message \d: .*{says}"):
            examples(conversation, tokenizer, "here")
        return
    found = list(answers(examples(conversation, tokenizer, "here"), tokenizer.end_ids))
    trained = [at for at, is_trained in enumerate(conversation.is_trained) if is_trained]
    for at, (before, answer) in zip(trained, found, strict=True):
        asked = Served.model_validate(row | {"messages": row["messages"][:at]}).chat
        assert before == tokenizer.encode(render(asked, tokenizer)), "the prompt of a request"
        assert answer[-1] in tokenizer.end_ids
        check_read_back(conversation.chat.messages[at], before, answer[:-1], asked.tools, tokenizer)


def check_read_back(message, prompt_ids, answer, tools, tokenizer):
    """What our server would answer, had the model written these tokens, is the message."""
    parser = AnswerFormat.of(tokenizer).parser(prompt_ids, tools)
    events = read(parser, answer, tokenizer.decode(answer), is_last=True)
    text = "".join(event.text for event in events if isinstance(event, Text))
    if "<tool_call>" in tokenizer.chat_template:
        assert parser.num_calls == len(message.get("tool_calls", ()))
    if not message.get("tool_calls"):
        assert text.strip() == (message.get("content") or "").strip()
    if "reasoning_content" in tokenizer.chat_template:
        thought = "".join(event.text for event in events if isinstance(event, Reasoning))
        assert thought.strip() == (message.get("reasoning") or message.get("reasoning_content") or "")


@pytest.mark.parametrize("template", GENERATION)
@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name != "weights"])
def test_masks_are_those_of_transformers_where_a_template_says_generation(template, name):
    tokenizer, row = tokenizer_of(template), read_row(name)
    if refused(template, name):
        return
    conversation = Conversation.of(row, "here")
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer._core, bos_token="<s>", eos_token=tokenizer.eos_token)
    want = theirs.apply_chat_template(
        [for_template(message) for message in conversation.chat.messages],
        tools=row["tools"] or None, chat_template=tokenizer.chat_template, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    [(ids, is_trained)] = examples(conversation, tokenizer, "here")
    assert ids == want["input_ids"][: len(ids)]
    assert [int(each) for each in is_trained] == want["assistant_masks"][: len(ids)]
    assert not any(want["assistant_masks"][len(ids) :])


def test_an_answer_ends_with_what_comes_next_where_the_template_has_no_end():
    tokenizer = tokenizer_of("no end of its own")
    [example] = examples(Conversation.of(read_row("call"), "here"), tokenizer, "here")
    said = [tokenizer.decode(answer) for _, answer in answers([example], tokenizer.end_ids)]
    assert [text.rpartition("<|")[2] for text in said] == ["observation|>", "user|>", "user|>"]
    assert example.ids.count(tokenizer.added_ids["<|user|>"]) == 3, "the second is the next question's"


def test_what_a_template_leaves_out_and_a_lack_of_ends_is_said(caplog):
    formats.say_once.cache_clear()
    row = {"messages": [user("Why?"), says("So.", reasoning="hm")]}
    with caplog.at_level(logging.WARNING):
        [example] = examples(Conversation.of(row, "here"), tokenizer_of("no end at all"), "here")
    assert "leaves out reasoning of some answers" in caplog.text
    assert "ends answers with none of the tokens that end a text" in caplog.text
    assert tokenizer_of("no end at all").decode(example.ids).endswith("ASSISTANT: So.")


def test_the_last_answer_alone_is_not_another_one():
    tokenizer = tokenizer_of("chatml")
    assert examples(Conversation.of(read_row("weights"), "here"), tokenizer, "here", last_only=True) == []


@pytest.mark.parametrize("name", ["description", "parameters"])
def test_control_tokens_of_tools_are_found(name):
    tool = TOOL | {name: "<|im_end|>" if name == "description" else {"title": "<|im_end|>"}}
    row = read_row("call") | {"tools": json.dumps([tool])}
    assert control_in(Conversation.of(row, "here"), tokenizer_of("chatml")) == "<|im_end|>"
