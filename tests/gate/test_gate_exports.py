"""What others open releases with: `datasets`, MONAI's bundle commands, a browser. Real, small, untrained generators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hand_made_run as hand
import nibabel as nib
import numpy as np
import pytest
import torch

from medvae.config import CanaryConfig, Recipe, ReleaseConfig
from medvae.errors import ConfigError, InputError, NotReleasable, VerificationFailed
from medvae.gate.bundle import export_bundle
from medvae.gate.licences import NAMES, licence_of
from medvae.gate.verify import verify
from medvae.nets.build import build_model, make_card, state_arrays
from medvae.synth.network import Generator
from medvae.train.rule import resolve
from medvae.types import Condition, ImageSpace, Intensity, ModelRelease

CONDITIONS = (Condition("kind", "class", ("a", "b")), Condition("age", "continuous", range=(20.0, 90.0)))
VOLUMES = ImageSpace((16, 16, 16), (1.0, 1.5, 2.0), "CT", Intensity("window", -160.0, 240.0), CONDITIONS, (1, 2))
FLAT = ImageSpace((16, 20), (1.0, 1.0), "DX", Intensity("window", 0.0, 255.0), CONDITIONS, (1,))
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def real_run(folder: Path, space: ImageSpace) -> Path:
    """A run with a generator of this space; nobody trained it."""
    recipe = resolve(Recipe(canaries=CanaryConfig(enabled=False)), 50, space)
    torch.manual_seed(0)
    network = build_model(space, recipe)
    assert network.linear is not None
    network.linear.mean_map.flatten(2)[:, :, 0] = 8.0
    network.linear.spectrum[:] = 0.05 * torch.eye(space.channels)
    model = ModelRelease(state_arrays(network), make_card(space, recipe))
    return hand.build_run(folder, space=space, model=model)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    run = real_run(folder / "real", VOLUMES)
    export_bundle(run, folder / "out", ReleaseConfig(), run.parent / "report", hand.fake_render)
    return folder / "out"


def monai(bundle: Path, *command: str) -> str:
    pytest.importorskip("fire", reason="MONAI's bundle commands need fire: pip install 'medvae-dp[bundle]'")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", *command],
        cwd=bundle, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_real_model_bundle_generates_volumes(bundle: Path, tmp_path: Path) -> None:
    command = ["run", "--config_file", "configs/inference.json", "--meta_file", "configs/metadata.json"]
    monai(bundle, *command, "--output_dir", str(tmp_path / "a"), "--count", "3", "--seed", "7")
    made = sorted((tmp_path / "a").rglob("*_image.nii.gz"))
    assert len(made) == 3
    first = nib.load(made[0])
    assert first.shape == VOLUMES.spatial_shape
    np.testing.assert_allclose(first.header.get_zooms(), VOLUMES.spacing_mm)
    assert len(list((tmp_path / "a").rglob("*_dseg.nii.gz"))) == 3


def test_real_model_bundle_passes_monais_own_check(bundle: Path) -> None:
    said = monai(
        bundle, "verify_net_in_out", "network_def", "--meta_file", "configs/metadata.json",
        "--config_file", "configs/inference.json", "--device", "cpu",
    )  # fmt: skip
    assert "verified with no error" in said


def test_real_model_bundle_is_the_released_generator_and_no_more(bundle: Path) -> None:
    names = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert names == {
        "LICENSE", "SHA256SUMS", "statement.dsse.json", "configs/inference.json", "configs/metadata.json",
        "docs/README.md", "models/model.json", "models/weights.safetensors", "privacy/certificate.json",
        "privacy/certificate.html", "privacy/certificate.pdf", "audit/audit.json",
    }  # fmt: skip
    for path in bundle.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [word for word in hand.PLANTED if word.encode() in data], path.name
    meta = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert meta["privacy"]["unit"] == "patient"
    assert (
        meta["privacy"]["epsilon"]
        == json.loads((bundle / "privacy" / "certificate.json").read_text())["claim"]["epsilon"]
    )


def test_real_model_bundle_is_verified_and_an_altered_weight_is_seen(bundle: Path, tmp_path: Path) -> None:
    import shutil

    assert verify(bundle)["count"] == 0
    own = Path(shutil.copytree(bundle, tmp_path / "own"))
    weights = own / "models" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(VerificationFailed, match="altered"):
        verify(own)


def test_real_model_network_draws_what_is_asked(bundle: Path) -> None:
    network = Generator(str(bundle / "models"))
    condition = torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.8]])
    first, again, fresh = (network(condition, **more) for more in ({"seed": 3}, {"seed": 3}, {}))
    assert first.shape == (2, 2, *VOLUMES.spatial_shape)
    assert torch.equal(first, again)
    assert not torch.equal(first, fresh)
    assert 0 <= first[:, 0].min() <= first[:, 0].max() <= 1
    assert set(first[:, 1].unique().tolist()) <= {0.0, 1.0, 2.0}
    with pytest.raises(InputError, match=r"\(B, 3\)"):
        network(torch.zeros(2, 4))


def test_a_run_that_is_not_releasable_gives_no_bundle(run: Path, edit_privacy: Any, tmp_path: Path) -> None:
    edit_privacy(releasable=False, reasons=["trained without privacy"])
    with pytest.raises(NotReleasable):
        export_bundle(run, tmp_path / "out", ReleaseConfig(), run.parent / "report")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("space", [VOLUMES, FLAT], ids=["volumes", "flat"])
def test_real_model_release_is_loaded_by_datasets(space: ImageSpace, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="Hugging Face's datasets is not here: pip install datasets")
    run = real_run(tmp_path / "real", space)
    config = ReleaseConfig(count=4, formats=("huggingface", "npz"), licence="CC0-1.0")
    hand.release(run, tmp_path / "release", config, render=hand.fake_render)
    verify(tmp_path / "release")
    # The folder travels alone, and a process of its own starts with no network setting of ours.
    script = """
import json, sys, numpy as np
from datasets import load_dataset
rows = load_dataset(sys.argv[1], split="train")
column = "nifti" if "nifti" in rows.features else "image"
read = lambda x: np.asarray(x.dataobj) if column == "nifti" else np.asarray(x)
np.savez(sys.argv[2], images=np.stack([read(r[column]) for r in rows]), masks=np.stack([read(r["mask"]) for r in rows]))
print(json.dumps({"kinds": {k: getattr(f, "dtype", type(f).__name__) for k, f in rows.features.items()},
                  "id": rows["participant_id"][:], "kind": rows["kind"][:], "age": rows["age"][:]}))
"""
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", script, str(tmp_path / "release" / "huggingface"), str(tmp_path / "read.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["id"] == ["SYN0001", "SYN0002", "SYN0003", "SYN0004"]
    assert sorted(told["kind"]) == ["a", "a", "b", "b"]
    assert all(isinstance(age, float) and 20 <= age <= 90 for age in told["age"])
    with np.load(tmp_path / "release" / "cohort.npz") as mine, np.load(tmp_path / "read.npz") as theirs:
        low, high = space.intensity.low, space.intensity.high
        raw = low + np.clip(mine["images"], 0, 1) * (high - low)
        assert np.abs(theirs["images"] - raw).max() <= 0.5 + 1e-3
        np.testing.assert_array_equal(theirs["masks"], mine["masks"])
    card = (tmp_path / "release" / "huggingface" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    assert "(delta 1e-05, unit patient, add-remove neighbours, PLD accountant)" in card


@pytest.mark.parametrize("name", NAMES)
def test_a_licence_is_the_same_in_every_document(name: str, run: Path, tmp_path: Path) -> None:
    import yaml

    hand.release(run, tmp_path / "out", ReleaseConfig(count=2, formats=("npz",), licence=name.lower()))
    out, terms = tmp_path / "out", licence_of(name)
    assert json.loads((out / "dataset_description.json").read_text())["License"] == name
    assert json.loads((out / "croissant.json").read_text())["license"] == terms.url
    assert yaml.safe_load((out / "CITATION.cff").read_text())["license"] == name
    assert yaml.safe_load((out / "DATASET_CARD.md").read_text().split("---")[1])["license"] == name.lower()
    assert f"({name})" in (out / "LICENSE").read_text()


def test_a_licence_of_ones_own_is_a_text_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("For the members of the network only.\n")
    config = ReleaseConfig(count=2, formats=("npz", "huggingface"), licence=str(tmp_path / "terms.txt"))
    hand.release(run, tmp_path / "out", config)
    assert "members of the network" in (tmp_path / "out" / "LICENSE").read_text()
    assert "\nlicense" not in (tmp_path / "out" / "CITATION.cff").read_text()
    assert "license: other\nlicense_name: data-holder" in (tmp_path / "out" / "huggingface" / "README.md").read_text()
    for path in (tmp_path / "out").rglob("*.*"):
        assert b"terms.txt" not in path.read_bytes() if path.is_file() else True
    with pytest.raises(ConfigError, match=r"CC-BY-4\.0") as error:
        licence_of(str(tmp_path / "missing.txt"))
    assert "missing.txt" not in str(error.value)
