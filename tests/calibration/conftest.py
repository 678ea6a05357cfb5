"""A tiny Llama-like model with random weights and a small text: everything real but the size."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.run import calibrate
from dynamo_kvtc.calibration.settings import CalibrationSettings


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Hugging Face folder: 3 layers, 2 KV heads of 16, and a byte-level tokenizer."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> tuple[Path, Path]:
    """Two UTF-8 files of a few thousand bytes with characters of several bytes."""
    folder = tmp_path_factory.mktemp("texts")
    first, second = folder / "first.txt", folder / "second.txt"
    first.write_text("".join(f"{i}: the quick brown fox, déjà vu\n" for i in range(400)), encoding="utf-8")
    second.write_text(
        "".join(f"def f{i}(x): return x * {i}  # größer\n" for i in range(400)), encoding="utf-8"
    )
    return first, second


@pytest.fixture(scope="session")
def calibrated_settings(tiny_model, texts, tmp_path_factory) -> CalibrationSettings:
    return CalibrationSettings(
        model=str(tiny_model),
        texts=texts,
        out=tmp_path_factory.mktemp("calibrated") / "artifact",
        profile="kvtc",
        tokens=1200,
        ratios=(4.0, 8.0),
        layers_per_group=2,
        document_tokens=150,
        dtype="float32",
        recent_window=16,
        sample_tokens=64,
    )


@pytest.fixture(scope="session")
def calibrated(calibrated_settings) -> Artifact:
    """The artifact of `calibrated_settings`; tests only read it."""
    return calibrate(calibrated_settings)


@pytest.fixture
def settings(calibrated_settings, tmp_path) -> CalibrationSettings:
    """The same settings with a folder of one's own, empty as yet."""
    return dataclasses.replace(calibrated_settings, out=tmp_path / "artifact")
