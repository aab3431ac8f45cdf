"""Log-probabilities of prompt tokens out of a pass's hidden states, a slice of positions at a time.

Legend: T tokens of one chunk, R those of a slice, D model, V vocabulary, N alternatives.
Decisions: the logits of a whole prompt are never there at once, because at 200,192 tokens each position has 0.8 MB of them: a
slice has SLICE_BYTES, and its log-probabilities as much again. The token's own value and the alternatives are read out of one
tensor, so that they are the same float where the token is the most likely. Only chunks of requests that ask come here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trinity.engine.prompt_logprobs import PromptLogprobs
from trinity.engine.request import Chunk, Sequence

SLICE_BYTES = 64 << 20  # of logits in float32


def score(chunk: Chunk, hidden_TD: Tensor, vocab_size: int, logits: Callable[[Tensor], Tensor]) -> None:
    """Write down how likely each prompt token after one of the chunk's is. Repeating it is harmless.

    `hidden_TD` are the chunk's hidden states after the final norm; `logits` makes [R, V] of [R, D].
    """
    scores = _begun(chunk.sequence, vocab_size)
    end = scored_end(chunk)
    rows = max(1, SLICE_BYTES // (4 * vocab_size))
    for start in range(chunk.start, end, rows):
        stop = min(start + rows, end)
        _write(scores, start, stop, logits(hidden_TD[start - chunk.start : stop - chunk.start]))


def scored_end(chunk: Chunk) -> int:
    """The end of those of its positions that a prompt token follows."""
    return min(chunk.end, chunk.sequence.num_prompt - 1)


def is_damaged(chunk: Chunk) -> bool:
    """Say whether what this pass wrote down is not finite."""
    scores = chunk.sequence.prompt_logprobs
    return scores is not None and not scores.is_finite(chunk.start, scored_end(chunk))


def _begun(sequence: Sequence, vocab_size: int) -> PromptLogprobs:
    """Made here and not with the request, so that one that waits holds nothing."""
    if sequence.prompt_logprobs is None:
        num_top = min(sequence.params.prompt_logprobs or 0, vocab_size)
        sequence.prompt_logprobs = PromptLogprobs.empty(sequence.prompt_ids, num_top)
    return sequence.prompt_logprobs


def _write(scores: PromptLogprobs, start: int, stop: int, logits_RV: Tensor) -> None:
    logprobs_RV = logits_RV.float().log_softmax(-1)
    token_R = torch.from_numpy(scores.token_ids_T[start + 1 : stop + 1]).to(logits_RV.device, torch.int64)
    own_R1 = logprobs_RV.gather(1, token_R[:, None])
    top = logprobs_RV.topk(scores.top_ids_SN.shape[1])
    scores.logprob_S[start:stop] = own_R1[:, 0].cpu().numpy()
    scores.rank_S[start:stop] = 1 + (logprobs_RV > own_R1).sum(-1).cpu().numpy()
    scores.top_ids_SN[start:stop] = top.indices.cpu().numpy()
    scores.top_logprobs_SN[start:stop] = top.values.cpu().numpy()
