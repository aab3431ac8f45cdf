"""LLM: a checkpoint folder in, text out. The checkpoint comes from the project's own writer, the experts are real."""

import json
import shutil

import pytest
import torch

from trinity.checkpoint import CheckpointWriter, kept_generation, write_tensors
from trinity.cli import main
from trinity.config import EngineConfig, preset
from trinity.dispatch.transport import Done
from trinity.engine.request import SamplingParams
from trinity.errors import CheckpointError, ConfigError, InvalidRequest, PromptTooLong, Unavailable
from trinity.llm import LLM
from trinity.models.afmoe.model import Afmoe
from trinity.models.rules.init import init_expert
from trinity.text.tokenizer import Tokenizer

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SETTINGS = EngineConfig(max_model_len=256, kv_cache_bytes=8 << 20, max_num_seqs=4, max_num_waiting=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = preset("tiny").model_copy(update={"vocab_size": 320, "num_hidden_layers": 2, "num_experts": 4})
    config = config.model_validate({**config.model_dump(), "layer_types": ()})
    torch.manual_seed(0)
    model = Afmoe(config, experts=None)
    writer = CheckpointWriter(tmp_path_factory.mktemp("run"), 7)
    parts = list(write_tensors(writer.folder, "model-backbone", model.tensors().items()))
    tensors = {
        f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight": weight
        for layer in config.moe_layers
        for e in range(config.num_experts)
        for name, weight in zip(("gate", "up", "down"), init_expert(config, layer, e, 0, torch.float32), strict=True)
    }
    parts += write_tensors(writer.folder, "model-experts", tensors.items())
    tokenizer = Tokenizer.train(iter(["def f(x): return x + 1\n" * 50]), 320)
    return writer.finish(parts, config, tokenizer, {})


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, engine=SETTINGS, backend="reference", device="cpu")


def test_texts_and_ids_give_the_same(llm):
    prompts = ["def f(", "x + 1", "return x"]
    from_text = llm.generate(prompts, PARAMS)
    ids = [llm.tokenizer.encode(p, add_special=True) for p in prompts]
    assert [c.prompt_token_ids for c in from_text] == [tuple(i) for i in ids]
    assert ids[0][0] == llm.tokenizer.bos_id
    assert llm.generate(ids, PARAMS) == from_text
    assert llm.generate("def f(", PARAMS) == from_text[:1]
    for completion in from_text:
        assert len(completion.token_ids) == 12
        assert completion.text == llm.tokenizer.decode(completion.token_ids, skip_special=True)
        assert (completion.finish_reason, completion.logprobs) == ("length", None)
        assert completion.versions == (7, 7)


def test_more_prompts_than_the_queue_takes_keep_their_order(llm):
    prompts = [[20 + i % 5, 30] for i in range(12)]
    alone = {p: llm.generate([list(p)], PARAMS)[0] for p in {tuple(p) for p in prompts}}
    assert llm.generate(prompts, PARAMS) == [alone[tuple(p)] for p in prompts]
    assert llm.engine.stats().num_free_blocks == llm.engine.stats().num_total_blocks


def test_shards_do_not_change_the_text(folder, llm):
    two = LLM(folder, engine=SETTINGS, num_shards=2, backend="reference", device="cpu")
    prompts = ["def f(x)", "return"]
    assert two.generate(prompts, PARAMS) == llm.generate(prompts, PARAMS)


def test_parameters_for_each_prompt_and_seeds(llm):
    each = [SamplingParams(seed=i % 2, max_tokens=10, ignore_eos=True, logprobs=1) for i in range(4)]
    a, b, c, d = llm.generate(["x"] * 4, each)
    assert (a.token_ids, b.token_ids) == (c.token_ids, d.token_ids)
    assert a.token_ids != b.token_ids
    assert [lp.token_id for lp in a.logprobs] == list(a.token_ids)
    assert llm.generate("x", each[1])[0].token_ids == b.token_ids


def test_chat_uses_the_checkpoints_template(llm):
    answer = llm.chat([{"role": "user", "content": "def"}], PARAMS)
    prompt = llm.tokenizer.decode(answer.prompt_token_ids)
    assert prompt == "<|begin_of_text|><|im_start|>user\ndef<|im_end|>\n<|im_start|>assistant\n"
    assert len(answer.token_ids) == 12


def test_one_bad_prompt_runs_nothing(llm):
    before = llm.engine.stats()
    for bad, error in (([], InvalidRequest), ([1] * 256, PromptTooLong), ([320], InvalidRequest)):
        with pytest.raises(error):
            llm.generate([[1], bad], PARAMS)
    with pytest.raises(InvalidRequest, match="2 sampling parameters for 3 prompts"):
        llm.generate(["a", "b", "c"], [PARAMS] * 2)
    assert llm.engine.stats() == before
    assert llm.generate([], PARAMS) == []


def test_a_failing_expert_raises_and_leaves_nothing_behind(folder):
    calls = []

    class Experts:
        def begin(self, layer, x_TD, ids_TK, weights_TK):
            calls.append(layer)
            return Done(torch.zeros_like(x_TD), Unavailable("shard-0 is away") if len(calls) == 3 else None)

    llm = LLM(folder, engine=SETTINGS, experts=Experts(), device="cpu")
    with pytest.raises(Unavailable, match="shard-0 is away"):
        llm.generate(["a"] * 9, PARAMS)
    assert not llm.engine.has_work
    llm.engine.check()
    assert len(llm.generate(["a"] * 9, PARAMS)) == 9


def test_a_wrong_folder_and_too_little_memory(folder, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        LLM(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        LLM(folder, engine=EngineConfig(kv_cache_bytes=1000), backend="reference", device="cpu")


def test_several_continuations_and_the_best_of_them(llm):
    asked = SamplingParams(seed=3, max_tokens=6, ignore_eos=True, n=3)
    found = llm.generate(["def", "return"], asked)
    single = [asked.model_copy(update={"n": 1, "seed": seed}) for seed in (3, 4, 5)]
    assert found == [llm.generate(prompt, one)[0] for prompt in ("def", "return") for one in single]
    likely = lambda c: sum(lp.logprob for lp in c.logprobs) / len(c.logprobs)  # noqa: E731
    drawn = llm.generate("def", asked.model_copy(update={"n": 4, "logprobs": 0}))
    best = llm.generate("def", asked.model_copy(update={"n": 2, "best_of": 4}))
    assert [c.token_ids for c in best] == [c.token_ids for c in sorted(drawn, key=likely, reverse=True)[:2]]
    assert [c.logprobs for c in best] == [None, None]


def test_a_prompt_is_cut_from_the_left_and_special_tokens_are_shown(llm):
    ids = llm.tokenizer.encode("def f(x): return x + 1", add_special=True)
    cut = llm.generate([ids], PARAMS.model_copy(update={"truncate_prompt_tokens": 3}))[0]
    assert cut.prompt_token_ids == tuple(ids[-3:])
    assert cut.token_ids == llm.generate([ids[-3:]], PARAMS)[0].token_ids
    eos = llm.tokenizer.eos_id
    always = SamplingParams(max_tokens=2, ignore_eos=True, logit_bias={eos: 100.0})
    assert llm.generate("x", always)[0].text == ""
    shown = always.model_copy(update={"skip_special_tokens": False})
    assert llm.generate("x", shown)[0].text == 2 * llm.tokenizer.eos_token
    stopped = llm.generate("x", shown.model_copy(update={"stop": (llm.tokenizer.eos_token,)}))[0]
    assert (stopped.text, stopped.finish_reason, len(stopped.token_ids)) == ("", "stop", 1)
    ended = always.model_copy(update={"ignore_eos": False, "skip_special_tokens": False})
    assert llm.generate("x", ended)[0].text == ""
    assert llm.generate("x", ended.model_copy(update={"include_stop_str_in_output": True}))[0].text == "<|im_end|>"


def test_what_generation_config_recommends_is_followed(folder, tmp_path, caplog):
    """Case 16: ten answers without a seed are the same at temperature 0.0001; and a fine-tuned or converted one keeps it."""
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / "manifest.json").unlink()
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    index["metadata"].pop("manifest")
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    recommended = {"temperature": 0.0001, "do_sample": True, "max_new_tokens": 7, "typical_p": 0.9}
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, **recommended}))
    with caplog.at_level("INFO", "trinity.llm"):
        llm = LLM(copied, engine=SETTINGS, backend="reference", device="cpu")
    assert "temperature 0.0001" in caplog.text
    assert "typical_p: not followed" in caplog.text
    assert llm.default_params.temperature == 0.0001
    found = llm.generate(["def f("] * 5) + llm.generate(["def f("] * 5, SamplingParams(max_tokens=7))
    assert len({completion.token_ids for completion in found}) == 1
    assert main(["convert", str(copied), str(tmp_path / "converted")]) == 0
    kept = json.loads((tmp_path / "converted" / "generation_config.json").read_text())
    assert {name: kept[name] for name in recommended} == recommended
    assert (kept_generation(tmp_path / "run", str(tmp_path / "converted")), kept["eos_token_id"]) == (kept, 3)
    assert kept_generation(tmp_path / "run", None) is None
    (copied / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: temperature"):
        LLM(copied, engine=SETTINGS, backend="reference", device="cpu")
    plain = LLM(copied, engine=SETTINGS, backend="reference", device="cpu", generation_config="none")
    assert plain.default_params == SamplingParams()


def test_settings_by_name(folder):
    llm = LLM(folder, engine=SETTINGS, max_model_len=32, backend="reference", device="cpu")
    assert (llm.engine.settings.max_model_len, llm.engine.settings.max_num_seqs) == (32, 4)
    with pytest.raises(ConfigError, match=r"did you mean 'engine.max_model_len'\?"):
        LLM(folder, max_model_length=32)
    with pytest.raises(ConfigError, match=r"engine.block_size: Input should be greater than or equal to 1 \(got 0\)"):
        LLM(folder, block_size=0)


def test_a_stream_gives_the_same_text_in_pieces_and_leaves_nothing_when_it_is_left(llm):
    pieces = list(llm.stream("def f(", PARAMS))
    assert "".join(pieces) == llm.generate("def f(", PARAMS)[0].text
    assert len([piece for piece in pieces if piece]) > 1
    left = llm.stream("def f(", PARAMS)
    next(left)
    left.close()
    assert not llm.engine.has_work
    with pytest.raises(PromptTooLong):
        next(llm.stream([1] * 256, PARAMS))
