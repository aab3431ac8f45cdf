"""Every field of a generation request, at every door: HTTP, gRPC and Python take the same values and refuse the same ones in
the same words. A field of SamplingParams that is not in the table, or that a door does not know, fails."""

import json

import pytest

from protos.trinity.v1 import inference_pb2 as pb
from serving.grpc.inference import BESIDE, to_params
from serving.http import schema
from trinity.engine.request import SamplingParams
from trinity.errors import InvalidRequest
from trinity.text.grammar.constraint import Constraint

MANY = 2**31 + 1
FIELDS = {  # (a value that a float32 and JSON hold exactly, values that are refused at every door)
    "max_tokens": (7, [-1]),
    "temperature": (0.5, [-1.0, 101.0]),
    "top_k": (7, [-2]),
    "top_p": (0.25, [0.0, 1.5]),
    "min_p": (0.125, [-0.5, 1.5]),
    "seed": (-5, []),
    "stop": (("a", "b"), [("",), ("x" * 257,), ("a",) * 17]),
    "stop_token_ids": ((5, 9), [(1,) * 129]),
    "include_stop_str_in_output": (True, []),
    "skip_special_tokens": (False, []),
    "ignore_eos": (True, []),
    "logprobs": (3, [-1, 21]),
    "prompt_logprobs": (3, [-1, 21]),
    "min_tokens": (4, [-1]),
    "bad_words": (("a", "b c"), [("",), ("x" * 1001,), ("a",) * 1001]),
    "allowed_token_ids": ((5, 9), [(1,) * 1025]),
    "truncate_prompt_tokens": (-1, [0, -2]),
    "thinking_token_budget": (7, [-1]),
    "n": (3, [0, 129]),
    "best_of": (4, [0, 129]),
    "priority": (-(2**40), []),
    "presence_penalty": (0.5, [2.5]),
    "frequency_penalty": (-0.5, [-2.5]),
    "repetition_penalty": (1.5, [0.0, 101.0]),
    "logit_bias": ({5: -2.5}, [{5: 101.0}]),
    "version_policy": ("pinned", []),
    "structured_outputs": ({"regex": "a+"}, []),
    "cache_salt": ("s", ["", "x" * 1025]),
}
READ = {"structured_outputs": Constraint.of}  # what is made of a value
INSIDE = {"trace"}  # for programs in the engine's process; over HTTP and gRPC it is return_routed_experts
POLICIES = {"pinned": pb.VERSION_POLICY_PINNED}


def over_http(name, value):
    body = schema.parse(schema.CompletionRequest, json.dumps({"prompt": "x", name: value}).encode())
    return body.params(body.max_tokens or 16, body.logprobs)


def over_grpc(name, value):
    value = POLICIES.get(value, value) if isinstance(value, str) else value
    if name in BESIDE:
        request = pb.GenerateRequest(text="x", **{name: value})
    else:
        request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(**{name: value}))
    return to_params(pb.GenerateRequest.FromString(request.SerializeToString()), 16)


def in_python(name, value):
    return SamplingParams.parse(**{name: value})


DOORS = (in_python, over_http, over_grpc)


def test_the_table_has_every_field():
    assert set(FIELDS) == set(SamplingParams.model_fields) - INSIDE


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_arrives_through_every_door(name):
    value = FIELDS[name][0]
    assert value != SamplingParams.model_fields[name].default, "or arriving could not be told from being lost"
    for door in DOORS:
        params = door(name, value)
        assert getattr(params, name) == READ.get(name, lambda same: same)(value), door.__name__
        assert name in params.model_fields_set, "a checkpoint's default must not replace it"


def said(door, name, value):
    with pytest.raises(InvalidRequest) as refused:
        door(name, value)
    return refused.value.param, refused.value.message.lower().replace("input should", "should").partition(" (got")[0]


@pytest.mark.parametrize(("name", "value"), [(name, bad) for name, (_, values) in FIELDS.items() for bad in values])
def test_a_refusal_says_the_same_at_every_door(name, value):
    """But for the value, which HTTP shows, and for how it names the bounds of a list: JSON has no tuples."""
    python, http, grpc = (said(door, name, value) for door in DOORS)
    assert python == http == grpc


def test_what_is_not_set_is_open_for_a_checkpoints_default():
    for params in (
        schema.parse(schema.CompletionRequest, b'{"prompt": "x", "temperature": null}').sampling,
        to_params(pb.GenerateRequest(text="x"), 16),
    ):
        assert not params.model_fields_set & {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
