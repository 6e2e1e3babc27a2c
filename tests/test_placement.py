"""Shares of an iteration: everything is done once, and every process has work."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.distributed.placement import even_ranges, largest_share, place
from dgpo_fast.errors import UserError

counts = st.integers(1, 40)


@given(groups=counts, group_size=counts, processes=counts)
def test_every_sample_belongs_to_one_process_and_every_process_has_work(groups: int, group_size: int, processes: int):
    if processes > groups * group_size:
        with pytest.raises(UserError, match=f"{processes} processes share {groups * group_size} images"):
            place(groups, group_size, processes)
        return
    shares = place(groups, group_size, processes)
    assert [sample for share in shares for sample in range(share.start, share.stop)] == list(range(groups * group_size))
    assert len(shares) == processes and all(len(share) > 0 for share in shares)
    assert largest_share(groups, group_size, processes) == max(map(len, shares))


@given(groups=counts, group_size=counts, processes=counts)
def test_groups_stay_whole_where_there_is_one_for_each_process(groups: int, group_size: int, processes: int):
    if processes > groups * group_size:
        return
    shares = place(groups, group_size, processes)
    lengths = [len(share) for share in shares]
    whole = groups >= processes
    assert not whole or all(share.whole for share in shares)
    assert max(lengths) - min(lengths) <= (group_size if whole else 1)


@given(groups=counts, group_size=counts, processes=counts)
def test_parts_name_the_groups_of_a_share(groups: int, group_size: int, processes: int):
    if processes > groups * group_size:
        return
    for share in place(groups, group_size, processes):
        samples = [(n // group_size, n) for n in range(share.start, share.stop)]
        assert [(group, n) for group, first, end in share.parts for n in range(first, end)] == samples


@given(total=st.integers(0, 200), processes=counts, unit=counts)
def test_even_ranges(total: int, processes: int, unit: int):
    """They cover everything in order, cut at multiples of the unit, and differ by one unit at most."""
    ranges = even_ranges(total, processes, unit)
    assert [n for start, stop in ranges for n in range(start, stop)] == list(range(total))
    assert all(start % unit == 0 or start == total for start, _ in ranges)
    units = [-(-(stop - start) // unit) for start, stop in ranges]
    assert max(units) - min(units) <= 1
