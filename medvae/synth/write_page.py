"""One HTML page with sliders over a released model's codes and conditions, which decodes in the page. 2D models.

The page holds the decoder as ONNX and ONNX Runtime Web (assets/README.md). Its own content security policy lets it load
and run nothing else. It shows the mean of the decoder, which is smoother than what `medvae release` draws around it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np
import torch

from medvae.errors import ConfigError
from medvae.synth.decoder import ReleasedDecoder
from medvae.synth.write_onnx import decoder_of
from medvae.types import Condition, ImageSpace, ModelRelease, decode_conditions

SLIDERS = 8  # codes that get one, at most
REACH = 3.0  # standard deviations of the prior, to either side
VISIBLE = 1 / 255  # a code that moves no pixel by a grey level has no slider
_EXPORT = re.compile(r"export\{([^{}]*)\};\s*(?://# sourceMappingURL=\S*\s*)?$")


def to_page(release: ModelRelease, onnx: bytes, facts: Mapping[str, Any]) -> str:
    """Return the page for a release whose decoder `onnx` is (synth/write_onnx.py).

    facts: of the gate: "title", "synthetic", "claim_words", "plain_words", "license" and, where a check was overridden,
    "override". Raises ConfigError for a model of volumes.
    """
    import jinja2

    space = release.space
    if space.spatial_dims != 2:
        raise ConfigError("a page shows 2D images, and this model makes volumes: export onnx or bundle")
    decoder = decoder_of(release)
    codes = visible_codes(decoder, space)
    data = {
        "conditions": [_control(c) for c in space.conditions],
        "width": space.condition_width,
        "codes": codes[:SLIDERS],
        "codeSize": decoder.code_size,
        "components": decoder.components,
        "reach": REACH,
        "shape": list(space.spatial_shape),
        "spacing": list(space.spacing_mm),
        "labels": list(space.mask_labels),
    }
    script = f"{_runtime()}\n{_asset('page.js').decode()}"
    template = jinja2.Environment(autoescape=True).from_string(_asset("page.html.j2").decode())
    return template.render(
        facts=facts,
        told=_told(len(codes), decoder),
        licences=_asset("onnxruntime.LICENSES.txt").decode(),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=json.dumps(data).replace("<", "\\u003c"),
        model=base64.b64encode(onnx).decode(),
        engine=base64.b64encode(gzip.compress(lzma.decompress(_asset("onnxruntime.wasm.xz")), 9, mtime=0)).decode(),
        script=script,
    )


def visible_codes(decoder: ReleasedDecoder, space: ImageSpace) -> list[int]:
    """Return the codes whose move by two standard deviations of the prior can be seen, those that change most first."""
    count = decoder.code_size - (decoder.components > 1)
    moves = torch.cat([torch.zeros(1, decoder.code_size), *(s * torch.eye(count, decoder.code_size) for s in (2, -2))])
    change = np.zeros(count)
    seen = np.zeros(count, dtype=bool)
    with torch.inference_mode():
        for condition in _each_class(space):
            rows = condition.expand(len(moves), -1)
            images, _, _ = decoder(decoder(moves, rows)[2], rows)
            gap = (images[1:] - images[:1]).abs().flatten(1).view(2, count, -1).amax(0)
            change += gap.square().mean(1).numpy()
            seen |= (gap.amax(1) >= VISIBLE).numpy()
    return [int(j) for j in np.argsort(-change, kind="stable") if seen[j]]


def _each_class(space: ImageSpace) -> list[torch.Tensor]:
    """Return encoded conditions (K,): every class once, whatever the others are, and numbers in their middle."""
    most = max((c.width for c in space.conditions if c.kind == "class"), default=1)
    rows = []
    for i in range(most):
        parts = [torch.eye(c.width)[i % c.width] if c.kind == "class" else torch.zeros(1) for c in space.conditions]
        rows.append(torch.cat(parts) if parts else torch.zeros(0))
    return rows


def _control(condition: Condition) -> dict[str, Any]:
    middle = decode_conditions((condition,), np.zeros(condition.width))[condition.name]
    start = 0 if condition.kind == "class" else middle
    return {"name": condition.name, "start": start, **condition.to_json()}


def _told(visible: int, decoder: ReleasedDecoder) -> str:
    if visible == 0:
        return (
            "No code of this model changes the picture: with few patients or a small epsilon, it learned the mean of "
            "each condition and no more."
        )
    rest = decoder.code_size - (decoder.components > 1)
    shown = min(visible, SLIDERS)
    return (
        f"{visible} of the model's {rest} codes change the picture; those that change it most, {shown} of them, have "
        "sliders, in standard deviations of the prior. The picture is the decoder's mean: a released image is rougher."
    )


def _runtime() -> str:
    """Return ONNX Runtime Web as code that ends with a constant `ort` in place of its exports: nothing imports it."""
    text = _asset("onnxruntime.min.mjs").decode()
    found = _EXPORT.search(text)
    if found is None:
        raise ValueError("the runtime's exports are not where they were: see synth/assets/README.md")
    pairs = (pair.partition(" as ") for pair in found[1].split(","))
    names = {outside: inside for inside, _, outside in pairs}
    chosen = ",".join(f"{name}:{names[name]}" for name in ("InferenceSession", "Tensor", "env"))
    return f"{text[: found.start()]}const ort={{{chosen}}};"


def _asset(name: str) -> bytes:
    return resources.files("medvae.synth").joinpath("assets", name).read_bytes()
