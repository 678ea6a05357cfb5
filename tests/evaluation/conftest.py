"""A tiny random model on disk with an artifact of its own: fast, and every part of the way is real."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.models import LoadedModel, load_model
from dynamo_kvtc.calibration.run import calibrate
from dynamo_kvtc.calibration.settings import CalibrationSettings
from dynamo_kvtc.data import CALIBRATION_TEXTS
from dynamo_kvtc.evaluation import EvaluationProtocol


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> LoadedModel:
    return load_model(tiny_folder)


@pytest.fixture(scope="session")
def tiny_artifact(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return calibrate(
        CalibrationSettings(
            model=str(tiny_folder),
            texts=CALIBRATION_TEXTS,
            out=tmp_path_factory.mktemp("tiny-artifact"),
            tokens=2000,
            ratios=(2.5, 4.0),
            document_tokens=500,
            sample_tokens=512,
        )
    )


@pytest.fixture(scope="session")
def short_protocol() -> EvaluationProtocol:
    """192 context tokens in streams of 64, 64 and 32 tokens, and 16 scored ones."""
    return EvaluationProtocol(
        documents=2, context_tokens=192, scored_tokens=16, recent_window=32, tier_block_tokens=64
    )
