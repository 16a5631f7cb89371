r"""Magnitudes of the contributions of single weights.

A weight contributes :math:`n_{jk} s_k` once per sample, position and use. The
sum of :math:`|n_{jk} s_k| = |n_{jk}||s_k|` is a weight product again, since
every numerator here has a sign that is known from those of its factors: no
contribution is ever formed on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrp._form import Form, Side, flip
from lrp._forms import (
    AbsoluteZPlus,
    AlphaBetaForm,
    CheapGamma,
    CheapZPlus,
    EpsilonForm,
    GeneralGamma,
    ScaledEpsilon,
    SplitAlphaBeta,
    SplitZPlus,
)
from lrp._input_forms import Box, FlatForm, Root, WSquareForm, _fit
from lrp.errors import RuleError


def _epsilon(form: Any, x: Tensor, s: Tensor, w: Tensor, side: Side) -> Tensor:
    return form.op.wgrad(x.abs(), s, w.shape) * w.abs()  # type: ignore[no-any-return]


def _cheap_gamma(form: Any, x: Tensor, s: Tensor, w: Tensor, side: Side) -> Tensor:
    modified = w.abs() + form.rule.gamma * w.clamp(min=0)
    return form.op.wgrad(x, s, w.shape) * modified  # type: ignore[no-any-return]


def _general_gamma(form: Any, x: Tensor, s: Tensor, w: Tensor, side: Side) -> Tensor:
    r""":math:`|n| = (1 + g) |xw|` where xw has the sign of z, else :math:`|xw|`."""
    g = form.rule.gamma
    straight = form.op.wgrad(x.abs(), s, w.shape) * w.abs()
    agreeing = form.op.wgrad(x, flip(s, side.z_negative), w.shape) * w
    return (1 + g / 2) * straight + (g / 2) * agreeing  # type: ignore[no-any-return]


def _z_plus(form: Any, x: Tensor, s: Tensor, w: Tensor, side: Side) -> Tensor:
    positive = form.op.wgrad(x.clamp(min=0), s, w.shape) * w.clamp(min=0)
    if form.non_negative:
        return positive  # type: ignore[no-any-return]
    return positive + form.op.wgrad(x.clamp(max=0), s, w.shape) * w.clamp(max=0)  # type: ignore[no-any-return]


def _alpha_beta(form: Any, x: Tensor, s: Tensor, w: Tensor, side: Side) -> Tensor:
    """A contribution is positive or negative, and belongs to one of the two shares."""
    out = form.op.wgrad(x.clamp(min=0), s[0], w.shape) * w.clamp(min=0)
    out -= form.op.wgrad(x.clamp(min=0), s[1], w.shape) * w.clamp(max=0)
    if form.non_negative:
        return out  # type: ignore[no-any-return]
    out += form.op.wgrad(x.clamp(max=0), s[0], w.shape) * w.clamp(max=0)
    out -= form.op.wgrad(x.clamp(max=0), s[1], w.shape) * w.clamp(min=0)
    return out  # type: ignore[no-any-return]


def _box(form: Any, x: Tensor, s: Tensor, w: Tensor, side: Side) -> Tensor:
    above, below = ((x - _fit(v, x, form.op, "ZBox")).abs() for v in (form.rule.low, form.rule.high))
    positive = form.op.wgrad(above, s, w.shape) * w.clamp(min=0)
    return positive - form.op.wgrad(below, s, w.shape) * w.clamp(max=0)  # type: ignore[no-any-return]


def _root(form: Any, x: Tensor, s: Tensor, w: Tensor, side: Side) -> Tensor:
    shifted = (x - _fit(form.rule.root, x, form.op, "RootPoint.root")).abs().expand_as(x)
    return form.op.wgrad(shifted, s, w.shape) * w.abs()  # type: ignore[no-any-return]


_POSITIVE = (WSquareForm, FlatForm)  # numerators that are never negative

# by exact type: a form derived from one of these may have other numerators
_KNOWN: dict[type[Form], Callable[..., Tensor]] = {
    EpsilonForm: _epsilon,
    ScaledEpsilon: _epsilon,
    CheapGamma: _cheap_gamma,
    GeneralGamma: _general_gamma,
    CheapZPlus: _z_plus,
    AbsoluteZPlus: _z_plus,
    SplitZPlus: _z_plus,
    AlphaBetaForm: _alpha_beta,
    SplitAlphaBeta: _alpha_beta,
    Box: _box,
    Root: _root,
}


def check_magnitudes(form: Form, layer: str, shape: tuple[int, ...]) -> None:
    """Raise unless the magnitudes of this form are a weight product.

    Raises
    ------
    RuleError
        If no product is known, or there is none: a root per output unit makes
        :math:`|x_j - r_{jk}|` depend on both ends of the weight.
    """
    per_output = isinstance(form, Root) and form._per_output(torch.empty(shape, device="meta"))
    if type(form) not in (*_KNOWN, *_POSITIVE) or per_output:
        raise RuleError(
            f"the magnitudes of single contributions to a weight are not known for layer '{layer}' ({form.name})",
            expected="a rule whose contributions have a known sign",
            got=str(form.rule),
            fix="aggregate the weights by 'signed', 'abs_per_sample' or 'abs_total'",
        )


def magnitudes(form: Form, x: Tensor, s: Tensor, w: Tensor, extra: tuple[Tensor, ...], side: Side) -> Tensor:
    """Sum over samples and positions of the magnitude of every weight's contribution.

    Parameters
    ----------
    form : Form
    x, s : Tensor
        Input of the layer, and the coefficient behind the ratio.
    extra : tuple of Tensor
        The form's modified weights.
    w : Tensor
        The layer's weight; the result has its shape.

    Notes
    -----
    One weight product; two where the sign of x or z is open, or the rule has
    two shares; four where both.
    """
    if type(form) in _POSITIVE:
        return form.weights(x, s.abs(), w, extra, side)
    return _KNOWN[type(form)](form, x, form.at_weight(s, extra).abs(), w, side)
