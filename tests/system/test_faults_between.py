"""Changes of a model or of its outputs between forward and backward, or between steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import fp64 as fp64, leaf, loss_of, mlps
from situations import noisy, normed
from torch import Tensor, nn
from ways import BUILD

import revfx


WAYS = ("convert", "rev_block", "compile")  # a `RevBlock` calls `rev_block`
ways = pytest.mark.parametrize("way", WAYS)
DEPTH = 3


def built(way: str, fs: Any, gs: Any) -> nn.Module:
    """The chain, by one of the ways, `torch.compile` among them."""
    if way != "compile":
        return BUILD[way](fs, gs)
    torch.compiler.reset()
    compiled: Any = torch.compile(BUILD["plain"](fs, gs), backend="revfx", options={"inner": "aot_eager"})
    return compiled


def assert_same(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    assert [k for k, (g, w) in enumerate(zip(got, want, strict=True)) if not _is_same(g, w)] == []


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)


def train(model: nn.Module, x: Tensor, steps: int) -> None:
    """Take steps: in the first one a model learns, in the second one it proves, later ones are steady."""
    for _ in range(steps):
        loss_of(model(x)).backward()
        model.zero_grad()
        x.grad = None


# --- the model
def _steps(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], object]:
    def run(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        make(model.parameters(), lr=0.1, **options).step()

    return run


def _load(model: nn.Module) -> None:
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


def _data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 2


def _no_grad(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)


def _foreach(model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 2.0)  # pyright: ignore[reportPrivateUsage,reportPrivateImportUsage]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "SGD": _steps(torch.optim.SGD, foreach=False),
    "SGD, foreach": _steps(torch.optim.SGD, foreach=True),
    "Adam, foreach": _steps(torch.optim.Adam, foreach=True),
    "in place": _no_grad,
    "foreach": _foreach,
    "a state dict loaded": _load,
    "data replaced": _data,
    "to another dtype": lambda model: model.to(torch.float32),
    "to another dtype and back": lambda model: model.to(torch.float32).to(torch.float64),
    "vector_to_parameters": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()).detach() * 2, model.parameters()
    ),
}


COMPILED = ("SGD, foreach",)  # compiling takes seconds
CASES = [(w, c, n) for w in WAYS for c in CHANGES for n in (0, 1, 3) if w != "compile" or (c in COMPILED and n == 0)]


@pytest.mark.parametrize(("way", "change", "steps"), CASES)
def test_weights_that_change_between_forward_and_backward_do_what_they_do_without_revfx(
    way: str, change: str, steps: int
) -> None:
    """`p.data = ...` is not seen by autograd, which goes on with the new weights and the old activations."""
    found: list[Any] = []
    for name in ("plain", way):
        torch.manual_seed(0)
        fs, gs, x = mlps(DEPTH), mlps(DEPTH), leaf(6, 8)
        model, both = built(name, fs, gs), nn.ModuleList([*fs, *gs])
        train(model, x, steps)
        loss = loss_of(model(x))
        CHANGES[change](both)
        both.zero_grad()
        try:
            loss.backward()
            found.append([x.grad, *(p.grad for p in both.parameters())])
        except RuntimeError as error:
            assert re.search(r"modified (in place|by an inplace operation)", str(error))
            found.append("it raises")
        model.zero_grad()
        both.double()
        _assert_steps_like_plain(name, fs, gs)
    plain, ours = found
    assert isinstance(plain, str) == isinstance(ours, str)
    if not isinstance(plain, str):
        assert_same(ours, plain)


@ways
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_step_between_forward_and_backward_is_not_counted_by_torch_and_raises_where_it_is_large(
    way: str, make: Callable[..., torch.optim.Optimizer]
) -> None:
    """Plain autograd goes on with the new weights and says nothing (torch 2.13): when it raises, so will revfx."""
    fs, gs, x = mlps(DEPTH), mlps(DEPTH), leaf(6, 8)
    both, model = nn.ModuleList([*fs, *gs]), built(way, fs, gs)
    train(model, x, 3 if way != "compile" else 0)
    versions = [p._version for p in both.parameters()]
    loss = loss_of(model(x))
    _steps(make, fused=True)(both)
    assert versions == [p._version for p in both.parameters()]
    kind = RuntimeError if way == "compile" else revfx.RevfxError
    with pytest.raises(kind, match=r"recomputed|regenerated|computed again"):
        loss.backward()


def _assert_steps_like_plain(way: str, fs: Any, gs: Any) -> None:
    x = leaf(6, 8)
    ours, plain = built(way, fs, gs), BUILD["plain"](fs, gs)
    for _ in range(1 if way == "compile" else 3):
        got: list[list[Any]] = []
        for model in (ours, plain):
            model.zero_grad()
            x.grad = None
            loss_of(model(x)).backward()
            got.append([x.grad, *(p.grad for p in nn.ModuleList([*fs, *gs]).parameters())])
        assert_same(got[0], got[1])


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("way", ("convert", "rev_block"))
def test_graph_whose_weights_changed_raises_at_every_backward_until_a_new_forward(way: str, steps: int) -> None:
    fs, gs, x = mlps(DEPTH), mlps(DEPTH), leaf(6, 8)
    model = built(way, fs, gs)
    train(model, x, steps)
    y = model(x)
    _no_grad(fs)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="modified"):
            loss_of(y).backward(retain_graph=True)
    _assert_steps_like_plain(way, fs, gs)


# --- its outputs
WRITES: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda y: y.mul_(2),
    "a part": lambda y: y[:, 1:3].add_(1),
    "relu_": lambda y: torch.relu_(y),
    "through a view": lambda y: y.view(-1).tanh_(),
    "zeroed": lambda y: y.zero_(),
    "filled by a mask": lambda y: y.masked_fill_(y > 0, 1.0),
    "copied to": lambda y: y.copy_(torch.ones_like(y)),
    "without gradients": lambda y: y.detach().mul_(2),
}


@pytest.mark.parametrize(("way", "write"), [(w, c) for w in WAYS for c in WRITES if w != "compile" or c == "a part"])
def test_outputs_written_in_place_do_what_they_do_without_revfx(way: str, write: str) -> None:
    fs, gs, x = mlps(DEPTH), mlps(DEPTH), leaf(6, 8)
    both = nn.ModuleList([*fs, *gs])

    def run(model: nn.Module) -> list[Tensor | None] | str:
        y = model(x)
        WRITES[write](y)
        try:
            return list(torch.autograd.grad(loss_of(y), [x, *both.parameters()], allow_unused=True))
        except RuntimeError as error:
            assert "modified" in str(error)
            return "it raises"

    expected, model = run(BUILD["plain"](fs, gs)), built(way, fs, gs)
    for _ in range(4):
        got = run(model)
        if way == "compile" and got == "it raises":
            break
        assert isinstance(got, str) == isinstance(expected, str)
        if not isinstance(got, str) and not isinstance(expected, str):
            assert_same(got, expected)
    _assert_steps_like_plain(way, fs, gs)


# --- no backward, and backwards of parts
@ways
def test_forward_without_a_backward_leaves_what_plain_code_leaves(way: str) -> None:
    torch.manual_seed(0)
    fs, gs, x = noisy(DEPTH), normed(DEPTH), leaf(6, 8)
    others = copy.deepcopy((fs, gs))
    model, plain = built(way, fs, gs), BUILD["plain"](*others)
    states: list[list[Tensor]] = []
    for m, parts in ((model, (fs, gs)), (plain, others)):
        torch.manual_seed(1)
        found: list[Tensor] = []
        for _ in range(3):
            kept = [m(x) for _ in range(3)]
            del kept
            y = m(x)
            found += torch.autograd.grad(loss_of(y[:2, :3]), x)
        buffers = (b.clone() for part in parts for q in part for b in q.buffers())
        states.append([torch.get_rng_state(), *buffers, *found])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


# --- the model, between steps
MOVES: dict[str, Callable[[Any], Any]] = {
    "to float and back": lambda m: m.float().double(),
    "to meta and back": lambda m: (
        (state := copy.deepcopy(m.state_dict()), m.to_empty(device="meta"))
        and (m.to_empty(device="cpu"), m.load_state_dict(state))
    ),
    "eval": lambda m: m.eval(),
    "eval and train": lambda m: m.eval().train(),
    "half of it in eval": lambda m: m[0].eval(),
    "frozen": lambda m: m.requires_grad_(False),
    "frozen and not": lambda m: m.requires_grad_(False).requires_grad_(True),
    "shared memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize(
    ("way", "move"), [(w, m) for w in WAYS for m in MOVES if w != "compile" or m == "eval and train"]
)
def test_model_that_is_moved_or_switched_between_steps_trains_like_the_plain_one(way: str, move: str) -> None:
    torch.manual_seed(0)
    fs, gs = nn.ModuleList(noisy(DEPTH)), nn.ModuleList(normed(DEPTH))
    theirs, x = copy.deepcopy((fs, gs)), leaf(6, 8)
    seen: list[list[Any]] = []
    for model, parts in ((built(way, fs, gs), (fs, gs)), (BUILD["plain"](*theirs), theirs)):
        module, got = nn.ModuleList(parts), list[Any]()
        torch.manual_seed(1)
        for step in range(8):
            module.zero_grad()
            x.grad = None
            loss_of(model(x)).backward()
            got += [x.grad, *(p.grad for p in module.parameters()), *(b.clone() for b in module.buffers())]
            if step % 2 == 0:
                MOVES[move](module)
        seen.append([*got, torch.get_rng_state()])
    assert_same(seen[0], seen[1])


def test_model_on_meta_runs_as_the_plain_one_does() -> None:
    model: Any = revfx.convert(BUILD["plain"](mlps(DEPTH), mlps(DEPTH)))
    train(model, leaf(6, 8), 3)
    model.to("meta")
    for _ in range(3):
        y = model(torch.randn(6, 8, device="meta", requires_grad=True))
        y.sum().backward()
        assert y.is_meta and all(p.grad is not None and p.grad.is_meta for p in model.parameters())
