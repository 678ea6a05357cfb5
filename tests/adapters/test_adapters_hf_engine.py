"""The engine against transformers itself, with a tiny model made on the fly."""

from pathlib import Path

import pytest
import torch

from dynamo_kvtc.adapters.hf import HfEngine
from dynamo_kvtc.calibration.fingerprint import ModelFingerprint
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import LayoutError

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'dynamo-kvtc[demo]'"
)


class NoStop:
    eos_token_id = -1


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    geometry = KvGeometry(3, 2, 8, "float32")
    rope = RopeParameters(theta=10_000.0, rotary_dim=8)
    fingerprint = ModelFingerprint("LlamaForCausalLM", geometry, rope, "0" * 64)
    return LoadedModel(model, NoStop(), geometry, rope, fingerprint, Path())


def prompt(length: int) -> list[int]:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def test_greedy_decoding_is_that_of_transformers(loaded: LoadedModel) -> None:
    tokens = prompt(45)
    expected = loaded.model.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)[0, 45:]
    session = HfEngine(loaded, num_blocks=8, block_size=8).session(tokens)
    assert session.generate(12) == expected.tolist()
    assert session.token_ids == [*tokens, *expected.tolist()]
    assert session.num_cached == 45 + 12 - 1


def test_prefill_in_pieces_gives_the_same_logits_and_kv(loaded: LoadedModel) -> None:
    tokens = prompt(50)
    engine = HfEngine(loaded, num_blocks=20, block_size=8)
    whole = engine.session(tokens)
    expected = whole.prefill(last=10)
    pieces = engine.session(tokens[:21])
    pieces.prefill()
    pieces.token_ids = tokens
    assert torch.allclose(pieces.prefill(last=10), expected, atol=1e-5)
    one, other = (engine.cache.gather(session.block_ids) for session in (whole, pieces))
    assert torch.allclose(one[0][:50], other[0][:50], atol=1e-5)
    assert torch.allclose(one[1][:50], other[1][:50], atol=1e-5)


def test_evicted_blocks_are_overwritten_and_can_be_used_again(loaded: LoadedModel) -> None:
    engine = HfEngine(loaded, num_blocks=8, block_size=8)
    session = engine.session(prompt(40))
    session.prefill()
    assert engine.free_blocks == 3
    with pytest.raises(LayoutError, match="free blocks"):
        engine.session(prompt(40)).prefill()
    blocks = session.block_ids
    session.evict()
    assert engine.free_blocks == 8
    assert engine.cache.gather(blocks)[0].isnan().all()


def test_kv_put_back_by_hand_is_used_instead_of_being_recomputed(loaded: LoadedModel) -> None:
    tokens = prompt(40)
    engine = HfEngine(loaded, num_blocks=16, block_size=8)
    first = engine.session(tokens)
    expected = first.prefill()
    keys, values = engine.cache.gather(first.cached_blocks().block_ids)
    first.evict()
    second = engine.session(tokens)
    target = second.reserve(32)
    for layer in range(3):
        engine.cache.scatter_layer(layer, target.block_ids, keys[:32, layer], values[:32, layer])
    second.commit(32)
    assert torch.allclose(second.prefill(), expected, atol=1e-5)
    assert target.hashes == first.hashes()[:4]
