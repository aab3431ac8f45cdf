"""Several Deltas of one request as one: what a pass gave it, or what waited for its caller."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from trinity.engine.request import Delta


def joined(deltas: Sequence[Delta]) -> Delta:
    """One Delta of those that follow each other in one answer."""
    if len(deltas) == 1:
        return deltas[0]
    return replace(
        deltas[-1],
        text="".join(each.text for each in deltas),
        token_ids=tuple(token for each in deltas for token in each.token_ids),
        logprobs=tuple(one for each in deltas for one in each.logprobs or ()) or None,
        prompt_logprobs=deltas[0].prompt_logprobs,
    )


def by_request(deltas: Iterable[Delta]) -> list[Delta]:
    """One Delta of each request. One that ends in an error stays by itself: its caller has the tokens before it first."""
    found: dict[tuple[str, bool], list[Delta]] = {}
    for delta in deltas:
        found.setdefault((delta.request_id, delta.finish_reason == "error"), []).append(delta)
    return [joined(each) for each in found.values()]
