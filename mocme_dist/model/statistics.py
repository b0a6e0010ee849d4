"""MINE's training pass by the C++ kernels of mine.cpp, on a CPU: what `mine` computes in torch, for views without a gradient.

Forward standardises the views, runs the networks and leaves sums; backward, once ranks have agreed on those sums, makes
the parameters' gradients. Nothing of a pair's rows and hidden units is stored in between. Products are float32, or
with float32 sums bfloat16 or three of bfloat16, where the CPU has AMX.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mocme_dist.model.native import call, library
from mocme_dist.model.precision import INSTRUCTIONS

_SOURCE = Path(__file__).with_name("mine.cpp")
# Bytes of a number that products multiply, and where the memory of some must begin.
_BYTES, _ALIGN = {"float32": 4, "bfloat16x3": 4, "bfloat16": 2}, 128
_SIZES = ("S", "V", "T", "P", "D", "H", "width", "threads", "halves", "low")
_VIEWS = ("view", "present", "held_out", "center", "inverse", "left", "right")
_PARAMETERS = ("first", "bias", "second", "second_bias", "last")
_FOUND = ("trained", "sides", "next", "exps", "sums")
_ARRAYS = (*_VIEWS, *_PARAMETERS, *_FOUND, "slopes", *(f"{name}_grad" for name in _PARAMETERS))


class _Networks(ctypes.Structure):
    """`Networks` of mine.cpp, field by field."""

    _fields_ = [*((name, ctypes.c_int64) for name in _SIZES), ("clip", ctypes.c_double), *((name, ctypes.c_void_p) for name in _ARRAYS)]


class Pass(NamedTuple):
    """What forward leaves.

    Attributes:
        sums: flat float64, as `Found.sums` of mine: (6, P), then (S,) numbers of present rows and (2, S, D) moments.
        sizes, arrays, precision, clip: for backward.
    """

    sums: Tensor
    sizes: dict[str, int]
    arrays: dict[str, Tensor]
    precision: str
    clip: float


@cache
def _kernels(precision: str) -> ctypes.CDLL | None:
    """The library of these products; None where it cannot run here."""
    found = library(_SOURCE, INSTRUCTIONS[precision])
    if found is not None:
        found.mocme_mine_pad.restype = ctypes.c_int64
    return found


def has_kernels(view: Tensor, precision: str) -> bool:
    """Whether statistics of these views with such products come from the kernels."""
    can = view.device.type == "cpu" and view.dtype in (torch.float32, torch.bfloat16) and precision in INSTRUCTIONS
    return can and _kernels(precision) is not None


def _run(name: str, precision: str, sizes: dict[str, int], clip: float, arrays: dict[str, Tensor]) -> None:
    assert all(array.is_contiguous() for array in arrays.values())
    addresses = {key: array.data_ptr() for key, array in arrays.items()}
    function = getattr(_kernels(precision), name)
    function.restype = None
    function(ctypes.byref(_Networks(**sizes, clip=clip, threads=torch.get_num_threads(), **addresses)))


def forward(
    view_SVD: Tensor,
    present_SV: Tensor,
    held_out_V: Tensor | None,
    standard: tuple[Tensor, Tensor],
    pairs: tuple[Tensor, Tensor],
    parameters: Sequence[Tensor],
    precision: str,
    clip: float,
) -> Pass:
    """Run the networks on all rows.

    Args:
        view_SVD: (S, V, D) views, float32 or bfloat16.
        present_SV: (S, V) rows that have the view.
        held_out_V: (V,) rows that estimate, the others train; None: all do both.
        standard: (S, D) mean and deviation to standardise with.
        pairs: (P,) left and right views.
        parameters: of StatisticsNetworks, in order.
        precision: of the products, see `has_kernels`.
        clip: of T' inside exp; infinite is none.
    """
    (S, V, width), (P, H) = view_SVD.shape, parameters[1].shape
    D, H = _padded(width, precision), _padded(H, precision)
    T = V if held_out_V is None else V - int(held_out_V.sum())
    halves, low = held_out_V is not None, view_SVD.dtype == torch.bfloat16
    sizes = {"S": S, "V": V, "T": T, "P": P, "D": D, "H": H, "width": width, "halves": int(halves), "low": int(low)}
    held_out_V = torch.zeros(V, dtype=torch.bool) if held_out_V is None else held_out_V
    center_SD, deviation_SD = standard
    given = (view_SVD.contiguous(), present_SV.contiguous(), held_out_V.contiguous(), center_SD, deviation_SD.reciprocal(), *pairs)
    trained, sides = (_room(count * _BYTES[precision]) for count in (S * T * D, S * V * 2 * H))
    found = (trained, sides, torch.empty(P, V, dtype=torch.int32), torch.empty(P, T, dtype=torch.float64))
    sums = torch.zeros(6 * P + S + 2 * S * width, dtype=torch.float64)
    arrays = dict(zip((*_VIEWS, *_PARAMETERS, *_FOUND), (*given, *_pad(parameters, D, H), *found, sums), strict=True))
    _run("mocme_mine_forward", precision, sizes, clip, arrays)
    return Pass(sums, sizes, {name: arrays[name] for name in ("left", "right", *_FOUND)}, precision, clip)


def finish(sums: Tensor, found: Pass, averages: Sequence[Tensor], bounded: bool, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Fields of `MineEstimate`; moves the averages.

    Args:
        sums: those of `found` over all ranks.
        found: what forward left.
        averages: mean_exp_P, center_SD, deviation_SD and num_updates of `Mine`, float32.
        bounded: cap the information at log n.
        parameters: as given to forward; they get a gradient from the loss.
    """
    P, (S, D) = len(averages[0]), averages[1].shape
    loss, slopes_2P, estimates_3P, valid_P = torch.empty(()), torch.empty(2, P), torch.empty(3, P), torch.empty(P, dtype=torch.bool)
    arrays = (sums, found.sums, *averages, loss, slopes_2P, estimates_3P, valid_P)
    call(_kernels("float32"), "mocme_mine_finish", arrays, (S, P, D, int(bounded)))
    return _Loss.apply(loss, slopes_2P, found, *parameters), *estimates_3P, valid_P


class _Loss(torch.autograd.Function):
    """A given value whose gradient to the parameters is that of slopes of T and of exp T'."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slopes_2P: Tensor, found: Pass, *parameters: Tensor) -> Tensor:
        """The value."""
        ctx.save_for_backward(slopes_2P, *parameters)
        ctx.found = found
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of the parameters."""
        slopes_2P, *parameters = ctx.saved_tensors
        found: Pass = ctx.found
        padded = _pad(parameters, found.sizes["D"], found.sizes["H"])
        # The kernel clears the largest itself, piece by piece as it fills it.
        grads = [torch.empty_like(padded[0]), *(torch.zeros_like(value) for value in padded[1:])]
        names = (*_PARAMETERS, "slopes", *(f"{name}_grad" for name in _PARAMETERS))
        arrays = found.arrays | dict(zip(names, (*padded, slopes_2P * slope, *grads), strict=True))
        _run("mocme_mine_backward", found.precision, found.sizes, found.clip, arrays)
        return None, None, None, *_cut(grads, parameters)


def _room(size: int) -> Tensor:
    """Memory for what only the kernels read."""
    memory = torch.empty(size + _ALIGN, dtype=torch.uint8)
    return memory[-memory.data_ptr() % _ALIGN :][:size]


def _padded(size: int, precision: str) -> int:
    found = _kernels(precision)
    assert found is not None, "has_kernels said so"
    pad = int(found.mocme_mine_pad())
    return -(-size // pad) * pad


def _pad(parameters: Sequence[Tensor], D: int, H: int) -> list[Tensor]:
    """Widths filled up with zeros to D and H; float32."""
    sides_SDH, *others = (p.detach().float().contiguous() for p in parameters)
    S, width, double = sides_SDH.shape
    more = H - double // 2
    if not more and width == D:  # padding by nothing copies all the same
        return [sides_SDH, *others]
    sides_SDH = functional.pad(sides_SDH.view(S, width, 2, double // 2), (0, more, 0, 0, 0, D - width)).reshape(S, D, 2 * H)
    return [sides_SDH, *(functional.pad(p, (0, more) if p.dim() == 2 else (0, more, 0, more)) for p in others)]


def _cut(grads: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parts of padded gradients that are the parameters', in their types."""
    if all(grad.shape == p.shape for grad, p in zip(grads, parameters, strict=True)):
        return [grad.to(p.dtype) for grad, p in zip(grads, parameters, strict=True)]
    (S, D, double), (S, width, sides), H = grads[0].shape, parameters[0].shape, parameters[1].shape[1]
    first = grads[0].view(S, D, 2, double // 2)[:, :width, :, :H].reshape(S, width, sides)
    others = [grad[:, :H] if grad.dim() == 2 else grad[:, :H, :H] for grad in grads[1:]]
    return [grad.to(p.dtype) for grad, p in zip((first, *others), parameters, strict=True)]
