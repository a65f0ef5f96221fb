"""Inverse rules of functions of each element that are one-to-one, but saturate or bend: a code makes up for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from revfx.rules import Direction, Inverse, NoInverse, Rule, Scalar, arguments, aten, register_inverse


def _one_to_one(by: Callable[[Tensor], Tensor]) -> Rule:
    """Return the rule of `y = f(a)`; `a = by(y)`."""

    def rule(node: fx.Node) -> Iterator[Direction]:
        (a,) = arguments(node, "input")
        yield Inverse(a, by, coded=True)

    return rule


register_inverse(torch.exp, "exp", "exp_", aten.exp.default)(_one_to_one(torch.log))
register_inverse(torch.log, "log", aten.log.default)(_one_to_one(torch.exp))
register_inverse(torch.expm1, "expm1", aten.expm1.default)(_one_to_one(torch.log1p))
register_inverse(torch.log1p, "log1p", aten.log1p.default)(_one_to_one(torch.expm1))
register_inverse(torch.sinh, "sinh", aten.sinh.default)(_one_to_one(torch.asinh))
register_inverse(torch.asinh, "asinh", aten.asinh.default)(_one_to_one(torch.sinh))
register_inverse(torch.tanh, F.tanh, "tanh", "tanh_", aten.tanh.default)(_one_to_one(torch.atanh))
register_inverse(torch.atan, "atan", aten.atan.default)(_one_to_one(torch.tan))
register_inverse(torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_", aten.sigmoid.default)(_one_to_one(torch.logit))
register_inverse(torch.reciprocal, "reciprocal", aten.reciprocal.default)(_one_to_one(torch.reciprocal))


@register_inverse("__rdiv__", "__rtruediv__")
def rdiv(node: fx.Node) -> Iterator[Direction]:
    """`y = b/a`; `a = b/y`."""
    a, b = arguments(node, "input", "other")
    yield Inverse(a, lambda y, b: b / y, (b,), coded=True)


@register_inverse(F.leaky_relu, aten.leaky_relu.default)
def leaky_relu(node: fx.Node) -> Iterator[Direction]:
    """`y = a` above 0, `slope*a` below; `a = y` above 0, `y/slope` below."""
    a, slope = arguments(node, "input", negative_slope=0.01)
    if isinstance(slope, Scalar) and slope > 0:
        yield Inverse(a, lambda y: torch.where(y > 0, y, y / slope), coded=True)
    else:
        yield NoInverse(a, f"`leaky_relu` with a slope of {slope} is not one-to-one")


def _exponential(a: Any, alpha: Any, scale: float = 1.0) -> Direction:
    """Return the inverse of `y = scale*a` above 0, `scale*alpha*(exp(a) - 1)` below."""
    if not isinstance(alpha, Scalar) or alpha <= 0:
        return NoInverse(a, f"`elu` with an alpha of {alpha} is not one-to-one")
    return Inverse(a, lambda y: torch.where(y > 0, y / scale, torch.log1p(y / (scale * alpha))), coded=True)


@register_inverse(F.elu)
def elu(node: fx.Node) -> Iterator[Direction]:
    """`y = a` above 0, `alpha*(exp(a) - 1)` below; `a = y` above 0, `log1p(y/alpha)` below."""
    yield _exponential(*arguments(node, "input", alpha=1.0))


@register_inverse(aten.elu.default)
def aten_elu(node: fx.Node) -> Iterator[Direction]:
    """`y = scale*a` above 0, `scale*alpha*(exp(input_scale*a) - 1)` below, which selu is spelled as, too."""
    a, alpha, scale, input_scale = arguments(node, "input", alpha=1, scale=1, input_scale=1)
    yield _exponential(a, alpha, scale) if input_scale == 1 else NoInverse(a, "`elu` is scaled in another way")


@register_inverse(F.selu, torch.selu)
def selu(node: fx.Node) -> Iterator[Direction]:
    """`y = scale*elu(a)` of given numbers; see Klambauer et al., 2017, https://arxiv.org/abs/1706.02515."""
    yield _exponential(arguments(node, "input")[0], 1.6732632423543772, 1.0507009873554805)


@register_inverse(F.softplus, aten.softplus.default)
def softplus(node: fx.Node) -> Iterator[Direction]:
    """`y = log(1 + exp(beta*a))/beta`; `a = y + log(1 - exp(-beta*y))/beta`."""
    a, beta = arguments(node, "input", beta=1)
    if isinstance(beta, Scalar) and beta > 0:
        yield Inverse(a, lambda y: y + torch.log(-torch.expm1(-beta * y)) / beta, coded=True)
    else:
        yield NoInverse(a, f"`softplus` with a beta of {beta} is not one-to-one")
