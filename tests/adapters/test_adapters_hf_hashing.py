from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.adapters.hf import sequence_hashes

TOKENS = st.lists(st.integers(0, 50_000), max_size=40)


@given(prefix=TOKENS, a=TOKENS, b=TOKENS, block=st.integers(1, 8))
def test_hashes_agree_exactly_as_far_as_the_prefixes_do(
    prefix: list[int], a: list[int], b: list[int], block: int
) -> None:
    first, second = prefix + a, prefix + b
    hashes = sequence_hashes(first, block), sequence_hashes(second, block)
    assert [len(h) for h in hashes] == [len(first) // block, len(second) // block]
    for index, (one, other) in enumerate(zip(*hashes, strict=False)):
        stop = (index + 1) * block
        assert (one == other) == (first[:stop] == second[:stop])
