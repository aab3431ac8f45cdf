"""vLLM's CPU backend behind the few methods of our engine that the benches call.

Decisions: its engine runs in this process, without a server or a worker process, which spares it their messages; it compiles
the model as its own default is, unless `eager`. What it reads from its environment is there before it starts (programs.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trinity.engine.request import Delta, SamplingParams


class VllmCpu:
    """Call `add` at any time, and `step` while `has_work`."""

    def __init__(
        self,
        path: Path,
        dtype: str,
        eager: bool,
        block_size: int | None,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        kv_cache_bytes: int,
    ):
        from vllm import LLM

        llm = LLM(
            str(path),
            dtype=dtype,  # by itself it would make bfloat16 of float32
            skip_tokenizer_init=True,
            enforce_eager=eager,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_bytes,
            enable_prefix_caching=True,
            **({"block_size": block_size} if block_size else {}),
        )
        self._engine = llm.llm_engine
        compilation = self._engine.vllm_config.compilation_config
        self.mode = "eager" if compilation.mode.value == 0 else f"compiled by {compilation.backend}"

    @property
    def has_work(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def add(self, request_id: str, prompt: Sequence[int], params: "SamplingParams") -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        theirs = SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            ignore_eos=params.ignore_eos,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, theirs)

    def step(self) -> list["Delta"]:
        from trinity.engine.request import Delta

        return [
            Delta(
                found.request_id,
                token_ids=tuple(found.outputs[0].token_ids),
                finish_reason="length" if found.finished else None,
                num_cached_tokens=found.num_cached_tokens or 0,
            )
            for found in self._engine.step()
        ]
