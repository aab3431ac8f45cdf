"""Sampling parameters at and beyond their bounds, and text with stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trinity.engine.request import SamplingParams
from trinity.errors import InvalidRequest
from trinity.text.detokenizer import TextStream

NAN, INF = float("nan"), float("inf")
NUMBERS = {  # parameter: (values taken, values refused)
    "max_tokens": ([0, 1, 1 << 31], [-1, (1 << 31) + 1, 1.5]),
    "temperature": ([0, 0.5, 2, 100], [-1, -1e-9, 101, 1e308]),
    "top_k": ([0, 1, 1 << 31], [-1, (1 << 31) + 1, 0.5]),
    "top_p": ([1e-9, 1, 0.5], [-1, 0, 1.0001, 1e308]),
    "min_p": ([0, 1, 0.5], [-1, 1.0001, 1e308]),
    "seed": ([0, -1, (1 << 63) - 1, -(1 << 63), None], [1 << 63, -(1 << 63) - 1, 1.5]),
    "logprobs": ([0, 20, None], [-1, 21, 1.5]),
    "min_tokens": ([0, 1 << 31], [-1, (1 << 31) + 1, 1.5]),
    "thinking_token_budget": ([0, 1, 1 << 31, None], [-1, (1 << 31) + 1, 1.5]),
    "truncate_prompt_tokens": ([-1, 1, 1 << 31, None], [-2, 0, (1 << 31) + 1, 1.5]),
    "n": ([1, 128], [0, -1, 129, 1.5]),
    "best_of": ([1, 128, None], [0, -1, 129, 1.5]),
    "priority": ([0, -(1 << 63), (1 << 63) - 1], [1 << 63, -(1 << 63) - 1, 1.5]),
    "prompt_logprobs": ([0, 20, None], [-1, 21, 1.5]),
    "presence_penalty": ([-2, 0, 2], [-2.1, 2.1, 1e308]),
    "frequency_penalty": ([-2, 0, 2], [-2.1, 2.1, 1e308]),
    "repetition_penalty": ([0.01, 1, 100], [0, -1, 101, 1e308]),
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, (good, _) in NUMBERS.items() for v in good])
def test_values_taken(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, v) for name, (_, bad) in NUMBERS.items() for v in [*bad, NAN, INF, -INF, "1", True, [], {}]],
)
def test_values_refused_by_name(name, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.parse(**{name: value})
    assert caught.value.param == name
    with pytest.raises(ValidationError):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [n for n, (good, _) in NUMBERS.items() if None not in good])
def test_null_is_no_number(name):
    with pytest.raises(InvalidRequest):
        SamplingParams.parse(**{name: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", [""]),
        ("stop", ["x" * 257]),
        ("stop", ["x"] * 17),
        ("stop", [1]),
        ("stop", 1),
        ("stop", None),
        ("stop_token_ids", ["1"]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [0] * 129),
        ("bad_words", ["a"] * 1001),
        ("bad_words", ["a" * 1001]),
        ("bad_words", [""]),
        ("bad_words", ["\ud800"]),
        ("bad_words", None),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [0] * 1025),
        ("allowed_token_ids", ["1"]),
        ("skip_special_tokens", 0),
        ("include_stop_str_in_output", "true"),
        ("logit_bias", {1: NAN}),
        ("logit_bias", {1: INF}),
        ("logit_bias", {1: 100.1}),
        ("logit_bias", {1: -100.1}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("logit_bias", [1]),
        ("ignore_eos", 1),
        ("ignore_eos", "true"),
        ("nucleus", 3),
    ],
)
def test_lists_and_flags_refused_by_name(name, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.parse(**{name: value})
    assert caught.value.param == name


def test_lists_taken():
    params = SamplingParams(stop=["a", "x" * 256], stop_token_ids=[1, 2], logit_bias={1: 100.0, 2: -100})
    assert (params.stop, params.stop_token_ids) == (("a", "x" * 256), (1, 2))
    assert SamplingParams(stop="one").stop == ("one",)
    assert len(SamplingParams(stop=["x"] * 16).stop) == 16
    assert not SamplingParams().greedy
    assert SamplingParams(temperature=0).greedy


class Pieces:
    """A decoder whose token i is the i-th piece, with a tail that only the flush brings."""

    def __init__(self, pieces: list[str], tail: str = ""):
        self.pieces, self.tail = pieces, tail

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return self.tail


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.text("ab", max_size=2),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_cut_where_they_first_appear_and_nothing_is_lost(pieces, tail, stop):
    """Whatever the pieces: the text up to the first stop string that the stream completed, and no part of one."""
    stream, out = TextStream(Pieces(pieces, tail), tuple(stop)), ""
    for i in range(len(pieces)):
        out += stream.push(i)
        so_far = "".join(pieces[: i + 1])
        assert so_far.startswith(out)
        held = so_far[len(out) :]
        if stream.stopped_by is None:
            assert not any(s in so_far for s in stop)
            assert held == "" or any(s.startswith(held) for s in stop)
    out += stream.finish()
    whole = "".join(pieces) + tail
    if stream.stopped_by is None:
        assert out == whole
        assert not any(s in whole for s in stop)
    else:
        assert not any(s in out for s in stop)
        assert whole.startswith(out + stream.stopped_by)
    shown = TextStream(Pieces(pieces, tail), tuple(stop), shows_stop=True)
    text = "".join(map(shown.push, range(len(pieces)))) + shown.finish()
    assert (text, shown.stopped_by) == (out + (stream.stopped_by or ""), stream.stopped_by)


def test_a_stop_string_in_many_pieces():
    stream = TextStream(Pieces(["He", "llo", "\n", "\nU", "se", "r: x"]), ("\n\nUser:", "##"))
    assert [stream.push(i) for i in range(6)] == ["He", "llo", "", "", "", ""]
    assert stream.stopped_by == "\n\nUser:"
    assert stream.finish() == ""


def test_a_false_start_is_released_at_once():
    stream = TextStream(Pieces(["a\n", "b", "\n"], "end"), ("\n\n",))
    assert [stream.push(i) for i in range(3)] == ["a", "\nb", ""]
    assert stream.finish() == "\nend"
