"""What users do around a model with a budget."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fit_models import (
    Residual,
    branch,
    equal,
    fit_of,
    make,
    peak,
    planned,
    quick_search as quick_search,
    segformer,
    square,
    state,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revfx
from revfx.engine import fingerprints
from revfx.errors import RevfxWarning
from revfx.testing import measure_memory


def pair(name: str = "mlp", memory: float = 0.5) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, the same with a budget, and its argument."""
    model, (x,), _ = make(name)
    fitted = planned(model, x, memory=memory)
    assert fit_of(fitted).plans[0].chosen.plan.dropped
    return model, fitted, x


def gradients(model: nn.Module, loss: Tensor, **options: Any) -> list[Tensor]:
    return [*torch.autograd.grad(loss, [*model.parameters()], **options)]


def test_the_graph_can_be_kept_and_used_again() -> None:
    model, fitted, x = pair()
    torch.manual_seed(1)
    want = gradients(model, square(model(x)))
    torch.manual_seed(1)
    loss = square(fitted(x))
    for keep in (True, True, False):
        assert equal(gradients(model, loss, retain_graph=keep), want)


def test_some_gradients_may_be_asked_for() -> None:
    model, fitted, x = pair()
    keepable = [model.get_parameter("layers.5.4.weight"), model.get_parameter("layers.2.1.bias")]
    found = []
    for m in (model, fitted):
        torch.manual_seed(1)
        found.append([*torch.autograd.grad(square(m(x)), keepable)])
    assert equal(*found)


def test_gradients_can_be_differentiated() -> None:
    model, fitted, _ = pair()
    found = []
    for m in (model, fitted):
        x = torch.linspace(-1, 1, 256 * 64).view(256, 64).requires_grad_()
        torch.manual_seed(1)
        (g,) = torch.autograd.grad(square(m(x)), x, create_graph=True)
        found.append([g.detach(), *torch.autograd.grad(g.square().sum() * 1e6, [*model.parameters()])])
    assert equal(*found)


def test_gradients_accumulate_over_several_forwards() -> None:
    """Two forwards before two backwards, and evaluation in between."""
    model, fitted, x = pair()
    found = []
    for m in (model, fitted):
        model.zero_grad()
        torch.manual_seed(1)
        losses = [square(m(x)), square(m(x + 1))]
        with torch.no_grad():
            value = m(x)
        for loss in losses:
            loss.backward()
        found.append([value, *(p.grad for p in model.parameters())])
    assert equal(*found)


def test_a_smaller_batch_takes_the_plan_of_a_larger_one() -> None:
    model, fitted, x = pair()
    for n, plans in ((64, 1), (256, 1), (320, 2), (300, 2)):
        part = torch.cat((x, x))[:n]
        assert equal(state(model, lambda p=part: square(fitted(p))), state(model, lambda p=part: square(model(p))))
        assert len(fit_of(fitted).plans) == plans


def test_a_number_that_changes_at_every_call_costs_no_plan() -> None:
    class Annealed(Residual):
        temperature = 1.0

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + (layer(x) / self.temperature).relu_().softmax(-1)
            return x

    torch.manual_seed(0)
    model, x = Annealed(*(branch() for _ in range(6))), torch.randn(256, 64)
    fitted = planned(model, x, memory=0.6)
    (plan,) = fit_of(fitted).plans
    for i in range(5):
        model.temperature = 1 / (1 + i)
        assert equal(state(model, lambda: square(fitted(x))), state(model, lambda: square(model(x))))
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.3
    assert equal(state(model, lambda: square(fitted(x))), state(model, lambda: square(model(x))))
    assert fit_of(fitted).plans == [plan]


def test_a_number_that_nobody_sees_may_change() -> None:
    factor = [1.0]

    def joined(x: Tensor, h: Tensor) -> Tensor:
        return x + (h * factor[0]).exp().mul(0.1)

    torch.manual_seed(0)
    model, x = Residual(*(nn.Linear(64, 64) for _ in range(12)), join=joined), torch.randn(1024, 64)
    fitted = planned(model, x, memory=0.5)
    factor[0] = 0.5
    assert equal(state(model, lambda: square(fitted(x))), state(model, lambda: square(model(x))))


@pytest.mark.parametrize("name", ["mlp", "encoder", "convolutions"])
def test_all_that_is_computed_again_is_looked_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is given in the first backward, then the last tensor of each unit."""
    looked: list[int] = []

    def read(noted: Any, counts: Any) -> Any:
        looked.append(len(noted))
        return fingerprints.read(noted, counts)

    monkeypatch.setattr("revfx.engine.backward.read", read)
    _, fitted, x = pair(name, 0.7)
    (plan,) = fit_of(fitted).plans
    units = [u.unit for u in plan.plan.sequence if u.unit.droppable]
    assert units
    square(fitted(x)).backward()
    assert looked[-1] == sum(len(unit.droppable - unit.workspaces) for unit in units)
    square(fitted(x)).backward()
    assert looked[-1] == len(units)


def test_numbers_of_the_data_vary_from_call_to_call() -> None:
    def joined(x: Tensor, h: Tensor) -> Tensor:
        scale = h.detach().abs().mean().item()
        return x + (h / scale).tanh().exp() * scale

    torch.manual_seed(0)
    model = Residual(*(nn.Linear(64, 64) for _ in range(8)), join=joined)
    fitted = planned(model, torch.randn(512, 64), memory=0.8)
    for i in range(3):
        x = torch.randn(512, 64) * (1 + i)
        assert equal(state(model, lambda x=x: square(fitted(x))), state(model, lambda x=x: square(model(x))))
    assert len(fit_of(fitted).plans) == 1


def drawn(x: Tensor, h: Tensor) -> Tensor:
    return x + (h * torch.empty_like(h).bernoulli_(0.5) * 2).exp().sin() * 0.1


def drawn_in_part(x: Tensor, h: Tensor) -> Tensor:
    m = torch.full_like(h, 2.0)
    m[:, :32].bernoulli_(0.8)
    return x + h.tanh() * m


def half_relu(x: Tensor, h: Tensor) -> Tensor:
    h[:, ::2].relu_()
    return x + h


@pytest.mark.parametrize("join", [drawn, drawn_in_part, half_relu])
def test_parts_of_memory_and_draws(join: Any) -> None:
    torch.manual_seed(0)
    model, x = Residual(*(nn.Linear(64, 64) for _ in range(8)), join=join), torch.randn(512, 64)
    want = state(model, lambda: square(model(x)))
    for share in (0.9, 0.8, 0.7):
        fitted = planned(model, x, memory=share)
        assert equal(state(model, lambda f=fitted: square(f(x))), want)


@pytest.mark.parametrize(
    ("draw", "share"),
    [
        (lambda h: torch.native_dropout(h, 0.1, True)[0], 0.5),  # .63 at the least where its results are kept
        (lambda h: h[:, torch.randperm(h.shape[1])], 0.46),  # .49
    ],
    ids=["native_dropout", "randperm"],
)
def test_random_operators_run_again(draw: Callable[[Tensor], Tensor], share: float) -> None:
    def joined(x: Tensor, h: Tensor) -> Tensor:
        return x + draw(h.sin().exp())

    torch.manual_seed(0)
    model, x = Residual(*(nn.Linear(64, 64) for _ in range(8)), join=joined), torch.randn(512, 64)
    want = state(model, lambda: square(model(x)))
    fitted = planned(model, x, memory=share)
    assert equal(state(model, lambda: square(fitted(x))), want)


def test_what_is_kept_whole_is_no_bits() -> None:
    """A mask that is saved as it was drawn may be either, and each choice is made without the other one."""
    torch.manual_seed(0)
    model, x = Residual(*(nn.Linear(64, 64) for _ in range(8)), join=drawn), torch.randn(512, 64)
    plan = fit_of(planned(model, x, memory=0.7)).plans[0].chosen.plan
    (mask, told), *_ = plan.needs.dropout_masks.items()
    assert mask == told
    for first in (replace(plan, kept=plan.kept | {mask}), replace(plan, dropout_masks=plan.dropout_masks | {mask})):
        both = replace(first, kept=first.kept | {mask}, dropout_masks=first.dropout_masks | {mask})
        assert mask in both.kept and mask not in both.dropout_masks


def test_running_statistics_are_read_before_they_are_written() -> None:
    class Normed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                h, bn = layer[0](x), layer[1]  # type: ignore[index]
                y = (h - bn.running_mean) / (bn.running_var + 1).sqrt()
                x = x + bn(h).tanh() * y.exp().clamp(max=3)
            return x

    torch.manual_seed(0)
    model = Normed(*(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)) for _ in range(6)))
    x = torch.randn(512, 64)
    want = state(model, lambda: square(model(x)))
    for share in (0.85, 0.7):
        fitted = planned(model, x, memory=share)
        assert equal(state(model, lambda f=fitted: square(f(x))), want)


def test_an_object_of_the_users_may_be_returned() -> None:
    class Output:
        def __init__(self, loss: Tensor, hidden: list[Tensor]) -> None:
            self.loss, self.hidden = loss, hidden

    class Returning(Residual):
        def forward(self, x: Tensor) -> Any:
            hidden: list[Tensor] = []
            for layer in self.layers:
                x = x + layer(x)
                hidden.append(x)
            return Output(x.square().mean(), hidden)

    torch.manual_seed(0)
    model, x = Returning(*(branch() for _ in range(6))), torch.randn(256, 64)
    plain, want = peak(model, lambda: model(x).loss), state(model, lambda: model(x).loss)
    fitted = planned(model, x, memory=0.6)
    assert equal(state(model, lambda: fitted(x).loss), want)
    assert peak(model, lambda: fitted(x).loss) <= 0.6 * plain


class Numpy(Residual):
    """Numbers of the data that only real tensors give."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (layer(x) * float(x.detach().numpy().std())).sin()
        return x


def test_code_that_asks_for_numbers_is_recorded_for_real() -> None:
    """Nothing of that stays: neither gradients, nor buffers, nor what is drawn."""
    torch.manual_seed(0)
    model = Numpy(*(nn.Sequential(*branch(), nn.BatchNorm1d(64)) for _ in range(6)))
    x = torch.randn(256, 64)
    plain, before = peak(model, lambda: square(model(x))), copy.deepcopy(model.state_dict())
    drawn, grads = torch.get_rng_state(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    fitted = planned(model, x, memory=0.6)
    assert equal([*model.state_dict().values()], [*before.values()])
    assert equal([p.grad for p in model.parameters() if p.grad is not None], grads) and torch.equal(
        torch.get_rng_state(), drawn
    )
    for i in range(3):
        y = x * (1 + i)
        assert equal(state(model, lambda y=y: square(fitted(y))), state(model, lambda y=y: square(model(y))))
    assert peak(model, lambda: square(fitted(x))) <= 0.6 * plain
    assert len(fit_of(fitted).plans) == 1


def test_of_an_attempt_that_asked_for_numbers_nothing_is_left_to_search_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revfx.world.left._take_out", lambda *args: pytest.fail("the heap was searched"))
    fitted = planned(*make("asks")[:2], memory=0.75)
    assert fit_of(fitted).plans[0].chosen.plan.dropped


def test_sequences_may_be_packed() -> None:
    class Packed(nn.LSTM):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(super().forward(packed)[0], batch_first=True)[0]

    torch.manual_seed(0)
    model = Packed(32, 64, 3, batch_first=True, dropout=0.1)
    given = torch.randn(16, 16, 32), torch.randint(3, 16, (16,))
    want, plain = state(model, lambda: square(model(*given))), peak(model, lambda: square(model(*given)))
    fitted = planned(model, given, memory=0.9)
    assert equal(state(model, lambda: square(fitted(*given))), want)
    assert peak(model, lambda: square(fitted(*given))) <= 0.9 * plain


def test_what_raises_raises_as_it_does_plainly() -> None:
    class Raising(Numpy):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such head")

    with pytest.raises(ValueError, match=r"^no such head$"):
        revfx.convert(Raising(branch()), memory=0.5)(torch.randn(8, 64))


def test_a_checkpoint_around_it_is_warned_of() -> None:
    _, fitted, x = pair()
    with pytest.warns(RevfxWarning, match="the budget is not kept"):
        checkpoint(fitted, x, use_reentrant=False)


def test_what_is_frozen_later_is_noticed() -> None:
    model, fitted, x = pair()
    model.get_submodule("layers.0").requires_grad_(False)
    assert equal(state(model, lambda: square(fitted(x))), state(model, lambda: square(model(x))))


def test_evaluation_with_gradients_is_another_kind_of_call() -> None:
    model, fitted, x = pair("convolutions", 0.7)
    for training in (False, True):
        model.train(training)
        assert equal(state(model, lambda: square(fitted(x))), state(model, lambda: square(model(x))))
    assert len(fit_of(fitted).plans) == 2


@pytest.mark.filterwarnings("ignore:.*ran other operators")  # half as many may match, by the plan that times choose
def test_a_forward_that_goes_another_way_is_planned_anew() -> None:
    class Branching(Residual):
        deep = 6

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[: self.deep]:
                x = x + layer(x)
            return x

    torch.manual_seed(0)
    model, x = Branching(*(branch() for _ in range(6))), torch.randn(256, 64)
    fitted = planned(model, x, memory=0.5)
    budget = 0.5 * peak(model, lambda: square(model(x)))  # smaller steps have as much
    for deep in (6, 4, 4, 4, 3, 5, 4):
        model.deep = deep
        assert equal(state(model, lambda: square(fitted(x))), state(model, lambda: square(model(x))))
    for _ in range(2):
        square(fitted(x)).backward()
    assert peak(model, lambda: square(fitted(x))) <= budget


def test_segformer_trains_within_its_budget() -> None:
    def three_steps(model: nn.Module, run: Any) -> tuple[list[Tensor], list[int]]:
        """Losses, gradients and weights of SGD, and the peaks of the steps."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found: list[Tensor] = []
        peaks: list[int] = []

        def step() -> Tensor:
            loss = run(x).logits.square().mean()
            found.append(loss.detach())
            return loss

        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        torch.manual_seed(2)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            peaks.append(measure_memory(step, warm_up=False).peak)
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
        return [*found, *model.state_dict().values()], peaks

    torch.manual_seed(0)
    plain = segformer().train()
    model, x = copy.deepcopy(plain), torch.randn(2, 3, 64, 64)
    want, plain_peaks = three_steps(plain, plain)
    got, peaks = three_steps(model, planned(model, x, memory=0.8))
    assert equal(got, want)
    assert max(peaks) <= 0.8 * max(plain_peaks)


def test_copies_have_plans_of_their_own() -> None:
    model, fitted, x = pair()
    want = state(model, lambda: square(model(x)))
    others: list[Any] = [copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))]
    for other in others:
        assert fit_of(other).plans == [] and fit_of(other).budget.share == 0.5
        assert equal(state(other, partial(lambda m: square(m(x)), other)), want)


def test_two_models_have_budgets_of_their_own() -> None:
    """Beside each other, and one in the other, whose budget then is that of all."""
    (a, fitted_a, x), (b, fitted_b, _) = pair(), pair("relu", 0.6)
    both, fitted = nn.Sequential(a, b), nn.Sequential(fitted_a, fitted_b)
    want = state(both, lambda: square(both(x)))
    assert equal(state(both, lambda: square(fitted(x))), want)
    whole = planned(fitted, x, memory=0.5)
    assert equal(state(both, lambda: square(whole(x))), want)
    assert peak(both, lambda: square(whole(x))) <= 0.5 * peak(both, lambda: square(both(x)))


def test_what_was_written_to_raises_as_it_does_plainly() -> None:
    def joined(x: Tensor, h: Tensor) -> Tensor:
        y = h.exp()
        z = x + y
        y.mul_(2)
        return z

    torch.manual_seed(0)
    model, x = Residual(*(nn.Linear(64, 64) for _ in range(12)), join=joined), torch.randn(1024, 64)
    fitted = revfx.convert(copy.deepcopy(model), memory=0.95)
    for m in (model, fitted):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square(m(x)).backward()


def test_a_parameter_that_was_written_to_raises() -> None:
    model, fitted, x = pair()
    for m in (model, fitted):
        loss = square(m(x))
        with torch.no_grad():  # one that nothing is computed again from
            model.get_parameter("layers.0.4.weight").mul_(1.01)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_compiler_around_it_leaves_it_alone() -> None:
    model, fitted, x = pair()
    outer = torch.compile(nn.Sequential(nn.Identity(), fitted), backend="eager")
    assert equal(state(model, lambda: square(outer(x))), state(model, lambda: square(model(x))))
    assert peak(model, lambda: square(outer(x))) <= 0.5 * peak(model, lambda: square(model(x)))


def test_the_compilers_backend_takes_no_budget() -> None:
    model, (x,), _ = make("mlp")
    options: Any = {"memory": 0.5}
    with pytest.raises(Exception, match=r"kept by eager code: `revfx.convert\(model, memory=...\)`"):
        torch.compile(model, backend="revfx", options=options)(x)
