"""Each command on a small run: what it writes, how it is marked, and one sentence for bad input."""

from __future__ import annotations

import csv
import json
import stat
from pathlib import Path

import numpy as np
import pytest
from conftest import write_cohort
from PIL import Image

from medvae import cli_run
from medvae.latent import anomaly
from medvae.latent.case import open_case

PRIVATE = (
    ("encode", [], ("codes.parquet", "codes_by_cluster.png", "codes_by_side.png")),
    ("encode", ["--format", "csv", "--clusters", "2"], ("codes.csv",)),
    ("encode", ["--format", "npz", "--split", "holdout"], ("codes.npz",)),
    ("reconstruct", ["--patients", "6"], ("reconstructions.npz", "errors.csv", "reconstructions.png")),
    ("denoise", ["--patients", "6"], ("denoised.npz", "denoised.png")),
    ("denoise", ["--patients", "6", "--corruption", "none"], ("denoised.png",)),
    ("score", ["--false-alarm-rate", "0.1"], ("scores.csv", "maps.npz", "scores.png", "strangest.png")),
    ("augment", ["--condition", "side"], ("npz/cohort.npz",)),
    ("augment", ["--condition", "age", "--bins", "4", "--format", "nifti"], ("nifti",)),
)


@pytest.mark.parametrize(("command", "flags", "files"), PRIVATE)
def test_what_is_made_from_real_scans_is_marked_private(command, flags, files, run, cohort, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli_run.run([command, str(run), str(cohort), "-o", str(out), "--json", *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((out / f"{command}.json").read_text())
    assert said["provenance"] == "private"
    assert "PRIVATE" in (out / "PRIVATE.txt").read_text()
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    for name in files:
        assert (out / name).exists(), name
    for picture in out.glob("*.png"):
        assert Image.open(picture).size[0] > 200


def test_codes_hold_every_scan_once_with_its_conditions(run, cohort, tmp_path):
    assert cli_run.run(["encode", str(run), str(cohort), "-o", str(tmp_path / "o"), "--format", "csv", "-q"]) == 0
    with (tmp_path / "o" / "codes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(r["scan"]) for r in rows) == list(range(150))
    assert {r["side"] for r in rows} == {"a", "b", "c"}
    assert {r["split"] for r in rows} == {"train", "holdout"}
    assert all(20 <= float(r["age"]) <= 80 for r in rows)
    assert np.std([float(r["z0"]) for r in rows]) > 0


def test_a_strange_scan_is_flagged_and_normal_ones_mostly_are_not(run, cohort, tmp_path, capsys):
    strange = write_cohort(tmp_path / "strange", 30, seed=5)
    images = np.load(strange / "images.npy")
    images[:10, 4:9, 4:9] = 65535  # a bright spot in the first ten patients
    np.save(strange / "images.npy", images)
    flags = ["--calibration", str(cohort), "--false-alarm-rate", "0.1", "--json", "-q"]
    assert cli_run.run(["score", str(run), str(strange), "-o", str(tmp_path / "o"), *flags]) == 0
    with (tmp_path / "o" / "scores.csv").open() as file:
        flagged = {int(r["patient"]) for r in csv.DictReader(file) if r["flagged"] == "True"}
    assert set(range(10)) <= flagged
    assert len(flagged - set(range(10))) <= 8  # 20 patients at 10 %: more than 8 has probability 2e-4
    with np.load(tmp_path / "o" / "maps.npz") as maps:
        spot = maps["maps"][:, 4:9, 4:9].mean()
        assert spot > 2 * maps["maps"].mean()


def test_so_many_of_each_class_are_made_where_that_is_asked_for(run, cohort, tmp_path, capsys):
    out = tmp_path / "o"
    assert cli_run.run(["augment", str(run), str(cohort), "-o", str(out), "--each", "7", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == [7, 7, 7]
    with np.load(out / "npz" / "cohort.npz", allow_pickle=False) as made:
        assert np.bincount(made["labels"]).tolist() == [7, 7, 7]


def test_a_blurring_illness_is_strange_once_detail_is_taken_away(run, cohort, tmp_path):
    """Scans differ in noise, and ill ones have little of it and a dim blob: easier to rebuild, and still found."""
    case = open_case(run, cohort)
    rng = np.random.default_rng(0)

    def scans(count, noise, blob):
        y, x = np.mgrid[:16, :16] / 16
        image = 0.5 + 0.25 * np.cos(2 * np.pi * x) + noise[:, None, None] * rng.standard_normal((count, 16, 16))
        image = image + blob * np.exp(-((x - 0.5) ** 2 + (y - 0.5) ** 2) / 0.02)
        return image.clip(0, 1)[:, None].astype(np.float32), np.tile(np.float32([1, 0, 0, 0]), (count, 1))

    def judged(images, conditions):
        return anomaly.score(case.model, images, conditions), anomaly.detail(images)

    known, detail = judged(*scans(300, rng.uniform(0.02, 0.12, 300), 0.0))
    slope = anomaly.detail_slope(known, detail)
    assert slope == pytest.approx(np.polyfit(detail, known, 1)[0])
    normal, ill = judged(*scans(200, rng.uniform(0.02, 0.12, 200), 0.0)), judged(*scans(200, np.full(200, 0.02), 0.25))
    plain, adjusted = (
        (a[:, None] > b).mean()
        for a, b in ((ill[0], normal[0]), (ill[0] - slope * ill[1], normal[0] - slope * normal[1]))
    )
    assert adjusted > 0.9 > 0.5 > plain


def test_scores_with_detail_taken_away_keep_the_rate(run, cohort, tmp_path, capsys):
    flags = ["--false-alarm-rate", "0.1", "--adjust", "detail", "--json", "-q"]
    assert cli_run.run(["score", str(run), str(cohort), "-o", str(tmp_path / "o"), *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["adjust"] == "detail"
    assert said["flagged_patients"] <= 9  # 25 patients at 10 %: more has probability 2e-4
    bad = ["score", str(run), str(cohort), "-o", str(tmp_path / "p"), "--adjust", "all"]
    assert cli_run.run(bad) == 2


def test_augmenting_evens_out_the_classes(run, cohort, tmp_path, capsys):
    out = tmp_path / "o"
    assert cli_run.run(["augment", str(run), str(cohort), "-o", str(out), "--json", "-q"]) == 0
    said = json.loads(capsys.readouterr().out)
    totals = np.asarray(said["had"]) + np.asarray(said["added"])
    assert len(set(totals.tolist())) == 1
    with np.load(out / "npz" / "cohort.npz", allow_pickle=False) as made:
        assert np.bincount(made["labels"], minlength=3).tolist() == said["added"]


@pytest.mark.parametrize("command", ["interpolate", "traverse"])
def test_walks_ask_the_gate_first(command, run, tmp_path, capsys):
    out = tmp_path / "o"
    assert cli_run.run([command, str(run), "-o", str(out)]) == 3
    assert "the gate is closed" in capsys.readouterr().err
    assert not out.exists()
    flags = ["--paths", "2", "--steps", "3", "--json"]
    assert cli_run.run([command, str(run), "-o", str(out), "--private", *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["provenance"] == "private"
    assert (out / "PRIVATE.txt").exists()
    film = Image.open(out / "film.gif")
    assert film.n_frames == 4  # there and back without the ends twice
    assert Image.open(out / "grid.png").size[0] > 200


def test_walking_along_age_changes_the_contrast(run, tmp_path):
    from medvae.config_latent import WalkConfig
    from medvae.nets.build import load_release
    from medvae.synth.store import read_release
    from medvae.synth.walk import traverse

    model = load_release(read_release(run / "model"))
    walk = traverse(model, WalkConfig(along="age", steps=5, paths=1, start=("side=a",)))
    assert walk.at.tolist() == [20, 35, 50, 65, 80]
    contrast = walk.images[0].std((1, 2))
    assert contrast[-1] > 1.5 * contrast[0]


BAD = (
    (["encode", "RUN", "COHORT", "--clusters", "0"], "clusters"),
    (["encode", "RUN", "COHORT", "--format", "xls"], "format"),
    (["encode", "RUN", "COHORT", "--split", "test"], "split"),
    (["encode", "COHORT", "COHORT"], "no finished model"),
    (["encode", "RUN", "RUN"], "not a cohort"),
    (["reconstruct", "RUN", "COHORT", "--patients", "0"], "patients"),
    (["denoise", "RUN", "COHORT", "--corruption", "rain"], "corruption"),
    (["denoise", "RUN", "COHORT", "--severity", "-1"], "severity"),
    (["score", "RUN", "COHORT", "--false-alarm-rate", "0.001"], "999 are needed"),
    (["score", "RUN", "COHORT", "--normal", "side=z"], "no class 'side=z'"),
    (["augment", "RUN", "COHORT", "--condition", "weight"], "no condition 'weight'"),
    (["traverse", "RUN", "--private", "--along", "side"], "no covariate 'side'"),
    (["traverse", "RUN", "--private", "--start", "age=900"], "number from 20 to 80"),
    (["traverse", "RUN", "--private", "--start", "colour=red"], "no condition of the model"),
    (["interpolate", "RUN", "--private", "--steps", "1"], "steps"),
)


@pytest.mark.parametrize(("argv", "says"), BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(argv, says, run, cohort, tmp_path, capsys):
    out = tmp_path / "out"
    given = [str({"RUN": run, "COHORT": cohort}.get(a, a)) for a in argv]
    assert cli_run.run([*given, "-o", str(out)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medvae:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert str(tmp_path) not in lines[0]
    assert not out.exists()


def test_a_cohort_of_another_kind_is_refused_with_the_difference(run, cohort, tmp_path, capsys):
    other = write_cohort(tmp_path / "other", 12)
    info = json.loads((other / "cohort.json").read_text())
    info["space"]["spacing_mm"] = [2.0, 2.0]
    (other / "cohort.json").write_text(json.dumps(info))
    assert cli_run.run(["encode", str(run), str(other), "-o", str(tmp_path / "out")]) == 2
    assert "spacing in mm [1.0, 1.0] and the cohort has [2.0, 2.0]" in capsys.readouterr().err


def test_nothing_private_enters_a_release(run, cohort, tmp_path, capsys):
    release = tmp_path / "release"
    (release / "privacy").mkdir(parents=True)
    (release / "privacy" / "certificate.json").write_text("{}")
    for out in (release / "codes", release):
        assert cli_run.run(["encode", str(run), str(cohort), "-o", str(out)]) == 3
        assert "part of a release" in capsys.readouterr().err
    assert sorted(p.name for p in release.rglob("*")) == ["certificate.json", "privacy"]


def test_an_interrupted_command_leaves_nothing(run, cohort, tmp_path, monkeypatch):
    from medvae.latent import uses

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(uses.pictures, "scatter", stop)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        uses.encode_cohort(Path(run), Path(cohort), out, uses.EncodeConfig())
    assert not any(tmp_path.iterdir())
