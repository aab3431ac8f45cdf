"""A tiny deterministic model for engine tests: two attention layers without a backbone, and what it must generate.

Legend: T tokens, S sequence, G key-value heads, H query heads, d head dim, V vocabulary.
Each token's query, key and value are fixed random vectors, turned a little by its position; a random projection of what
attention returns is the logits. So the next token depends on every visible token and its position, and a slot read
wrongly shows. `Reference` computes the same with dense masks and no cache.
"""

from collections import Counter
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from trinity.config import EngineConfig, ModelConfig
from trinity.engine.engine import Engine
from trinity.engine.kv_tier import TierPlace
from trinity.engine.request import SamplingParams, Sequence
from trinity.engine.sampler import sample
from trinity.engine.weights import FixedWeights, WeightSource
from trinity.errors import StepConflict, VersionGone
from trinity.models.afmoe.config import AfmoeConfig
from trinity.models.common.decoder import Output
from trinity.models.common.family import Nobody
from trinity.text.detokenizer import TextStream

VOCAB = 40


class FakeTokenizer:
    """Token i is the character chr(65 + i); 3 is eos. Has what IncrementalDecoder and grammars need."""

    token_bytes = [chr(65 + i).encode() for i in range(VOCAB)]
    special_ids, added_ids = frozenset[int](), dict[str, int]()
    vocab_size = VOCAB
    eos_id = 3

    def id_of(self, token):
        return None


def fake_config(window: int = 4, layers: tuple[str, ...] = ("sliding_attention", "full_attention")) -> ModelConfig:
    return AfmoeConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_hidden_layers=len(layers),
        num_dense_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_experts=1,
        num_experts_per_tok=1,
        num_shared_experts=0,
        route_scale=1.0,
        sliding_window=window,
        layer_types=layers,
        max_position_embeddings=4096,
        dtype="float32",
    )


class FakeAfmoe(nn.Module):
    weight_dtype = "auto"

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        made = torch.Generator().manual_seed(seed)
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.query = nn.Parameter(2 * torch.randn(VOCAB, heads, dim, generator=made))
        self.key = nn.Parameter(torch.randn(VOCAB, groups, dim, generator=made))
        self.value = nn.Parameter(torch.randn(VOCAB, groups, dim, generator=made))
        self.experts = Nobody()
        self.head = nn.Parameter(2 * torch.randn(VOCAB, config.num_hidden_layers * heads * dim, generator=made))

    def forward_all(self, passes):
        return [self(*inputs[:3]) for inputs in passes]

    def qkv(self, ids_T, positions_T):
        turn_T11 = 1 + 0.5 * torch.sin(1.7 * positions_T.float())[:, None, None]
        return self.query[ids_T], self.key[ids_T] * turn_T11, self.value[ids_T] * turn_T11

    def forward(self, ids_T, positions_T, attend) -> Output:
        q, k, v = self.qkv(ids_T, positions_T)
        outs = [attend(layer, q, k, v).flatten(1) for layer in range(self.config.num_hidden_layers)]
        return Output(torch.cat(outs, dim=1), ())

    def logits(self, hidden_TD):
        return hidden_TD @ self.head.T


class DenseAttend:
    """One whole sequence, by explicit masks."""

    def __init__(self, config: ModelConfig):
        self.config = config

    def __call__(self, layer, q_SHd, k_SGd, v_SGd):
        ahead = torch.arange(len(q_SHd))[:, None] - torch.arange(len(q_SHd))
        mask = ahead >= 0
        if self.config.layer_types[layer] == "sliding_attention":
            mask &= ahead < self.config.sliding_window
        repeats = q_SHd.shape[1] // k_SGd.shape[1]
        k, v = (x.repeat_interleave(repeats, dim=1).transpose(0, 1) for x in (k_SGd, v_SGd))
        return F.scaled_dot_product_attention(q_SHd.transpose(0, 1), k, v, attn_mask=mask).transpose(0, 1)


def solo(config: ModelConfig, prompt: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
    """What a request must generate: the whole sequence computed anew for each token, nothing batched or cached."""
    return _solo(config.sliding_window, config.layer_types, prompt, params.model_dump_json())


@lru_cache(maxsize=4096)
def _solo(window: int, layers: tuple[str, ...], prompt: tuple[int, ...], dumped: str) -> tuple[int, ...]:
    params = SamplingParams.model_validate_json(dumped)
    config = fake_config(window, layers)
    model = FakeAfmoe(config)
    sequence = Sequence("solo", prompt, params, TextStream(None))
    with torch.inference_mode():
        for _ in range(params.max_tokens):
            ids = torch.tensor(sequence.token_ids)
            hidden = model(ids, torch.arange(len(ids)), DenseAttend(config)).hidden_TD
            token = sample(model.logits(hidden[-1:]), [sequence])[0].token_id
            sequence.token_ids.append(token)
            if token == config.eos_token_id and not params.ignore_eos:
                break
    return tuple(sequence.generated_ids)


class FakeSource:
    """Weights of a run that goes on. Version v is FakeAfmoe(seed=v), with NaN in it if `poisoned`.

    The newest version is written into one model, as a live source does; held ones have models of their own. `lose` takes a
    version away, held or not; the next `conflicts` passes meet shards of another version halfway.
    """

    def __init__(self, config: ModelConfig, version: int = 1):
        self.config, self.known, self.poisoned = config, {version}, set[int]()
        self.held, self.gone, self.quarantined, self.conflicts = Counter[int](), set[int](), set[int](), 0
        self.shared, self.own = self._watched(version), dict[int, FakeAfmoe]()
        self.top = version

    def _watched(self, version: int) -> FakeAfmoe:
        model = FakeAfmoe(self.config, version)
        whole = model.forward

        def forward(*inputs):
            out = whole(*inputs)
            if self.conflicts:
                self.conflicts -= 1
                raise StepConflict("shard-0 holds another version")
            return out

        model.forward = forward
        return model

    def commit(self, poisoned: bool = False) -> int:
        self.top += 1
        self.known.add(self.top)
        self.poisoned |= {self.top} if poisoned else set()
        return self.top

    def roll_back(self) -> None:
        if len(self.known) > 1:
            self.known.remove(self.newest())

    def lose(self, version: int) -> None:
        if self.known != {version}:
            self.known.discard(version)
            self.gone.add(version)

    def newest(self) -> int:
        return max(self.known)

    def model(self, version: int) -> FakeAfmoe:
        if version in self.gone:
            raise VersionGone(f"version {version} has gone")
        weights = FakeAfmoe(self.config, version)
        if version in self.poisoned:
            weights.head.data.fill_(float("nan"))
        if version != max(self.known):
            assert self.held[version], f"version {version} is used, old and not held"
        model = self.own.setdefault(version, self._watched(version)) if self.held[version] else self.shared
        model.load_state_dict(weights.state_dict())
        return model

    def hold(self, version: int) -> None:
        self.held[version] += 1

    def release(self, version: int) -> None:
        self.held[version] -= 1
        assert self.held[version] >= 0, f"version {version} was released more often than held"

    def quarantine(self, version: int) -> None:
        self.quarantined.add(version)
        if self.known != {version}:
            self.known.discard(version)


@lru_cache(maxsize=64)
def weights_of(version: int, window: int) -> FakeAfmoe:
    return FakeAfmoe(fake_config(window), version).requires_grad_(False)


def next_token(window: int, version: int, cached: tuple, token_ids: list[int], prompt: int, params) -> int:
    """The token after `token_ids` by weights of `version`, where keys and values of position p are of `cached[layer][p]`."""
    ids, positions = torch.tensor(token_ids), torch.arange(len(token_ids))
    model, attend = weights_of(version, window), DenseAttend(fake_config(window))
    q = model.qkv(ids, positions)[0]
    outs = []
    for layer, versions in enumerate(cached):
        rows = [[x[p] for x in weights_of(v, window).qkv(ids, positions)[1:]] for p, v in enumerate(versions)]
        k, v = (torch.stack(each) for each in zip(*rows, strict=True))
        outs.append(attend(layer, q, k, v)[-1:].flatten(1))
    sequence = Sequence("one", tuple(token_ids[:prompt]), params, TextStream(None))
    sequence.token_ids = list(token_ids)
    return sample(model.logits(torch.cat(outs, 1)), [sequence])[0].token_id


def fake_engine(
    config: ModelConfig | None = None,
    *,
    model: nn.Module | None = None,
    source: WeightSource | None = None,
    tier: TierPlace | None = None,
    **settings,
) -> Engine:
    config = config or fake_config()
    source = source or FixedWeights(model or FakeAfmoe(config), 0)
    base = {"max_model_len": 64, "block_size": 4, "kv_cache_bytes": 1 << 20, "max_num_seqs": 8, "max_draft_tokens": 0}
    return Engine(source, config, EngineConfig(**base | settings), FakeTokenizer(), tier=tier)


def run_all(engine: Engine, max_steps: int = 10_000) -> dict[str, list]:
    """Step until idle; the Deltas of each request."""
    deltas: dict[str, list] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return deltas
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
    raise AssertionError(f"still busy after {max_steps} steps: {engine.stats()}")
