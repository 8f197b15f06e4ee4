"""Further layouts and formats, 4D files, colour, missing values, ordered classes; and what ingest says it guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from vault_sources import noise, write_nifti_cohort, write_table

from medvae.config import IngestConfig
from medvae.errors import CohortError, ConfigError, InputError
from medvae.types import Condition
from medvae.vault.discover import discover
from medvae.vault.ingest import ingest
from medvae.vault.layouts import volume_source
from medvae.vault.nifti import read_nifti
from medvae.vault.scan import Rules, Unusable

SMALL = {"shape": (8, 9, 7)}


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def refused(source: Path, out: Path, **config: Any) -> str:
    with pytest.raises(InputError) as caught:
        ingest(source, out, IngestConfig(**{"holdout": 0.0, **config}))
    assert not out.exists()
    return str(caught.value)


def test_decathlon_task(tmp_path: Path, run: Any) -> None:
    rows, training = [], []
    for p in range(3):
        save(tmp_path / "in" / "imagesTr" / f"hip_{p}.nii.gz", noise((8, 9, 7), p, "f4"))
        save(tmp_path / "in" / "labelsTr" / f"hip_{p}.nii.gz", (noise((8, 9, 7), p) > 500).astype("u1"))
        training.append({"image": f"./imagesTr/hip_{p}.nii.gz", "label": f"./labelsTr/hip_{p}.nii.gz"})
        rows.append({"file": f"hip_{p}", "patient_id": p})
    save(tmp_path / "in" / "imagesTs" / "hip_9.nii.gz", noise((8, 9, 7), 9, "f4"))
    training.append({"image": "../../elsewhere.nii.gz", "label": "x"})
    card = {"modality": {"0": "MRI"}, "training": training, "test": ["./imagesTs/hip_9.nii.gz"]}
    (tmp_path / "in" / "dataset.json").write_text(json.dumps(card))
    write_table(tmp_path / "t.csv", rows)
    info = run(tmp_path / "in", labels=tmp_path / "t.csv", **SMALL).info
    assert (info["layout"], info["images"], info["masks"], info["space"]["modality"]) == ("decathlon", 3, True, "MR")
    assert {s["reason"] for s in info["skipped"]} == {"test image of the layout", "unreadable file"}
    assert info["notes"][0].startswith("read as a Medical Decathlon task")


def test_bids_sessions_give_values(tmp_path: Path, run: Any) -> None:
    for p in ("01", "02"):
        lines = ["session_id\tphase"]
        for s in ("a", "b"):
            name = f"sub-{p}_ses-{s}_T1w.nii.gz"
            save(tmp_path / "in" / f"sub-{p}" / f"ses-{s}" / "anat" / name, noise((8, 9, 7), ord(s) + int(p), "f4"))
            lines.append(f"ses-{s}\t{'before' if s == 'a' else 'after'}")
        (tmp_path / "in" / f"sub-{p}" / f"sub-{p}_sessions.tsv").write_text("\n".join(lines))
    (tmp_path / "in" / "participants.tsv").write_text("participant_id\tage\nsub-01\t40\nsub-02\t60\n")
    info = run(tmp_path / "in", conditions=("phase", "age", "session"), **SMALL).info
    assert (info["layout"], info["patients"], info["images"]) == ("bids", 2, 4)
    assert info["conditions"]["phase"]["classes"] == ["after", "before"]
    assert info["conditions"]["session"]["classes"] == ["ses-a", "ses-b"]


@pytest.mark.parametrize("extension", ["nrrd", "mha", "mhd", "nhdr"])
def test_nrrd_and_metaimage_equal_nifti_in_space(tmp_path: Path, run: Any, extension: str) -> None:
    """The same volume with an oblique frame, written by SimpleITK as NIfTI and as the other format."""
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not here: pip install 'medvae-dp[itk]'")
    rows = []
    for p in range(2):
        image = sitk.GetImageFromArray(noise((7, 9, 8), p, "i2"))
        image.SetSpacing((0.5, 0.8, 2.0))
        image.SetOrigin((10.0, -20.0, 30.0))
        c, s = np.cos(0.2), np.sin(0.2)
        image.SetDirection((c, -s, 0, s, c, 0, 0, 0, 1))
        for kind in (extension, "nii"):
            (tmp_path / kind).mkdir(exist_ok=True)
            sitk.WriteImage(image, str(tmp_path / kind / f"v{p}.{kind}"))
        rows.append({"file": f"v{p}", "patient_id": p})
    write_table(tmp_path / "t.csv", rows)
    ours, twin = (volume_source(discover(tmp_path / k)).scans[1].read() for k in (extension, "nii"))
    np.testing.assert_array_equal(ours.array, twin.array)
    np.testing.assert_allclose(ours.affine, twin.affine, atol=1e-5)
    assert run(tmp_path / extension, labels=tmp_path / "t.csv", **SMALL).info["layout"] == "itk"


def test_a_header_that_names_pixels_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK", reason="SimpleITK is not here: pip install 'medvae-dp[itk]'")
    (tmp_path / "secret.raw").write_bytes(b"x" * 64)
    (tmp_path / "in").mkdir()
    head = "ObjectType = Image\nNDims = 2\nDimSize = 8 8\nElementType = MET_UCHAR\nElementDataFile = {}\n"
    nrrd = "NRRD0004\ntype: uchar\ndimension: 2\nsizes: 8 8\nencoding: raw\ndata file: {}\n\n"
    (tmp_path / "in" / "link.raw").symlink_to(tmp_path / "secret.raw")
    for i, name in enumerate(("../secret.raw", str(tmp_path / "secret.raw"), "LIST", "x%03d.raw 1 2 1", "link.raw")):
        (tmp_path / "in" / f"{i}.mhd").write_text(head.format(name))
        (tmp_path / "in" / f"{i}.nhdr").write_text(nrrd.format(name))
    for scan in volume_source(discover(tmp_path / "in")).scans:
        with pytest.raises(Unusable, match="outside its own folder"):
            scan.read()


def test_4d_nifti_by_rule(tmp_path: Path, run: Any) -> None:
    volumes = noise((8, 9, 7, 3), 0, "f4")
    rows = [{"file": f"{p}.nii.gz", "patient_id": p} for p in range(2)]
    for p in range(2):
        save(tmp_path / "in" / f"{p}.nii.gz", volumes + p)
    write_table(tmp_path / "t.csv", rows)
    path = tmp_path / "in" / "0.nii.gz"
    with pytest.raises(Unusable, match="several frames"):
        read_nifti(path, None)
    np.testing.assert_array_equal(read_nifti(path, None, rules=Rules(frames="first")).array, volumes[..., 0])
    np.testing.assert_allclose(read_nifti(path, None, rules=Rules(frames="mean")).array, volumes.mean(-1), rtol=1e-6)
    info = run(tmp_path / "in", labels=tmp_path / "t.csv", frames="all", **SMALL).info
    assert (info["patients"], info["images"]) == (2, 6)
    message = refused(tmp_path / "in", tmp_path / "out", labels=tmp_path / "t.csv", **SMALL)
    assert "give --frames" in message


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "i8", "u8", "f4", "f8"])
def test_any_number_type_of_nifti(tmp_path: Path, kind: str) -> None:
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(kind)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4), dtype=kind), tmp_path / "a.nii")
    read = read_nifti(tmp_path / "a.nii", None)
    assert read.array.dtype == np.float32
    np.testing.assert_array_equal(read.array, values)


def test_colour_and_complex_nifti(tmp_path: Path) -> None:
    rgb = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb["R"], rgb["B"] = 100, 50
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(Unusable, match="colour"):
        read_nifti(tmp_path / "a.nii", None)
    taken = read_nifti(tmp_path / "a.nii", None, rules=Rules(colour="luminance")).array
    np.testing.assert_allclose(taken, 0.299 * 100 + 0.114 * 50, rtol=1e-6)
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6), "c8"), np.eye(4)), tmp_path / "b.nii")
    with pytest.raises(Unusable, match="complex"):
        read_nifti(tmp_path / "b.nii", None)


def test_npz_in_colour_as_medmnist(tmp_path: Path, run: Any) -> None:
    images = noise((6, 5, 7, 3), 0, "u1")
    np.savez(tmp_path / "c.npz", images=images, labels=np.arange(6) % 2)
    assert "luminance" in refused(tmp_path / "c.npz", tmp_path / "out")
    store = run(tmp_path / "c.npz", colour="luminance")
    want = np.sort((images @ np.array([0.299, 0.587, 0.114]) / 255).ravel())
    np.testing.assert_allclose(np.sort(store.load(np.arange(6)).x.ravel()), want, atol=1e-4)


def test_pictures_in_colour_and_of_several_pages(tmp_path: Path, run: Any) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    pages = [noise((9, 8), i, "u1") for i in range(3)]
    first, *rest = [Image.fromarray(p) for p in pages]
    first.save(tmp_path / "in" / "a.tif", save_all=True, append_images=rest)
    Image.fromarray(noise((9, 8, 3), 5, "u1")).save(tmp_path / "in" / "b.png")
    Image.fromarray(noise((9, 8), 6, "u1")).save(tmp_path / "in" / "c.bmp")
    write_table(tmp_path / "t.csv", [{"file": f, "patient_id": f} for f in ("a.tif", "b.png", "c.bmp")])
    config = {"labels": tmp_path / "t.csv", "shape": (9, 8)}
    assert "needs 2 or more" in refused(tmp_path / "in", tmp_path / "out", **config)
    info = run(tmp_path / "in", colour="luminance", frames="all", **config).info
    assert (info["patients"], info["images"]) == (3, 5)
    first = run(tmp_path / "in", frames="first", **config)
    assert {s["reason"]: s["count"] for s in first.info["skipped"]} == {"colour": 1}
    got = {np.rint(i * 255).astype("u1").tobytes() for i in first.load([0, 1]).x[:, 0]}
    assert pages[0].tobytes() in got


def test_ingest_says_what_it_guessed_and_lists_what_it_left(tmp_path: Path, run: Any) -> None:
    write_nifti_cohort(tmp_path / "in", masks=False)
    (tmp_path / "in" / "images" / "vol_0_0.nii.gz").write_bytes(b"torn")
    (tmp_path / "in" / "odd.xyz").write_bytes(b"?")
    store = run(tmp_path / "in", **SMALL)
    assert store.info["notes"][0] == "read as a folder of NIfTI files: 8 image files"
    listed = store._folder / "private" / "skipped.tsv"
    assert listed.read_text().splitlines() == [
        "reason\tfile", "not an image\todd.xyz", "unreadable file\timages/vol_0_0.nii.gz",
    ]  # fmt: skip
    assert listed.stat().st_mode & 0o777 == 0o600
    assert listed.parent.stat().st_mode & 0o777 == 0o700
    assert "vol_0_0" not in (store._folder / "cohort.json").read_text()


# Covariates


def with_gaps(folder: Path, column: str, gap: str = "n/a") -> None:
    rows = write_nifti_cohort(folder, patients=6, scans=1, masks=False)
    levels = ("low", "middle", "high")
    rows = [{**r, "stage": levels[i % 3], "age": 30 + i} for i, r in enumerate(rows)]
    for i in (0, 3):
        rows[i][column] = gap
    write_table(folder / "table.csv", rows)


def test_missing_values_by_rule(tmp_path: Path, run: Any) -> None:
    with_gaps(tmp_path / "in", "group")
    config = {"conditions": ("group",), **SMALL}
    assert "--missing drop or class" in refused(tmp_path / "in", tmp_path / "out", **config)
    dropped = run(tmp_path / "in", missing="drop", **config).info
    assert dropped["images"] == 4
    assert dropped["skipped"] == [{"reason": "missing value of a condition", "count": 2}]
    own = run(tmp_path / "in", missing="class", **config)
    assert own.info["conditions"]["group"]["classes"] == ["a", "b", "missing"]
    assert own.condition[:, 2].sum() == 2
    declared = run(tmp_path / "in", missing="class", conditions=("group=b|a",), **SMALL).info
    assert declared["conditions"]["group"]["classes"] == ["b", "a", "missing"]
    with_gaps(tmp_path / "in", "age")
    message = refused(tmp_path / "in", tmp_path / "out", missing="class", conditions=("age=20:90",), **SMALL)
    assert "no class for missing" in message
    assert run(tmp_path / "in", missing="drop", conditions=("age=20:90",), **SMALL).info["images"] == 4


def test_ordered_classes_are_even_steps(tmp_path: Path, run: Any) -> None:
    with_gaps(tmp_path / "in", "group", gap="a")
    store = run(tmp_path / "in", conditions=("stage=low<middle<high",), **SMALL)
    assert store.info["conditions"]["stage"] == {
        "kind": "continuous", "range": [0.0, 2.0], "levels": ["low", "middle", "high"],
    }  # fmt: skip
    assert sorted(store.condition[:, 0]) == [-1, -1, 0, 0, 1, 1]
    (condition,) = store.space.conditions
    assert condition.levels == ("low", "middle", "high")
    assert Condition.from_json("stage", condition.to_json()) == condition
    assert condition.encode("middle") == condition.encode(1.0) == 0
    message = refused(tmp_path / "in", tmp_path / "out", conditions=("stage=low<high",), **SMALL)
    assert "none of the 2 declared classes" in message
    with pytest.raises(ConfigError):
        ingest(tmp_path / "in", tmp_path / "out", IngestConfig(conditions=("stage=low<low",), **SMALL))
    with pytest.raises(CohortError):
        ingest(tmp_path / "in", tmp_path / "out", IngestConfig(conditions=("nothing=a<b",), **SMALL))
