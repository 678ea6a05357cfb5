"""One pass of one variant in a process of its own: a real vLLM answers a trace, request by request.

Reads one JSON object from standard input: ``model``, ``dtype``, ``connector`` (or null), ``prefix_caching``,
``blocks`` and ``block_size`` of the paged cache, ``longest`` (tokens of the longest request) and ``requests``
(lists of token ids). The last line that it writes is one JSON object: an `Answer` per request, what the tiers
counted, and what Prometheus would have read after each request.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.local_dynamo.vllm_cpu import VLLM_ON_CPU

# Before vLLM is imported: it reads them while it is.
os.environ.update(VLLM_ON_CPU, VLLM_LOGGING_LEVEL="WARNING")

_SETTLE_TIMEOUT_S = 60.0
_SOURCES = {
    "local_cache_hit": "in_cache",
    "external_kv_transfer": "onboarded",
    "local_compute": "computed",
}


@dataclass(frozen=True)
class Answer:
    """What one request took.

    Attributes
    ----------
    ttft_s : float
        From the request to its first new token.
    in_cache, onboarded, computed : int
        Where the KV of its tokens came from, by vLLM's own counters: its prefix cache, the tiers, the model.
    first_token : int
        The token, to compare variants with.
    offload_s : float
        From the first token to the end of the offload that the request set off.
    """

    ttft_s: float
    in_cache: int
    onboarded: int
    computed: int
    first_token: int
    offload_s: float


class Engine:
    """An engine that answers one request at a time."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        options: dict[str, Any] = {}
        if asked["connector"] is not None:
            options["kv_transfer_config"] = asked["connector"]
        self._llm = LLM(
            model=asked["model"],
            dtype=asked["dtype"],
            enforce_eager=True,
            max_num_seqs=1,
            max_model_len=asked["longest"] + 16,
            # A prefill is one step, whatever its length.
            max_num_batched_tokens=asked["longest"] + 16,
            block_size=asked["block_size"],
            num_gpu_blocks_override=asked["blocks"],
            enable_prefix_caching=asked["prefix_caching"],
            disable_log_stats=False,
            **options,
        )
        self._sampling = SamplingParams(temperature=0.0, max_tokens=1)
        self._has_tiers = asked["connector"] is not None

    def answer(self, token_ids: Sequence[int]) -> Answer:
        """Answer a request, then wait until what is new of it has been offloaded."""
        before = self._sources()
        start = time.perf_counter()
        (output,) = self._llm.generate(
            [{"prompt_token_ids": list(token_ids)}], self._sampling, use_tqdm=False
        )
        answered = time.perf_counter()
        self._settle()
        after = self._sources()
        sources = {name: after.get(key, 0) - before.get(key, 0) for key, name in _SOURCES.items()}
        return Answer(
            ttft_s=answered - start,
            first_token=output.outputs[0].token_ids[0],
            offload_s=time.perf_counter() - answered,
            **sources,
        )

    def status(self) -> dict[str, Any] | None:
        """Return what the tiers say of themselves, if there are any."""
        if not self._has_tiers:
            return None
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        status: dict[str, Any] = get_kv_transfer_group()._worker._adapter.status().to_dict()
        return status

    def close(self) -> None:
        """End the engine, and with it the tiers, which write down what they have to."""
        self._llm.llm_engine.engine_core.shutdown()

    def _settle(self) -> None:
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while (status := self.status()) is not None and status["offloads_pending"]:
            if time.monotonic() > deadline:
                raise RuntimeError("an offload did not end within a minute")
            # Steps without a request are how the connector learns that an offload has ended.
            self._llm.llm_engine.step()
            time.sleep(0.002)

    def _sources(self) -> dict[str, int]:
        return {
            metric.labels["source"]: int(metric.value)
            for metric in self._llm.get_metrics()
            if metric.name == "vllm:prompt_tokens_by_source"
        }


def scrape(status: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Return what Prometheus would read now, by series."""
    from dynamo_kvtc.observability import metric_families

    values = {
        f"{family.metric.name}{{{','.join(labels)}}}": value["sum"] if isinstance(value, dict) else value
        for family in metric_families(status)
        for labels, value in family.samples
    }
    return {"seconds": seconds, "values": values}


def main() -> None:
    asked = json.load(sys.stdin)
    began = time.monotonic()
    engine = Engine(asked)
    # What is compiled or allocated at the first request is paid here, with text that the trace does not hold.
    engine.answer([7] * 300)
    engine.answer([7] * 300)
    answers, scrapes, status = [], [], None
    for number, token_ids in enumerate(asked["requests"]):
        answers.append(asdict(engine.answer(token_ids)))
        status = engine.status()
        if status is not None:
            scrapes.append(scrape(status, time.monotonic() - began))
        print(f"answered {number + 1} of {len(asked['requests'])}", file=sys.stderr, flush=True)
    engine.close()
    print("\n" + json.dumps({"answers": answers, "status": status, "scrapes": scrapes}), flush=True)


if __name__ == "__main__":
    main()
