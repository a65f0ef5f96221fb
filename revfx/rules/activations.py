"""Inverse rules of one-to-one functions of each element that saturate or bend, and so need a code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from revfx.rules import Direction, Inverse, NoInverse, Rule, Scalar, arguments, aten, register_inverse


def _one_to_one(by: Callable[[Tensor], Tensor]) -> Rule:
    """Return the rule of `y = f(a)`; `a = by(y)`."""

    def rule(node: fx.Node) -> Iterator[Direction]:
        (a,) = arguments(node, "input")
        yield Inverse(a, by, coded=True)

    return rule


register_inverse(aten.exp.default)(_one_to_one(torch.log))
register_inverse(aten.log.default)(_one_to_one(torch.exp))
register_inverse(aten.expm1.default)(_one_to_one(torch.log1p))
register_inverse(aten.log1p.default)(_one_to_one(torch.expm1))
register_inverse(aten.sinh.default)(_one_to_one(torch.asinh))
register_inverse(aten.asinh.default)(_one_to_one(torch.sinh))
register_inverse(aten.tanh.default)(_one_to_one(torch.atanh))
register_inverse(aten.atan.default)(_one_to_one(torch.tan))
register_inverse(aten.sigmoid.default)(_one_to_one(torch.logit))
register_inverse(aten.reciprocal.default)(_one_to_one(torch.reciprocal))


@register_inverse(aten.leaky_relu.default)
def leaky_relu(node: fx.Node) -> Iterator[Direction]:
    """`y = a` above 0, `slope*a` below; `a = y` above 0, `y/slope` below."""
    a, slope = arguments(node, "input", negative_slope=0.01)
    if isinstance(slope, Scalar) and slope > 0:
        yield Inverse(a, lambda y: torch.where(y > 0, y, y / slope), coded=True)
    else:
        yield NoInverse(a, f"`leaky_relu` with a slope of {slope} is not one-to-one")


@register_inverse(aten.elu.default)
def aten_elu(node: fx.Node) -> Iterator[Direction]:
    """`y = scale*a` above 0, `scale*alpha*(exp(input_scale*a) - 1)` below; selu is a case of it."""
    a, alpha, scale, input_scale = arguments(node, "input", alpha=1, scale=1, input_scale=1)
    if input_scale != 1:
        yield NoInverse(a, "`elu` is scaled in another way")
    elif not isinstance(alpha, Scalar) or alpha <= 0:
        yield NoInverse(a, f"`elu` with an alpha of {alpha} is not one-to-one")
    else:
        yield Inverse(a, lambda y: torch.where(y > 0, y / scale, torch.log1p(y / (scale * alpha))), coded=True)


@register_inverse(aten.softplus.default)
def softplus(node: fx.Node) -> Iterator[Direction]:
    """`y = log(1 + exp(beta*a))/beta`; `a = y + log(1 - exp(-beta*y))/beta`."""
    a, beta = arguments(node, "input", beta=1)
    if isinstance(beta, Scalar) and beta > 0:
        yield Inverse(a, lambda y: y + torch.log(-torch.expm1(-beta * y)) / beta, coded=True)
    else:
        yield NoInverse(a, f"`softplus` with a beta of {beta} is not one-to-one")
