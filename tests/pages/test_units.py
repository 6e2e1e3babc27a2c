"""Numbers as text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.pages import units


def test_numbers_have_the_unit_that_fits() -> None:
    assert [units.seconds(value) for value in (0, 12.34, 0.5, 0.00012, 3e-8)] == [
        "0 s",
        "12.3 s",
        "500 ms",
        "120 µs",
        "0.0300 µs",
    ]
    assert [units.flop(value, True) for value in (790, 1234, 25_000, 0.36, 6.8e-5)] == [
        "790 TFLOP/s",
        "1,234 TFLOP/s",
        "25.0 PFLOP/s",
        "360 GFLOP/s",
        "68.0 MFLOP/s",
    ]
    assert [units.mebibytes(value) for value in (0.8, 1023, 1536)] == ["0.800 MiB", "1,023 MiB", "1.50 GiB"]
    assert [units.gbytes(value, True) for value in (4300, 12.3, 0.05)] == ["4.30 TB/s", "12.3 GB/s", "50.0 MB/s"]
    assert [units.percent(value) for value in (0.12, 9.94, 9.96, 100)] == ["0.1 %", "9.9 %", "10 %", "100 %"]
    assert [units.short(text) for text in ("2.00 s", "1,500 MHz", "0.50", "200 ms")] == [
        "2 s",
        "1,500 MHz",
        "0.5",
        "200 ms",
    ]


@given(st.floats(min_value=1e-9, max_value=1e9))
def test_three_digits_are_kept(value: float) -> None:
    text = units.digits(value)
    assert "e" not in text
    assert math.isclose(float(text.replace(",", "")), value, rel_tol=5.1e-3)
    assert float(units.short(text).replace(",", "")) == pytest.approx(float(text.replace(",", "")))
