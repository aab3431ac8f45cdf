"""`trinity bench rivals` without the rivals: files for llama.cpp, loads that are alike, and what its tables say."""

import argparse
import ctypes
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from trinity.bench.prefixes import CHAT, DRAWN, SHARED
from trinity.bench.report import Report
from trinity.bench.rivals import alike, child, decoding, gguf_file, llama_cpp, programs
from trinity.bench.rivals.programs import LLAMA, OURS, VLLM, Arm
from trinity.cli import main
from trinity.config import preset
from trinity.engine.request import Delta
from trinity.errors import ConfigError, Unavailable
from trinity.models.registry import write_config

GIVEN = argparse.Namespace(**alike.QUICK, threads=1, quick=True)


class Parrot:
    """An engine that says a prompt's last token and those after it, and has the first half of each prompt."""

    def __init__(self):
        self.waiting = {}

    @property
    def has_work(self):
        return bool(self.waiting)

    def add(self, request_id, prompt, params):
        assert (params.temperature, params.ignore_eos) == (0, True)
        self.waiting[request_id] = [len(prompt) // 2, list(range(prompt[-1], prompt[-1] + params.max_tokens))]

    def step(self):
        said = []
        for name, (num_cached, tokens) in list(self.waiting.items()):
            reason = "length" if len(tokens) == 1 else None
            said.append(Delta(name, token_ids=(tokens.pop(0),), finish_reason=reason, num_cached_tokens=num_cached))
            if reason:
                del self.waiting[name]
        return said


def test_the_file_has_all_settings_of_a_checkpoint():
    found = gguf_file.parameters(write_config(preset("bench")))
    assert found["block_count"] == 8
    assert (found["expert_count"], found["expert_used_count"], found["expert_weights_scale"]) == (32, 4, 2.448)
    assert (found["sliding_window"], found["rope_freq_base"], found["tokenizer_model"]) == (256, 10000.0, "no_vocab")


def test_experts_of_a_layer_are_one_tensor_in_the_order_of_their_numbers():
    names = [f"model.layers.{layer}.mlp.experts.{i}.up_proj.weight" for layer in (1, 10) for i in range(12)]
    found = gguf_file.stacks([*reversed(names), "lm_head.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"])
    assert found["model.layers.1.mlp.experts.up_proj.weight"] == names[:12]
    assert found["model.layers.10.mlp.experts.up_proj.weight"] == names[12:]
    assert len(found) == 4


def test_vectors_and_routers_stay_in_float32():
    assert gguf_file.stays_wide("model.norm.weight", 1)
    assert gguf_file.stays_wide("model.layers.3.mlp.router.gate.weight", 2)
    assert not gguf_file.stays_wide("model.layers.3.mlp.experts.up_proj.weight", 3)


def test_a_batch_says_where_each_token_stands_and_which_logits_are_wanted():
    requests = [llama_cpp.Waiting("a", 0, [5, 6, 7], 1), llama_cpp.Waiting("b", 1, [9], 1, num_seen=4)]
    token, embd, pos, num, places, wanted, place = llama_cpp._arrays(requests, [3, 1], np.array([2, 3]))
    assert embd is None
    assert (token.tolist(), pos.tolist(), num.tolist()) == ([5, 6, 7, 9], [0, 1, 2, 4], [1] * 4)
    assert (wanted.tolist(), place.tolist()) == ([0, 0, 1, 1], [0, 0, 0, 1])
    assert [ctypes.c_int32.from_address(int(each)).value for each in places] == place.tolist()


def test_steps_count_when_all_requests_have_a_token():
    found = child.decode(Parrot(), [[3], [7, 8]], 4)
    assert found["tokens"] == [[3, 4, 5, 6], [8, 9, 10, 11]]
    assert (found["num_steps"], found["num_decoded"]) == (3, 6)


def test_both_programs_meet_the_same_loads_and_each_round_others():
    first, second = alike._drawn(argparse.Namespace(**vars(GIVEN) | {"rounds": 2}), 1 << 20)
    assert list(first) == ["", CHAT, SHARED, DRAWN]
    assert asdict(first[CHAT][0]) == asdict(alike._drawn(GIVEN, 1 << 20)[0][CHAT][0])
    assert first[SHARED][0].parts != second[SHARED][0].parts


def told(load):
    """A turn at a load, as a process tells it."""
    talks = list(map(asdict, alike._drawn(GIVEN, 1 << 20)[0][load]))
    return json.loads(json.dumps(child.talks(Parrot(), talks, GIVEN.concurrency, GIVEN.output_len)))


def test_a_conversation_goes_on_with_the_engines_own_answers():
    found = told(CHAT)
    assert len(found["answers"]) == len(found["ttft_s"]) == 10
    assert found["prompts"]["0.3"][-13:][0] == found["answers"]["0.4"][-1]
    assert 0.4 < found["num_cached"] / alike._num_asked(found) <= 0.5


def turns_of(answers):
    turn = {load: {**told(load), "seconds": 2.0, "cpu_s": 1.0} for load in alike.LOADS}
    for each in turn.values():
        each["answers"] = answers(each["answers"])
    return [{"mode": "", **turn}]


def test_answers_of_another_model_are_no_comparison():
    report = alike._report(GIVEN, {OURS: turns_of(dict), VLLM: turns_of(dict)})
    assert not report.failure
    assert [row[1:] for row in report.tables[1].rows] == [(pytest.approx(1.0, rel=1), 1.0, 1.0, "100%", "")] * 3
    wrong = turns_of(lambda answers: {name: [1] for name in answers})
    assert "0% of the answers" in alike._report(GIVEN, {OURS: turns_of(dict), VLLM: wrong}).failure


def test_what_runs_eagerly_is_no_opponent():
    def turn(seconds, mode=""):
        run = {"num_decoded": 8, "seconds": seconds, "cpu_s": seconds, "num_steps": 4, "tokens": [[1], [2]]}
        return {"mode": mode, "2": run}

    given = argparse.Namespace(
        preset="bench", quick=False, threads=1, rounds=1, requests=(2,), prompt_len=3, new_tokens=5
    )
    arms = {Arm(OURS, "bfloat16", Path()): turn(1.0), Arm(LLAMA, "float16", Path()): turn(2.0)}
    arms[Arm(VLLM, "bfloat16", Path())] = turn(3.0, "eager")
    report = Report("rivals-decode")
    decoding._tell(report, given, {arm: [found] for arm, found in arms.items()})
    beside = report.tables[1].rows
    assert [row[2] for row in beside] == [2.0, 3.0]
    assert [row[-1] for row in beside] == ["", programs.NO_OPPONENT]
    assert [value for _, value, _, _ in report.targets] == [2.0]


def test_who_begins_changes():
    assert list(programs.in_turns(["a", "b"], 3)) == ["a", "b", "b", "a", "a", "b"]


def test_a_missing_environment_is_named(tmp_path, capsys):
    assert main(["bench", "rivals", "decode", "--quick", "--rivals", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "no environment with other people's engines: make interop-rivals" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="has no libllama"):
        llama_cpp.library(tmp_path)


def test_what_does_not_compile_runs_without_and_what_does_not_start_is_named(tmp_path, monkeypatch):
    """A process that answers if it is told to be eager, and ends if not."""
    code = (
        "import json, sys; order = json.loads(input()); order['eager'] and print('{\"mode\": \"eager\"}', flush=True)"
    )
    monkeypatch.setattr(programs.Place, "command", lambda place, arm: [sys.executable, "-c", code])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    place = programs.Place(argparse.Namespace(rivals=str(tmp_path), out=str(tmp_path), threads=1, block_size=None), {})
    with programs.running(place, Arm(VLLM, "float32", tmp_path)) as program:
        assert program.mode == "eager"
    with pytest.raises(Unavailable, match=r"float16 did not start; what it said is in .*rivals-llama.cpp-float16.log"):
        programs.loaded(place, Arm(LLAMA, "float16", tmp_path))
    assert "KeyError: 'eager'" in (tmp_path / "rivals-llama.cpp-float16.log").read_text()
