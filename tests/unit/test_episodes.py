"""Conversations with an environment: by tokens, the model's own alone are trained, and what fails costs its conversation."""

import json

import pytest
import torch

from tests.unit.test_reward_runs import config_for, trainer_for
from tests.unit.test_trainer import all_weights
from trinity.data.prompts import chat_of, prompt_ids
from trinity.errors import InvalidRequest
from trinity.rl.episodes import Episode, Episodes
from trinity.rl.policy import Judged, policy_batch
from trinity.rl.reward_worker import turn
from trinity.rl.turns import between
from trinity.text.tokenizer import Tokenizer
from trinity.train.loss import token_logprobs

PLAY = """
import math, time

def thrice(messages, row):
    answers = [each["content"] for each in messages if each["role"] == "assistant"]
    if len(answers) == 3:
        return sum(map(len, answers)) / 30
    return {"role": "tool", "content": f"it is {len(answers)}"}, 0.25

def moody(messages, row):
    if len(messages) > 1 and row["n"] == 1:
        time.sleep(60)
    if len(messages) > 1 and row["n"] == 2:
        return math.nan
    if row["n"] == 3:
        return "<|im_end|> is said by the environment"
    return "more" if len(messages) < 4 else 1.0
"""
ROWS = [{"messages": [{"role": "user", "content": "so? " * n}], "n": n} for n in range(1, 5)]


def player(folder, which="thrice", rows=ROWS, wants_to_end=4.5, **rl):
    """A trainer whose environment that is; its random model ends an answer after a few tokens."""
    (folder / "play.py").write_text(PLAY)
    told = {"rewards": (), "environment": f"{folder}/play.py:{which}", "max_tokens": 20, "reward_timeout_s": 2.0, **rl}
    sizes = {"seq_len": 192, "global_batch_size": 16, "micro_batch_size": 8}
    config = config_for(folder, rows, rl=told, train=sizes).replace(data={"val_fraction": 0})
    trainer = trainer_for(config)
    drawn, eos = trainer.drawing.params, trainer.data.tokenizer.eos_id

    def params(*asked):
        return drawn(*asked).model_copy(update={"logit_bias": {eos: wants_to_end}})

    trainer.drawing.params = params
    return trainer


def test_a_conversation_goes_on_by_its_tokens(tmp_path):
    trainer = player(tmp_path, mask_truncated=True)
    tokenizer = trainer.data.tokenizer
    prompts, first = trainer.prompts_at(0)
    samples = trainer.drawing.drawn(prompts, first)
    whole = [sample for sample in samples if sample.num_turns == 3]
    assert len(whole) > 8
    says = "\n<|im_start|>user\n<tool_response>\nit is {}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    told = [tokenizer.encode(says.format(n)) for n in (1, 2)]
    for sample in whole:
        own = sample.is_own_N.tolist()
        others = [token for token, is_own in zip(sample.token_ids, own, strict=True) if not is_own]
        assert others == told[0] + told[1], "the environment's words as the template has them, and nothing else"
        ends = [at for at, token in enumerate(sample.token_ids) if token == tokenizer.eos_id and own[at]]
        assert len(ends) == 3, "each answer ended by itself"
        assert own[ends[0] + 1 : ends[0] + 2] == [False]
        assert len(sample.experts_TLK) == len(sample.prompt_ids) + len(sample.token_ids) - 1
    again = [tokenizer.encode(tokenizer.decode(each.token_ids, skip_special=False)) for each in whole]
    assert any(list(each.token_ids) != other for each, other in zip(whole, again, strict=True)), (
        "text would have lost them"
    )
    trainer.dispatcher.use(0)
    for sample in whole[:4]:
        scores_T = token_logprobs(trainer.model, torch.tensor([sample.prompt_ids + sample.token_ids]))[0]
        mine_N = scores_T[len(sample.prompt_ids) - 1 :][sample.is_own_N]
        torch.testing.assert_close(sample.logprobs_N[sample.is_own_N], mine_N, atol=2e-5, rtol=0)
    batch = policy_batch([Judged(each, 1.0) for each in whole])
    assert batch.num_trained == sum(each.num_own for each in whole) < sum(len(each.token_ids) for each in whole)
    found = trainer.step().measures
    assert found["divergence"] == pytest.approx(0, abs=1e-6)
    assert found["turns"] == pytest.approx(sum(each.num_turns for each in samples) / len(samples))
    assert found["length"] == pytest.approx(sum(each.num_own for each in samples) / len(samples))
    assert (found["staleness"], found["unjudged"]) == (0, 0)


def test_what_the_environment_said_has_no_gradient(tmp_path):
    """Other words of the environment at the end, where nothing of the model follows: the same gradient."""
    trainer = player(tmp_path)
    prompts, first = trainer.prompts_at(0)
    [sample, *_] = [each for each in trainer.drawing.drawn(prompts, first) if each.num_turns == 3]
    batch = policy_batch([Judged(sample, 1.0)])
    others = (~batch.counts_BS).nonzero()[:, 1]
    grads = []
    for token in (5, 7):
        targets_BS = batch.targets_BS.clone()
        targets_BS[0, others] = token
        trainer.dispatcher.use(0)
        trainer.model.zero_grad()
        trainer.objective([batch._replace(targets_BS=targets_BS)], batch.num_trained)[0].ce.backward()
        grads.append(
            {name: weight.grad.clone() for name, weight in trainer.backbone.trained.items() if weight.grad is not None}
        )
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())
    assert all_weights(trainer)


def test_an_environment_that_fails_costs_its_conversation(tmp_path, caplog):
    trainer = player(tmp_path, "moody", wants_to_end=30.0)
    prompts = trainer.data.train.take(range(4))
    samples = trainer.drawing.drawn(prompts, 0, 1)
    rewards = {prompt.row["n"]: sample for prompt, sample in zip(prompts, samples, strict=True)}
    assert {n: sample.reward for n, sample in rewards.items()} == {1: None, 2: None, 3: None, 4: 1.0}
    assert [rewards[n].num_turns for n in (1, 2, 3, 4)] == [2, 2, 1, 3]
    for why in ("took longer than 2 s", "returned nan", "holds the control token '<|im_end|>'"):
        assert why in caplog.text


def test_limits_end_a_conversation(tmp_path):
    trainer = player(tmp_path, max_turns=2, wants_to_end=30.0)
    prompts = trainer.data.train.take(range(2))
    for sample in trainer.drawing.drawn(prompts, 0, 1):
        assert (sample.num_turns, sample.reward, sample.finish_reason) == (2, 0.25, "stop"), "what it was worth so far"
    trainer.drawing.episodes.room = len(prompts[0].ids) + 10
    [sample] = trainer.drawing.drawn(prompts[:1], 0, 1)
    assert (sample.num_turns, sample.reward, sample.finish_reason) == (1, 0.25, "length")
    trainer.config = trainer.config.replace(rl={"max_tokens": 1})
    [sample] = Episodes(trainer.config, trainer.data.tokenizer).play(
        trainer.drawing.rollout,
        prompts[:1],
        lambda *asked: trainer.drawing.params(*asked, {}).model_copy(update={"ignore_eos": True}),
    )
    assert (sample.num_turns, sample.finish_reason) == (1, "length"), "an answer that was cut off is not answered"


def test_calls_of_tools_are_told_as_such(tmp_path):
    trainer = player(tmp_path)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    row = {"messages": ROWS[0]["messages"], "tools": tools}
    prompt = trainer.data.train.take(range(1))[0]._replace(row=row)
    [answer] = trainer.drawing.drawn([prompt], 0, 1)
    called = 'so <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    answer.__dict__.update(token_ids=tuple(trainer.data.tokenizer.encode(called)), text=called)
    episode = Episode(prompt, chat_of(row, "row"), list(prompt.ids))
    trainer.drawing.episodes._note(episode, answer)
    [message] = episode.messages
    [call] = message["tool_calls"]
    assert (message["content"].strip(), call["id"], call["function"]["name"]) == ("so", "call_0", "add")
    assert json.loads(call["function"]["arguments"]) == {"a": 1}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (1, {"next": [], "reward": 1.0}),
        (True, {"next": [], "reward": 1.0}),
        ("so", {"next": [{"role": "user", "content": "so"}], "reward": 0.0}),
        (({"role": "tool", "content": "7"}, 2), {"next": [{"role": "tool", "content": "7"}], "reward": 2.0}),
        (["a", "b"], {"next": [{"role": "user", "content": each} for each in "ab"], "reward": 0.0}),
    ],
)
def test_an_environment_may_say(value, found):
    assert turn(value) == found


@pytest.mark.parametrize(
    "value",
    [None, float("nan"), ("so", float("inf")), {"role": "assistant", "content": "me"}, {"role": "user"}, [1], {"a": 1}],
)
def test_an_environment_may_not_say(value):
    with pytest.raises(ValueError, match="it returned"):
        turn(value)


def test_texts_go_on_as_texts_and_templates_must_show_an_answer():
    tokenizer = Tokenizer.train(iter(["is it so? it is"]), 300)
    assert between(tokenizer, None, [{"role": "user", "content": "it is"}]) == tokenizer.encode("it is")
    row = {"messages": [{"role": "user", "content": "so?"}]}
    ids = between(tokenizer, chat_of(row, "row"), [{"role": "user", "content": "it is"}])
    assert tokenizer.decode(ids) == "\n<|im_start|>user\nit is<|im_end|>\n<|im_start|>assistant\n"
    answered = prompt_ids(tokenizer, row, "row") + tokenizer.encode("yes<|im_end|>") + ids
    messages = [*row["messages"], {"role": "assistant", "content": "yes"}, {"role": "user", "content": "it is"}]
    assert answered == prompt_ids(tokenizer, {"messages": messages}, "row"), "what the template renders of the whole"
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(InvalidRequest, match="does not show an answer"):
        between(tokenizer, chat_of(row, "row"), [{"role": "user", "content": "it is"}])
