"""What is done to a model or to its outputs between forward and backward, or between steps: right, or it raises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, fp64 as fp64, leaf, loss_of, mlps, relative_error
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


def gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    return [x.grad, *(p.grad for p in model.parameters())]


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


@pytest.mark.parametrize(("way", "change"), [(w, c) for w in WAYS for c in CHANGES if w != "compile" or c in COMPILED])
def test_weights_that_change_between_forward_and_backward_raise(way: str, change: str) -> None:
    fs, gs = mlps(DEPTH), mlps(DEPTH)
    model, x = built(way, fs, gs), leaf(6, 8)
    loss = loss_of(model(x))
    CHANGES[change](nn.ModuleList([*fs, *gs]))
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        loss.backward()
    model.zero_grad()
    nn.ModuleList([fs, gs]).double()
    _assert_steps_like_plain(way, fs, gs)


@ways
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_step_between_forward_and_backward_is_not_counted_by_torch_and_raises_where_it_is_large(
    way: str, make: Callable[..., torch.optim.Optimizer]
) -> None:
    """Plain autograd goes on with the new weights and says nothing (torch 2.13): when it raises, so will revfx."""
    fs, gs = mlps(DEPTH), mlps(DEPTH)
    both = nn.ModuleList([*fs, *gs])
    versions = [p._version for p in both.parameters()]
    loss = loss_of(built(way, fs, gs)(leaf(6, 8)))
    _steps(make, fused=True)(both)
    assert versions == [p._version for p in both.parameters()]
    with pytest.raises(revfx.RevfxError if way != "compile" else RuntimeError, match=r"regenerated|computed again"):
        loss.backward()


def _assert_steps_like_plain(way: str, fs: Any, gs: Any) -> None:
    x = leaf(6, 8)
    got: list[list[Any]] = []
    for model in (built(way, fs, gs), BUILD["plain"](fs, gs)):
        model.zero_grad()
        x.grad = None
        loss_of(model(x)).backward()
        got.append([x.grad, *(p.grad for p in nn.ModuleList([*fs, *gs]).parameters())])
    assert relative_error(got[0], got[1]) < TOLERANCE


@pytest.mark.parametrize("way", ("convert", "rev_block"))
def test_graph_whose_weights_changed_raises_at_every_backward_until_a_new_forward(way: str) -> None:
    fs, gs = mlps(DEPTH), mlps(DEPTH)
    model = built(way, fs, gs)
    y = model(leaf(6, 8))
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
def test_outputs_written_in_place_give_the_right_gradient_or_raise(way: str, write: str) -> None:
    fs, gs, x = mlps(DEPTH), mlps(DEPTH), leaf(6, 8)
    both = nn.ModuleList([*fs, *gs])

    def run(model: nn.Module) -> list[Tensor | None]:
        y = model(x)
        WRITES[write](y)
        return list(torch.autograd.grad(loss_of(y), [x, *both.parameters()], allow_unused=True))

    expected = run(BUILD["plain"](fs, gs))
    try:
        assert relative_error(run(built(way, fs, gs)), expected) < TOLERANCE
    except RuntimeError as error:
        assert "modified" in str(error)
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
        kept = [m(x) for _ in range(3)]
        del kept
        y = m(x)
        torch.autograd.grad(loss_of(y[:2, :3]), x)
        states.append([torch.get_rng_state(), *(b.clone() for part in parts for q in part for b in q.buffers())])
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
        for _ in range(3):
            module.zero_grad()
            x.grad = None
            loss_of(model(x)).backward()
            got += [x.grad, *(p.grad for p in module.parameters()), *(b.clone() for b in module.buffers())]
            MOVES[move](module)
        seen.append([*got, torch.get_rng_state()])
    assert torch.equal(seen[0].pop(), seen[1].pop())
    floating = [[t if t is None or t.is_floating_point() else t.double() for t in s] for s in seen]
    assert relative_error(floating[0], floating[1]) < 1e-6 if "float" in move else TOLERANCE


def test_model_on_meta_runs_as_the_plain_one_does() -> None:
    model: Any = revfx.convert(BUILD["plain"](mlps(DEPTH), mlps(DEPTH)))
    loss_of(model(leaf(6, 8))).backward()
    model.to("meta")
    y = model(torch.randn(6, 8, device="meta", requires_grad=True))
    y.sum().backward()
    assert y.is_meta and all(p.grad is not None and p.grad.is_meta for p in model.parameters())
