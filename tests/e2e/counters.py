"""Who served a prompt, from the worker's own counters: no test looks at a clock."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

PROMPT_TOKENS = "vllm:prompt_tokens_by_source_total"


class Counters:
    """The metrics of a worker at one moment.

    Parameters
    ----------
    text : str
        Prometheus text.
    """

    def __init__(self, text: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all samples with these labels."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def prompt_tokens(self) -> Sources:
        """Return where all prompt tokens so far came from."""
        return Sources(
            *(
                int(self.total(PROMPT_TOKENS, source=source))
                for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
            )
        )


@dataclass(frozen=True)
class Sources:
    """Prompt tokens by who served them: the engine's own work, its prefix cache, a connector."""

    computed: int
    local_cache: int
    external: int

    def __sub__(self, earlier: Sources) -> Sources:
        return Sources(
            self.computed - earlier.computed,
            self.local_cache - earlier.local_cache,
            self.external - earlier.external,
        )
