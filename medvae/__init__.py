"""medvae: synthetic medical images under patient-level differential privacy, with a certificate anyone can check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "audit",
    "demo",
    "doctor",
    "ingest",
    "ledger",
    "plan",
    "release",
    "train",
    "verify",
]

if TYPE_CHECKING:
    from medvae.api import audit, demo, doctor, ingest, ledger, plan, release, train, verify


def __getattr__(name: str) -> Any:
    # Heavy imports happen on first use, so that `import medvae` and `medvae --help` answer at once.
    if name in __all__:
        from medvae import api

        return getattr(api, name)
    raise AttributeError(f"module 'medvae' has no attribute {name!r}")
