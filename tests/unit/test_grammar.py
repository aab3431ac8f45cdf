"""Constraints by themselves: what they accept, what is refused, and that masks and advances agree."""

import json
import time

import numpy as np
import pytest

from tests.unit.grammar_cases import VOCAB, tokenizer, vocabulary
from trinity.text.grammar.admission import CPU_S, admit
from trinity.text.grammar.compiler import grammar, mask_V, matcher
from trinity.text.grammar.constraint import Constraint
from trinity.text.grammar.progress import Progress, reasoning_end
from trinity.text.grammar.schemas import MAX_DEPTH, MAX_ENUM, MAX_NODES, bounded
from trinity.text.grammar.tools import tools_constraint
from trinity.text.grammar.vocabulary import Vocabulary

OWN = tokenizer()
WORDS = vocabulary(OWN)


def accepts(constraint, text, words=WORDS):
    """Whether the whole text is an answer, by any tokens: each must be in the mask, and the end must be."""
    at = Progress(matcher(grammar(constraint, words), words), words)
    for token_id in OWN.encode(text):
        allowed_V = at.allowed_V()
        if at.is_complete or allowed_V is None or not allowed_V[token_id]:
            return False
        at.take(token_id)
    return at.is_complete or bool(at.allowed_V()[OWN.eos_id])


def of(**tree):
    return Constraint.of(tree)


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (of(regex="[a-c]{2,3}x?"), ["ab", "abc", "ccx"], ["a", "abcd", "abx "]),
        (of(choice=["yes", "yes please", 'a "q"\nline', "naïve 🙂"]), ["yes", "yes please", 'a "q"\nline', "naïve 🙂"],
         ["ye", "yes ", "no"]),
        (of(grammar='start: "(" start ")" | "x"'), ["x", "((x))"], ["((x)", "()"]),
        (of(json_object=True), ["{}", '{"a": [1, {"b": null}], "c": -2.5}'], ["[]", '{"a": 1', '"a"']),
        (of(json={"type": "object", "properties": {"a": {}}}), ['{"a": 1, "b": 2}'], ['{a: 1}']),
        (of(json={"properties": {"a": {}}, "type": "object"}, disable_additional_properties=True), ["{}", '{"a": "x"}'],
         ['{"b": 2}']),
        (of(json={"type": "array"}, disable_any_whitespace=True), ["[1,2]"], ["[1, 2]", "[1,2] "]),
        (of(json={"type": "array"}), ["[1,2]", "[\n    1,\n    2\n]"], ["[" + "\n" * 20 + "1]"]),
        (of(json={"type": "array"}, whitespace_pattern=" ?"), ["[1, 2]"], ["[\n1]"]),
        (of(json={"type": "integer"}), ["0", "-7", "9" * 18], ["9" * 20, "1.5"]),
        (of(json={"type": "number"}), ["2.5", "-0.0000000001"], ["1" * 30, "0." + "3" * 30]),
        (of(json={"type": "integer", "minimum": 0, "maximum": 2**64 - 1}), ["0", "9" * 18], ["-1", "9" * 19]),
        (of(json={"type": "integer", "minimum": -(2**63), "exclusiveMaximum": 2**63}), ["-" + "9" * 18], ["9" * 19]),
        (of(json={"type": "number", "exclusiveMinimum": 0}), ["0.5", "7"], ["0", "-1", "0." + "3" * 30]),
        (of(json='{"type": "null"}'), ["null"], ["nul"]),
    ],
)  # fmt: skip
def test_what_is_an_answer(constraint, good, bad):
    assert [text for text in good if not accepts(constraint, text)] == []
    assert [text for text in bad if accepts(constraint, text)] == []
    assert Constraint.of(constraint.tree()) == constraint


def test_any_tokens_of_the_text_will_do():
    """Where only one text can follow, the model may still write it in the tokens it likes."""
    at = matcher(grammar(of(choice=["the quick brown fox"]), WORDS), WORDS)
    mask = mask_V(at, VOCAB)
    assert mask.sum() > 1
    assert all(b"the quick brown fox".startswith(WORDS.tokens[i]) for i in np.flatnonzero(mask))


def test_padding_and_markers_are_in_no_text():
    mask = mask_V(matcher(grammar(of(regex=r"(.|\n)*"), WORDS), WORDS), VOCAB)
    assert not mask[OWN.vocab_size :].any()
    assert set(np.flatnonzero(mask[sorted(OWN.added_ids.values())])) == {
        sorted(OWN.added_ids.values()).index(OWN.eos_id)
    }


def test_a_vocabulary_survives_its_journey():
    assert Vocabulary.unpacked(WORDS.packed) == WORDS
    assert Vocabulary.unpacked(WORDS.packed).digest == WORDS.digest
    assert len(WORDS.tokens) == VOCAB


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({}, "0 constraints"),
        ({"regex": "a", "json": {}}, "2 constraints"),
        ({"jsn": {}}, "'jsn' is unknown"),
        ({"json": 5}, "is a int"),
        ({"json": "{"}, "no JSON Schema"),
        ({"json": {"const": float("inf")}}, "not JSON compliant"),
        ({"json": {"enum": ["x" * 70_000]}}, "70,0.. bytes, at most 65,536"),
        ({"regex": ""}, "not empty"),
        ({"choice": "a"}, "list of 1 to 1000"),
        ({"choice": ["a"] * 1001}, "list of 1 to 1000"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"json_object": False}, "only be true"),
        ({"json_object": True, "whitespace_pattern": "x" * 257}, "at most 256"),
        ({"json_object": True, "disable_any_whitespace": 1}, "true or false"),
    ],
)
def test_what_is_no_constraint(tree, why):
    with pytest.raises(ValueError, match=why):
        Constraint.of(tree)


def test_schemas_are_counted():
    deep = {"type": "null"}
    for _ in range(MAX_DEPTH):
        deep = {"type": "array", "items": deep}
    for schema, why in (
        (deep, f"over {MAX_DEPTH} levels"),
        ({"anyOf": [{"const": 1}] * MAX_NODES}, "over 5,000 parts"),
        ({"enum": list(range(MAX_ENUM + 1))}, "over 10,000 values"),
        ({"type": "integer", "multipleOf": 99991}, "multipleOf is 99991, at most 10,000"),
        ({"type": "number", "minimum": 2e18}, "minimum is 2e"),
        ({"type": "integer", "maximum": -(10**19)}, "maximum is -1000"),
        ({"type": "integer", "minimum": 10**400}, "minimum is 1000"),
    ):
        with pytest.raises(ValueError, match=why):
            bounded(schema)


ALL_OF = {"allOf": [{"oneOf": [{"properties": {f"p{i}{j}": {"const": j}}} for j in range(4)]} for i in range(10)]}
BOMBS = {
    "a loop of references": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    "a reference to elsewhere": {"json": {"$ref": "http://example.org/schema"}},
    "nested repetition": {"regex": r"(\w{1,1000}){1,1000}"},
    "an open group": {"regex": "(a"},
    "look-ahead": {"regex": "(?=a)a"},
    "nothing matches": {"regex": r"[^\s\S]"},
    "a product of alternatives": {"json": ALL_OF},
    "an automaton of 99,991 states": {"json": {"type": "integer", "multipleOf": 99991}},
    "an intersection": {"grammar": "start: A\nA: " + " & ".join(f"/(.|\\n)*{c}(.|\\n)*/" for c in "abcdefghijklmnop")},
    "deep brackets": {"grammar": "start: " + "(" * 300 + '"x"' + ")" * 300},
    "no rule of that name": {"grammar": "start: nobody"},
    "arrays in arrays": {"json": json.loads('{"items":' * 400 + "{}" + "}" * 400)},
    "a keyword that nobody follows": {"json": {"type": "array", "uniqueItems": True}},
    "no schema at all": {"json": {"type": "array", "items": {"properties": 1, "required": 5}}},
    "a type that is none": {"json": {"type": ["integer", {}], "enum": 5, "$defs": 3}},
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_in_its_own_process(bomb):
    used_s = time.process_time()
    with pytest.raises(ValueError, match=r"\w+"):
        admit(Constraint.of(bomb), WORDS)
    assert time.process_time() - used_s < CPU_S, "it was not this process that looked"


def test_what_takes_too_long_ends_its_process_and_nothing_else(monkeypatch):
    """A limit far below what any constraint needs, in a process of its own."""
    from trinity.text.grammar import admission

    monkeypatch.setattr(admission, "CPU_S", 1e-6)
    monkeypatch.setattr(admission, "_workers", admission._workers.__wrapped__)
    boxes = admission._workers()
    monkeypatch.setattr(admission, "_workers", lambda: boxes)
    with pytest.raises(ValueError, match="takes longer than"):
        admit(of(regex="a{1000}b{1000}"), WORDS)


def test_what_is_admitted_compiles_here():
    text = admit(of(json={"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}), WORDS)
    assert matcher(text, WORDS)


def test_an_answer_that_becomes_too_costly_says_so():
    """The first masks are cheap; what the library's own limits refuse later ends this answer alone."""
    at = Progress(matcher(grammar(of(regex="(([a-z]{1,100}){1,100}){1,100}"), WORDS), WORDS), WORDS)
    rng = np.random.default_rng(1)
    letters = np.array([token.isalpha() and token.islower() for token in WORDS.tokens])
    for _ in range(2000):
        allowed_V = at.allowed_V()
        if allowed_V is None:
            break
        at.take(int(rng.choice(np.flatnonzero(allowed_V & letters))))
    assert at.error is not None
    assert not at.is_complete
    assert at.allowed_V() is None
    at.take(5)  # a token that is sampled meanwhile changes nothing


def test_asking_twice_gives_the_same_mask():
    at = Progress(matcher(grammar(of(regex="(ab|cd)+"), WORDS), WORDS), WORDS)
    for text in "abcd":
        assert (at.allowed_V() == at.allowed_V()).all()
        at.take(OWN.encode(text)[0])


def test_sequences_share_a_grammar_and_no_state():
    start = matcher(grammar(of(regex="ab"), WORDS), WORDS)
    one, other = Progress(start, WORDS), Progress(start, WORDS)
    one.take(OWN.encode("a")[0])
    assert set(np.flatnonzero(one.allowed_V())) == set(OWN.encode("b"))
    assert OWN.encode("a")[0] in np.flatnonzero(other.allowed_V())


THINK, END = OWN.id_of("<think>"), OWN.id_of("</think>")


@pytest.mark.parametrize(
    ("prompt", "ends"),
    [
        ("<|im_start|>assistant\n", None),
        ("<|im_start|>assistant\n<think>\n", END),
        ("<|im_start|>assistant\n<think>\nso far", END),
        ("<|im_start|>assistant\n<think>\nno</think>\n", None),
        ("<|im_start|>system\nThink in <think>.<|im_end|>\n<|im_start|>assistant\n", None),
    ],
)
def test_whether_a_prompt_leaves_reasoning_open(prompt, ends):
    assert reasoning_end(OWN.encode(prompt), THINK, END, {OWN.eos_id}) == ends
    assert reasoning_end(OWN.encode(prompt), None, None, {OWN.eos_id}) is None


def test_reasoning_is_free_and_then_the_grammar_begins():
    at = Progress(matcher(grammar(of(choice=["yes"]), WORDS), WORDS), WORDS, after=END)
    allowed_V = at.allowed_V()
    assert not allowed_V[OWN.eos_id]
    assert not allowed_V[OWN.vocab_size :].any()
    assert allowed_V.sum() == OWN.vocab_size - 1
    for token_id in OWN.encode("well</think>yes"):
        assert not at.is_complete
        assert at.allowed_V()[token_id]
        at.take(token_id)
    assert at.is_complete


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"type": "string", "enum": ["c", "f"]},
        "spot": {"$ref": "#/$defs/spot"},
    },
    "required": ["city"],
    "$defs": {"spot": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALLS = {  # -> a call of each tool, the first with a wrong value
    "hermes": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 3, "spot": {"x": 1.5}}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": "3"}}\n</tool_call>',
    ),
    "qwen3_coder": (
        '<tool_call>\n<function=get_weather>\n<parameter=city>\n"a" </b>\n\nKöln\n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n"
        '<parameter=unit>\nc\n</parameter>\n<parameter=spot>\n{"x": 1.5}\n</parameter>\n</function>\n</tool_call>',
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n<parameter=days>\nthree\n</parameter>\n"
        "</function>\n</tool_call>",
    ),
}  # fmt: skip
PLAIN = Vocabulary(WORDS.tokens, frozenset({OWN.eos_id}), WORDS.eos_ids)  # where markers are text


@pytest.mark.parametrize("form", CALLS)
@pytest.mark.parametrize("words", [WORDS, PLAIN], ids=["marker tokens", "markers as text"])
def test_calls_in_the_format_of_their_family(form, words):
    call, other, wrong = CALLS[form]
    texts = {
        "a call": call,
        "two": f"\n{call}\n{other}",
        "the other": other,
        "text": "hello",
        "text, a call, text": f"hello {call} bye",
        "wrong": wrong,
    }

    def accepted(choice, parallel=True):
        constraint = tools_constraint(form, TOOLS, choice, parallel)
        return {name for name, text in texts.items() if accepts(constraint, text, words)}

    assert accepted("required") == {"a call", "two", "the other"}
    assert accepted("required", parallel=False) == {"a call", "the other"}
    assert accepted(NAMED) == {"a call"}
    if words is WORDS:
        assert accepted("auto") == {"a call", "two", "the other", "text", "text, a call, text"}
        assert accepted("auto", parallel=False) == {"a call", "the other", "text", "text, a call, text"}


def test_tools_that_leave_an_answer_free():
    assert tools_constraint("hermes", TOOLS, "none") is None
    assert tools_constraint("hermes", TOOLS[1:], "auto") is None
    with pytest.raises(ValueError, match="names 'nobody', which is not in tools"):
        tools_constraint("hermes", TOOLS, {"type": "function", "function": {"name": "nobody"}})
    with pytest.raises(ValueError, match=r"tools has .* bytes, at most 262,144"):
        tools_constraint("hermes", [{"type": "function", "function": {"name": "a" * (1 << 18)}}], "required")


def test_only_a_strict_tool_is_refused_for_what_nobody_follows():
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    for strict in (True, False):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}
        text = grammar(tools_constraint("hermes", [tool], "required"), WORDS)
        if strict:
            with pytest.raises(ValueError, match="uniqueItems"):
                matcher(text, WORDS)
        else:
            assert matcher(text, WORDS)
