"""A causal language model without its routed experts: embedding, blocks, final norm and head.

Legend: T tokens (flat: no batch dimension), D model, V vocabulary.
Two seams keep one forward pass for training and serving: `ExpertLayer` (where routed experts are) and `Attend` (how
tokens see each other). Checkpoints' names of the tensors are the family's KeyMap's to say (`tensors`).
One pass calls blocks as anybody's modules are called; several, whose messages overlap, call the blocks' parts.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from trinity.config import ModelConfig
from trinity.errors import ConfigError
from trinity.models.common.adapted import PassAdapters, Passing
from trinity.models.common.attention import Attend
from trinity.models.common.block import Block, Hop, Table
from trinity.models.common.experts import ExpertLayer
from trinity.models.common.keys import KeyMap
from trinity.models.common.layers import Device, Dtype, Embedding, Linear, RMSNorm, RotaryTable, rotary_table
from trinity.models.common.native_model import NativeModel
from trinity.models.common.router import Router, Routing
from trinity.ops.stored import FORMATS

ADAPTER = ".adapter."  # in the paths of what is beside a matrix (layers.py)


class Output(NamedTuple):
    hidden_TD: Tensor  # after the final norm
    routing: Sequence[Routing]  # one per MoE layer, in order
    logits_TV: Tensor | None = None  # where they were wanted and cost no call of their own


class Inputs(NamedTuple):
    """Inputs of one pass. `attend`: who sees whom; `adapters`: those of its rows, where any has one; `wants_logits`: of all."""

    ids_T: Tensor
    positions_T: Tensor
    attend: Attend
    adapters: PassAdapters | None = None
    wants_logits: bool = False


class Rotary(NamedTuple):
    """Rotation of queries and keys by position: the numbers of a head that are rotated, and the base of their angles."""

    dim: int
    theta: float


class Decoder(nn.Module):
    """Embedding, layers and final norm: what checkpoints call `model.`"""

    def __init__(
        self, config: ModelConfig, blocks: Sequence[Block], norm: RMSNorm, rotary: Rotary, embed_scale: float | None = None,
        *, device: Device = None, dtype: Dtype = None,
    ):  # fmt: skip
        super().__init__()
        self.rotary, self.embed_scale, self.is_exact = rotary, embed_scale, config.batch_invariant
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(blocks)
        self.norm, self.passing = norm, Passing()
        self._angles = RotaryTable(*rotary, config.max_position_embeddings)
        self.at_once: NativeModel | None = None  # the whole pass as one call, where that is possible

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, attend: Attend, experts: ExpertLayer, wants_logits: bool = False
    ) -> Output:
        h_TD = self.embed(ids_T)
        table = self.table(positions_T, h_TD.dtype)
        found = None if self.at_once is None else self.at_once(h_TD, table, attend, experts, wants_logits)
        return self.through(h_TD, table, attend, experts) if found is None else found

    def through(self, h_TD: Tensor, table: Table, attend: Attend, experts: ExpertLayer) -> Output:
        """The pass, layer by layer."""
        routings = []
        for block in self.layers:
            h_TD, routing = block(h_TD, table, attend, experts)
            routings.append(routing)
        return Output(self.norm(h_TD), tuple(routing for routing in routings if routing is not None))

    def forward_all(self, passes: Sequence[Inputs], experts: ExpertLayer) -> list[Output]:
        running = [_Pass(self, Inputs(*inputs), experts) for inputs in passes]
        for block in self.layers:
            assert isinstance(block, Block), "passes overlap around the parts of a block"
            for each in running:
                each.enter(block)
        for each in running:
            each.leave()
        return [Output(self.norm(each.h_TD), tuple(each.routings)) for each in running]

    def embed(self, ids_T: Tensor) -> Tensor:
        h_TD = self.embed_tokens(ids_T)
        return h_TD if self.embed_scale is None else h_TD * self.embed_scale

    def table(self, positions_T: Tensor, dtype: torch.dtype) -> Table:
        if self.is_exact and positions_T.is_cpu and not positions_T.is_meta:
            return self._angles(positions_T, dtype)
        return rotary_table(positions_T, *self.rotary, dtype, self.is_exact)


class _Pass:
    """One of several forward passes on its way through the layers."""

    def __init__(self, decoder: Decoder, inputs: Inputs, experts: ExpertLayer):
        self._attend, self._adapters, self._passing = inputs.attend, inputs.adapters, decoder.passing
        self.h_TD = decoder.embed(inputs.ids_T)
        self._table = decoder.table(inputs.positions_T, self.h_TD.dtype)
        self._experts = experts if inputs.adapters is None else inputs.adapters.over(experts)
        self._hop: Hop | None = None
        self.routings: list[Routing] = []

    def enter(self, block: Block) -> None:
        """Finish the layer before, and go as far into this one as its rows' leaving."""
        self.leave()
        with self._passing.of(self._adapters):
            self._hop = block.begin(self.h_TD, self._table, self._attend, self._experts)
        if self._hop.sent.routing is not None:
            self.routings.append(self._hop.sent.routing)

    def leave(self) -> None:
        if self._hop is not None:
            self.h_TD, self._hop = self._hop.finish(), None


class CausalLM(nn.Module):
    """A family's backbone with its untied head. `experts` is called, never owned: it is no submodule and has no state here.

    Weights are torch's defaults until the family's `init_weights` or `load`. `weight_dtype`: see `round_to`.
    """

    weight_dtype = "auto"

    def __init__(self, config: ModelConfig, keys: KeyMap, experts: ExpertLayer, decoder: Decoder):
        super().__init__()
        self.config, self._keys = config, keys
        self._names: dict[str, str] = {}  # path -> key, found once: every new version asks for all
        self._experts = (experts,)  # a tuple hides a Module from nn.Module's registration
        self.model = decoder
        like = decoder.embed_tokens.weight
        self.lm_head = Linear(config.hidden_size, config.vocab_size, device=like.device, dtype=like.dtype)
        for path, part in self.named_modules():
            part.is_exact = config.batch_invariant  # type: ignore[assignment]  # read by the parts that have it
            if isinstance(part, Linear):
                part.name, part.passing = self.key(f"{path}.weight").removesuffix(".weight"), decoder.passing
        decoder.at_once = NativeModel(self)

    @property
    def experts(self) -> ExpertLayer:
        return self._experts[0]

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, attend: Attend, adapters: PassAdapters | None = None,
        wants_logits: bool = False,
    ) -> Output:  # fmt: skip
        """ids and positions int64 [T]; `attend` says which tokens see which. T may be 0. Others: see `Inputs`."""
        experts = self.experts if adapters is None else adapters.over(self.experts)
        with self.model.passing.of(adapters):
            out: Output = self.model(ids_T, positions_T, attend, experts, wants_logits)
        return out

    def forward_all(self, passes: Sequence[Inputs]) -> list[Output]:
        """Independent passes side by side: while the rows of one are with their experts, another goes on."""
        return [self(*passes[0])] if len(passes) == 1 else self.model.forward_all(passes, self.experts)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] in the model's dtype, from hidden states after the final norm. No scaling, no soft cap."""
        return self.lm_head(hidden_TD)

    def with_experts(self, experts: ExpertLayer) -> Self:
        """The same modules, and so the same weights, calling other experts: another caller's dispatcher, say."""
        twin = copy.copy(self)
        twin._experts = (experts,)
        return twin

    # -- parts, and tensors by the names that checkpoints give them

    def blocks(self) -> Iterator[Block]:
        yield from (block for block in self.model.layers if isinstance(block, Block))

    @property
    def routers(self) -> dict[int, Router]:
        """Routers by layer, of those with routed experts."""
        found = ((block.layer, getattr(block.pre, "router", None)) for block in self.blocks())
        return {layer: router for layer, router in found if router is not None}

    @property
    def expert_bias(self) -> dict[int, Tensor]:
        """The fp32 selection biases [E] by layer: the buffers themselves, to be written in place."""
        return {layer: router.bias_E for layer, router in self.routers.items() if router.bias_E is not None}

    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in a checkpoint, without those of adapters: the live ones."""
        return {self.key(name): parameter for name, parameter in self.named_parameters() if ADAPTER not in name}

    def adapters(self) -> dict[str, nn.Parameter]:
        """The parameters of adapters, named after their matrices in a checkpoint: the live ones."""
        found = {name: parameter for name, parameter in self.named_parameters() if ADAPTER in name}
        return {self.key(name.replace(ADAPTER, ".")): parameter for name, parameter in found.items()}

    def biases(self) -> dict[str, Tensor]:
        """The selection biases by their names in a checkpoint: the live ones."""
        return {self.key(name): buffer for name, buffer in self.named_buffers()}

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds of the backbone, by its names there: the live tensors."""
        return {self.key(name): tensor for name, tensor in self.state_dict().items() if ADAPTER not in name}

    def key(self, path: str) -> str:
        """The name in a checkpoint of the tensor at a module path."""
        if path not in self._names:
            self._names[path] = self._keys.outside(path)
        return self._names[path]

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values in, by the names that checkpoints use, in this model's types. Raises KeyError for one that is missing."""
        rounded = self.rounded()
        for name, mine in self.tensors().items():
            if name in rounded:
                rounded[name].fill(tensors[name])
            else:
                mine.copy_(tensors[name])

    def round_to(self, weight_dtype: str, device: str = "cpu") -> None:
        """Keep all matrices but the embedding and the routers' in that format of trinity/ops/stored.py, for inference, where
        it is not the model's type. Their values are lost: load them. Raises ConfigError but on a CPU, and for sizes that
        are not the format's."""
        if weight_dtype in ("auto", self.config.dtype):
            return
        if device != "cpu":
            raise ConfigError(
                f"engine.weight_dtype {weight_dtype} is computed on CPUs, not on {device}; leave it out there"
            )
        gates = {router.gate for router in self.routers.values()}
        for part in self.modules():
            if isinstance(part, Linear) and part not in gates and part.weight.numel():
                self._check_inputs(part, weight_dtype)
                part.round_to(weight_dtype)
        self.weight_dtype = weight_dtype

    def _check_inputs(self, part: Linear, weight_dtype: str) -> None:
        if part.in_features % (wanted := FORMATS[weight_dtype].inputs):
            raise ConfigError(
                f"engine.weight_dtype {weight_dtype} needs multiples of {wanted}; {part.name} has {part.in_features} inputs"
            )

    def rounded(self) -> dict[str, Linear]:
        """Matrices that are kept in another format, by their names in a checkpoint."""
        parts = (part for part in self.modules() if isinstance(part, Linear) and part.is_rounded)
        return {f"{part.name}.weight": part for part in parts}
