"""Every rule of the table over its domain and just outside it: what it says it solves, it gives back; nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings, strategies as st
from rules_layouts import ELSEWHERE, STRATEGIES
from rules_samples import Sample, named
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import revfx
from revfx import rules
from revfx.converted import Reversible
from revfx.engine.learn import Learning
from revfx.errors import RevfxWarning
from revfx.plan.couplings import lowered_tape
from revfx.plan.solve import compile_values
from revfx.rules import op_name
from revfx.testing import gradients, relative_error


CODED = "revfx.rules.activations", "revfx.rules.linear"  # have no domain, as codes make up for what they miss
OPS = [op for op, rule in rules.registered().items() if op not in ELSEWHERE and rule.__module__ not in CODED]
NEVER_SOLVED = {
    "where": "its halves are put together elsewhere",
    "aten.lerp.Tensor": "a tensor is not bounded away from zero",
    "aten.mul.Tensor": "nor is a factor that is an input: tests/rules/test_rules.py has one that is",
    **dict.fromkeys(("alias", "detach"), "it gives the same elements back, which are one value"),
}
QUICK = settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    derandomize=True,
    database=None,
    phases=[Phase.generate],
)


def label(op: object) -> str:
    return f"{'method ' if isinstance(op, str) else ''}{op if 'Overload' in type(op).__name__ else op_name(op)}"


def writes(op: object) -> bool:
    """Whether an operation works in place."""
    return isinstance(op, str) and (op.startswith("__i") or (op.endswith("_") and not op.startswith("__")))


def call(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation in its own spelling; a method of the first argument, which an in-place one gets a copy of."""
    if isinstance(op, type):
        return op(*args[1:])(args[0])
    first, *rest = args
    if writes(op):
        copied = first.clone()
        first, rest = copied, [copied if x is args[0] else x for x in rest]
    return getattr(first, op)(*rest, **kwargs) if isinstance(op, str) else op(first, *rest, **kwargs)


class Applies(nn.Module):
    """One operation: its tensors are inputs, the constant ones buffers."""

    def __init__(self, op: Any, sample: Sample) -> None:
        super().__init__()
        leaves = pytree.tree_leaves((list(sample.args), sample.kwargs))
        unique = list({id(x): x for x in leaves if isinstance(x, Tensor)}.values())
        places = {id(t): i for i, t in enumerate(unique)}
        args = _placed(list(sample.args), places)
        for i in sample.constants:
            self.register_buffer(f"constant_{i}", unique[i])
        self.real = tuple(t for i, t in enumerate(unique) if i not in sample.constants)
        held = {i: f"constant_{i}" for i in sample.constants}
        count, kwargs = len(unique), sample.kwargs

        def run(*inputs: Tensor) -> Any:
            rest = list(inputs)
            tensors = [getattr(self, held[i]) if i in held else rest.pop(0) for i in range(count)]
            return call(op, _filled(args, tensors), kwargs)

        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


class _Place(int):
    pass


def _placed(x: Any, places: dict[int, int]) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(_placed(v, places) for v in x)
    return _Place(places[id(x)]) if isinstance(x, Tensor) else x


def _filled(x: Any, tensors: list[Tensor]) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(_filled(v, tensors) for v in x)
    return tensors[x] if isinstance(x, _Place) else x


def drawn(op: object, data: st.DataObject) -> tuple[Sample, Applies]:
    """A sample that the operation takes."""
    assert named(op) in STRATEGIES, f"no sample for {label(op)}"
    sample = STRATEGIES[named(op)](data.draw, op)
    model = Applies(op, sample)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model(*(t.clone() for t in model.real))
        except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
            assume(False)
    return sample, model


def solved(model: Applies, amplification: float, inplace: bool = False) -> set[int]:
    """The places of the inputs that the rule's arcs give; each is compared with what it was."""
    learning = Learning(model, model.real)
    with learning:
        out = model(*model.real)
    tape = learning.tape
    tape.returned = [learning.number(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    places = {learning.number(t): i for i, t in enumerate(model.real)}
    of, lowered = lowered_tape(tape, lossless=False, from_inputs=True)
    arcs = [a for o in lowered.program.ops if not (inplace and o.name == "clone") for a in o.arcs]
    needed = list(dict.fromkeys(v for a in arcs for v in (a.head, *a.tail)))
    run, outside = compile_values(tape, of, lowered, needed)
    env = dict(zip(needed, run([learning.tensor(value) for value in outside]), strict=True))
    for a in arcs:
        if not all(env[v].isfinite().all() for v in a.tail):
            continue
        got, want = a.solve(*(env[v] for v in a.tail)), env[a.head]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), a.text
        if a.exact:
            assert torch.equal(_bits(got), _bits(want)), a.text
        else:
            scale = max([1.0, *(float(env[v].abs().max()) for v in (*a.tail, a.head) if env[v].numel())])
            error = float((got.double() - want.double()).abs().max()) if got.numel() else 0.0
            assert error <= 16 * amplification * torch.finfo(want.dtype).eps * scale, (a.text, error)
    place = {v: places.get(of.value_of[n]) for v, n in enumerate(lowered.value_nodes) if n in of.value_of}
    copies = {o.outs[0]: place.get(o.ins[0]) for o in lowered.program.ops if o.name == "clone" and o.outs}
    found = {place.get(a.head, copies.get(a.head)) for a in arcs if lowered.program.values[a.head].dtype}
    return {i for i in found if i is not None}


def _bits(t: Tensor) -> Tensor:
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[t.element_size()]
    return t.detach().clone(memory_format=torch.contiguous_format).view(whole)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("op", OPS, ids=label)
def test_a_rule_solves_what_the_result_determines_and_nothing_else(op: object) -> None:
    seen = {"solved": 0, "refused": 0}

    @QUICK
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        sample, model = drawn(op, data)
        found = solved(model, sample.amplification, writes(op))
        assert found <= sample.solved, f"{sample}: solves for {sorted(found)}"
        seen["solved" if found else "refused"] += 1

    check()
    assert seen["solved"] or named(op) in NEVER_SOLVED or str(op) in NEVER_SOLVED, "tried outside its domain only"


class Coupled(nn.Module):
    """Two streams, one of which goes through the operation in every coupling; other operands are made of the other."""

    def __init__(self, op: Any, sample: Sample) -> None:
        super().__init__()
        self.op, self.applied = op, Applies(op, sample)
        self.shape = self.applied.real[0].shape
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, 8, dtype=torch.float64))
        for i, t in enumerate(self.applied.real[1:]):
            self.register_buffer(f"operand_{i}", t)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.unbind(0)
        for i in range(4):
            a = a + torch.tanh(b * self.w[i])
            made = torch.tanh(b * self.w[4 + i])
            held = [self.get_buffer(f"operand_{i}") for i in range(len(self.applied.real) - 1)]
            others = [made if t.shape == self.shape and t.is_floating_point() else t for t in held]
            a = self._back(self.applied(a, *others), a)
            b = b + torch.tanh(a * self.w[i])
        return torch.stack([a, b])

    def _back(self, y: Any, a: Tensor) -> Tensor:
        whole = y if isinstance(y, Tensor) else torch.cat([part.flatten() for part in y])
        if whole.numel() == a.numel():
            return whole.reshape(self.shape).to(a.dtype)
        return a * 0.5 + whole.to(a.dtype).mean()


NOT_COUPLED = frozenset(
    """aten.where.self aten.index_select.default aten.index.Tensor aten._unsafe_index.Tensor aten.copy.default
    aten.index_put.default prims.rev.default aten.native_channel_shuffle.default""".split()
) | {"method view_as", "method reshape_as"}  # they take a tensor that is no stream, or have no gradient of their own


def by_backend(model: nn.Module) -> Any:
    """The model compiled over eager kernels; it is recompiled for every sample."""
    torch.compiler.reset()
    return torch.compile(model, backend="revfx", options={"inner": "aot_eager"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [revfx.convert, pytest.param(by_backend, marks=pytest.mark.deep)])
@pytest.mark.parametrize(
    "op", [op for op in {named(op): op for op in OPS}.values() if label(op) not in NOT_COUPLED], ids=label
)
def test_a_model_whose_couplings_use_the_rule_has_plain_gradients(op: object, way: Callable[[nn.Module], Any]) -> None:
    @settings(QUICK, max_examples=1)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        sample, applied = drawn(op, data)
        assume(not sample.constants and applied.real[0].dtype == torch.float64 and applied.real[0].numel())
        assume(all(t.dtype == torch.float64 for t in applied.real))
        model = Coupled(op, sample)
        x = torch.randn(2, *model.shape, dtype=torch.float64, requires_grad=True)
        try:
            want = gradients(model, [x])
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError):
            assume(False)
            return
        assume(all(g is None or bool(g.isfinite().all()) for g in want.values()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RevfxWarning)
            taken = way(model)
            got = gradients(taken, [x])
        if isinstance(taken, Reversible):
            assert not any("can't be recorded" in refusal.detail for refusal in taken.revfx.refusals)
        for name, g in want.items():
            mine = got[name]
            assert (g is None) == (mine is None), name
            assert g is None or mine is None or relative_error(mine, g) < 1e-9, name

    check()
