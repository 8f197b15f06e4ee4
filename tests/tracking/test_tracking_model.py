"""The released model in MLflow's registry: safetensors and JSON, loaded by our own module, and it generates."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medvae import tracking
from medvae.errors import InputError, PrivacyError
from medvae.synth.store import read_release, write_release
from medvae.types import Condition, ImageSpace, Intensity, ModelRelease

SPACE = ImageSpace(
    (4, 6),
    (1.0, 1.0),
    "MR",
    Intensity("window", 0.0, 1.0),
    (Condition("size_class", "class", ("small", "large")), Condition("age", "continuous", range=(20.0, 90.0))),
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    write_release(run / "model", ModelRelease({"w": np.ones(3, np.float32)}, {"space": SPACE.to_json(), "recipe": {}}))
    (run / "privacy.json").write_text(json.dumps({"releasable": True}))
    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the generator, which has its own tests, and notes what it was asked for."""
    import medvae.synth.sample as sample

    calls: list[Any] = []

    def generate(release: ModelRelease, conditions: Any, seed: int, **_: Any) -> Any:
        calls.append((conditions, seed))
        return SimpleNamespace(images=np.full((len(conditions), *release.space.spatial_shape), 0.25, np.float32))

    monkeypatch.setattr(sample, "generate", generate)
    return calls


def test_the_registered_model_loads_and_generates(store: Path, run_dir: Path, asked: list[Any]) -> None:
    import mlflow.pyfunc
    import pandas as pd

    from mlflow import MlflowClient

    with tracking.run("release", {}, private=False) as t:
        t.register(run_dir / "model")
    uri = f"sqlite:///{store}"
    version = MlflowClient(tracking_uri=uri, registry_uri=uri).get_model_version("medvae", "1")
    folder = Path(version.source.removeprefix("file://"))
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "model.json", "weights.safetensors"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".py"))]

    model = mlflow.pyfunc.load_model(str(folder))
    table = pd.DataFrame({"age": [30.0, 40.0], "size_class": ["small", "large"]})
    images = model.predict(table, params={"seed": 7})
    assert images.shape == (2, 4, 6)
    assert asked == [([{"size_class": "small", "age": 30.0}, {"size_class": "large", "age": 40.0}], 7)]


def test_each_registration_is_a_version_and_the_aliases_know_which(store: Path, run_dir: Path) -> None:
    from mlflow import MlflowClient

    for _ in range(2):
        with tracking.run("release", {}, private=False) as t:
            t.register(run_dir / "model")
    uri = f"sqlite:///{store}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert sorted(int(v.version) for v in client.search_model_versions("name='medvae'")) == [1, 2]
    assert client.get_registered_model("medvae").aliases == {"champion": 1, "released": 2}
    client.set_registered_model_alias("medvae", "champion", 2)  # by people
    with tracking.run("release", {}, private=False) as t:
        t.register(run_dir / "model")
    assert client.get_registered_model("medvae").aliases == {"champion": 2, "released": 3}


@pytest.mark.parametrize("content", ['{"releasable": false}', "{}", "[]", "torn", None])
def test_a_model_without_proof_is_not_registered(store: Path, run_dir: Path, content: str | None) -> None:
    (run_dir / "privacy.json").unlink()
    if content is not None:
        (run_dir / "privacy.json").write_text(content)
    with pytest.raises(PrivacyError, match="no proof"), tracking.run("train", {}, private=True) as t:
        t.register(run_dir / "model")


def test_a_missing_condition_is_one_sentence(run_dir: Path) -> None:
    import pandas as pd

    from medvae.pyfunc import _load_pyfunc

    with pytest.raises(InputError, match="lacks the condition 'age': give the columns size_class, age"):
        _load_pyfunc(str(run_dir / "model")).predict(pd.DataFrame({"size_class": ["small"]}))


def test_a_model_without_conditions_generates_one_scan_a_row(tmp_path: Path, asked: list[Any]) -> None:
    import pandas as pd

    from medvae.pyfunc import Generator

    space = ImageSpace((4, 6), (1.0, 1.0), "MR", Intensity("window", 0.0, 1.0), ())
    write_release(tmp_path, ModelRelease({"w": np.ones(1, np.float32)}, {"space": space.to_json()}))
    images = Generator(read_release(tmp_path)).predict(pd.DataFrame(index=range(3)))
    assert images.shape == (3, 4, 6)
    assert asked == [([{}, {}, {}], 0)]
