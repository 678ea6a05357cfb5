"""A name that transformers changed: a model's cache was ``past_key_values`` and is ``cache`` from 5.24."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["cache_argument", "cache_of"]


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a cache to a model's forward pass."""
    forward: Callable[..., Any] = model.forward
    name = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
    return {name: cache}


def cache_of(output: Any) -> Any:
    """Return the cache that a forward pass filled."""
    cache = getattr(output, "cache", None)
    return output.past_key_values if cache is None else cache
