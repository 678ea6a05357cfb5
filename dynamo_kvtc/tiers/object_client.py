"""Requests to an S3 bucket over obstore, an asynchronous client in Rust, with typed errors.

Credentials, as usual for S3: ``AWS_ACCESS_KEY_ID`` and so on, a web identity token, the container's or the
machine's role; where none of these is set, the shared credentials file. They are never in the configuration.
"""

from __future__ import annotations

import asyncio
import configparser
import datetime
import importlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import (
    MissingDependencyError,
    ObjectCorruptError,
    ObjectMissingError,
    TierError,
    TransferError,
    TransferTimeoutError,
)

__all__ = ["AccessDeniedError", "BucketClient", "BucketMissingError", "BucketPlace", "static_credentials"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

# How often the credentials file is read again: secrets are rotated while the process runs.
_CREDENTIALS_AGE = datetime.timedelta(minutes=5)

_ELSEWHERE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


class BucketMissingError(TransferError):
    """There is no such bucket."""


class AccessDeniedError(TransferError):
    """The bucket refuses the credentials, or what is asked of it."""


@dataclass(frozen=True, slots=True)
class BucketPlace:
    """Where objects live.

    Attributes
    ----------
    bucket, prefix : str
        The bucket, and what every name in it begins with; a slash follows by itself.
    endpoint : str, optional
        URL of the server; None for AWS.
    region : str
        Region that requests are signed for.
    virtual_hosted : bool
        Whether the bucket is part of the host name; most servers other than AWS want it in the path.
    """

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str = "us-east-1"
    virtual_hosted: bool = False

    @property
    def description(self) -> str:
        """For messages."""
        return f"s3://{self.bucket}/{self.prefix}" + (f" at {self.endpoint}" if self.endpoint else "")


class BucketClient:
    """The requests that the object tier needs. Every one has a deadline, none is repeated by itself.

    Parameters
    ----------
    timeout_s : float
        Deadline of a request, however long its caller would wait.

    Raises
    ------
    MissingDependencyError
        If obstore is not installed.
    TierError
        If the place or the credentials file cannot be understood.
    """

    def __init__(self, place: BucketPlace, timeout_s: float) -> None:
        self.place = place
        self.timeout_s = timeout_s
        self._obs = _load_obstore()
        options: dict[str, Any] = {
            "allow_http": (place.endpoint or "").startswith("http://"),
            # Ours comes first: it is the one that tells a deadline from another failure.
            "timeout": datetime.timedelta(seconds=timeout_s + 5.0),
            "connect_timeout": datetime.timedelta(seconds=min(timeout_s, 5.0)),
        }
        try:
            if bundle := os.environ.get("AWS_CA_BUNDLE"):
                options["root_certificate"] = Path(bundle).read_bytes()
            settings: dict[str, Any] = {
                "region": place.region,
                "virtual_hosted_style_request": place.virtual_hosted,
            }
            if place.endpoint:
                settings["endpoint"] = place.endpoint
            if shared_credentials() is not None:
                settings["credential_provider"] = _provide
            store = importlib.import_module("obstore.store")
            self._store = store.S3Store(
                place.bucket,
                prefix=place.prefix or None,
                client_options=options,
                retry_config={
                    "max_retries": 0,
                    "retry_timeout": datetime.timedelta(seconds=timeout_s),
                },
                **settings,
            )
        except (OSError, ValueError, self._obs.exceptions.BaseError) as error:
            raise TierError(f"cannot use {place.description}: {_first_line(error)}") from error

    async def head(self, name: str, timeout_s: float) -> int | None:
        """Return an object's size in bytes, or None if there is none."""
        try:
            meta = await self._send(self._obs.head_async(self._store, name), timeout_s, f"HEAD {name}")
        except ObjectMissingError:
            return None
        return int(meta["size"])

    async def put(self, name: str, data: bytes, timeout_s: float, *, only_new: bool) -> bool:
        """Store an object; with `only_new` only if there is none yet. Returns whether it was stored.

        Raises
        ------
        BucketMissingError
            If there is no such bucket.
        """
        mode: Literal["create", "overwrite"] = "create" if only_new else "overwrite"
        sending = self._obs.put_async(self._store, name, data, mode=mode, use_multipart=False)
        try:
            await self._send(sending, timeout_s, f"PUT {name}")
        except _ExistsError:
            return False
        except ObjectMissingError as error:
            raise BucketMissingError(f"there is no bucket {self.place.bucket}: {error}") from error
        return True

    async def get_range(self, name: str, offset: int, nbytes: int, timeout_s: float) -> memoryview:
        """Return a range of an object.

        Raises
        ------
        ObjectMissingError
            If there is no such object.
        ObjectCorruptError
            If it ends before the range does.
        """
        sending = self._obs.get_range_async(self._store, name, start=offset, length=nbytes)
        found = memoryview(await self._send(sending, timeout_s, f"GET {name}"))
        if found.nbytes != nbytes:
            raise ObjectCorruptError(f"{name}: {found.nbytes} bytes came instead of {nbytes}")
        return found

    async def list_sizes(self, timeout_s: float) -> AsyncIterator[list[tuple[str, int]]]:
        """Iterate over the names below the prefix and their sizes, a page at a time."""
        pages = aiter(self._obs.list(self._store))

        async def next_page() -> Any:
            return await anext(pages, None)

        while (page := await self._send(next_page(), timeout_s, "LIST")) is not None:
            yield [(str(meta["path"]), int(meta["size"])) for meta in page]

    async def delete(self, names: Sequence[str], timeout_s: float) -> None:
        """Delete objects, in as few requests as there can be; missing ones are no error."""
        sending = self._obs.delete_async(self._store, list(names))
        try:
            await self._send(sending, timeout_s, f"DELETE of {len(names)} objects")
        except ObjectMissingError:
            return

    async def _send(self, request: Awaitable[T], timeout_s: float, what: str) -> T:
        """Await a request within its deadline; every failure is a typed error."""
        limit = min(timeout_s, self.timeout_s)
        exceptions = self._obs.exceptions
        try:
            return await in_time(request, max(0.0, limit))
        except (TimeoutError, asyncio.TimeoutError):
            raise TransferTimeoutError(
                f"{what} got no answer from {self.place.description} within {limit:g} s"
            ) from None
        except FileNotFoundError as error:
            raise ObjectMissingError(f"{what}: {_first_line(error)}") from error
        except exceptions.AlreadyExistsError as error:
            raise _ExistsError(what) from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise AccessDeniedError(
                f"{what}: {self.place.description} denies access; check credentials and bucket policy"
            ) from error
        except (exceptions.BaseError, OSError, ValueError) as error:
            if "416 Range" in str(error):
                raise ObjectCorruptError(f"{what}: the object ends before the range asked for") from error
            raise TransferError(f"{what} failed: {_first_line(error)}") from error


class _ExistsError(Exception):
    """A conditional put met an object."""


def _load_obstore() -> Any:
    try:
        return importlib.import_module("obstore")
    except ImportError as error:
        raise MissingDependencyError(
            f"object tiers need obstore: pip install 'dynamo-kvtc[object]' ({error})"
        ) from error


def _first_line(error: BaseException) -> str:
    # The client appends its own debug output, with headers and bodies.
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def static_credentials(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the keys that environment or credentials file name; empty if they come from elsewhere."""
    env = os.environ if env is None else env
    if env.get("AWS_ACCESS_KEY_ID"):
        found = {
            "access_key": env["AWS_ACCESS_KEY_ID"],
            "secret_key": env.get("AWS_SECRET_ACCESS_KEY", ""),
            "session_token": env.get("AWS_SESSION_TOKEN", ""),
        }
    else:
        found = shared_credentials(env) or {}
    return {name: value for name, value in found.items() if value}


def shared_credentials(env: Mapping[str, str] | None = None) -> dict[str, str] | None:
    """Read ``AWS_PROFILE`` of the shared credentials file, unless the environment names another source.

    Raises
    ------
    TierError
        If ``AWS_SHARED_CREDENTIALS_FILE`` or ``AWS_PROFILE`` is set and leads nowhere.
    """
    env = os.environ if env is None else env
    if any(env.get(name) for name in _ELSEWHERE):
        return None
    path = Path(env.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    profile = env.get("AWS_PROFILE") or "default"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with path.open(encoding="utf-8") as file:
            parser.read_file(file)
        section = parser[profile]
        return {
            "access_key": section["aws_access_key_id"],
            "secret_key": section["aws_secret_access_key"],
            "session_token": section.get("aws_session_token", ""),
        }
    except (OSError, KeyError, UnicodeDecodeError, configparser.Error) as error:
        if env.get("AWS_SHARED_CREDENTIALS_FILE") or env.get("AWS_PROFILE"):
            raise TierError(
                f"no S3 credentials for profile {profile} in {path}: {type(error).__name__}"
            ) from error
        return None


def _provide() -> dict[str, Any]:
    """Give obstore the credentials file's present content. A few hundred bytes, in obstore's own thread."""
    found = shared_credentials()
    if found is None:
        raise ValueError("the S3 credentials file is gone")
    return {
        "access_key_id": found["access_key"],
        "secret_access_key": found["secret_key"],
        "token": found["session_token"] or None,
        "expires_at": datetime.datetime.now(datetime.timezone.utc) + _CREDENTIALS_AGE,
    }
