"""Fields of vLLM's answers beside OpenAI's, where a request asks for them: token ids, and the experts of each token.

Decisions: `prompt_token_ids` is in each choice of a completion, whose prompts may be several, and beside the choices of a
chat; in a stream, in the first chunk. `routed_experts` is the base64 of a .npy file [tokens - 1, MoE layers, K] of prompt and
answer (the last token went through no expert), in the last chunk of a stream.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving.http import schema
from serving.http.openai import usage
from trinity.engine.request import Delta


@dataclass(frozen=True)
class Extras:
    """Extra fields that one request asks for. `prompts` are the token ids behind each choice."""

    body: schema.Generation
    prompts: Sequence[Sequence[int]]

    @property
    def is_chat(self) -> bool:
        return isinstance(self.body, schema.ChatRequest)

    def of_answer(self) -> dict[str, Any]:
        """Fields of the answer as a whole, or of a stream's first chunk."""
        return self._prompt(0) if self.is_chat else {}

    def of_choice(self, index: int) -> dict[str, Any]:
        """Fields of a whole choice, or of its first chunk."""
        return {} if self.is_chat else self._prompt(index)

    def of_tokens(self, token_ids: Sequence[int], experts_TLK: np.ndarray | None) -> dict[str, Any]:
        """Fields about these tokens of a choice."""
        ids = {"token_ids": list(token_ids)} if self.body.return_token_ids else {}
        return ids if experts_TLK is None else ids | {"routed_experts": base64.b64encode(npy(experts_TLK)).decode()}

    def so_far(self, delta: Delta) -> dict[str, Any]:
        """Usage in every chunk (`continuous_usage_stats`): that of its choice until then."""
        return {"usage": usage([delta], 1)} if self.body.continuous_usage else {}

    def _prompt(self, index: int) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.prompts[index])} if self.body.return_token_ids else {}


def npy(experts_TLK: np.ndarray) -> bytes:
    """A .npy file, of uint8 or uint16."""
    file = io.BytesIO()
    np.save(file, experts_TLK.view(np.uint16) if experts_TLK.dtype == np.int16 else experts_TLK, allow_pickle=False)
    return file.getvalue()
