"""LLM: a checkpoint folder in, text out. The checkpoint comes from the project's own writer, the experts are real."""

import pytest
import torch

from trinity.checkpoint import CheckpointWriter, write_tensors
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
