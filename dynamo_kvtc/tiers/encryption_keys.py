"""Keys of encrypted tiers, read from files; one derived key per tenant and object.

Needs the extra ``encryption``.

Derivation, all with HKDF-SHA256 (RFC 5869) and 256-bit results::

    key id     = HKDF(master key, info = "dynamo-kvtc key id v1"), first 8 bytes
    tenant key = HKDF(master key, info = "dynamo-kvtc tenant v1" || tenant tag)
    object key = HKDF(tenant key, salt = the object's 32 random bytes, info = "dynamo-kvtc object v1")

The tenant tag is part of the tier key (`dynamo_kvtc.tiers.base.tenant_of`), so that whoever reads an object
needs no further state. The key id names a master key in objects and in their names; another key has another
id, whatever people call it.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dynamo_kvtc.errors import ConfigError, MissingDependencyError
from dynamo_kvtc.tiers.access import key_file_exposure

__all__ = ["KEY_FILE_ADVICE", "KEY_ID_BYTES", "OBJECT_SALT_BYTES", "KeyRing", "MasterKey", "read_key"]

_log = logging.getLogger(__name__)

#: What to do about a key file that others have access to.
KEY_FILE_ADVICE = "chmod 0600 {path}, or in Kubernetes set defaultMode: 0400 on the Secret's volume"

#: Bytes of a master key, a tenant key and an object key.
_KEY_BYTES = 32

#: Bytes of a master key's id, in objects' headers and folded into their names.
KEY_ID_BYTES = 8

#: Random bytes of each object.
OBJECT_SALT_BYTES = 32

#: Largest key file that is read.
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class MasterKey:
    """A master key and its name.

    Attributes
    ----------
    name : str
        What people call it, in configurations and messages.
    secret : bytes
        32 bytes.
    """

    name: str
    secret: bytes = field(repr=False)


def read_key(name: str, path: Path) -> MasterKey:
    """Read a master key from a file: 32 bytes as they are, as 64 hexadecimal digits, or in base64.

    Raises
    ------
    ConfigError
        If the file cannot be read, others than its owner may write it, or it holds something else.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read the encryption key {name} from {path}: {error}") from error
    exposure = key_file_exposure(mode)
    if exposure is not None:
        message = f"encryption key {path}: {exposure[0]}; {KEY_FILE_ADVICE.format(path=path)}"
        if exposure[1]:
            raise ConfigError(message)
        _log.warning(message)
    secret = _decode(content)
    if secret is None:
        raise ConfigError(
            f"{path} does not hold an encryption key: 32 random bytes, as they are, in hexadecimal or in "
            f"base64, for example from: openssl rand -base64 32 > {path}"
        )
    return MasterKey(name, secret)


def _decode(content: bytes) -> bytes | None:
    if len(content) == _KEY_BYTES:
        return content
    text = content.strip()
    for decode in (bytes.fromhex, lambda text: base64.b64decode(text, validate=True)):
        try:
            decoded = decode(text.decode("ascii"))
        except (ValueError, binascii.Error):
            continue
        if len(decoded) == _KEY_BYTES:
            return bytes(decoded)
    return None


class KeyRing:
    """Master keys: the first one encrypts, all of them decrypt. Callable from any thread.

    Parameters
    ----------
    keys : tuple[MasterKey, ...]
        At least one, with different names and different secrets.

    Attributes
    ----------
    ids : tuple[bytes, ...]
        The keys' ids, the one that encrypts first.

    Raises
    ------
    ConfigError
        If two keys have one name or are the same.
    MissingDependencyError
        If the cryptography package is not installed.
    """

    def __init__(self, *keys: MasterKey) -> None:
        self._hazmat = _load_cryptography()
        self._keys: Mapping[bytes, MasterKey] = {self._id(key): key for key in keys}
        if not keys or len({key.name for key in keys}) < len(keys):
            raise ConfigError("encryption needs at least one key, and a different id for each")
        if len(self._keys) < len(keys):
            raise ConfigError("two encryption keys are the same: a new key needs new random bytes")
        self.ids = tuple(self._keys)
        # Onboarding reads an object several times in a row, and a tenant's objects together.
        self._tenant_key = lru_cache(1024)(self._derive_tenant_key)
        self._cipher = lru_cache(4096)(self._make_cipher)

    def cipher(self, key_id: bytes, tenant: bytes, object_salt: bytes) -> Any | None:
        """Return the AES-256-GCM cipher (``cryptography``'s AESGCM) of one object; None for unknown keys."""
        return self._cipher(key_id, tenant, object_salt) if key_id in self._keys else None

    def _id(self, key: MasterKey) -> bytes:
        return self._hkdf(key.secret, b"", b"dynamo-kvtc key id v1")[:KEY_ID_BYTES]

    def _derive_tenant_key(self, key_id: bytes, tenant: bytes) -> bytes:
        return self._hkdf(self._keys[key_id].secret, b"", b"dynamo-kvtc tenant v1" + tenant)

    def _make_cipher(self, key_id: bytes, tenant: bytes, object_salt: bytes) -> Any:
        tenant_key = self._tenant_key(key_id, tenant)
        return self._hazmat.AESGCM(self._hkdf(tenant_key, object_salt, b"dynamo-kvtc object v1"))

    def _hkdf(self, secret: bytes, salt: bytes, info: bytes) -> bytes:
        derived: bytes = self._hazmat.HKDF(
            algorithm=self._hazmat.SHA256(), length=_KEY_BYTES, salt=salt or None, info=info
        ).derive(secret)
        return derived


@dataclass(frozen=True, slots=True)
class _Hazmat:
    AESGCM: Any
    HKDF: Any
    SHA256: Any


def _load_cryptography() -> _Hazmat:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise MissingDependencyError(
            "encryption needs the cryptography package: pip install 'dynamo-kvtc[encryption]'"
        ) from error
    return _Hazmat(AESGCM, HKDF, SHA256)
