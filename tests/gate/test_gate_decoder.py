"""The released decoder in one file, behind the gate: an ONNX graph, and a page with sliders in a headless Chromium."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import hand_made_run as hand
import numpy as np
import pytest
import torch

from medvae import api_export, cli_run
from medvae.config import CanaryConfig, ModelConfig, MomentsConfig, Recipe, ReleaseConfig
from medvae.errors import ConfigError, NotReleasable, RunError
from medvae.gate.decoder import export_decoder
from medvae.gate.shareable import require_shareable
from medvae.nets.build import build_model, make_card, state_arrays
from medvae.synth.store import read_release
from medvae.synth.write_onnx import decoder_of
from medvae.synth.write_page import to_page, visible_codes
from medvae.train.rule import resolve
from medvae.types import Condition, ImageSpace, Intensity, ModelRelease

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not here: pip install 'medvae-dp[onnx]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
CONDITIONS = (Condition("kind", "class", ("a", "<b>")), Condition("age", "continuous", range=(20.0, 90.0)))
FLAT = ImageSpace((16, 20), (1.0, 1.5), "DX", Intensity("window", 0.0, 255.0), CONDITIONS, (1,))
VOLUMES = ImageSpace((8, 8, 8), (1.0, 1.0, 2.0), "CT", Intensity("window", -160.0, 240.0), CONDITIONS)

# Moves code and class as a person does, and notes what the canvas holds before and after.
PROBE = """
addEventListener("securitypolicyviolation", e => { document.body.dataset.refused = e.blockedURI || "inline"; });
const canvas = document.getElementById("picture");
const pixels = () => JSON.stringify([...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]);
const until = wanted => new Promise(done => {
  const look = () => wanted() ? done() : setTimeout(look, 20);
  look();
});
const after = async act => {
  const before = Number(document.body.dataset.shown ?? 0);
  act();
  await until(() => Number(document.body.dataset.shown) > before);
  return pixels();
};
const set = (id, value, kind) => {
  const control = document.getElementById(id);
  control.value = value;
  control.dispatchEvent(new Event(kind));
};
(async () => {
  await until(() => document.body.dataset.ready);
  const notes = { start: pixels() };
  notes.opaque = await after(() => set("opacity", 0, "input"));
  notes.code = await after(() => set("CODE", 1.5, "input"));
  notes.label = await after(() => set("condition-0", 1, "change"));
  notes.age = await after(() => set("condition-1", 80, "input"));
  notes.draw = await after(() => document.getElementById("draw").click());
  notes.reset = await after(() => document.getElementById("reset").click());
  notes.key = await after(() => document.getElementById("CODE").dispatchEvent(
    new KeyboardEvent("keydown", { key: "PageUp", cancelable: true })));
  notes.valued = document.getElementById("CODE").value;
  notes.unnamed = [...document.querySelectorAll("input, select")].filter(c => !c.labels.length).length;
  notes.outside = performance.getEntriesByType("resource").map(e => e.name).filter(n => !/^(data|blob):/.test(n));
  const told = document.createElement("pre");
  told.id = "notes";
  told.textContent = JSON.stringify(notes);
  document.body.append(told);
})();
"""


def make_run(folder: Path, space: ImageSpace) -> Path:
    """A releasable run whose model varies along two codes; nobody trained it."""
    recipe = Recipe(
        model=ModelConfig(latent_dim=3, channels=(4,)),
        moments=MomentsConfig(basis_shape=(4,) * space.spatial_dims, coarse_shape=(2,) * space.spatial_dims),
        canaries=CanaryConfig(enabled=False),
        mixture={"enabled": False},
        dpsgd={"enabled": False},
    )
    resolved = resolve(recipe, 50, space)
    torch.manual_seed(0)
    network = build_model(space, resolved)
    assert network.linear is not None
    network.linear.mean_map.normal_(0, 0.3)
    network.linear.mean_map.flatten(2)[:, 0, 0] = 6.0
    network.linear.mean_map.flatten(2)[:, 1:, 0] = 16.0
    network.linear.directions.normal_(0, 0.1)
    network.linear.directions[0] = 0.0
    network.linear.directions[2] *= 6
    return hand.build_run(folder, space=space, model=ModelRelease(state_arrays(network), make_card(space, resolved)))


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("flat"), FLAT)


@pytest.fixture(scope="module")
def page(flat: Path) -> Path:
    out = flat.parent / "page.html"
    export_decoder("page", flat, out, ReleaseConfig(title="Chests & <more>"), flat.parent / "report")
    return out


def test_the_onnx_file_is_the_released_decoder_with_its_claim(flat: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MEDVAE_TRACKING", "off")
    out = tmp_path / "new" / "model.onnx"
    report = str(flat.parent / "report")
    assert cli_run.run(["export", "onnx", str(flat), "-o", str(out), "--report", report, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["max_abs_error"] < 1e-5
    assert said["bytes"] == out.stat().st_size < 100_000
    assert [p.name for p in out.parent.iterdir()] == ["model.onnx"]
    assert not [word for word in hand.PLANTED if word.encode() in out.read_bytes()]
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    claim = json.loads((flat / "privacy.json").read_text())
    assert json.loads(notes["claim"]) == {
        k: claim[k] for k in ("epsilon", "delta", "unit", "neighboring", "accountant")
    }
    assert notes["synthetic"].startswith("SYNTHETIC")
    assert notes["license"] == "CC-BY-4.0"
    assert int(notes["latent_dim"]) == 3
    assert json.loads(notes["conditions"])["age"] == {"kind": "continuous", "range": [20.0, 90.0]}
    assert notes["weights_sha256"] == read_release(flat / "model").card["weights_sha256"]
    decoder = decoder_of(read_release(flat / "model"))
    z, condition = torch.randn(6, 3), torch.tensor([[0.0, 1.0, 0.4]] * 6)
    image, mask, prior = session.run(["image", "mask", "prior"], {"z": z.numpy(), "condition": condition.numpy()})
    with torch.inference_mode():
        for found, wanted in zip((image, mask, prior), decoder(z, condition), strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_the_gate_is_asked_first(flat: Path, tmp_path: Path) -> None:
    for kind in ("onnx", "page"):
        with pytest.raises(NotReleasable, match="no audit of this run was found"):
            export_decoder(kind, flat, tmp_path / "x", ReleaseConfig())
    assert not list(tmp_path.iterdir())


def test_a_walk_is_refused_with_the_ways_that_it_has(flat: Path) -> None:
    with pytest.raises(NotReleasable) as refused:
        require_shareable(flat, None)
    assert "medvae audit RUN -o REPORT" in str(refused.value)
    assert "--private" in str(refused.value)
    assert not re.search("--report|--override", str(refused.value))


def test_an_override_is_told_in_the_file(flat: Path, tmp_path: Path) -> None:
    config = ReleaseConfig(override="the board of the hospital decided so")
    said = export_decoder("onnx", flat, tmp_path / "m.onnx", config)
    notes = ort.InferenceSession(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(notes["override"]) == said["override"]
    assert "the board of the hospital" in said["override"]["reason"]


def test_bad_input_is_one_sentence(flat: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MEDVAE_TRACKING", "off")
    (tmp_path / "taken.onnx").write_text("mine")
    volumes = make_run(tmp_path / "volumes", VOLUMES)
    cases = (
        (["pickle", str(flat), "-o", "x"], "there is no export of the kind 'pickle'"),
        (["onnx", str(tmp_path), "-o", str(tmp_path / "x")], "no finished run"),
        (["onnx", str(flat), "-o", str(tmp_path / "taken.onnx")], "exists"),
        (["onnx", str(flat), "-o", str(tmp_path / "x"), "--licence", "mine"], "the licence is not known"),
        (["onnx", str(flat), "-o", str(tmp_path / "x"), "--key", "key.pem"], "holds no signature"),
        (["page", str(volumes), "-o", str(tmp_path / "x"), "--report", str(volumes.parent / "report")], "2D images"),
    )
    for argv, says in cases:
        assert cli_run.run(["export", *argv]) == 2, argv
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medvae:")]
        assert len(lines) == 1
        assert says in lines[0]
    assert (tmp_path / "taken.onnx").read_text() == "mine"
    assert not (tmp_path / "x").exists()


def test_an_interrupted_export_leaves_nothing(flat: Path, tmp_path: Path, monkeypatch) -> None:
    from medvae.gate import decoder

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder, "to_onnx", lambda *_: (b"", 0.0))
    monkeypatch.setattr(decoder, "to_page", stop)
    with pytest.raises(KeyboardInterrupt):
        export_decoder("page", flat, tmp_path / "deep" / "x.html", ReleaseConfig(), flat.parent / "report")
    assert not list(tmp_path.iterdir())


def test_the_strongest_codes_come_first_and_dead_ones_not_at_all(flat: Path) -> None:
    release = read_release(flat / "model")
    assert visible_codes(decoder_of(release), release.space) == [2, 1]


def test_the_page_says_what_it_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "SYNTHETIC: no image that this decoder makes shows a person" in text
    assert re.search(r"Synthetic, epsilon [\d.]+ \(delta 1e-05, unit patient, add-remove neighbours, PLD", text)
    assert "Chests &amp; &lt;more&gt;" in text
    assert "<b>" not in text
    assert "2 of the model&#39;s 3 codes change the picture" in text
    assert "Copyright (c) Microsoft Corporation" in text
    assert len(text) < 6_000_000
    assert not [word for word in hand.PLANTED if word in text]
    assert not re.search(r"(src|href)=", text.split("<pre>")[0])


def test_a_model_without_visible_codes_says_so(flat: Path) -> None:
    release = read_release(flat / "model")
    weights = {k: v * 0 if k.endswith("directions") else v for k, v in release.weights.items()}
    facts = {"title": "t", "claim_words": "", "plain_words": []}
    text = to_page(ModelRelease(weights, release.card), b"", facts)
    assert "No code of this model changes the picture" in text


def look(page: Path, probe: str, folder: Path) -> dict[str, Any]:
    """What a probe found in the page; the page's policy is opened for this one script."""
    folder.mkdir(exist_ok=True)
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    text = page.read_text(encoding="utf-8").replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    head, body, tail = text.rpartition("</body>")
    (folder / "probed.html").write_text(f"{head}<script>{probe}</script>{body}{tail}", encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-background-networking",
        "--virtual-time-budget=300000", f"--user-data-dir={folder / 'profile'}", "--dump-dom",
        (folder / "probed.html").as_uri(),
    ]  # fmt: skip
    seen = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "data-refused" not in seen
    found = re.search(r'<pre id="notes">(.*?)</pre>', seen, flags=re.S)
    assert found is not None, re.findall(r"<figcaption.*?</figcaption>", seen)
    return json.loads(found[1].replace("&lt;", "<").replace("&amp;", "&"))


@browser
def test_sliders_decode_as_torch_does_and_nothing_is_asked_from_outside(flat: Path, page: Path, tmp_path: Path) -> None:
    release = read_release(flat / "model")
    decoder = decoder_of(release)
    notes = look(page, PROBE.replace("CODE", "code-2"), tmp_path / "chromium")
    shots = {
        k: np.asarray(json.loads(v)).reshape(16, 20, 4) for k, v in notes.items() if isinstance(v, str) and v[0] == "["
    }

    def torch_decodes(code: float, kind: str, age: float) -> np.ndarray:
        condition = torch.from_numpy(np.concatenate([CONDITIONS[0].encode(kind), CONDITIONS[1].encode(age)]))[None]
        with torch.inference_mode():
            prior = decoder(torch.tensor([[0.0, 0.0, code]]), condition)[2]
            return 255 * decoder(prior, condition)[0][0].numpy()

    for name, wanted in (
        ("opaque", torch_decodes(0, "a", 55)),
        ("code", torch_decodes(1.5, "a", 55)),
        ("label", torch_decodes(1.5, "<b>", 55)),
        ("age", torch_decodes(1.5, "<b>", 80)),
    ):
        assert np.abs(shots[name][..., 0] - wanted).max() <= 1.0, name
        assert (shots[name][..., 0] == shots[name][..., 2]).all()  # grey: the mask is transparent
    for before, then in (("opaque", "code"), ("code", "label"), ("label", "age"), ("age", "draw"), ("reset", "key")):
        assert np.abs(shots[before] - shots[then]).max() > 5, then
    assert (shots["start"][..., 0] != shots["start"][..., 2]).any()  # a mask lies over the first picture
    assert (shots["reset"] == shots["start"]).all()
    assert float(notes["valued"]) == pytest.approx(0.6)
    assert notes["unnamed"] == 0
    assert notes["outside"] == []


@browser
def test_a_foreign_script_does_not_run(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    foreign = tmp_path / "foreign.html"
    foreign.write_text(text.replace("</body>", '<script>document.body.dataset.foreign = "1"</script></body>'))
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    seen = subprocess.run([*command, foreign.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "data-foreign" not in seen


def test_the_functions_refuse_what_the_commands_do(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no export of the kind"):
        api_export.export("pickle", flat, tmp_path / "x")
    with pytest.raises(RunError, match="exists"):
        export_decoder("onnx", flat, tmp_path, ReleaseConfig())
