"""vLLM's names for our metrics: people's dashboards ask for these. The same numbers once more, with the model's name."""

import time
from collections.abc import Iterator
from typing import Any, Protocol

from prometheus_client.core import Metric

from trinity.config import MOST_ADAPTERS

NAMES = {
    "vllm:num_requests_running": "trinity_requests_running",
    "vllm:num_requests_waiting": "trinity_requests_waiting",
    "vllm:kv_cache_usage_perc": "trinity_kv_usage",
    "vllm:num_preemptions": "trinity_preemptions_total",
    "vllm:prefix_cache_queries": "trinity_prefix_queries_total",
    "vllm:prefix_cache_hits": "trinity_prefix_hits_total",
    "vllm:spec_decode_num_draft_tokens": "trinity_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens": "trinity_accepted_draft_tokens_total",
    "vllm:prompt_tokens": "trinity_prompt_tokens_total",
    "vllm:generation_tokens": "trinity_generated_tokens_total",
    "vllm:request_success": "trinity_sequences_total",
    "vllm:time_to_first_token_seconds": "trinity_time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds": "trinity_inter_token_seconds",
    "vllm:e2e_request_latency_seconds": "trinity_sequence_seconds",
    "vllm:request_queue_time_seconds": "trinity_queue_seconds",
}


class Metrics(Protocol):
    """Metrics of the client library by our names."""

    def __getitem__(self, name: str) -> Any: ...


class VllmNames:
    """A collector of what has been counted under our names."""

    def __init__(self, metrics: Metrics, model: str):
        self._metrics, self._labels = metrics, {"model_name": model, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        for name, ours in NAMES.items():
            for family in self._metrics[ours].collect():
                yield self._renamed(family, name)
        yield from self._adapters()

    def _adapters(self) -> Iterator[Metric]:
        """Adapters that requests run with, as gateways which choose a server by them ask for; nothing before there is one."""
        [family] = self._metrics["trinity_adapter_requests"].collect()
        if family.samples:
            running = ",".join(sample.labels["adapter"] for sample in family.samples if sample.value)
            labels = {"max_lora": str(MOST_ADAPTERS), "running_lora_adapters": running, "waiting_lora_adapters": ""}
            found = Metric("vllm:lora_requests_info", "Running stats on LoRA requests.", "gauge")
            found.add_sample(found.name, labels, time.time())
            yield found

    def _renamed(self, family: Metric, name: str) -> Metric:
        found = Metric(name, family.documentation, family.type)
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found.add_sample(
                    name + sample.name.removeprefix(family.name), {**self._labels, **sample.labels}, sample.value
                )
        return found
