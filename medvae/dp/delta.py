"""The rule for delta: far below one over the number of patients."""

from __future__ import annotations

import math

from medvae.errors import ConfigError


def default_delta(patients: int) -> float:
    """Return min(1e-5, 1/(n ln n)), for n patients: the chance that the promise does not hold.

    At delta = 1/n a mechanism that publishes one patient at random would still be (0, delta)-DP, hence the ln n.
    Raises ConfigError for fewer than two patients.
    """
    _check_patients(patients)
    return min(1e-5, 1 / (patients * math.log(patients)))


def check_delta(delta: float, patients: int) -> list[str]:
    """Return warnings about delta for a cohort of n patients; raises ConfigError at 1/n and above, or out of (0, 1)."""
    _check_patients(patients)
    if not 0 < delta < 1:
        raise ConfigError(f"delta is {delta:g}: give a number above 0 and below 1/patients, such as 1e-5")
    if delta >= 1 / patients:
        raise ConfigError(
            f"delta {delta:g} is at or above 1/patients ({1 / patients:.3g}), where publishing one patient at random "
            f"would count as private: give at most {1 / (10 * patients):.1e}"
        )
    if delta > 1 / (10 * patients):
        return [
            f"delta {delta:g} is above a tenth of 1/patients ({1 / patients:.3g}): "
            f"{default_delta(patients):.1e} is the default for this cohort"
        ]
    return []


def _check_patients(patients: int) -> None:
    if patients < 2:
        raise ConfigError(f"the cohort has {patients} patient(s): differential privacy needs at least two")
