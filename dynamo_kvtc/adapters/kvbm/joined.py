"""Transfers that KVBM and our tiers make for one request: done when both are."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["JoinedTransfers"]


class JoinedTransfers:
    """Holds back what one of two parties reports until the other has reported it too.

    vLLM takes one report per request, and frees or reads the request's blocks on it. A request that only one
    party works for is passed on at once. Bounded by the requests in flight: each is dropped on its second
    report.
    """

    def __init__(self) -> None:
        self._reports_missing: dict[str, int] = {}

    def expect(self, request_ids: Iterable[str]) -> None:
        """Note requests that both parties will report."""
        for request_id in request_ids:
            self._reports_missing[request_id] = 2

    def report(self, *reports: Iterable[str]) -> set[str]:
        """Take each party's report of one step and return the requests that are now done."""
        done = set()
        for request_ids in reports:
            for request_id in request_ids:
                missing = self._reports_missing.pop(request_id, 1) - 1
                if missing:
                    self._reports_missing[request_id] = missing
                else:
                    done.add(request_id)
        return done
