"""Training and serving are the same arithmetic: the same experts for every token, the same log-probabilities, in any batch.

Random weights with spread-out router gates, two shards, windows shorter than the texts. What is compared is compared bit for
bit, in float32 and in bfloat16 (asked for are KL = 0, and at most 1e-4 in bfloat16).
"""

import random
from functools import cache

import pytest
import torch

from trinity.config import Config, EngineConfig, ModelConfig, OptimConfig, TrainConfig, preset
from trinity.data.dataset import Batch
from trinity.engine.engine import Engine
from trinity.engine.request import SamplingParams
from trinity.engine.weights import FixedWeights
from trinity.models.afmoe.model import Afmoe
from trinity.models.common.attention import document_positions
from trinity.models.common.router import Router
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.text.tokenizer import Tokenizer
from trinity.train.loss import Objective, packed_inputs, token_logprobs

NUM_NEW = 12
SIZES = {
    "small": dict(
        vocab_size=307, hidden_size=40, intermediate_size=44, moe_intermediate_size=20, head_dim=12, sliding_window=9
    ),
    "tiny": dict(vocab_size=307, sliding_window=32),
}
CASES = [("small", "float32"), ("tiny", "float32"), ("small", "bfloat16")]


def config_of(size: str, dtype: str) -> ModelConfig:
    return preset("tiny").model_copy(update={**SIZES[size], "dtype": dtype})


@cache
def model_of(size: str, dtype: str) -> tuple[Afmoe, object]:
    """-> a model whose routers and logits are far from even, and its pool."""
    config = config_of(size, dtype)
    pool = local_pool(config, Load(seed=3), num_shards=2, optim=OptimConfig())
    model, rng = Afmoe(config, pool.dispatcher()).eval(), torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=rng)
        gain = weight.ndim == 1
        weight.data.copy_(
            1 + 0.2 * noise if gain else noise * (3 if "lm_head" in name else 1) * weight.shape[-1] ** -0.5
        )
    return model, pool


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["def f(x): return x + 1\n" * 20]), 299)


def prompts(num: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(20, 300) for _ in range(rng.choice([1, 2, 9, 10, 40, 70]))] for _ in range(num)]


def answers(model: Afmoe, requests: list[list[int]], between=lambda: None, **settings) -> list[list[tuple[int, float]]]:
    """(token, log-probability) of each request's greedy answer; `between` is called after each step."""
    base = {"block_size": 4, "kv_cache_bytes": 16 << 20, "max_model_len": 96}
    engine = Engine(FixedWeights(model, 0), model.config, EngineConfig(**base | settings), tokenizer())
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True, logprobs=0)
    for i, request in enumerate(requests):
        engine.add(str(i), request, params)
    got: dict[str, list[tuple[int, float]]] = {str(i): [] for i in range(len(requests))}
    while engine.has_work:
        for delta in engine.step():
            got[delta.request_id] += [
                (token, one.logprob) for token, one in zip(delta.token_ids, delta.logprobs, strict=True)
            ]
        between()
    return [got[str(i)] for i in range(len(requests))]


class Listening:
    """What routers choose, [layers][T, K] in the order of tokens, and the logits, of all passes within the block."""

    def __init__(self, model: Afmoe):
        self.model, self.ids, self.logits = model, [], []

    def __enter__(self):
        routers = [part for part in self.model.modules() if isinstance(part, Router)]
        self.ids = [[] for _ in routers]
        hooks = [
            (router, lambda _, __, out, ids=ids: ids.append(out.ids_TK))
            for router, ids in zip(routers, self.ids, strict=True)
        ]
        hooks.append((self.model.lm_head, lambda _, __, out: self.logits.append(out.float())))
        self._handles = [part.register_forward_hook(hook) for part, hook in hooks]
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize(
    ("size", "dtype", "kept"), [(*case, "auto") for case in CASES] + [("small", "bfloat16", "int8")]
)
def test_the_same_text_and_logprobs_at_batch_1_and_64_and_in_pieces(size, dtype, kept):
    num = 64 if kept == "auto" else 16
    model, requests = model_of(size, dtype)[0], prompts(num)
    together = answers(model, requests, max_num_seqs=64, kv_cache_dtype=kept)
    for i in (0, 7, num // 2 + 1, num - 1):
        assert answers(model, [requests[i]], max_num_seqs=1, kv_cache_dtype=kept) == [together[i]]
    assert (
        answers(
            model,
            requests[:12],
            kv_cache_dtype=kept,
            max_num_batched_tokens=17,
            max_num_seqs=5,
            num_overlapped_microbatches=2,
            min_part_tokens=2,
        )
        == (together[:12])
    )


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_the_server_and_the_trainer_choose_the_same_experts_with_kl_0(size, dtype):
    model, num_tokens = model_of(size, dtype)[0], 0
    for prompt in prompts(10):
        with Listening(model) as served:
            answer = answers(model, [prompt])[0]
        ids_BS = torch.tensor([[*prompt, *(token for token, _ in answer)]])
        with Listening(model) as trained:
            out = model(*packed_inputs(model.config, ids_BS, None))  # with gradients, as in training
            logits_TV = model.logits(out.hidden_TD).float()
        for mine, theirs in zip(served.ids, trained.ids, strict=True):
            assert torch.equal(torch.cat(mine), theirs[0][:-1])
            num_tokens += len(theirs[0])
        p, q = (logits.log_softmax(-1) for logits in (torch.cat(served.logits), logits_TV[len(prompt) - 1 : -1]))
        assert (p.exp() * (p - q)).sum(-1).abs().max() == 0
        assert token_logprobs(model, ids_BS)[0, len(prompt) - 1 :].tolist() == [logprob for _, logprob in answer]
    assert num_tokens > 900


def test_without_the_switch_they_differ_by_rounding():
    """So the tests above can fail."""
    model = model_of("tiny", "float32")[0]
    config = model.config.model_copy(update={"batch_invariant": False})
    free = Afmoe(config, model._experts[0]).eval()
    free.load(model.tensors())
    requests = prompts(20)
    together, alone = answers(free, requests), [answers(free, [request])[0] for request in requests]
    pairs = [(a[1], b[1]) for t, o in zip(together, alone, strict=True) for a, b in zip(t, o, strict=True)]
    assert together != alone
    assert max(abs(a - b) for a, b in pairs[:NUM_NEW]) < 1e-3


def test_the_same_text_while_the_shards_train():
    """Between any two steps of the engine a training batch runs forward and backward on the same shards."""
    model, pool = model_of("tiny", "float32")
    requests = prompts(6)
    quiet = answers(model, requests)
    learner = Afmoe(model.config, pool.dispatcher())
    learner.load(model.tensors())
    ids_BS = torch.randint(20, 300, (2, 30), generator=torch.Generator().manual_seed(0))

    def learn():
        out = learner(*packed_inputs(model.config, ids_BS, None))
        out.hidden_TD.square().sum().backward()

    assert answers(model, requests, between=learn) == quiet


def test_a_packed_document_has_the_logprobs_of_its_own():
    model = model_of("tiny", "float32")[0]
    one, two = prompts(64)[4][:20], [5, 9, 40, 33, 21, 60, 71]
    docs_BS = torch.tensor([[0] * len(one) + [1] * len(two)])
    packed = token_logprobs(model, torch.tensor([one + two]), docs_BS)[0]
    assert packed[len(one) :].tolist() == token_logprobs(model, torch.tensor([two]))[0].tolist()
    assert document_positions(docs_BS, 1, docs_BS.shape[1]).max() == max(len(one), len(two)) - 1


def test_the_loss_is_that_of_the_logprobs():
    """`token_logprobs` and the trainer's own loss of a batch: one path, so equal but for the order of the sum."""
    model, rng = model_of("tiny", "float32")[0], torch.Generator().manual_seed(2)
    ids_BS = torch.randint(20, 300, (2, 24), generator=rng)
    docs_BS = torch.tensor([[0] * 10 + [1] * 13, [0] * 23])
    config = Config(model=model.config, train=TrainConfig(global_batch_size=2, micro_batch_size=2))
    ce = Objective(model, config)([Batch(ids_BS[:, :-1], ids_BS[:, 1:], docs_BS)], num_tokens=46)[0].ce
    documents = [(0, slice(0, 11)), (0, slice(10, 24)), (1, slice(0, 24))]  # the last target of one begins the next
    logprobs = [token_logprobs(model, ids_BS[row : row + 1, part]) for row, part in documents]
    assert ce.item() == pytest.approx(-torch.cat(logprobs, 1).mean().item(), rel=1e-6)
