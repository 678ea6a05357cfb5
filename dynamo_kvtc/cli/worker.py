"""A running worker's status, for the commands that show it."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import typer

from dynamo_kvtc.errors import ConfigError

__all__ = ["DEFAULT_URL", "UrlOption", "fetch_status"]

#: Where a worker listens if its configuration says ``metrics_port: 9464``.
DEFAULT_URL = "http://127.0.0.1:9464"

_TIMEOUT_S = 5.0
_MOST_BYTES = 16 << 20

UrlOption = Annotated[str, typer.Option("--url", help="The worker's endpoint (observability.metrics_port).")]


def fetch_status(url: str) -> dict[str, Any]:
    """Return the status that a worker's endpoint gives.

    Raises
    ------
    ConfigError
        If no worker answers there, or something else does.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no address of an endpoint; it begins with http://")
    try:
        with urlopen(f"{url.rstrip('/')}/status", timeout=_TIMEOUT_S) as answer:
            status = json.loads(answer.read(_MOST_BYTES))
    except HTTPError as error:
        with error:
            raise ConfigError(
                f"the endpoint {url} answers {error.code}: {error.read(500).decode()}"
            ) from error
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"no worker answers at {url}: {reason}; set observability.metrics_port in its configuration, and "
            "--url here"
        ) from error
    if not isinstance(status, dict) or "counters" not in status:
        raise ConfigError(f"what answers at {url} is not a worker of dynamo_kvtc")
    return status
