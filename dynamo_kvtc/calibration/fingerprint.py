"""What identifies a model: its attention shape, its RoPE and a hash over its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import CalibrationError

__all__ = ["ModelFingerprint", "hash_weights"]

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class ModelFingerprint:
    """Identity of a model, as far as its KV depends on it.

    Attributes
    ----------
    architecture : str
        Class name in the model's configuration, such as ``LlamaForCausalLM``.
    geometry : KvGeometry
        Layers, KV heads, head size and the dtype of the cache.
    rope : RopeParameters
        How keys are rotated.
    weights_hash : str
        `hash_weights` of the model's folder.
    """

    architecture: str
    geometry: KvGeometry
    rope: RopeParameters
    weights_hash: str


def hash_weights(folder: Path) -> str:
    """Hash all tensors of a Hugging Face folder, whatever files they are spread over.

    Parameters
    ----------
    folder : Path
        A folder with ``*.safetensors`` files. Only one tensor is in memory at a time.

    Returns
    -------
    str
        Hex BLAKE2b-256 over names, dtypes, shapes and content of the tensors, in the order of names.

    Raises
    ------
    CalibrationError
        If the folder has no safetensors files, or an unreadable one.
    """
    try:
        digests = dict(_tensor_digests(folder))
    except (SafetensorError, OSError) as error:
        raise CalibrationError(
            f"cannot read the weights in {folder}: {error}; fetch the model anew"
        ) from error
    if not digests:
        raise CalibrationError(
            f"{folder} holds no *.safetensors weights; save the model with save_pretrained() and try again"
        )
    whole = blake2b(digest_size=_DIGEST_BYTES)
    for name in sorted(digests):
        whole.update(json.dumps([name, digests[name]]).encode())
    return whole.hexdigest()


def _tensor_digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, _digest(file.get_tensor(name))


def _digest(tensor: torch.Tensor) -> str:
    digest = blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=_DIGEST_BYTES)
    content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(content)
    return digest.hexdigest()
