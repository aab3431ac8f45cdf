"""Answers of a random model under grammars: always valid, whatever else the request asks for and whoever runs beside it."""

import json
import re

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_fakes import FakeSource, FakeTokenizer, fake_config, fake_engine
from tests.unit.grammar_cases import SCHEMAS, checkpoint, random_llm, tokenizer
from trinity.config import Client, EngineConfig
from trinity.engine.engine import Engine
from trinity.engine.grammars import MaskThread, within_grammars
from trinity.engine.request import SamplingParams, Sequence
from trinity.errors import InvalidRequest
from trinity.text.detokenizer import TextStream
from trinity.text.grammar.constraint import Constraint

SAMPLED = {
    "greedy": {"temperature": 0},
    "hot": {"temperature": 2.0},
    "filtered": {"temperature": 1.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
    "penalised": {"repetition_penalty": 1.5, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    "biased": {"logit_bias": dict.fromkeys(range(200, 260), 100.0)},
    "without an end": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("run"), tokenizer())


@pytest.fixture(scope="module")
def llm(folder):
    return random_llm(folder)


def params(structured, **more):
    return SamplingParams(**{"max_tokens": 600, "seed": 1, "structured_outputs": structured, **more})


def complete(llm, structured, prompts=("x",), **more):
    """Texts of answers that ended by themselves."""
    found = llm.generate(list(prompts), params(structured, **more))
    assert [answer.finish_reason for answer in found] == ["stop"] * len(found), [answer.text for answer in found]
    return [answer.text for answer in found]


def closed(schema):
    """A random model would add properties for ever."""
    return {"json": schema, "disable_additional_properties": True}


def terse(llm):
    """A bias that has it come to an end of what it has begun."""
    return {i: 8.0 for i, token in enumerate(llm.tokenizer.token_bytes) if token in (b'"', b"}", b"]")}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_answer_follows_its_schema(llm, schema):
    for text in complete(llm, closed(schema), ["a", "b", "c"], logit_bias=terse(llm)):
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("how", SAMPLED.values(), ids=SAMPLED)
def test_however_it_is_sampled(llm, how):
    schema = SCHEMAS["Owner"]
    for text in complete(llm, closed(schema), ["a", "b"], **how):
        jsonschema.validate(json.loads(text), schema)
    [text] = complete(llm, {"regex": r"[a-z]{3}-[0-9]{2,4}( x)?"}, **how)
    assert re.fullmatch(r"[a-z]{3}-[0-9]{2,4}( x)?", text)


def test_choices_and_grammars(llm):
    options = ["yes", "yes please", "no", "naïve 🙂"]
    found = {text for seed in range(8) for text in complete(llm, {"choice": options}, seed=seed, temperature=3.0)}
    assert found <= set(options)
    assert len(found) > 1
    rule = 'start: "(" start ")" | /[0-9]{1,3}/'
    for seed in range(4):
        [text] = complete(llm, {"grammar": rule}, seed=seed)
        assert re.fullmatch(r"(\(*)[0-9]{1,3}(\)*)", text)
        assert text.count("(") == text.count(")")


def test_any_object(llm):
    [text] = complete(llm, {"json_object": True}, logit_bias=terse(llm))
    assert isinstance(json.loads(text), dict)


def test_an_answer_that_is_cut_is_the_beginning_of_one(llm):
    [answer] = llm.generate("x", params(closed(SCHEMAS["Owner"]), max_tokens=9))
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 9)
    [whole] = llm.generate("x", params(closed(SCHEMAS["Owner"])))
    assert whole.token_ids[:9] == answer.token_ids


def test_stop_strings_and_logprobs_stand_beside_it(llm):
    [whole] = llm.generate("x", params({"regex": "ab+c"}, logprobs=2, max_tokens=40))
    assert [position.token_id for position in whole.logprobs] == list(whole.token_ids)
    [cut] = llm.generate("x", params({"regex": "(ab){200}"}, stop=["bab"]))
    assert (cut.text, cut.finish_reason) == ("a", "stop")


def test_a_complete_answer_ends_without_the_end_token(llm):
    [answer] = llm.generate("x", params({"choice": ["done"]}))
    assert (answer.text, answer.finish_reason) == ("done", "stop")
    assert llm.tokenizer.eos_id not in answer.token_ids
    [open_end] = llm.generate("x", params({"regex": "a+"}, logit_bias={llm.tokenizer.eos_id: 100.0}))
    assert (open_end.text, open_end.token_ids[-1]) in {("a", llm.tokenizer.eos_id), ("aa", llm.tokenizer.eos_id)}


def test_the_grammar_begins_after_the_reasoning(llm):
    own = llm.tokenizer
    prompt = own.encode("<|im_start|>assistant\n<think>\n")
    end = own.id_of("</think>")
    bias = {end: 6.0}
    found = llm.generate([prompt] * 3, [params({"choice": ["yes", "no"]}, seed=s, logit_bias=bias) for s in range(3)])
    for answer in found:
        at = answer.token_ids.index(end)
        assert own.decode(answer.token_ids[at + 1 :], skip_special=True) in ("yes", "no")
        assert answer.finish_reason == "stop"
    assert max(answer.token_ids.index(end) for answer in found) > 0, "there was something to wait for"


def test_others_in_the_batch_are_as_without(llm):
    free = [SamplingParams(max_tokens=20, seed=i, temperature=i % 2, ignore_eos=True) for i in range(3)]
    bound = [params(closed(SCHEMAS[name]), logit_bias=terse(llm)) for name in ("Owner", "Event", "numbers")]
    prompts = ["def f(x)", "the quick", "brown", "a", "b", "c"]
    alone = [llm.generate(prompt, each)[0] for prompt, each in zip(prompts, free + bound, strict=True)]
    assert llm.generate(prompts, free + bound) == alone


def test_preempted_answers_are_the_same(folder, llm):
    bound = [params(closed(SCHEMAS["Owner"]), seed=i) for i in range(6)]
    prompts = ["x" * (3 * i + 1) for i in range(6)]
    tight = random_llm(folder, kv_cache_bytes=80 << 10, max_model_len=320, block_size=2)
    assert [answer.text for answer in tight.generate(prompts, bound)] == [
        answer.text for answer in llm.generate(prompts, bound)
    ]
    assert tight.engine.stats().num_preemptions > 0


@pytest.mark.parametrize("tree", [{"regex": "(a"}, {"json": {"$ref": "#"}}, {"grammar": "start: nobody"}])
def test_a_wrong_one_is_refused_and_nothing_is_left(llm, tree):
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(InvalidRequest, match=r"^structured_outputs: .") as caught:
            llm.generate("x", params(tree))
        assert caught.value.param == "structured_outputs"
    assert not llm.engine.has_work
    assert complete(llm, {"choice": ["ok"]}) == ["ok"]


def test_a_grammar_is_compiled_for_each_key_and_salt_that_asks_for_it():
    """A second one's first answer would be faster where another has asked for the same."""
    engine, compiled = fake_engine(), []
    whole = engine.grammars._compile
    engine.grammars._compile = lambda constraint: compiled.append(constraint) or whole(constraint)
    for at, (name, salt) in enumerate([("ann", None), ("ann", None), ("bob", None), ("ann", "own"), ("ann", "own")]):
        engine.add(str(at), [1], params({"regex": "A+"}, max_tokens=1, cache_salt=salt), Client(name))
    assert len(compiled) == 3


def test_one_that_becomes_too_costly_ends_alone(llm):
    """Its beginning is cheap, as far as anybody looks before it is admitted."""
    letters = {i: 100.0 for i, token in enumerate(llm.tokenizer.token_bytes) if token.isalpha() and token.islower()}
    engine = llm.engine
    late = {"regex": "a{200}(([a-z]{1,100}){1,100}){1,100}"}
    engine.add("costly", [20], params(late, max_tokens=900, logit_bias=letters))
    engine.add("free", [20], SamplingParams(max_tokens=5, ignore_eos=True))
    ends = {}
    while engine.has_work:
        ends |= {delta.request_id: delta for delta in engine.step() if delta.finish_reason}
    assert ends["free"].finish_reason == "length"
    assert ends["costly"].finish_reason == "error"
    assert isinstance(ends["costly"].cause, InvalidRequest)
    assert "after 2" in ends["costly"].error
    engine.check()


def sequence(constraint):
    return Sequence("s", (1,), SamplingParams(), TextStream(None), progress=constraint)


class Only:
    """A grammar that allows these tokens."""

    def __init__(self, *ids):
        self.ids = ids

    def allowed_V(self):
        return torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(self.ids), True).numpy()


def test_what_a_mask_leaves():
    """Forbidden logits are -inf, rows without a grammar untouched; where bans leave nothing of a grammar, it counts alone."""
    raw_BV = torch.arange(18.0).view(3, 6)
    steered_BV = raw_BV.clone()
    steered_BV[2, 4] = -torch.inf
    bound = [sequence(Only(1, 2)), sequence(None), sequence(Only(4))]
    mask_BV = MaskThread().start(bound, 6).result()
    inf = torch.inf
    want_BV = torch.tensor([[-inf, 1, 2, -inf, -inf, -inf], [6, 7, 8, 9, 10, 11], [-inf] * 4 + [16, -inf]])
    assert torch.equal(within_grammars(steered_BV, raw_BV, mask_BV), want_BV)
    assert torch.equal(raw_BV, torch.arange(18.0).view(3, 6))
    assert MaskThread().start([bound[1]], 6) is None


def test_parameters_travel_as_json():
    for tree in (
        {"json": {"type": "object"}},
        {"choice": ["a", "b"]},
        {"json_object": True, "disable_any_whitespace": True},
    ):
        given = SamplingParams(structured_outputs=tree)
        assert given.structured_outputs == Constraint.of(tree)
        assert SamplingParams.model_validate_json(given.model_dump_json()) == given
    with pytest.raises(InvalidRequest, match=r"structured_outputs: 'jsn' is unknown"):
        SamplingParams.parse(structured_outputs={"jsn": 1})


# Traces over the letters of the fake model, whose weights change, are lost and are damaged meanwhile

LETTERS = [None, "[A-Z]{1,12}", "(AB|BA|CC)+", "[^A]{3}B*", "A(B|C[D-Z]){2,9}"]
asked = st.tuples(st.lists(st.integers(0, 25), min_size=1, max_size=6), st.integers(0, 3), st.sampled_from(LETTERS))


def wish(seed, pattern):
    bound = {"structured_outputs": {"regex": pattern}} if pattern else {"ignore_eos": True}
    return SamplingParams(max_tokens=12, seed=seed, temperature=0.8 if seed else 0, **bound)


def answers(engine, requests, disturb=lambda step: None):
    for i, (prompt, seed, pattern) in enumerate(requests):
        engine.add(str(i), prompt, wish(seed, pattern))
    got, ends = {str(i): [] for i in range(len(requests))}, {}
    for step in range(500):
        if not engine.has_work:
            return got, ends
        disturb(step)
        for delta in engine.step():
            got[delta.request_id] += delta.token_ids
            if delta.finish_reason:
                ends[delta.request_id] = delta.finish_reason
        engine.check()
    raise AssertionError("requests never ended")


@settings(max_examples=20, deadline=None)
@given(
    requests=st.lists(asked, min_size=1, max_size=6),
    faults=st.sets(st.integers(0, 20), max_size=8),
    slack=st.integers(0, 4),
)
def test_repeated_and_preempted_passes_change_nothing(requests, faults, slack):
    """The same weights throughout; passes fail and are repeated, and memory is for one longest sequence and little more."""
    config = fake_config(4)
    source = FakeSource(config)
    small = EngineConfig(
        max_model_len=24, block_size=2, kv_cache_bytes=64 * 2 * (17 + slack), max_num_seqs=6, max_draft_tokens=0
    )
    engine = Engine(source, config, small, FakeTokenizer())
    got, ends = answers(engine, requests, lambda step: setattr(source, "conflicts", int(step in faults)))
    for i, request in enumerate(requests):
        alone, end = answers(Engine(FakeSource(config), config, small, FakeTokenizer()), [request])
        assert (got[str(i)], ends[str(i)]) == (alone["0"], end["0"])
        text = "".join(chr(65 + token) for token in got[str(i)] if token != 3 or not request[2])
        if request[2] and ends[str(i)] == "stop":
            assert re.fullmatch(request[2], text.removesuffix("D") if got[str(i)][-1] == 3 else text)


def test_an_aborted_answer_leaves_nothing():
    engine = fake_engine()
    engine.add("a", [1, 2], wish(1, "[A-Z]+"))
    engine.step()
    assert engine.abort("a").finish_reason == "abort"
    engine.check()
    assert not engine.has_work
