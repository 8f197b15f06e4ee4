"""A released model as MLflow loads it: `mlflow.pyfunc` calls `_load_pyfunc` on a folder of safetensors and JSON.

No mlflow is imported here and nothing is unpickled; the code that runs is this package, not the stored model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvae.errors import InputError
from medvae.types import FloatArray, ModelRelease

if TYPE_CHECKING:
    import pandas as pd


class Generator:
    """Generates one scan a row of conditions."""

    def __init__(self, release: ModelRelease) -> None:
        self._release = release

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> FloatArray:
        """Return images (N, *spatial) float32 in [0, 1] for N rows, one column a condition.

        params: {"seed": int}, 0 where it is not given; the same seed and rows give the same images.
        Raises InputError where a condition of the model is no column.
        """
        from medvae.synth.sample import generate

        names = [condition.name for condition in self._release.space.conditions]
        missing = [name for name in names if name not in model_input.columns]
        if missing:
            raise InputError(f"the table lacks the condition {missing[0]!r}: give the columns {', '.join(names)}")
        rows = [dict(zip(names, values, strict=True)) for values in zip(*(model_input[n] for n in names), strict=True)]
        rows = rows if names else [{} for _ in range(len(model_input))]
        return generate(self._release, rows, seed=int((params or {}).get("seed", 0))).images


def _load_pyfunc(path: str) -> Generator:
    """Load a copy of RUN/model; the name is MLflow's contract for a `loader_module`."""
    from medvae.synth.store import read_release

    return Generator(read_release(Path(path)))
