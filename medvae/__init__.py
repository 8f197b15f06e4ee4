"""medvae: synthetic medical images under patient-level differential privacy, with a certificate anyone can check."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from medvae.version import __version__

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


class _Room(ModuleType):
    """A module named like a command (`medvae.train`): calling it is calling the command."""

    @property
    def __wrapped__(self) -> Any:  # what help() and inspect.signature() show
        from medvae import api

        return getattr(api, self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


class _Package(ModuleType):
    """The import system binds `medvae.train` to the room once it is imported; the room must stay callable then."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in __all__:
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    # Heavy imports happen on first use, so that `import medvae` and `medvae --help` answer at once.
    if name in __all__:
        from medvae import api

        return getattr(api, name)
    raise AttributeError(f"module 'medvae' has no attribute {name!r}")
