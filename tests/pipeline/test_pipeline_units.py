from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.pipeline.units import cut_units


class Header:
    """Stands for a stream's header: only the spans and the tokens matter here."""

    num_tokens = 32

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def group_span(self, group: int) -> tuple[int, int]:
        start = sum(self.sizes[:group])
        return start, start + self.sizes[group]


@given(
    data=st.data(),
    groups=st.integers(1, 5),
    units=st.integers(1, 20),
    most_bytes=st.integers(0, 300),
    most_tokens=st.none() | st.integers(0, 200),
)
def test_units_cover_everything_once_in_order_and_within_bounds(
    data: st.DataObject, groups: int, units: int, most_bytes: int, most_tokens: int | None
) -> None:
    sizes = st.lists(st.integers(0, 100), min_size=groups, max_size=groups)
    headers = [Header(one) for one in data.draw(st.lists(sizes, max_size=12))]
    cut = cut_units(
        headers,  # type: ignore[arg-type]
        groups,
        units=units,
        most_bytes=most_bytes,
        most_tokens=most_tokens,
    )
    covered = [(unit.group, block) for unit in cut for block in range(unit.first, unit.stop)]
    assert covered == [(group, block) for group in range(groups) for block in range(len(headers))]
    for unit in cut:
        stored = sum(headers[block].sizes[unit.group] for block in range(unit.first, unit.stop))
        assert unit.count == 1 or stored <= most_bytes
        assert unit.count == 1 or most_tokens is None or unit.count * Header.num_tokens <= most_tokens
