"""The rule for delta."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvae.dp.delta import check_delta, default_delta
from medvae.errors import ConfigError


@given(st.integers(2, 10**8))
def test_default_is_small_and_passes_its_own_check(patients: int) -> None:
    delta = default_delta(patients)
    assert delta == min(1e-5, 1 / (patients * math.log(patients)))
    assert delta * patients < 1 / math.log(patients) + 1e-9 or delta == 1e-5
    if patients > 22026:  # there ln n is above 10
        assert check_delta(delta, patients) == []
    else:
        check_delta(delta, patients)


def test_warning_above_a_tenth_and_refusal_at_one_over_n() -> None:
    assert check_delta(1e-4, 1000) == []
    (warning,) = check_delta(1.1e-4, 1000)
    assert "1/patients" in warning
    check_delta(9.99e-4, 1000)
    for delta in (1e-3, 0.5):
        with pytest.raises(ConfigError, match="at or above 1/patients"):
            check_delta(delta, 1000)
    for delta in (0.0, -1.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="delta is"):
            check_delta(delta, 1000)


@pytest.mark.parametrize("patients", [0, 1, -3])
def test_a_cohort_of_one_has_no_delta(patients: int) -> None:
    with pytest.raises(ConfigError, match="at least two"):
        default_delta(patients)
    with pytest.raises(ConfigError, match="at least two"):
        check_delta(1e-5, patients)
