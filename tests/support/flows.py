"""Normalizing flows out of public libraries (FrEIA, normflows, nflows), used as they are: the losses users train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import nflows.transforms as nt
import normflows as nf
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow as NFlow
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn


D, CONTEXT, HIDDEN = 8, 3, 32
CHANNELS, SIDE = 4, 8
IMAGE = (CHANNELS, SIDE, SIDE)

Loss = Callable[..., Tensor]
Flow = tuple[nn.Module, Loss]
Layer = tuple[type[nn.Module], dict[str, Any]]


@dataclass(frozen=True)
class Program:
    """`build(depth)` gives a flow of that many blocks and its loss, a function of what `inputs(rows)` gives."""

    build: Callable[[int], Flow]
    inputs: Callable[[int], tuple[Tensor, ...]]


# --- what goes in, and the networks inside the couplings
def vectors(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, D),)


def vectors_and_context(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, D), torch.randn(n, CONTEXT)


def images(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(max(2, n // SIDE**2), *IMAGE),)


def small(module: nn.Module) -> nn.Module:
    """`module` with small random parameters, as flows are started from: with torch's, twelve blocks explode."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.05 * torch.randn_like(p))
    return module


def mlp(inputs: int, outputs: int) -> nn.Module:
    return small(nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs)))


def conv(inputs: int, outputs: int) -> nn.Module:
    layers = nn.Conv2d(inputs, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN, outputs, 3, padding=1)
    return small(nn.Sequential(*layers))


def nf_mlp(inputs: int, outputs: int) -> nn.Module:
    return small(nf.nets.MLP([inputs, HIDDEN, outputs]))


def nf_conv(inputs: int, outputs: int) -> nn.Module:
    return small(nf.nets.ConvNet2d([inputs, HIDDEN, HIDDEN, outputs], (3, 1, 3), init_zeros=False))


# --- FrEIA: a SequenceINN, its likelihood under a standard normal
def freia(
    block: type[nn.Module],
    *after: Layer,
    dims: Sequence[int] = (D,),
    context: tuple[int, ...] | None = None,
    **options: Any,
) -> Callable[[int], Flow]:
    """The function of a depth that gives so many times `block` and the layers `after` it."""

    def build(depth: int) -> Flow:
        inn: Any = Ff.SequenceINN(*dims)
        condition = {} if context is None else {"cond": 0, "cond_shape": context}
        for _ in range(depth):
            inn.append(block, subnet_constructor=conv if len(dims) > 1 else mlp, **condition, **options)
            for layer, settings in after:
                inn.append(layer, **settings)

        def loss(x: Tensor, *conditions: Tensor) -> Tensor:
            z, log_det = inn(x, c=conditions)
            return (0.5 * z.flatten(1).square().sum(1) - log_det).mean()

        return inn.double(), loss  # some of FrEIA's parameters are made in fp32

    return build


SHUFFLE: Layer = (Fm.PermuteRandom, {})
DOWN_AND_UP = [(layer, {"legacy_backend": True}) for layer in (Fm.IRevNetDownsampling, Fm.IRevNetUpsampling)]


# --- normflows: a NormalizingFlow over a standard normal
def normflow(*layers: Callable[[int], nn.Module], shape: Sequence[int] = (D,)) -> Callable[[int], Flow]:
    """The function of a depth that gives so many times what `layers` make of the block's number."""

    def build(depth: int) -> Flow:
        base = nf.distributions.DiagGaussian(tuple(shape), trainable=False)
        flow: Any = nf.NormalizingFlow(base, [layer(k) for k in range(depth) for layer in layers])
        return flow, lambda x: -flow.log_prob(x).mean()

    return build


def affine(**options: Any) -> Callable[[int], nn.Module]:
    return lambda k: nf.flows.AffineCouplingBlock(nf_mlp(D // 2, D), **options)


def affine_conv(**options: Any) -> Callable[[int], nn.Module]:
    return lambda k: nf.flows.AffineCouplingBlock(nf_conv(CHANNELS // 2, CHANNELS), **options)


def additive(k: int) -> nn.Module:
    return nf.flows.AffineCouplingBlock(nf_mlp(D // 2, D // 2), scale=False)


def alternating(k: int) -> nn.Module:
    return nf.flows.AffineCouplingBlock(nf_mlp(D // 2, D), split_mode="channel_inv" if k % 2 else "channel")


def checkerboard(k: int) -> nn.Module:
    mode = "checkerboard_inv" if k % 2 else "checkerboard"
    return nf.flows.AffineCouplingBlock(nf_conv(CHANNELS, 2 * CHANNELS), split_mode=mode)


def masked(k: int) -> nn.Module:
    mask = (torch.arange(D) % 2 == k % 2).to(torch.get_default_dtype())
    return nf.flows.MaskedAffineFlow(mask, nf_mlp(D, D), nf_mlp(D, D))


def constants(k: int) -> nn.Module:
    return small(nf.flows.AffineConstFlow(D))


def permute(channels: int, mode: str) -> Callable[[int], nn.Module]:
    return lambda k: nf.flows.Permute(channels, mode=mode)


def class_conditional(depth: int) -> Flow:
    """Couplings and layers whose constants depend on a class, given as a vector of weights, chained by hand."""
    couplings: list[Any] = [nf.flows.AffineCouplingBlock(nf_mlp(D // 2, D)) for _ in range(depth)]
    scales: list[Any] = [small(nf.flows.CCAffineConst(D, CONTEXT)) for _ in range(depth)]
    swap: Any = nf.flows.Permute(D, mode="swap")
    base: Any = nf.distributions.DiagGaussian((D,), trainable=False)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(len(z), dtype=z.dtype)
        for coupling, scale in zip(couplings, scales, strict=True):
            z, first = coupling.inverse(z)
            z, second = scale.inverse(z, y)
            z, _ = swap.inverse(z)
            total = total + first + second
        return -(total + base.log_prob(z)).mean()

    return nn.ModuleList([*couplings, *scales]), loss


def multiscale(depth: int) -> Flow:
    """Glow with two scales, as the examples of normflows build it."""
    blocks, merges, bases = list[Any](), list[Any](), list[Any]()
    for scale in range(2):
        channels = CHANNELS * 2 ** (3 - scale)
        glow = [nf.flows.GlowBlock(channels, HIDDEN, init_zeros=False) for _ in range(depth)]
        blocks.append([*glow, nf.flows.Squeeze()])
        merges += [nf.flows.Merge()] if scale else []
        size = SIDE // 2 ** (2 - scale)
        bases.append(nf.distributions.DiagGaussian((channels // (2 if scale else 1), size, size), trainable=False))
    flow: Any = nf.MultiscaleFlow(bases, blocks, merges)
    return flow, lambda x: -flow.log_prob(x, None).mean()


# --- nflows: a Flow over a standard normal
def nflow(*layers: Callable[[int], nn.Module]) -> Callable[[int], Flow]:
    """The function of a depth that gives so many times what `layers` make of the block's number."""

    def build(depth: int) -> Flow:
        transform = nt.CompositeTransform([layer(k) for k in range(depth) for layer in layers])
        flow: Any = NFlow(transform, StandardNormal([D]))
        return flow, lambda x: -flow.log_prob(x).mean()

    return build


def residual(inputs: int, outputs: int) -> nn.Module:
    return ResidualNet(inputs, outputs, hidden_features=HIDDEN, num_blocks=1)


def coupling(kind: Any = nt.AffineCouplingTransform, **options: Any) -> Callable[[int], nn.Module]:
    return lambda k: kind((torch.arange(D) % 2 == k % 2).long(), residual, **options)


FLOWS: dict[str, Program] = {
    "FrEIA NICE": Program(freia(Fm.NICECouplingBlock, SHUFFLE), vectors),
    "FrEIA RNVP": Program(freia(Fm.RNVPCouplingBlock, SHUFFLE, clamp_activation="TANH"), vectors),
    "FrEIA GLOW": Program(freia(Fm.GLOWCouplingBlock, SHUFFLE), vectors),
    "FrEIA GLOW, context": Program(freia(Fm.GLOWCouplingBlock, SHUFFLE, context=(CONTEXT,)), vectors_and_context),
    "FrEIA GLOW, images": Program(freia(Fm.GLOWCouplingBlock, SHUFFLE, dims=IMAGE), images),
    "FrEIA GIN": Program(freia(Fm.GINCouplingBlock, SHUFFLE, clamp_activation="SIGMOID"), vectors),
    "FrEIA one-sided": Program(freia(Fm.AffineCouplingOneSided, SHUFFLE), vectors),
    "FrEIA conditional affine": Program(
        freia(Fm.ConditionalAffineTransform, SHUFFLE, context=(CONTEXT,)), vectors_and_context
    ),
    "FrEIA i-RevNet sampling": Program(freia(Fm.NICECouplingBlock, *DOWN_AND_UP, SHUFFLE, dims=IMAGE), images),
    "normflows affine, swap": Program(normflow(affine(), permute(D, "swap")), vectors),
    "normflows sigmoid, shuffle": Program(normflow(affine(scale_map="sigmoid"), permute(D, "shuffle")), vectors),
    "normflows sigmoid_inv, swap": Program(normflow(affine(scale_map="sigmoid_inv"), permute(D, "swap")), vectors),
    "normflows channel and channel_inv": Program(normflow(alternating), vectors),
    "normflows additive, swap": Program(normflow(additive, permute(D, "swap")), vectors),
    "normflows masked": Program(normflow(masked), vectors),
    "normflows constants": Program(normflow(affine(), constants, permute(D, "swap")), vectors),
    "normflows class-conditional": Program(class_conditional, vectors_and_context),
    "normflows images": Program(normflow(affine_conv(), permute(CHANNELS, "swap"), shape=IMAGE), images),
}

Q, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))
COUPLING = Fm.GLOWCouplingBlock
LINEAR: Layer = (Fm.FixedLinearTransform, {"M": Q})
PIXELWISE: Layer = (Fm.Fixed1x1Conv, {"M": Q[:CHANNELS, :CHANNELS] + 2 * torch.eye(CHANNELS)})

# Layers that can't be inverted from what a graph tells.
IRREVERSIBLE: dict[str, Program] = {
    "FrEIA all in one": Program(freia(Fm.AllInOneBlock), vectors),
    "FrEIA all in one, soft": Program(freia(Fm.AllInOneBlock, permute_soft=True), vectors),
    "FrEIA all in one, GIN": Program(freia(Fm.AllInOneBlock, gin_block=True), vectors),
    "FrEIA all in one, Householder": Program(freia(Fm.AllInOneBlock, learned_householder_permutation=2), vectors),
    "FrEIA all in one, images": Program(freia(Fm.AllInOneBlock, dims=IMAGE), images),
    "FrEIA fixed matrix": Program(freia(COUPLING, LINEAR), vectors),
    "FrEIA fixed 1x1 convolution": Program(freia(COUPLING, PIXELWISE, dims=IMAGE), images),
    "FrEIA i-RevNet sampling by convolution": Program(
        freia(COUPLING, (Fm.IRevNetDownsampling, {}), (Fm.IRevNetUpsampling, {}), dims=IMAGE), images
    ),
    "FrEIA Haar": Program(freia(COUPLING, (Fm.HaarDownsampling, {}), (Fm.HaarUpsampling, {}), dims=IMAGE), images),
    "FrEIA Householder": Program(freia(COUPLING, (Fm.HouseholderPerm, {"n_reflections": 2})), vectors),
    "FrEIA sigmoid": Program(freia(COUPLING, (Fm.InvertibleSigmoid, {})), vectors),
    "normflows LU": Program(normflow(affine(), lambda k: nf.flows.LULinearPermute(D)), vectors),
    "normflows matrix": Program(normflow(affine(), lambda k: nf.flows.InvertibleAffine(D)), vectors),
    "normflows 1x1 convolution": Program(
        normflow(affine_conv(), lambda k: nf.flows.Invertible1x1Conv(CHANNELS), shape=IMAGE), images
    ),
    "normflows checkerboard": Program(normflow(checkerboard, shape=IMAGE), images),
    "normflows Glow": Program(
        normflow(lambda k: nf.flows.GlowBlock(CHANNELS, HIDDEN, init_zeros=False), shape=IMAGE), images
    ),
}

SPLINE = nt.PiecewiseRationalQuadraticCouplingTransform
# Which ask buffers, put parts in their places by index, or call functions that invert themselves: by `convert`.
BY_CONVERT: dict[str, Program] = {
    "normflows activation normalisation": Program(
        normflow(lambda k: nf.flows.ActNorm(D), affine(), permute(D, "swap")), vectors
    ),
    "normflows LU": IRREVERSIBLE["normflows LU"],
    "normflows Glow": IRREVERSIBLE["normflows Glow"],
    "normflows Glow, two scales": Program(multiscale, lambda n: images(4 * n)),
    "nflows affine": Program(nflow(coupling()), vectors),
    "nflows additive": Program(nflow(coupling(nt.AdditiveCouplingTransform)), vectors),
    "nflows activation normalisation": Program(nflow(lambda k: nt.ActNorm(D), coupling()), vectors),
    "nflows LU": Program(nflow(lambda k: nt.LULinear(D, identity_init=False), coupling()), vectors),
    "nflows permutation": Program(nflow(lambda k: nt.RandomPermutation(D), coupling()), vectors),
    "nflows leaky relu": Program(nflow(lambda k: nt.LeakyReLU(), coupling()), vectors),
    "nflows rational-quadratic": Program(nflow(coupling(SPLINE, tails="linear", tail_bound=3.0)), vectors),
    "normflows rational-quadratic": Program(
        normflow(
            lambda k: nf.flows.CoupledRationalQuadraticSpline(D, 1, HIDDEN), lambda k: nf.flows.LULinearPermute(D)
        ),
        vectors,
    ),
}
