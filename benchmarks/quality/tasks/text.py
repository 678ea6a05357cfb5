"""Next tokens of held-out text: divergence, agreement and perplexity, domain by domain.

The context is followed by one token of suffix, so that every one of the scored tokens is predicted over the
cache under test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.quality.domains import DOMAINS
from benchmarks.quality.tasks.base import Document, Probe, Task
from dynamo_kvtc.calibration.text import Documents
from dynamo_kvtc.errors import EvaluationError

__all__ = ["TextTask"]


@dataclass(frozen=True)
class TextTask(Task):
    """Documents of each domain's held-out text.

    Attributes
    ----------
    per_domain : int
        Documents of each domain.
    context_tokens, scored_tokens : int
        Sizes of a document's two parts.
    domains : tuple[str, ...]
        Names of `DOMAINS`.
    """

    per_domain: int = 3
    context_tokens: int = 2048
    scored_tokens: int = 256
    domains: tuple[str, ...] = tuple(DOMAINS)

    name = "text"
    metrics = ("kl", "top1", "perplexity")

    def documents(self, tokenizer: Any) -> list[Document]:
        """Cut each text evenly into documents; see `Task.documents`.

        Raises
        ------
        EvaluationError
            If a text is too short for its documents.
        """
        wanted = self.context_tokens + 1 + self.scored_tokens
        found = []
        for domain in self.domains:
            texts = Documents(
                [DOMAINS[domain].heldout],
                tokenizer,
                tokens=self.per_domain * wanted,
                document_tokens=wanted,
                seed=0,
            )
            for ids in texts:
                if len(ids) < wanted:
                    raise EvaluationError(
                        f"the {domain} text does not hold {self.per_domain} documents of {wanted} tokens"
                    )
                context, answer = ids[: self.context_tokens], ids[self.context_tokens + 1 :]
                probe = Probe((ids[self.context_tokens],), tuple(answer))
                found.append(Document(domain, tuple(context), (probe,)))
        return found
