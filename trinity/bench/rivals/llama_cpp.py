"""llama.cpp behind the few methods of our engine that the benches call: greedy decoding of sequences that begin together.

Its shared libraries are those that Node's package `@node-llama-cpp/linux-x64` carries, called by their C API through ctypes;
the structures below are those of its header at VERSION, and of no other. Legend: V vocabulary.
Decisions: settings are its own defaults, but for threads and sizes; and where weights are float32, keys and values are too and
attention is not its flash attention, whose logits are some 1e-2 off, so that tokens can be compared. It picks the backend for
this processor itself.
"""

import ctypes as c
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trinity.errors import ConfigError, TrinityError

if TYPE_CHECKING:
    from trinity.engine.request import Delta, SamplingParams

VERSION = "v0.5.0"
F32 = 0  # ggml's number of the type
ROOM = 256  # a sequence's place is a multiple of so many tokens


class ModelParams(c.Structure):
    _fields_ = [
        ("devices", c.c_void_p), ("tensor_buft_overrides", c.c_void_p), ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int), ("load_mode", c.c_int), ("lazy_mode", c.c_int), ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p), ("progress_callback", c.c_void_p), ("progress_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p), ("vocab_only", c.c_bool), ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool), ("no_host", c.c_bool), ("no_alloc", c.c_bool), ("load_mtp", c.c_bool),
    ]  # fmt: skip


class ContextParams(c.Structure):
    _fields_ = [
        ("n_ctx", c.c_uint32), ("n_batch", c.c_uint32), ("n_ubatch", c.c_uint32), ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32), ("n_outputs_max", c.c_uint32), ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32), ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int), ("rope_scaling_type", c.c_int), ("pooling_type", c.c_int), ("attention_type", c.c_int),
        ("flash_attn_type", c.c_int),
        ("rope_freq_base", c.c_float), ("rope_freq_scale", c.c_float), ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float), ("yarn_beta_fast", c.c_float), ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32), ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p), ("cb_eval_user_data", c.c_void_p), ("type_k", c.c_int), ("type_v", c.c_int),
        ("abort_callback", c.c_void_p), ("abort_callback_data", c.c_void_p),
        ("embeddings", c.c_bool), ("offload_kqv", c.c_bool), ("no_perf", c.c_bool), ("op_offload", c.c_bool),
        ("swa_full", c.c_bool), ("kv_unified", c.c_bool),
        ("samplers", c.c_void_p), ("n_samplers", c.c_size_t), ("ctx_other", c.c_void_p),
    ]  # fmt: skip


class Batch(c.Structure):
    _fields_ = [("n_tokens", c.c_int32)]
    _fields_ += [(name, c.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")]


def library(folder: Path) -> c.CDLL:
    """llama.cpp, its backends loaded. Raises ConfigError where the folder has none of VERSION."""
    found = next(folder.rglob(f"libllama.{VERSION}.so"), None)
    if found is None:
        raise ConfigError(f"{folder} has no libllama.{VERSION}.so: make interop-rivals")
    ggml, lib = c.CDLL(str(found.with_name(f"libggml.{VERSION}.so"))), c.CDLL(str(found))
    ggml.ggml_backend_load_all_from_path(str(found.parent).encode())
    pointers = ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory", "llama_model_get_vocab")
    for name in pointers:
        getattr(lib, name).restype = c.c_void_p
    lib.llama_model_default_params.restype = ModelParams
    lib.llama_model_load_from_file.argtypes = [c.c_char_p, ModelParams]
    lib.llama_context_default_params.restype = ContextParams
    lib.llama_init_from_model.argtypes = [c.c_void_p, ContextParams]
    lib.llama_decode.argtypes = [c.c_void_p, Batch]
    lib.llama_get_logits_ith.argtypes = [c.c_void_p, c.c_int32]
    lib.llama_get_logits_ith.restype = c.POINTER(c.c_float)
    lib.llama_memory_clear.argtypes = [c.c_void_p, c.c_bool]
    for name in ("llama_get_memory", "llama_model_get_vocab", "llama_vocab_n_tokens"):
        getattr(lib, name).argtypes = [c.c_void_p]
    lib.llama_backend_init()
    return lib


@dataclass
class Waiting:
    """A request: its place in the cache, tokens to be computed next, and how many it has seen and may still say."""

    name: str
    place: int
    tokens: list[int]
    num_left: int
    num_seen: int = 0


class LlamaCpp:
    """Call `add` for all requests, then `step` while `has_work`; and again, when all have ended."""

    def __init__(self, path: Path, folder: Path, threads: int, max_num_seqs: int, max_model_len: int):
        lib = self._lib = library(folder)
        model = _made(lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params()), path)
        params = lib.llama_context_default_params()
        params.n_ctx = max_num_seqs * ROOM * -(-max_model_len // ROOM)
        params.n_seq_max, params.n_batch = max_num_seqs, params.n_ctx
        params.n_threads = params.n_threads_batch = threads
        if "float32" in path.name:
            params.type_k = params.type_v = F32
            params.flash_attn_type = 0
        self._context = _made(lib.llama_init_from_model(model, params), path)
        self._num_V = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._open: list[Waiting] = []

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def add(self, request_id: str, prompt: Sequence[int], params: "SamplingParams") -> None:
        assert params.temperature == 0, "llama.cpp is asked for the likeliest tokens only"
        self._open.append(Waiting(request_id, len(self._open), list(prompt), params.max_tokens))

    def step(self) -> list["Delta"]:
        """Compute whole prompts, or a token of each request; -> a token of each."""
        from trinity.engine.request import Delta

        said = []
        for request, token in zip(self._open, self._decode(), strict=True):
            request.num_seen += len(request.tokens)
            request.tokens, request.num_left = [token], request.num_left - 1
            reason: Any = None if request.num_left else "length"
            said.append(Delta(request.name, token_ids=(token,), finish_reason=reason))
        self._open = [request for request in self._open if request.num_left]
        if not self._open:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return said

    def _decode(self) -> list[int]:
        """-> the likeliest token after each request's tokens."""
        nums = [len(request.tokens) for request in self._open]
        last = np.cumsum(nums) - 1
        arrays = _arrays(self._open, nums, last)
        if code := self._lib.llama_decode(self._context, Batch(sum(nums), *map(_address, arrays[:6]))):
            raise TrinityError(f"llama_decode returned {code}")
        rows = (self._lib.llama_get_logits_ith(self._context, int(at)) for at in last)
        return [int(np.ctypeslib.as_array(row, (self._num_V,)).argmax()) for row in rows]


def _arrays(requests: Sequence[Waiting], nums: Sequence[int], last: np.ndarray) -> list[np.ndarray | None]:
    """Fields of a Batch after the number of its tokens, and what the last but one points into."""
    token = np.concatenate([request.tokens for request in requests]).astype(np.int32)
    seen = [np.arange(request.num_seen, request.num_seen + num) for request, num in zip(requests, nums, strict=True)]
    place = np.repeat([request.place for request in requests], nums).astype(np.int32)
    wanted = np.zeros(len(token), np.int8)
    wanted[last] = 1
    places = (place.ctypes.data + place.itemsize * np.arange(len(place))).astype(np.uint64)
    return [token, None, np.concatenate(seen).astype(np.int32), np.ones_like(token), places, wanted, place]


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _made(pointer: int | None, path: Path) -> int:
    if not pointer:
        raise TrinityError(f"llama.cpp does not take {path}; what it said is above")
    return pointer
