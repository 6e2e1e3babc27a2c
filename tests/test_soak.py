"""What `benchmarks/soak.py` says of a series that grows, and of one that only wanders."""

import numpy as np
import pytest

from benchmarks.soak import fit

HOURS = np.linspace(0, 2, 1440)


def wandering(seed: int, tau: float = 20) -> np.ndarray:
    """Noise of size 1 whose neighbours are alike, as those of a process's memory are."""
    rng, keep = np.random.default_rng(seed), np.exp(-1 / tau)
    values = [0.0]
    for kick in rng.normal(size=len(HOURS) - 1):
        values.append(keep * values[-1] + (1 - keep**2) ** 0.5 * kick)
    return np.array(values)


def test_a_leak_is_found() -> None:
    """4 % an hour, under noise of 1 %; slope and mean are those put in."""
    for seed in range(20):
        line = fit(HOURS, 100 + 4 * HOURS + wandering(seed))
        assert not line.flat
        assert line.slope_per_hour == pytest.approx(4, abs=4 * line.standard_error_per_hour)
        assert line.change == pytest.approx(8 / 104, rel=0.3)


def test_noise_is_no_growth() -> None:
    """Nor is what two hours cannot tell from none."""
    assert all(fit(HOURS, 100 + wandering(seed)).flat for seed in range(20))
    assert fit(HOURS, np.full(len(HOURS), 70.0)).flat
    assert fit(HOURS, 1000 + 2 * HOURS).flat  # 0.4 % in all


def test_a_short_soak_is_refused() -> None:
    with pytest.raises(SystemExit, match="soak for longer"):
        fit([0.0, 0.1, 0.2], [1.0, 1.0, 1.0])
