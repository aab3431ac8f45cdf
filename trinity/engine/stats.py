"""Numbers that an engine says of itself. Host code, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineStats:
    """Sequences, cache blocks and versions held now; the other numbers since the start, the last switch's seconds apart.

    `num_idle_blocks`: of the free ones, those whose content may be found again. `num_prefix_queries` and `num_prefix_hits` are
    tokens of requests that began, and of these the ones that were cached; `num_computed_tokens` went through passes. Of the
    node's KV tier: tokens that came from it, blocks that this engine wrote to it and that went for others, bytes of all blocks
    in it, whoever wrote them.
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_total_blocks: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_tier_hits: int = 0
    num_tier_written: int = 0
    num_tier_evicted: int = 0
    tier_bytes: int = 0
    num_idle_blocks: int = 0
    num_computed_tokens: int = 0
    num_versions_held: int = 0
    num_quarantined: int = 0
    num_repeats: int = 0
    num_drafted: int = 0  # tokens of drafts
    num_accepted: int = 0  # those of them that came true
    switch_seconds: float = 0.0
    longest_pass_seconds: float = 0.0  # of the last minute
    num_dispatch_retries: int = 0
    dispatch_seconds: Mapping[str, tuple[list[int], float]] = field(
        default_factory=dict
    )  # as in trinity/observability/
