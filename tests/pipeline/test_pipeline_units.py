from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.pipeline.units import cut_units


class Header:
    """Stands for a stream's header: only the spans matter here."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def group_span(self, group: int) -> tuple[int, int]:
        start = sum(self.sizes[:group])
        return start, start + self.sizes[group]


@given(data=st.data(), groups=st.integers(1, 5), units=st.integers(1, 20), most_bytes=st.integers(0, 300))
def test_units_cover_everything_once_in_order_and_within_bounds(
    data: st.DataObject, groups: int, units: int, most_bytes: int
) -> None:
    sizes = st.lists(st.integers(0, 100), min_size=groups, max_size=groups)
    headers = [Header(one) for one in data.draw(st.lists(sizes, max_size=12))]
    cut = cut_units(headers, groups, units=units, most_bytes=most_bytes)  # type: ignore[arg-type]
    covered = [(unit.group, block) for unit in cut for block in range(unit.first, unit.stop)]
    assert covered == [(group, block) for group in range(groups) for block in range(len(headers))]
    for unit in cut:
        stored = sum(headers[block].sizes[unit.group] for block in range(unit.first, unit.stop))
        assert unit.count == 1 or stored <= most_bytes
