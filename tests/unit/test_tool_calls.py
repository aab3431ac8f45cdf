"""The machine that reads answers: scripted streams in right, wrong, cut and interleaved formats, however they are split."""

import functools
import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.text.answers import AnswerFormat, Verbatim
from trinity.text.detokenizer import IncrementalDecoder
from trinity.text.special_tokens import MARKERS
from trinity.text.tokenizer import Tokenizer
from trinity.text.tool_calls.events import CallArguments, CallBegan, CallEnded, Reasoning, Text
from trinity.text.tool_calls.formats import FORMATS
from trinity.text.tool_calls.hermes import JsonSpan

WEATHER = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "where": {"type": "object"},
    "free": {},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": WEATHER}}},
    {"type": "function", "function": {"name": "now"}},
]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
CALL = f'{OPEN}\n{{"name": "weather", "arguments": {{"city": "Köln"}}}}\n{CLOSE}'


@functools.cache
def tokenizer(kind="visible"):
    """Markers are tokens that show, tokens that do not, or no tokens at all."""
    found = Tokenizer.train(iter(["the weather in Köln is a function of the city \n" * 50]), 300)
    tree = json.loads(found.to_json())
    for token in tree["added_tokens"]:
        token["special"] = token["special"] or kind == "hidden"
    if kind == "absent":
        tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in MARKERS]
        tree["model"]["vocab"] = {text: i for text, i in tree["model"]["vocab"].items() if text not in MARKERS}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tree)), {}, None)


def steps(kind, text, sizes=(1,), lag=0):
    """Token ids in steps of these sizes, each with its text; an engine that looks for stop strings is some steps late."""
    own = tokenizer(kind)
    ids, decoder = own.encode(text), IncrementalDecoder(own, skip_special=True)
    texts, sizes, late = [], itertools.cycle(sizes), [""] * lag
    while ids:
        size = next(sizes)
        now, ids = ids[:size], ids[size:]
        late.append("".join(map(decoder.push, now)) + (decoder.flush() if not ids else ""))
        texts.append((now, late.pop(0) if ids else "".join(late)))
    return texts


def read(text, tool_format="hermes", kind="visible", prompt="", sizes=(1,), lag=0, most_calls=None, cut=None):
    """Events, neighbours of a kind joined, with the number of tokens in place of identities."""
    own = AnswerFormat.of(tokenizer(kind), tool_format, "think")
    parser = own.parser(tokenizer(kind).encode(prompt), TOOLS, most_calls)
    found = []
    for ids, shown in steps(kind, text, sizes, lag)[:cut]:
        found += parser.push(ids, shown)
    return joined(found + parser.finish())


def joined(events):
    told = []
    for event in events:
        match event:
            case Text(text) | Reasoning(text):
                key, value = (type(event).__name__.lower(),), text
            case CallBegan(index, _, name):
                key, value = ("call", index), f"{name}:"
            case CallArguments(index, piece):
                key, value = ("call", index), piece
            case CallEnded(index):
                key, value = ("call", index), "."
        if told and told[-1][0] == key:
            told[-1] = (key, told[-1][1] + value)
        else:
            told.append((key, value))
    return [(*key, value) for key, value in told]


def xml(name, **values):
    given = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"{OPEN}\n<function={name}>\n{given}</function>\n{CLOSE}"


def glm(name, **values):
    given = "".join(f"\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>" for key, value in values.items())
    return f"{OPEN}{name}{given}\n{CLOSE}"


HERMES = {  # what a model writes -> what comes out
    "text alone": (" Hello \n", [("text", " Hello \n")]),
    "a call": (CALL, [("call", 0, 'weather:{"city": "Köln"}.')]),
    "text, a call": (f"I look.\n\n{CALL}\n", [("text", "I look."), ("call", 0, 'weather:{"city": "Köln"}.')]),
    "two calls": (f"{CALL}\n{CALL}", [("call", i, 'weather:{"city": "Köln"}.') for i in range(2)]),
    "two in a block": (
        f'{OPEN}{{"name":"now","arguments":{{}}}}\n{{"name":"weather","arguments":{{"days":2}}}}{CLOSE}',
        [("call", 0, "now:{}."), ("call", 1, 'weather:{"days":2}.')],
    ),
    "text after a call": (f"{CALL}\nDone.", [("call", 0, 'weather:{"city": "Köln"}.'), ("text", "Done.")]),
    "arguments first": (
        f'{OPEN}{{"arguments": {{"days": 1}}, "name": "weather"}}{CLOSE} so',
        [("call", 0, 'weather:{"days": 1}.'), ("text", "so")],
    ),
    "arguments as a text": (
        f'{OPEN}{{"name": "weather", "arguments": "{{\\"days\\": 1}}"}}{CLOSE}',
        [("call", 0, 'weather:{"days": 1}.')],
    ),
    "no arguments": (f'{OPEN}{{"name": "now"}}{CLOSE}', [("call", 0, "now:{}.")]),
    "arguments null": (f'{OPEN}{{"name": "now", "arguments": null}}{CLOSE}', [("call", 0, "now:{}.")]),
    "parameters": (f'{OPEN}{{"name": "now", "parameters": {{"a": 1}}}}{CLOSE}', [("call", 0, 'now:{"a": 1}.')]),
    "brackets in a text": (
        f'{OPEN}{{"name": "now", "arguments": {{"a": "}}]\\"}}"}}}}{CLOSE}',
        [("call", 0, 'now:{"a": "}]\\"}"}.')],
    ),
    "more fields": (f'{OPEN}{{"name": "now", "arguments": {{}}, "id": 3}}{CLOSE}', [("call", 0, "now:{}.")]),
    "a bracket missing": (f'{OPEN}{{"name": "now", "arguments": {{"a": 1}}{CLOSE}', [("call", 0, 'now:{"a": 1}.')]),
    "no end": ('<tool_call>{"name": "now", "arguments": {"a": 1}}', [("call", 0, 'now:{"a": 1}.')]),
    "cut in the arguments": ('<tool_call>{"name": "now", "arguments": {"a": "b', [("call", 0, 'now:{"a": "b.')]),
    "cut in the name": ('Hm.\n<tool_call>\n{"name": "no', [("text", 'Hm.\n<tool_call>\n{"name": "no')]),
    "words in a block": (f"a {OPEN} words {CLOSE} b", [("text", f"a {OPEN} words {CLOSE} b")]),
    "JSON, but no call": (f'{OPEN}{{"a": 1}}{CLOSE}', [("text", f'{OPEN}{{"a": 1}}{CLOSE}')]),
    "no JSON": (f"{OPEN}{{name: now}}{CLOSE}", [("text", f"{OPEN}{{name: now}}{CLOSE}")]),
    "a name that is a number": (f'{OPEN}{{"name": 1}}{CLOSE}', [("text", f'{OPEN}{{"name": 1}}{CLOSE}')]),
    "an empty block": (f"a {OPEN}{CLOSE} b", [("text", f"a {OPEN}{CLOSE} b")]),
    "depth": (f"{OPEN}{'{' * 9999}{CLOSE}", [("text", f"{OPEN}{'{' * 9999}{CLOSE}")]),
    "words after a call in its block": (
        f'{OPEN}{{"name": "now", "arguments": {{}}}} and so{CLOSE} on',
        [("call", 0, "now:{}."), ("text", "and so on")],
    ),
    "a block in a block": (f"{OPEN}{CALL}", [("text", OPEN), ("call", 0, 'weather:{"city": "Köln"}.')]),
    "a call that nobody ended": (
        f'{OPEN}{{"name": "now", "arguments": {{{CALL}',
        [("call", 0, "now:{."), ("call", 1, 'weather:{"city": "Köln"}.')],
    ),
    "an end alone": (f"a {CLOSE} b", [("text", f"a {CLOSE} b")]),
    "reasoning": ("<think>\nWell.\n</think>\n\nYes.", [("reasoning", "Well."), ("text", "Yes.")]),
    "reasoning, a call": (
        f"<think>Well.</think>\n{CALL}",
        [("reasoning", "Well."), ("call", 0, 'weather:{"city": "Köln"}.')],
    ),
    "a call in reasoning ends it": (
        f"<think>Well.\n{CALL}\n</think>Yes.",
        [("reasoning", "Well."), ("call", 0, 'weather:{"city": "Köln"}.'), ("text", "Yes.")],
    ),
    "no call in reasoning": (
        f"<think>As {OPEN} says {CLOSE} so</think>Yes.",
        [("reasoning", f"As {OPEN} says {CLOSE} so"), ("text", "Yes.")],
    ),
    "reasoning that is cut": ("<think>Well", [("reasoning", "Well")]),
    "reasoning between": (
        "a<think>b</think>c<think>d</think>e",
        [("text", "a"), ("reasoning", "b"), ("text", "c"), ("reasoning", "d"), ("text", "e")],
    ),
    "an end of no reasoning": ("a</think>b", [("text", "a</think>b")]),
}


@pytest.mark.parametrize("name", HERMES)
@pytest.mark.parametrize(("sizes", "lag"), [((1,), 0), ((1,), 3), ((1000,), 0), ((2, 3, 5), 1)])
def test_hermes(name, sizes, lag):
    written, wanted = HERMES[name]
    assert read(written, sizes=sizes, lag=lag) == wanted
    assert read(written, kind="absent", sizes=sizes, lag=lag) == wanted


@pytest.mark.parametrize(
    "name", ["a call", "two calls", "text, a call", "reasoning, a call", "a call in reasoning ends it"]
)
def test_markers_that_are_not_shown(name):
    written, wanted = HERMES[name]
    assert read(written, kind="hidden") == read(written, kind="hidden", sizes=(7,), lag=2) == wanted


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"city": "Köln"}, {"city": "Köln"}),
        ({"city": ' "a"\\n\n\nb\t'}, {"city": ' "a"\\n\n\nb\t'}),
        ({"city": "7"}, {"city": "7"}),
        ({"city": ""}, {"city": ""}),
        ({"days": "7"}, {"days": 7}),
        ({"days": "seven"}, {"days": "seven"}),
        ({"days": "NaN"}, {"days": "NaN"}),
        ({"unit": "null"}, {"unit": None}),
        ({"unit": "nullable"}, {"unit": "nullable"}),
        ({"unit": "nu"}, {"unit": "nu"}),
        ({"where": '{"a": [1, "x"]}'}, {"where": {"a": [1, "x"]}}),
        ({"where": "None"}, {"where": None}),
        ({"free": "12"}, {"free": "12"}),
        ({"free": "[1, 2"}, {"free": "[1, 2"}),
        ({"free": "[1, 2]"}, {"free": [1, 2]}),
        (
            {"unknown": "word", "days": "1", "city": "<b>&amp;</b>"},
            {"unknown": "word", "days": 1, "city": "<b>&amp;</b>"},
        ),
        ({}, {}),
    ],
)
@pytest.mark.parametrize(("tool_format", "write"), [("qwen3_coder", xml), ("glm", glm)])
def test_values_of_tags_are_typed_by_the_schema(tool_format, write, values, wanted):
    for sizes, lag in (((1,), 0), ((1,), 2), ((1000,), 0), ((3, 2), 0)):
        [(_, _, told)] = read(f"\n{write('weather', **values)}\n", tool_format, sizes=sizes, lag=lag)
        assert told[:8] == "weather:"
        assert json.loads(told[8:-1]) == wanted


TAGS = {
    "text before": ("qwen3_coder", f"I look.\n{xml('now')}", [("text", "I look."), ("call", 0, "now:{}.")]),
    "two": ("qwen3_coder", xml("now") + xml("now"), [("call", 0, "now:{}."), ("call", 1, "now:{}.")]),
    "two in a block": (
        "qwen3_coder",
        f"{OPEN}<function=now></function>\n<function=now></function>{CLOSE}",
        [("call", 0, "now:{}."), ("call", 1, "now:{}.")],
    ),
    "tags in a value": (
        "qwen3_coder",
        xml("weather", city="<function=x><parameter=y>z</function>"),
        [("call", 0, 'weather:{"city": "<function=x><parameter=y>z</function>"}.')],
    ),
    "no end of the function": (
        "qwen3_coder",
        f"{OPEN}<function=weather><parameter=city>a</parameter>{CLOSE}",
        [("call", 0, 'weather:{"city": "a"}.')],
    ),
    "cut in a value": (
        "qwen3_coder",
        f"{OPEN}<function=weather><parameter=city>rm -r /tmp",
        [("call", 0, 'weather:{"city": "rm -r /tmp.')],
    ),
    "cut in the name": ("qwen3_coder", f"{OPEN}<function=wea", [("text", f"{OPEN}<function=wea")]),
    "a block without": ("qwen3_coder", f"{OPEN}a{CLOSE}b", [("text", f"{OPEN}a{CLOSE}b")]),
    "JSON in it": ("qwen3_coder", CALL, [("text", CALL)]),
    "tags outside": ("qwen3_coder", "a <function=b> c", [("text", "a <function=b> c")]),
    "words within": (
        "qwen3_coder",
        f"{OPEN}<function=now> hm </function>{CLOSE}",
        [("call", 0, "now:{}."), ("text", "hm")],
    ),
    "GLM, no arguments": ("glm", f"a{glm('now')}", [("text", "a"), ("call", 0, "now:{}.")]),
    "GLM, a name that nobody gave": ("glm", f"{OPEN}later{CLOSE}", [("text", f"{OPEN}later{CLOSE}")]),
    "GLM, words": ("glm", f"{OPEN}now\nthen", [("text", f"{OPEN}now\nthen")]),
    "GLM, cut": ("glm", glm("weather", city="a").partition("</arg_v")[0], [("call", 0, 'weather:{"city": "a.')]),
}


@pytest.mark.parametrize("name", TAGS)
def test_tags(name):
    tool_format, written, wanted = TAGS[name]
    for sizes in ((1,), (1000,), (3, 2)):
        for kind in ("visible", "absent"):
            assert read(written, tool_format, kind=kind, sizes=sizes) == wanted, (sizes, kind)


@pytest.mark.parametrize(
    ("prompt", "is_inside"),
    [
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>half a thou", True),
        ("", False),
    ],
)
@pytest.mark.parametrize("kind", ["visible", "hidden", "absent"])
def test_an_answer_starts_inside_reasoning_if_its_prompt_ends_there(kind, prompt, is_inside):
    told = read("ght</think>Yes.", kind=kind, prompt=prompt)
    assert (told[0] == ("reasoning", "ght")) == is_inside
    assert told[-1][1].endswith("Yes.")


def test_tokens_of_reasoning_are_counted():
    own = AnswerFormat.of(tokenizer(), "hermes", "think")
    for sizes in ((1,), (4,)):
        parser = own.parser(tokenizer().encode("<think>"))
        for ids, shown in steps("visible", "the weather</think>is a function<think>of</think>", sizes):
            parser.push(ids, shown)
        parser.finish()
        thoughts = [len(tokenizer().encode(text)) for text in ("the weather", "of")]
        assert parser.num_reasoning_tokens == sum(thoughts)


def test_only_the_first_calls_count():
    assert read(f"a{CALL}{CALL}b", most_calls=1) == [
        ("text", "a"),
        ("call", 0, 'weather:{"city": "Köln"}.'),
        ("text", "b"),
    ]


def test_arguments_flow():
    """A text of thousands of tokens comes a token at a time, in each format."""
    long = "the weather is a function " * 200
    for tool_format, written in (
        ("hermes", f'{OPEN}{{"name": "weather", "arguments": {{"city": "{long}"}}}}{CLOSE}'),
        ("qwen3_coder", xml("weather", city=long)),
        ("glm", glm("weather", city=long)),
    ):
        parser = AnswerFormat.of(tokenizer(), tool_format, "none").parser([], TOOLS)
        pieces = [parser.push(ids, shown) for ids, shown in steps("visible", written)]
        sizes = [len(event.piece) for events in pieces for event in events if isinstance(event, CallArguments)]
        assert sum(sizes) >= len(long)
        assert max(sizes) < 30, tool_format


@pytest.mark.parametrize("stop", ["the", "x</tool", "\n</tool_call>", "</think>", "Kö"])
@pytest.mark.parametrize("lag", [0, 1, 4])
def test_what_an_engine_cuts_off_is_not_shown(stop, lag):
    """Its text ends before the stop string, wherever in a token that is."""
    written = f"<think>of Köln</think>is the weather {CALL}"
    shown = written.partition(stop)[0]
    parser = AnswerFormat.of(tokenizer(), "hermes", "think").parser([], TOOLS)
    found, room = [], len(shown)
    for ids, text in steps("visible", written, lag=lag):
        found += parser.push(ids, text[:room])
        room -= len(text[:room])
    told = joined(found + parser.finish())
    whole = "".join(value for *_, value in told)
    assert stop not in whole
    if stop == "\n</tool_call>":
        assert told == [("reasoning", "of Köln"), ("text", "is the weather"), ("call", 0, 'weather:{"city": "Köln"}.')]
    if stop == "the":
        assert told == [("reasoning", "of Köln"), ("text", "is ")]


FRAGMENTS = [
    *(OPEN, CLOSE, "<think>", "</think>", " ", "\n", "a", "ß", "🦊", "{", "}", '"', "[1]", "null"),
    *("<|im_end|>", "<|im_start|>"),
    *('{"name": "now", "arguments": ', '{"a": "b"}', '{"name": "weather"', CALL, xml("now"), xml("weather", city="x\n")),
    *("<function=now>", "<parameter=city>", "</parameter>", "</function>", "<function=", "now", "<arg_key>", "</arg_key>"),
    *("<arg_value>", "</arg_value>", glm("weather", city="x", days="3")),
]  # fmt: skip
written = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)
KINDS = st.sampled_from(["visible", "hidden", "absent"])
NAMES = st.sampled_from([each.name for each in FORMATS])


@settings(deadline=None)
@given(
    written, NAMES, KINDS, st.lists(st.integers(1, 9), min_size=1), st.integers(0, 3), st.sampled_from(["", "<think>"])
)
def test_any_split_of_the_tokens_gives_the_same_events(text, name, kind, sizes, lag, prompt):
    one_by_one = read(text, name, kind, prompt)
    assert read(text, name, kind, prompt, sizes=sizes, lag=lag) == one_by_one
    assert read(text, name, kind, prompt, sizes=(10_000,)) == one_by_one


@settings(deadline=None)
@given(written, NAMES, KINDS)
def test_nothing_is_lost_where_there_is_no_call(text, name, kind):
    told = read(text, name, kind)
    if any(each[0] == "call" for each in told):
        return
    shown = "".join(shown for _, shown in steps(kind, text))
    assert bare("".join(value for _, value in told)) == bare(shown)


def bare(text):
    """Without white space and the markers that reasoning is told by."""
    return "".join(text.replace("<think>", "").replace("</think>", "").split())


@settings(deadline=None)
@given(written, NAMES)
def test_calls_are_numbered_and_end(text, name):
    parser = AnswerFormat.of(tokenizer(), name, "think").parser([], TOOLS)
    events = [event for ids, shown in steps("visible", text) for event in parser.push(ids, shown)] + parser.finish()
    calls = [event for event in events if isinstance(event, CallBegan)]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls) == parser.num_calls
    assert all(call.id.removeprefix("call_").isalnum() and len(call.id) >= 24 for call in calls)
    assert [event.index for event in events if isinstance(event, CallEnded)] == list(range(len(calls)))


@settings(deadline=None)
@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_an_objects_end_is_found(value):
    text = json.dumps({"a": value}, ensure_ascii=False)
    assert JsonSpan().end(text + " rest") == len(text)
    assert JsonSpan().end(text[:-1]) is None


@pytest.mark.parametrize(
    ("template", "tools", "reasons"),
    [
        ("{% if tools %}# Tools <tool_call>{% endif %}", "hermes", False),
        ("{{ tools }}<tool_call><function=x><parameter=y>", "qwen3_coder", False),
        ("{{ tools }}<tool_call>x<arg_key>", "glm", False),
        ("{{ messages }}<think>", None, True),
        ("{{ messages }}", None, False),
        (None, None, False),
    ],
)
def test_a_checkpoints_format_is_told_by_its_template(template, tools, reasons):
    own = Tokenizer(tokenizer()._core, {}, template)
    found = AnswerFormat.of(own)
    assert (found.tools and found.tools.name, found.reasons) == (tools, reasons)
    assert AnswerFormat.of(own, "glm", "none").tools.name == "glm"
    assert AnswerFormat.of(own, "none", "none").tools is None
    assert isinstance(AnswerFormat.of(own, "none", "none").parser([]), Verbatim)
