"""The layers the engine knows: forward as ever, backward into the book.

Autograd sees every layer with its weights detached, so it takes the gradient of the input and nothing else. A hook on
the output hands (input, output gradient) to the book. Weights get no gradient from autograd, so none is allocated; a
weight that has one all the same was used behind its layer's back, and the module refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from medvae.errors import ConfigError
from medvae.train.engine.book import Book, Deferred
from medvae.train.engine.convolution import ConvCall, Geometry
from medvae.train.engine.strategies import LAYOUTS, Found, LinearCall
from medvae.train.engine.tuner import Tuner


@dataclass
class Desk:
    """Where the layers find the book of the step in progress; without one they are plain layers.

    channels_last: whether convolutions compute in that layout.
    """

    tuner: Tuner
    book: Book | None = None
    channels_last: bool = False


class _Root(torch.autograd.Function):
    """Where the graph of a layer begins whose input needs no gradient: its output has one all the same."""

    @staticmethod
    def forward(_ctx: Any, _anchor: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    @staticmethod
    def backward(_ctx: Any, *_: Tensor) -> tuple[None, None]:
        return None, None


def _tapped(x: Tensor, book: Book, compute: Callable[[], Tensor], write: Callable[[Tensor, Tensor], None]) -> Tensor:
    """Compute a layer's output; in the backward pass `write` gets x and the output's gradient, once.

    x is let go as soon as it has served, as autograd does with what it saves, and guarded like it.
    """
    saved, version = [x], x._version

    def hook(gradient: Tensor) -> None:
        values = saved.pop()
        if values._version != version:
            raise ConfigError("a layer's input was changed in place before its gradient was taken: change a copy")
        write(values, gradient)

    y = compute() if x.requires_grad else torch.as_tensor(_Root.apply(book.anchor, compute))  # type: ignore[no-untyped-call]
    y.register_hook(hook)  # type: ignore[no-untyped-call]
    return y


def _write(tuner: Tuner, book: Book, weight: Tensor, call: ConvCall | LinearCall) -> Tensor | None:
    """Write a weight's gradients into the book by the strategy chosen for the call.

    Returns the bias's gradients a patient where they came along.
    """
    alone = book.used_once(weight)
    if alone and not book.has_room(weight):
        found, weighted = call.measured(), call.measured_again
    else:
        found, weighted = tuner.choose(call, may_defer=alone)(), call.weighted
    if found.rows is not None:
        book.keep(weight, found)
    elif found.norms is not None:
        book.defer(weight, Deferred(found.norms, weighted))
    return found.by_bias


def _is_channels_last(x: Tensor) -> bool:
    """Return whether x (B, C, ...) has exactly the strides of channels_last; the native kernels take no others."""
    strides, step = [1], x.shape[1]
    for size in reversed(x.shape[2:]):
        strides.insert(1, step)
        step *= size
    return x.dim() in LAYOUTS and x.stride() == (step, *strides)


def _dense(x: Tensor) -> Tensor:
    """Return x (B, C, ...) in one of the two layouts that the native kernels know."""
    return x if x.is_contiguous() or _is_channels_last(x) else x.contiguous()


def _cast(x: Tensor) -> Tensor:
    """Return x in the precision that autocast computes in, where it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _values(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a parameter's values in the precision of x, out of autograd's sight."""
    return None if parameter is None else parameter.detach().to(x.dtype)


def _convolved(module: _ConvNd, x: Tensor, geometry: Geometry, desk: Desk, book: Book) -> Tensor:
    x = _cast(x)
    weight, bias = module.weight, module.bias
    # `to`, unlike `contiguous`, lays out a single channel too: the kernel takes its layout from the strides.
    layout = LAYOUTS.get(x.dim(), torch.preserve_format) if desk.channels_last else torch.preserve_format
    values = weight.detach().to(x.dtype, memory_format=layout)
    biased = bias is not None and bias.requires_grad

    def compute() -> Tensor:
        return torch.convolution(
            x,
            values,
            _values(bias, x),
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.transposed,
            geometry.output_padding,
            geometry.groups,
        )

    def write(x: Tensor, gradient: Tensor) -> None:
        by_bias = None
        if weight.requires_grad:
            call = ConvCall(geometry, x, gradient, values, book.segments, biased)
            by_bias = _write(desk.tuner, book, weight, call)
        if bias is None or not biased:
            return
        if by_bias is not None:
            book.keep(bias, Found(by_bias))
        else:
            book.keep_scans(bias, gradient.flatten(2).sum(2))

    return _tapped(x, book, compute, write)


def _conv(module: _ConvNd, x: Tensor, desk: Desk, book: Book) -> Tensor:
    padding: Any = module.padding
    if module.padding_mode != "zeros" or padding == "same":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = "valid"
    none = (0,) * len(module.stride)
    padding = none if padding == "valid" else padding
    geometry = Geometry(module.stride, padding, module.dilation, False, none, module.groups)
    return _convolved(module, x, geometry, desk, book)


def _conv_transpose(
    module: _ConvTransposeNd, x: Tensor, desk: Desk, book: Book, output_size: list[int] | None = None
) -> Tensor:
    padding: Any = module.padding
    kernel, axes = module.kernel_size, len(module.stride)
    extra = module._output_padding(x, output_size, module.stride, padding, kernel, axes, module.dilation)  # type: ignore[arg-type]
    geometry = Geometry(module.stride, padding, module.dilation, True, tuple(extra), module.groups)
    return _convolved(module, x, geometry, desk, book)


def _linear(module: nn.Linear, x: Tensor, desk: Desk, book: Book) -> Tensor:
    x = _cast(x)
    weight, bias = module.weight, module.bias

    def compute() -> Tensor:
        return functional.linear(x, weight.detach().to(x.dtype), _values(bias, x))

    def write(x: Tensor, gradient: Tensor) -> None:
        rows, outward = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, gradient))
        if weight.requires_grad:
            _write(desk.tuner, book, weight, LinearCall(rows, outward, book.segments))
        if bias is not None and bias.requires_grad:
            book.keep_scans(bias, outward.sum(1))

    return _tapped(x, book, compute, write)


def _group_norm(module: nn.GroupNorm, x: Tensor, desk: Desk, book: Book) -> Tensor:
    x = _dense(x)
    if x.dtype == torch.bfloat16 and not x.is_contiguous():
        # In this layout and precision the native backward pass takes ten times as long; two copies cost less.
        return _group_norm(module, x.contiguous(), desk, book).contiguous(memory_format=LAYOUTS[x.dim()])
    weight, bias = module.weight, module.bias
    if x.is_contiguous():
        batch, channels, places = len(x), x.shape[1], x[0, 0].numel()
        # A batch as one sample of many groups, with weights a scan: autograd's own gradients are then a scan's.
        weights, biases = (book.copies(p, batch, x.dtype) for p in (weight, bias))
        size, groups = (1, batch * channels, places), batch * module.num_groups
        return torch.native_group_norm(x.view(size), weights, biases, *size, groups, module.eps)[0].view(x.shape)
    return torch.as_tensor(_NormLast.apply(x, book.anchor, module, book))  # type: ignore[no-untyped-call]


class _NormLast(torch.autograd.Function):
    """GroupNorm in channels_last, where no view tells scans apart: the native backward pass, a patient at a time.

    It is asked for the input's gradient always: without, the kernel for this layout crashes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, module: nn.GroupNorm, book: Book) -> Tensor:
        weight, bias = (_values(p, x) for p in (module.weight, module.bias))
        size = (len(x), x.shape[1], x[0, 0].numel())
        y, *moments = torch.native_group_norm(x, weight, bias, *size, module.num_groups, module.eps)
        ctx.save_for_backward(x, *moments)
        ctx.module, ctx.book = module, book
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, mean, scale = ctx.saved_tensors
        module, book, places = ctx.module, ctx.book, x[0, 0].numel()
        gradient = gradient.to(memory_format=LAYOUTS[x.dim()])
        by_input, rows = torch.empty_like(x), []
        weight, mask = _values(module.weight, x), (True, True, True)
        for start, stop in book.segments.bounds:
            part = (t[start:stop] for t in (gradient, x, mean, scale))
            size = (stop - start, x.shape[1], places, module.num_groups)
            found = torch.ops.aten.native_group_norm_backward(*part, weight, *size, mask)
            by_input[start:stop] = found[0]
            rows.append(found[1:])
        for parameter, some in zip((module.weight, module.bias), zip(*rows, strict=True), strict=True):
            if parameter.requires_grad:
                book.keep(parameter, Found(torch.stack(some)))
        return by_input, None, None, None


def _layer_norm(module: nn.LayerNorm, x: Tensor, _desk: Desk, book: Book) -> Tensor:
    weight, bias, shape = module.weight, module.bias, tuple(module.normalized_shape)
    y, mean, scale = torch.native_layer_norm(x, shape, _values(weight, x), _values(bias, x), module.eps)

    def write(x: Tensor, gradient: Tensor) -> None:
        def by_scan(t: Tensor) -> Tensor:
            return t.reshape(len(t), -1, *shape).sum(1)

        if weight.requires_grad:
            book.keep_scans(weight, by_scan(gradient * (x - mean) * scale))
        if bias is not None and bias.requires_grad:
            book.keep_scans(bias, by_scan(gradient))

    return _tapped(x, book, lambda: y, write)


def _embedding(module: nn.Embedding, index: Tensor, _desk: Desk, book: Book) -> Tensor:
    weight, padding = module.weight, module.padding_idx

    def write(index: Tensor, gradient: Tensor) -> None:
        segments, (words, width) = book.segments, weight.shape
        index = index.reshape(len(index), -1)
        patient = segments.index(index.device)[:, None].expand_as(index)
        found = gradient.new_zeros((segments.patients, words, width))
        place = (patient.flatten(), index.flatten())
        found.index_put_(place, gradient.reshape(-1, width), accumulate=True)
        if padding is not None:
            found[:, padding] = 0
        book.keep(weight, Found(found))

    return _tapped(index, book, lambda: functional.embedding(index, weight.detach()), write)


LAYERS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _conv_transpose,
    nn.ConvTranspose2d: _conv_transpose,
    nn.ConvTranspose3d: _conv_transpose,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}


def install(model: nn.Module, desk: Desk) -> list[nn.Module]:
    """Give every layer with trainable parameters a forward that writes to the desk's book; return these layers.

    Raises ConfigError with the name of the first layer that is unknown; then nothing is changed.
    """
    found = {}
    for name, module in model.named_modules():
        trainable = {n for n, p in module.named_parameters(recurse=False) if p.requires_grad}
        if trainable:
            found[module] = (name, _layer(name, module, trainable))
    for module, (name, layer) in found.items():
        # A partial, unlike a closure, is copied with the model and then refers to the copy.
        object.__setattr__(module, "forward", partial(_forward, layer, module, name, desk))
    return list(found)


def remove(layers: list[nn.Module]) -> None:
    """Undo `install`."""
    for module in layers:
        module.__dict__.pop("forward", None)


def _layer(name: str, module: nn.Module, trainable: set[str]) -> Callable[..., Tensor]:
    """Return the forward for a layer. A subclass that computes something else is as unknown as any other."""
    kind = next((k for k in LAYERS if isinstance(module, k) and type(module).forward is k.forward), None)
    steps = all(getattr(type(module), n, None) is getattr(kind, n, None) for n in ("_conv_forward", "_output_padding"))
    special = isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq)
    if kind is None or not steps or special or not trainable <= {"weight", "bias"} or "forward" in module.__dict__:
        raise ConfigError(
            f"no gradient by patient is known for the layer {name or 'model'!r} ({type(module).__name__}): "
            "use another layer, or dpsgd.grad_sampler: functorch"
        )
    return LAYERS[kind]


def _forward(
    layer: Callable[..., Tensor], module: nn.Module, name: str, desk: Desk, x: Tensor, *rest: Any, **options: Any
) -> Tensor:
    """Call a layer; while a book is open, note the call in it."""
    book = desk.book
    if book is None or not torch.is_grad_enabled():
        return torch.as_tensor(type(module).forward(module, x, *rest, **options))
    if x.dim() < _axes(module) or len(x) != book.segments.scans:
        raise ConfigError(
            f"the layer {name!r} does not see one row a scan, so no gradient by patient can be taken: keep the batch "
            "as the first axis"
        )
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            book.announce(parameter)
    return layer(module, x, desk, book, *rest, **options)


def _axes(module: nn.Module) -> int:
    """Return how many axes the input of a layer has at least when the batch is one of them."""
    if isinstance(module, _ConvNd):
        return 2 + len(module.stride)
    if isinstance(module, nn.LayerNorm):
        return 1 + len(module.normalized_shape)
    return 1 if isinstance(module, nn.Embedding) else 2
