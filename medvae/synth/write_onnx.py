"""A released decoder as an ONNX file: for any runtime, and checked against torch before it is written.

Inputs: z (N, code_size) and condition (N, K), float32; N is free. Outputs: image (N, *spatial) in [0, 1], mask
(N, M, *spatial) where the model has masks, and prior (N, code_size); see synth/decoder.py. What a reader has to know,
the privacy claim first, is in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from medvae.errors import MissingPart, RunError
from medvae.nets.build import load_release
from medvae.synth.decoder import ReleasedDecoder
from medvae.types import ImageSpace, ModelRelease

if TYPE_CHECKING:
    import onnx

SCHEMA = "medvae.onnx/1"
OPSET = 20
# Rounding differs between runtimes by about 1e-6 of a value in [0, 1]; what differs more is not this decoder.
TOLERANCE = 1e-4
CHECKED = 5  # scans decoded by both; another number than the two that the graph was traced with


def decoder_of(release: ModelRelease) -> ReleasedDecoder:
    """Return the decoder of a release with its weights, for evaluation. Raises RunError as `load_release` does."""
    return ReleasedDecoder(load_release(release)).eval().requires_grad_(False)


def to_onnx(release: ModelRelease, facts: Mapping[str, Any]) -> tuple[bytes, float]:
    """Return the ONNX file of a release's decoder, and the largest difference of its outputs from torch's.

    facts: goes into the metadata, one key each, texts as they are and all else as JSON. Raises MissingPart without the
    packages of the extra `onnx`, and RunError where a graph differs from the model by more than TOLERANCE.
    """
    _require()
    decoder = decoder_of(release)
    graph = _Graph(decoder, release.space).eval()
    proto = _strip(_exported(graph, *_example(graph, 2)))
    for key, value in {**describe(decoder, release.space), **facts}.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    blob: bytes = proto.SerializeToString()
    error = _difference(blob, graph)
    if not error <= TOLERANCE:
        raise RunError(
            f"the exported graph differs from the model by {error:.2g}, so it was not written: try other versions of "
            "onnx, onnxscript and onnxruntime, and please report it"
        )
    return blob, error


def describe(decoder: ReleasedDecoder, space: ImageSpace) -> dict[str, Any]:
    """Return what a user of the decoder has to know: codes, conditions and how they are encoded, geometry."""
    return {
        "schema": SCHEMA,
        "latent_dim": decoder.model.latent_dim,
        "code_size": decoder.code_size,
        "components": decoder.components,
        "prior": "the output `prior` at z of standard normal numbers is a code to decode; at z = 0 its centre",
        "conditions": {c.name: c.to_json() for c in space.conditions},
        "condition_encoding": "classes one-hot, a number from its range to -1..1, joined in this order",
        "spatial_shape": list(space.spatial_shape),
        "spacing_mm": list(space.spacing_mm),
        "modality": space.modality,
        "intensity": space.to_json()["intensity"],
        "mask_labels": list(space.mask_labels),
    }


class _Graph(nn.Module):
    """The decoder with the inputs and outputs that its space has: no condition of no width, no mask of no label."""

    def __init__(self, decoder: ReleasedDecoder, space: ImageSpace) -> None:
        super().__init__()
        self.decoder, self.space = decoder, space
        self.inputs = ["z", *(["condition"] if space.condition_width else [])]
        self.outputs = ["image", *(["mask"] if space.mask_labels else []), "prior"]

    def forward(self, z: Tensor, *condition: Tensor) -> tuple[Tensor, ...]:
        given = condition[0] if condition else z.new_zeros(len(z), 0)
        image, mask, prior = self.decoder(z, given)
        return (image, mask, prior) if self.space.mask_labels else (image, prior)


def _require() -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript

        _ = (onnx, onnxruntime, onnxscript)
    except ImportError as missing:
        raise MissingPart(f"{missing.name or 'onnx'} is missing: pip install 'medvae-dp[onnx]'") from None


def _example(graph: _Graph, count: int) -> tuple[Tensor, ...]:
    """Return codes from the prior's normal numbers, and conditions as they are encoded, classes in turn."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count, graph.decoder.code_size, generator=generator)
    columns = []
    for condition in graph.space.conditions:
        if condition.kind == "class":
            columns.append(torch.eye(condition.width)[torch.arange(count) % condition.width])
        else:
            columns.append(2 * torch.rand(count, 1, generator=generator) - 1)
    return (z, torch.cat(columns, dim=1)) if columns else (z,)


def _exported(graph: _Graph, *example: Tensor) -> onnx.ModelProto:
    import contextlib
    import io
    import logging

    free = {0: torch.export.Dim.DYNAMIC}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            program = torch.onnx.export(
                graph,
                example,
                dynamo=True,
                input_names=graph.inputs,
                output_names=graph.outputs,
                dynamic_shapes=(free, *([tuple(free for _ in example[1:])] if example[1:] else [])),
                opset_version=OPSET,
                verbose=False,
            )
        finally:
            logging.disable(level)
    if program is None:
        raise RunError("torch made no ONNX graph of this model: try another version of torch")
    return program.model_proto


def _strip(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Take out what the exporter notes about this machine: stack traces with paths, and names of modules."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    del graph.value_info[:]
    graph.name = "decoder"
    proto.producer_name, proto.producer_version = "medvae-dp", ""
    return proto


def _difference(blob: bytes, graph: _Graph) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
    example = _example(graph, CHECKED)
    found = session.run(graph.outputs, {n: t.numpy() for n, t in zip(graph.inputs, example, strict=True)})
    with torch.inference_mode():
        wanted = graph(*example)
    return float(max(np.abs(a - b.numpy()).max() for a, b in zip(found, wanted, strict=True)))
