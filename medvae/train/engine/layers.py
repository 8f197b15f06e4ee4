"""The layers the engine knows: forward as ever, backward into the book.

Each Function returns the gradient of its input only. Weights get no gradient from autograd, so none is allocated; a
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
from medvae.train.engine.strategies import ConvCall, Geometry, LinearCall
from medvae.train.engine.tuner import Tuner


@dataclass
class Desk:
    """Where the layers find the book of the step in progress; without one they are plain layers."""

    tuner: Tuner
    book: Book | None = None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, desk: Desk, book: Book
    ) -> Tensor:
        ctx.geometry, ctx.desk, ctx.book, ctx.parameters = geometry, desk, book, (weight, bias)
        ctx.save_for_backward(x)
        return torch.convolution(
            x,
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.transposed,
            geometry.output_padding,
            geometry.groups,
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        weight, bias = ctx.parameters
        book: Book = ctx.book
        values = weight.detach().to(x.dtype)
        by_bias = None
        if weight.requires_grad:
            by_bias = _write(ctx.desk.tuner, book, weight, ConvCall(ctx.geometry, x, gradient, values, book.segments))
        if bias is not None and bias.requires_grad:
            book.keep(bias, book.segments.sum(gradient.flatten(2).sum(2)) if by_bias is None else by_bias)
        back = None
        if ctx.needs_input_grad[0]:
            back = ctx.geometry.backward(x, gradient, values, (True, False, False))[0]
        return back, None, None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, desk: Desk, book: Book) -> Tensor:
        ctx.desk, ctx.book, ctx.parameters = desk, book, (weight, bias)
        ctx.save_for_backward(x)
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        weight, bias = ctx.parameters
        book: Book = ctx.book
        rows, outward = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, gradient))
        if weight.requires_grad:
            _write(ctx.desk.tuner, book, weight, LinearCall(rows, outward, book.segments))
        if bias is not None and bias.requires_grad:
            book.keep(bias, book.segments.sum(outward.sum(1)))
        back = gradient @ weight.detach().to(x.dtype) if ctx.needs_input_grad[0] else None
        return back, None, None, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, book: Book) -> Tensor:
        x = _dense(x)
        size = (len(x), x.shape[1], x[0, 0].numel())
        y, mean, scale = torch.ops.aten.native_group_norm(x, weight.to(x.dtype), bias.to(x.dtype), *size, groups, eps)
        ctx.groups, ctx.book, ctx.parameters = groups, book, (weight, bias)
        ctx.save_for_backward(x, mean, scale)
        return torch.as_tensor(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        weight, bias = ctx.parameters
        book: Book = ctx.book
        batch, channels, places = len(x), x.shape[1], x[0, 0].numel()
        gradient, values = _like(gradients[0], x), weight.detach().to(x.dtype)
        options = (x, mean, scale, values, batch, channels, places, ctx.groups)
        if x.is_contiguous():
            # A batch as one sample of many groups: the native sums over the batch are then sums a scan.
            flat = (1, batch * channels, places)
            options = (
                x.view(flat),
                mean.view(1, -1),
                scale.view(1, -1),
                values.repeat(batch),
                *flat,
                batch * ctx.groups,
            )
            found = torch.ops.aten.native_group_norm_backward(gradient.view(flat), *options, (True, True, True))
            back, by_weight, by_bias = found[0].view(x.shape), *(t.view(batch, channels) for t in found[1:])
        else:
            back = torch.ops.aten.native_group_norm_backward(gradient, *options, (True, False, False))[0]
            by_bias = gradient.float().flatten(2).sum(2)
            product = (gradient.float() * x.float()).flatten(2).sum(2)
            mean, scale = (t.float().repeat_interleave(channels // ctx.groups, 1) for t in (mean, scale))
            by_weight = (product - by_bias * mean) * scale
        if weight.requires_grad:
            book.keep(weight, book.segments.sum(by_weight))
        if bias.requires_grad:
            book.keep(bias, book.segments.sum(by_bias))
        return back, None, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], eps: float, book: Book
    ) -> Tensor:
        y, mean, scale = torch.ops.aten.native_layer_norm(
            x, shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps
        )
        ctx.shape, ctx.book, ctx.parameters = shape, book, (weight, bias)
        ctx.save_for_backward(x, mean, scale)
        return torch.as_tensor(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, mean, scale), (gradient,) = ctx.saved_tensors, gradients
        weight, bias = ctx.parameters
        book: Book = ctx.book

        def by_patient(t: Tensor) -> Tensor:
            return book.segments.sum(t.reshape(len(t), -1, *ctx.shape).sum(1))

        if weight.requires_grad:
            book.keep(weight, by_patient(gradient * (x - mean) * scale))
        if bias is not None and bias.requires_grad:
            book.keep(bias, by_patient(gradient))
        back = None
        if ctx.needs_input_grad[0]:
            values = (None if p is None else p.detach().to(x.dtype) for p in (weight, bias))
            back = torch.ops.aten.native_layer_norm_backward(
                gradient, x, ctx.shape, mean, scale, *values, (True, False, False)
            )[0]
        return back, None, None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, padding: int | None, book: Book) -> Tensor:
        ctx.weight, ctx.padding, ctx.book = weight, padding, book
        ctx.save_for_backward(index)
        return functional.embedding(index, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (index,), (gradient,) = ctx.saved_tensors, gradients
        book: Book = ctx.book
        segments, (words, width) = book.segments, ctx.weight.shape
        index = index.reshape(len(index), -1)
        patient = segments.index(index.device)[:, None].expand_as(index)
        found = gradient.new_zeros((segments.patients, words, width))
        place = (patient.flatten(), index.flatten())
        found.index_put_(place, gradient.reshape(-1, width), accumulate=True)
        if ctx.padding is not None:
            found[:, ctx.padding] = 0
        book.keep(ctx.weight, found)
        return None, None, None, None


def _write(tuner: Tuner, book: Book, weight: nn.Parameter, call: ConvCall | LinearCall) -> Tensor | None:
    """Write a weight's gradients into the book by the strategy chosen for the call.

    Returns the bias's gradients a patient where they came along.
    """
    work = tuner.choose(call, may_defer=book.used_once(weight))
    if work.deferred:
        book.defer(weight, Deferred(work.run()[0], call.weighted))
        return None
    found, by_bias = work.run()
    book.keep(weight, found)
    return by_bias


def _is_channels_last(x: Tensor) -> bool:
    """Return whether x (B, C, ...) has exactly the strides of channels_last; the native kernels take no others."""
    strides, step = [1], x.shape[1]
    for size in reversed(x.shape[2:]):
        strides.insert(1, step)
        step *= size
    return x.dim() in (4, 5) and x.stride() == (step, *strides)


def _dense(x: Tensor) -> Tensor:
    """Return x (B, C, ...) in one of the two layouts that the native kernels know."""
    return x if _is_channels_last(x) else x.contiguous()


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """Return the gradient in the layout of x: the native kernel reads both so, and does not check."""
    if x.is_contiguous():
        return gradient.contiguous()
    return torch.empty_like(x, dtype=gradient.dtype).copy_(gradient) if gradient.stride() != x.stride() else gradient


def _cast(x: Tensor) -> Tensor:
    """Return x in the precision that autocast computes in, where it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _apply(function: type[torch.autograd.Function], *values: object) -> Tensor:
    return torch.as_tensor(function.apply(*values))  # type: ignore[no-untyped-call]


def _conv(module: _ConvNd, x: Tensor, desk: Desk, book: Book) -> Tensor:
    padding: Any = module.padding
    if module.padding_mode != "zeros" or padding == "same":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = "valid"
    none = (0,) * len(module.stride)
    padding = none if padding == "valid" else padding
    geometry = Geometry(module.stride, padding, module.dilation, False, none, module.groups)
    return _apply(_Conv, _cast(x), module.weight, module.bias, geometry, desk, book)


def _conv_transpose(
    module: _ConvTransposeNd, x: Tensor, desk: Desk, book: Book, output_size: list[int] | None = None
) -> Tensor:
    padding: Any = module.padding
    kernel, axes = module.kernel_size, len(module.stride)
    extra = module._output_padding(x, output_size, module.stride, padding, kernel, axes, module.dilation)  # type: ignore[arg-type]
    geometry = Geometry(module.stride, padding, module.dilation, True, tuple(extra), module.groups)
    return _apply(_Conv, _cast(x), module.weight, module.bias, geometry, desk, book)


def _linear(module: nn.Linear, x: Tensor, desk: Desk, book: Book) -> Tensor:
    return _apply(_Linear, _cast(x), module.weight, module.bias, desk, book)


def _group_norm(module: nn.GroupNorm, x: Tensor, _desk: Desk, book: Book) -> Tensor:
    return _apply(_GroupNorm, x, module.weight, module.bias, module.num_groups, module.eps, book)


def _layer_norm(module: nn.LayerNorm, x: Tensor, _desk: Desk, book: Book) -> Tensor:
    return _apply(_LayerNorm, x, module.weight, module.bias, tuple(module.normalized_shape), module.eps, book)


def _embedding(module: nn.Embedding, x: Tensor, _desk: Desk, book: Book) -> Tensor:
    return _apply(_Embedding, module.weight, x, module.padding_idx, book)


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
    for parameter in module.parameters(recurse=False):
        if parameter.requires_grad:
            book.announce(parameter)
    return layer(module, x, desk, book, *rest, **options)


def _axes(module: nn.Module) -> int:
    """Return how many axes the input of a layer has at least when the batch is one of them."""
    if isinstance(module, _ConvNd):
        return 2 + len(module.stride)
    if isinstance(module, nn.LayerNorm):
        return 1 + len(module.normalized_shape)
    return 1 if isinstance(module, nn.Embedding) else 2
