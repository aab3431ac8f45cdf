"""The names of all Prometheus metrics, declared as values and exported at the edges: one list for code, docs and dashboards."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """The declaration of one Prometheus metric; `buckets` are a histogram's upper bounds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SERVING_METRICS = (
    Metric("trinity_requests_total", "counter", "Requests answered, by route and status code.", ("route", "code")),
    Metric("trinity_ignored_fields_total", "counter", "Fields of requests that had no effect, by name.", ("field",)),
    Metric("trinity_requests_running", "gauge", "Sequences in the running batch."),
    Metric("trinity_requests_waiting", "gauge", "Sequences waiting to be scheduled."),
    Metric("trinity_gateways", "gauge", "Gateways that divide serve.max_concurrent_requests, as this one has heard."),
    Metric("trinity_displaced_total", "counter", "Requests that lost their place to a more urgent one."),
    Metric("trinity_engine_requests_running", "gauge", "Sequences in an engine's batch.", ("engine", "role")),
    Metric("trinity_engine_requests_waiting", "gauge", "Sequences waiting in an engine.", ("engine", "role")),
    Metric("trinity_engine_prefix_queries", "gauge", "Tokens that an engine looked up so far.", ("engine", "role")),
    Metric("trinity_engine_prefix_hits", "gauge", "Tokens of them that it found.", ("engine", "role")),
    Metric("trinity_client_requests", "gauge", "Sequences that hold a slot, by the name of their key.", ("client",)),
    Metric("trinity_prompt_tokens_total", "counter", "Prompt tokens of accepted requests."),
    Metric("trinity_generated_tokens_total", "counter", "Tokens generated."),
    Metric("trinity_time_to_first_token_seconds", "histogram", "From request to first token.", buckets=LONG_S),
    Metric("trinity_inter_token_seconds", "histogram", "Between two tokens of a request.", buckets=SHORT_S),
    Metric("trinity_request_seconds", "histogram", "From request to last token.", ("route",), LONG_S),
    Metric("trinity_sequence_seconds", "histogram", "From a sequence's request to its end.", buckets=LONG_S),
    Metric("trinity_queue_seconds", "histogram", "Until a sequence is first in a batch.", buckets=LONG_S),
    Metric("trinity_sequences_total", "counter", "Sequences that have ended, by why.", ("finished_reason",)),
    Metric(
        "trinity_continuation_seconds",
        "histogram",
        "From the loss of a sequence's engine to its next token from another; its count is that of continuations.",
        buckets=LONG_S,
    ),
    Metric("trinity_adapter_requests", "gauge", "Sequences of an adapter that run or wait.", ("adapter",)),
    Metric(
        "trinity_adapter_sequences_total",
        "counter",
        "Sequences of an adapter that have ended, by why; they count among all.",
        ("adapter", "finished_reason"),
    ),
    Metric("trinity_adapter_generated_tokens_total", "counter", "Tokens generated with an adapter.", ("adapter",)),
    Metric("trinity_kv_blocks_free", "gauge", "Blocks of the KV cache that no sequence holds."),
    Metric("trinity_kv_blocks", "gauge", "Blocks of the KV cache."),
    Metric("trinity_kv_blocks_cached", "gauge", "Blocks that no sequence holds and whose content may be found again."),
    Metric("trinity_kv_usage", "gauge", "Share of them that sequences hold."),
    Metric("trinity_prefix_queries_total", "counter", "Tokens of sequences that began, looked up in the prefix cache."),
    Metric("trinity_prefix_hits_total", "counter", "Tokens of them that were found there."),
    Metric("trinity_kv_tier_hits_total", "counter", "Tokens of them that came from the node's KV tier."),
    Metric("trinity_kv_tier_written_total", "counter", "Blocks written to the node's KV tier."),
    Metric("trinity_kv_tier_evicted_total", "counter", "Blocks of the node's KV tier that went for others."),
    Metric("trinity_kv_tier_bytes", "gauge", "Bytes of blocks in the KV tier of the node that has most."),
    Metric("trinity_computed_tokens_total", "counter", "Tokens that went through forward passes."),
    Metric("trinity_preemptions_total", "counter", "Sequences that gave their blocks back and were computed again."),
    Metric("trinity_weights_version", "gauge", "Optimizer step of the weights in use."),
    Metric("trinity_weights_versions_held", "gauge", "Versions that engines hold for pinned requests."),
    Metric("trinity_weights_quarantined_total", "counter", "Versions that gave logits which are not finite."),
    Metric("trinity_weights_switch_seconds", "gauge", "Seconds that it took to take up the version in use."),
    Metric("trinity_draft_tokens_total", "counter", "Tokens computed as drafts of what may come next."),
    Metric("trinity_accepted_draft_tokens_total", "counter", "Those of them that came true."),
    Metric("trinity_longest_pass_seconds", "gauge", "Longest step of an engine in the last minute that it worked."),
    Metric("trinity_passes_repeated_total", "counter", "Passes of requests repeated for want of good weights."),
)


# Of one engine: EngineStats.dispatch_seconds is {phase: (counts, sum)}, with a count for each of these buckets and one more for
# what is longer, not cumulative; EngineStats.num_dispatch_retries. Both since the engine began.
DISPATCH_PHASES = ("route", "send", "wait", "combine")
DISPATCH_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
DISPATCH_SECONDS = Metric(
    "trinity_dispatch_seconds", "histogram", "Of one layer's rows, by phase.", ("phase",), DISPATCH_S
)


DISPATCH_METRICS = (
    DISPATCH_SECONDS,
    Metric("trinity_dispatch_retries_total", "counter", "Rows sent again, to another replica or a restarted shard."),
)


# Of the pool, by its placement service; while that is away, `up` is 0 and the others stay as they were.
PLACEMENT_METRICS = (
    Metric("trinity_placement_up", "gauge", "1 while the placement service answers."),
    Metric("trinity_placement_epoch", "gauge", "Epoch of the placement table."),
    Metric("trinity_placement_imbalance", "gauge", "Largest / mean rows per second of the shards; 1 is even."),
    Metric("trinity_placement_survives", "gauge", "So many may be lost at once, and no expert with them.", ("what",)),
    Metric("trinity_placement_replicas", "gauge", "Replicas of all experts."),
    Metric("trinity_placement_max_replicas", "gauge", "Replicas of the expert that has most."),
    Metric("trinity_placement_shards", "gauge", "Shards, by what they are doing.", ("state",)),
    Metric("trinity_placement_changes_total", "counter", "Changes of the table that have ended.", ("result",)),
    Metric("trinity_placement_copies_total", "counter", "Replicas that those changes copied."),
    Metric("trinity_placement_copied_bytes_total", "counter", "Bytes that those changes copied."),
    Metric("trinity_placement_recoveries_total", "counter", "Shards lost and replaced."),
    Metric("trinity_placement_change_seconds", "gauge", "Seconds that the latest change took, or has taken so far."),
    Metric("trinity_shard_rows_per_second", "gauge", "Rows that the shard computes.", ("shard",)),
    Metric("trinity_shard_weight_bytes", "gauge", "Bytes of its weights.", ("shard",)),
)


# Of a training job, by its worker 0 (actors/train_metrics.py). Reasons: trinity/train/retry.py.
TRAINING_METRICS = (
    Metric("trinity_train_step", "gauge", "Steps taken or skipped: batches consumed."),
    Metric("trinity_train_loss", "gauge", "Cross-entropy of the last step, nats per token."),
    Metric("trinity_train_validation_loss", "gauge", "Cross-entropy of the last validation, nats per token."),
    Metric("trinity_train_source_validation_loss", "gauge", "The same of one source of a mixture.", ("source",)),
    Metric("trinity_train_score", "gauge", "Of the last weights that were asked, by task.", ("task",)),
    Metric("trinity_train_gate_open", "gauge", "1 where they passed the task's gate, 0 where not.", ("task",)),
    Metric("trinity_train_grad_norm", "gauge", "Norm of the last step's gradient, before it is clipped."),
    Metric("trinity_train_tokens_total", "counter", "Tokens trained on."),
    Metric("trinity_train_source_tokens_total", "counter", "Those of each source of a mixture.", ("source",)),
    Metric("trinity_train_tokens_per_second", "gauge", "Tokens of the last step over its seconds, retries apart."),
    Metric(
        "trinity_train_tokens_per_second_per_gpu", "gauge", "The same over workers' and shards' GPUs, where it has any."
    ),
    Metric("trinity_train_mfu", "gauge", "Model FLOPs utilisation of the last step, of 1, where GPUs' peak is known."),
    Metric("trinity_train_phase_seconds", "histogram", "Of a step, by phase.", ("phase",), LONG_S),
    Metric("trinity_train_retries_total", "counter", "Attempts at a step that came to nothing.", ("reason",)),
    Metric("trinity_train_skipped_total", "counter", "Steps skipped for numbers that are not finite."),
    Metric("trinity_train_checkpoint_seconds", "histogram", "To write a checkpoint, beside training.", buckets=LONG_S),
    Metric("trinity_train_max_vio", "gauge", "Most loaded expert / mean - 1 in the last step.", ("layer",)),
)


GPU_METRICS = ("trinity_train_tokens_per_second_per_gpu", "trinity_train_mfu")  # exported once there is a value
ALL_METRICS = SERVING_METRICS + DISPATCH_METRICS + PLACEMENT_METRICS + TRAINING_METRICS
