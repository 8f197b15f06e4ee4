"""The quality benchmark: judges can fail, baselines keep their sensitivity, cells resume, the page tells the truth."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality
import torch
from leaderboard import cells, coarse, merf, render
from leaderboard.alike import fidelity, matched
from leaderboard.judges import balanced_order, judge
from leaderboard.methods import Task, class_means
from leaderboard.rows import Row, at_judges_size, labels_of, open_row, real_scans, row_of

from medvae.types import Condition, ImageSpace, Intensity
from medvae.vault.store import SCHEMA, CohortStore, CohortWriter, open_cohort


def blobs(count: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Two classes: a bright spot left or right, on noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = rng.uniform(0, 60, (count, 16, 16))
    for image, label in zip(images, labels, strict=True):
        row, column = rng.integers(3, 12), rng.integers(2, 6) + 8 * label
        image[row - 2 : row + 2, column - 2 : column + 2] += 120
    return images.astype(np.uint8), labels.astype(np.int64)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, Path]:
    """A small row of blobs, as an .npz a user would have, and a results folder."""
    folder = tmp_path_factory.mktemp("quality")
    train, test = blobs(300, 0), blobs(120, 1)
    np.savez(
        folder / "blobs.npz", train_images=train[0], train_labels=train[1], test_images=test[0], test_labels=test[1]
    )
    row = dataclasses.replace(row_of(str(folder / "blobs.npz")), steps=60, batch=32, repeats=1, synthetic=200)
    return row, folder / "results"


def several_scans(folder: Path, patients: int, last: bool = True) -> CohortStore:
    """A store in which patient p has 1 + p % 3 scans, of several classes; the last one may be left out."""
    side = Condition("side", "class", ("a", "b"))
    space = ImageSpace((8, 8), (1.0, 1.0), "MR", Intensity("percentile", 1, 99), (side,))
    rng, images = np.random.default_rng(0), 0
    kept = patients if last else patients - 1
    with CohortWriter(folder, (8, 8), masks=False) as writer:
        for patient in range(kept):
            for scan in range(1 + patient % 3):
                image = rng.uniform(0, 1, (8, 8)).astype(np.float32)
                writer.append(image, None, patient, side.encode("ab"[(patient + scan) % 2]))
                images += 1
        info = {"schema": SCHEMA, "patients": kept, "images": images, "space": space.to_json(), "masks": False}
        writer.finish(info, dict.fromkeys(range(kept), "train"))
    return open_cohort(folder).reveal()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_one_patient_moves_the_baselines_sums_by_at_most_one(tmp_path: Path, size: float) -> None:
    with_last = several_scans(tmp_path / "a", 6)
    without = several_scans(tmp_path / "b", 6, last=False)

    def feature(x: Any) -> Any:  # all rows point the same way, the worst case for a sum
        return np.full((len(x), 50), size) + 0 * x.sum()

    sums = [coarse.patient_sums(s, s.patients("train"), 64, feature) for s in (with_last, without)]
    moved = float(np.linalg.norm(sums[0] - sums[1]))
    assert moved <= 1 + 1e-9
    if size >= 1:  # patient 5 has three scans in two classes: 2/3 and 1/3 of a full vector
        assert moved == pytest.approx(math.hypot(2 / 3, 1 / 3))


def test_what_a_baseline_says_it_spent_is_what_was_asked(world: tuple[Row, Path]) -> None:
    row, out = world
    folder, store = open_row(row, Path("."), out, 0)
    made = class_means(Task(row, folder, store, 2.0, 0, seeded=True))
    assert made.epsilon is not None
    assert 1.99 < made.epsilon <= 2.0
    assert made.delta == 1e-5
    assert np.bincount(labels_of(made.scans)).tolist() == [100, 100]
    strict = class_means(Task(row, folder, store, 0.02, 0, seeded=True))
    real = real_scans(store, "train", row.longest)
    truth = np.stack([real.images[labels_of(real) == c].mean(0) for c in (0, 1)])
    wrong = [
        np.abs(np.stack([m.scans.images[labels_of(m.scans) == c].mean(0) for c in (0, 1)]) - truth).mean()
        for m in (made, strict)
    ]
    assert wrong[0] < 0.1 < wrong[1]  # at a hundredth of the budget nothing of the means is left


def test_a_method_at_the_judges_size_sees_the_same_patients_and_what_judges_see(world: tuple[Row, Path]) -> None:
    row, out = world
    _, whole = open_row(row, Path("."), out, 0)
    assert at_judges_size(row, whole) is row
    small = dataclasses.replace(row, longest=8)
    _, store = open_row(at_judges_size(small, whole), Path("."), out, 0)
    assert store.space.spatial_shape == (8, 8)
    for split in ("train", "holdout"):
        mine, theirs = real_scans(store, split, 64), real_scans(whole, split, 8)
        np.testing.assert_array_equal(mine.patient, theirs.patient)
        np.testing.assert_allclose(mine.images, theirs.images, atol=2e-3)


def test_a_judge_learns_real_labels_and_not_shuffled_ones(world: tuple[Row, Path]) -> None:
    row, out = world
    _, store = open_row(row, Path("."), out, 0)
    train, test = (real_scans(store, split, row.longest) for split in ("train", "holdout"))
    shuffled = dataclasses.replace(train, condition=np.random.default_rng(0).permutation(train.condition))
    assert judge(row, train, test, 0)["auc"] > 0.95
    assert judge(row, shuffled, test, 0)["auc"] < 0.8
    assert judge(row, train, test, 0) == judge(row, train, test, 0)


def test_every_class_is_drawn_equally_often_and_every_scan_of_it() -> None:
    labels = np.asarray([0] * 90 + [1] * 9 + [2])
    order = balanced_order(labels, 300, np.random.default_rng(0))
    assert np.bincount(labels[order]).tolist() == [100, 100, 100]
    drawn = np.bincount(order, minlength=100)
    assert set(drawn[:90]) <= {1, 2}
    assert set(drawn[90:99]) <= {11, 12}
    assert all(set(labels[part]) == {0, 1, 2} for part in order.reshape(-1, 3))


def test_shares_of_classes_do_not_enter_the_distances(world: tuple[Row, Path]) -> None:
    row, out = world
    _, store = open_row(row, Path("."), out, 0)
    train, test = (real_scans(store, split, row.longest) for split in ("train", "holdout"))
    assert sorted(labels_of(train)[matched(labels_of(train), labels_of(test), np.random.default_rng(0))]) == sorted(
        labels_of(test)
    )
    keep = np.concatenate([np.flatnonzero(labels_of(train) == 0), np.flatnonzero(labels_of(train) == 1)[:70]])
    even, skewed = (fidelity(s, test, 0)["frechet"] for s in (train, train.take(keep)))
    assert skewed < 2 * even


def test_fourier_features_are_a_gaussian_kernel_of_unit_norm() -> None:
    features = merf.FourierFeatures((1, 8, 8), 0)
    x = torch.rand(20, 1, 8, 8)
    phi = features(x)
    torch.testing.assert_close(phi.norm(dim=1), torch.ones(20))
    squared = torch.cdist(x.flatten(1), x.flatten(1)) ** 2
    kernel = torch.exp(-squared / (2 * merf.WIDTH_PER_VOXEL * 64))
    assert (phi @ phi.T - kernel).abs().max() < 6 / math.sqrt(merf.FREQUENCIES)


def test_the_generator_finds_the_classes_whose_embedding_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merf, "STEPS", 120)
    monkeypatch.setattr(merf, "BATCH", {2: 64})
    shape = (1, 8, 8)
    features = merf.FourierFeatures(shape, 0)
    truth = np.zeros((2, *shape), np.float32)
    truth[0, :, :4], truth[1, :, 4:] = 0.9, 0.9
    net = merf.fit_generator(features.of_array(truth).astype(np.float64), features, shape, 0)
    made = merf.draw_scans(net, np.asarray([0, 1] * 20), 0)
    means = np.stack([made[::2].mean(0), made[1::2].mean(0)])
    assert np.abs(means - truth).mean() < 0.15
    assert np.abs(means - truth[::-1]).mean() > 0.5


def test_cells_are_kept_and_never_run_twice(
    world: tuple[Row, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, out = world
    monkeypatch.setattr(cells, "row_of", lambda name: row)
    page = tmp_path / "page.md"
    line = f"quality.py --rows blobs:8 --methods real,closed_form,class_means --seeds 0 --out {out} --render {page}"
    monkeypatch.setattr(sys, "argv", line.split())
    quality.main()
    first = {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    assert sorted(first) == [
        "blobs-eps8-class_means-seed0.json", "blobs-eps8-closed_form-seed0.json", "blobs-real-seed0.json",
    ]  # fmt: skip
    quality.main()
    assert {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()} == first
    assert "3 of 3 cells are there already" in capsys.readouterr().out
    cell = json.loads((out / "cells" / "blobs-eps8-closed_form-seed0.json").read_text())
    assert cell["epsilon"] <= 8
    assert cell["trained_on"] == 200
    assert cell["tested_on"] == 120
    text = page.read_text()
    assert f"{cell['scores']['auc']:.4f}" in text
    assert str(out) not in text


def result(method: str, seed: int, score: float, **changes: Any) -> dict[str, Any]:
    private = method not in ("real", "nonprivate")
    made = {
        "row": "x", "title": "X", "measure": "dice", "relative": True, "folds": True, "targets": {"8": 0.8},
        "stretch": {}, "asked_epsilon": 8.0 if private else None, "epsilon": 7.99 if private else None,
        "delta": 1e-5 if private else None, "method": method, "recipe": "", "seed": seed, "noise": "os_entropy",
        "train_patients": 100 + seed, "scores": {"dice": score, "dice/1": score},
        "fidelity": {"frechet": 1.0, "recall": 0.2, "coverage": 0.0, "inception_fid": None},
        "train_cpu_s": 36.0, "generate_cpu_s": 0.0,
    }  # fmt: skip
    return {**made, **changes}


def test_a_fold_is_measured_by_its_own_ceiling_and_others_by_the_mean() -> None:
    made, real = [result("product", s, 0.4) for s in (0, 1)], [result("real", 0, 0.8), result("real", 1, 0.5)]
    assert render.ratios(made, real) == pytest.approx([0.5, 0.8])
    pooled = [{**c, "folds": False} for c in made]
    assert render.ratios(pooled, real) == pytest.approx([0.4 / 0.65] * 2)
    assert render.ratios(made, []) == []


def test_the_page_says_what_was_missed_and_what_was_not_run(tmp_path: Path) -> None:
    every = [
        result("product", 0, 0.6), result("product", 1, 0.6), result("real", 0, 0.8), result("real", 1, 0.8),
        result("closed_form", 0, 0.7), result("class_means", 0, 0.1), result("nonprivate", 0, 0.9),
    ]  # fmt: skip
    for index, cell in enumerate(every):
        cells.write(tmp_path / "cells" / f"{index}.json", {"schema": cells.SCHEMA, **cell})
    text = render.render(tmp_path)
    assert "target 0.8: missed with 0.7500" in text
    assert "NOT ahead of closed form alone by -0.1000" in text
    assert "ahead of noisy class means (floor) by +0.5000" in text
    assert "DP-MERF: not run" in text
    assert "recall over non-private, target 0.8: reached with 1.00" in text
    assert "coverage over non-private, target 0.8: not measured" in text
    assert "--rows x.npz:8" in text
    with pytest.raises(SystemExit, match="no finished cell"):
        render.render(tmp_path / "nothing")


@pytest.mark.parametrize("spec", ["mnist", "mnist:", "mnist:-1", "mnist:inf", "nothing:8"])
def test_a_row_that_cannot_be_read_is_refused(spec: str) -> None:
    with pytest.raises(SystemExit):
        cells.plan_cells([spec], ["real"], [0], None)


def test_ceilings_are_planned_once_for_all_epsilons() -> None:
    planned = cells.plan_cells(["mnist:1", "mnist:8"], ["product", "real"], [0, 1], Path("my.yaml"))
    assert [c.name for c in planned] == [
        "mnist-eps1-product@my-seed0", "mnist-real-seed0", "mnist-eps1-product@my-seed1", "mnist-real-seed1",
        "mnist-eps8-product@my-seed0", "mnist-eps8-product@my-seed1",
    ]  # fmt: skip
