"""The NIXL agent: one owner thread, awaitable transfers."""

from __future__ import annotations
