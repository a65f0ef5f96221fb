"""What random programs do between couplings: operations without an inverse, writes in place, values that are kept."""

from __future__ import annotations

from collections.abc import Callable

from programs_draft import Draft


Kind = Callable[[Draft], None]


def irreversible(d: Draft) -> None:
    u, v = d.two()
    a = d.axis
    d.emit(
        d.pick(
            (
                f"{u} = torch.relu({u})",
                f"{u} = torch.tanh({u})",
                f"{u} = {u} + {d.function(u, u)}",
                f"{u} = {u} * 0",
                f"{u} = {u} * 0 + {v}" if d.width(u) == d.width(v) else f"{u} = {u}.sin()",
                f"{u} = {u} + {u}",
                f"{u} = {u} - {u}",
                f"{u} = {u} * {u}",
                f"{u} = {u}.square() + {u}",
                f"{u} = {u}.clamp(-0.5, 0.5)",
                f"{u} = {u} - {u}.mean({a}, keepdim=True)",
                f"{u} = F.dropout({u}, 0.3, self.training)",
                f"{u} = {u}.float().double()",
                f"{u} = {u}.to(torch.bfloat16).to({u}.dtype)",
                f"{u} = {u}.cumsum({a})",
                f"{u} = {u}.sort({a}).values",
                f"{u} = {u}.abs()",
                f"{u} = {u} * {v}.mean()",
                f"{u} = {u} * ({v}.mean() > 0)",
                f"{u} = torch.maximum({u}, {u}.mean())",
                f"{u} = torch.where({u} > 0, {u}, 0.1 * {u})",
                f"{u} = {u}.round() + {u} * 0.5",
                f"{u} = {u}.sign() * {u}.abs()",
                f"{u} = F.softmax({u}, {a})",
                f"{u} = {u}[..., torch.zeros({u}.shape[-1], dtype=torch.long)]",
                f"{u} = {u} / {u}.detach().abs().max().clamp(min=1)",
                f"{u} = torch.fmod({u}, 1.0)",
                f"{u} = {u}.masked_fill({u} > 1, 0.5)",
                f"{u} = {u}.prod({a}, keepdim=True).expand({u}.shape) * 0.1 + {u}",
            )
        )
    )


def with_atoms(d: Draft) -> None:
    """A stream gets values that are exactly zero, or whole, or equal to others."""
    u, v = d.two()
    d.emit(
        d.pick(
            (
                f"{u} = torch.relu({u})",
                f"{u} = torch.cat([{u}[..., :1] * 0, {u}[..., 1:]], -1)",
                f"{u} = F.pad({u}, (1, 0))[..., :-1]",
                f"{u} = torch.tril({u})" if d.layout == "rows" else f"{u} = {u}.clamp(min=0)",
                f"{u} = {u} - {u}.detach()",
                f"{u} = ({u} - {u}.detach()) + {d.function(v, u)}",
                f"{u} = {u} * ({u} > 0.2)",
                f"{u} = {u}.round()",
                f"{u} = {u}.clamp(-0.5, 0.5)",
                f"{u} = {u}.clamp(-0.5, 0.5) + torch.relu({d.function(v, u)})",
                f"{u} = {u} * torch.bernoulli(torch.full({u}.shape, 0.5))",
                f"{u} = {u}.masked_fill({u} > 0, 1.0)",
                f"{u} = F.threshold({u}, 0.1, 0.5)",
                f"{u} = F.hardshrink({u})",
                f"{u} = torch.zeros_like({u}) + {u}.relu()",
                f"{u} = {u}.index_fill(0, torch.zeros(1, dtype=torch.long), 0.0)",
                f"{u} = {u}.scatter(-1, {u}.argmax(-1, keepdim=True), 0.0)",
                f"{u} = torch.zeros_like({u}).scatter(-1, {u}.argsort(-1), {u})",
                f"{u} = {u} - {u}.amax(-1, keepdim=True)",
                f"{u} = {u}[..., :1].expand({u}.shape) + 0 * {u}",
                f"{u} = F.dropout({u}, 0.5)",
                f"{u} = {u}.new_zeros({u}.shape).copy_({u}.relu())",
                f"{u} = torch.nan_to_num({u} / 0.0, posinf=1.0, neginf=0.0)" if d.chance(1, 3) else f"{u} = {u}.sign()",
                f"{u} = torch.cat([{u}[:1].relu(), {u}[1:]], 0)",
                f"{u} = torch.stack([{u}, {u}.relu()]).mean(0)",
                f"{u} = torch.lerp({u}, {u}.relu(), 0.5)",
                f"{u} = {u}.diff(prepend={u}[..., :1], dim=-1)",
                f"{u} = torch.linalg.vector_norm({u}, dim=-1, keepdim=True) * {u}.sign()",
                f"{u} = F.one_hot({u}.argmax(-1), {u}.shape[-1]) * {u}",
            )
        )
    )


def broadcast(d: Draft) -> None:
    u, v = d.two()
    n = d.width(u)
    shape = f"({n}, 1, 1)" if d.layout == "images" else f"({n},)"
    weight = d.member(f"nn.Parameter(torch.rand{shape} + 0.5)", "w") if d.layout == "images" else d.member(
        f"nn.Parameter(torch.rand({n}) + 0.5)", "w"
    )  # fmt: skip
    scalar = d.member("nn.Parameter(torch.tensor(0.7))", "w")
    d.emit(
        d.pick(
            (
                f"{u} = {u} + {weight}",
                f"{u} = {u} * {weight}",
                f"{u} = {u} * {weight}.exp()",
                f"{u} = {scalar} * {u}",
                f"{u} = {u} + {v}.mean()",
                f"{u} = {u} + {v}.mean(0, keepdim=True).sum()",
                f"{u} = {u} + {u}[:1]",
                f"{u} = {u} - {v}[:1].mean(-1, keepdim=True)",
                f"{u} = {weight} + {u} * {scalar}.sigmoid()",
                f"{u} = {u}.mean(0, keepdim=True) + {d.function(v, u)}",
                f"{u} = torch.addcmul({u}, {weight}, {weight})",
                f"{u} = {u} / {weight}",
                f"{u} = {u} + 1",
                f"{u} = 2 - {u}",
                f"{u} = {u} * torch.tensor(1.5)",
                f"{u} = {u} + torch.ones(1)",
            )
        )
    )


def in_place(d: Draft) -> None:
    u, v = d.two()
    h = d.fresh()
    f = d.function(v, u)
    d.emit(
        d.pick(
            (
                f"{u}.mul_(2)",
                f"{u} = {u}.clone()\n{u}[..., 0] = {v}[..., 0]",
                f"{u}[..., :1] += 1",
                f"{h} = {u}.view(-1)\n{h} += 1",
                f"{h} = {f}\nalias = {h}.view({h}.shape)\n{h} += 1\n{u} = {u} + alias",
                f"{h} = {u} * 1\n{h}.relu_()\n{u} = {u} + {h}",
                f"{h} = {u} * 1\n{h}.copy_({v}.mean(-1, keepdim=True))\n{u} = {u} + {h}",
                f"{h} = torch.empty_like({u})\n{h}.fill_(0.5)\n{u} = {u} * {h}",
                f"{h} = torch.zeros_like({u})\n{h}[..., 0] = {v}[..., 0]\n{u} = {u} + {h}",
                f"{u} = {u} * 1\n{u}.add_({u}, alpha=0.5)",
                f"{u} = {u} * 1\n{u}.transpose(0, -1).add_(1)",
                f"{u} = {u} * 1\n{u}[..., ::2].mul_(-1)",
                f"{u} = {u} * 1\n{u}.masked_fill_({u} > 0.3, 0.0)",
                f"{u} = {u} * 1\n{u}.index_add_(0, torch.zeros(1, dtype=torch.long), {f}[:1])",
                f"{h} = {f}\n{h}.add_({u}).mul_(2).sub_({u})\n{u} = {h}",
                f"{h} = {u} + {f}\n{u} = {h}.detach().add_(1) * 0.1 + {h}",
                f"with torch.no_grad():\n    {h} = {u}.clone().zero_().add_({v}.sum())\n{u} = {u} + {h}",
                f"{h} = {u} * 1\n{u} = {u} + {h}.view(-1).add_(1).view({u}.shape)",
                f"{h} = ({u} * 1).as_strided({u}.shape, [0] * {u}.dim())\n{u} = {u} + {h}",
            )
        )
    )


def kept(d: Draft) -> None:
    """A value that the model returns, or that it reads much later."""
    u, v = d.two()
    k = d.fresh("k")
    done = d.emit(
        d.pick(
            (
                f"{k} = {u}.square().mean()",
                f"{k} = {u}",
                f"{k} = {u}.sum(-1)",
                f"{k} = {u}[..., :1]",
                f"{k} = {u}.detach()",
                f"{k} = {u}.argmax(-1)",
                f"{k} = {u} > 0",
                f"{k} = {u}.unbind(0)[-1]" if d.rows else f"{k} = {u}.sum()",
                f"{k} = {u}.max(-1).values",
                f"{k} = {u}.unfold(-1, 1, 1)",
                f"{k} = {u}.norm()",
                f"{k} = torch.cat([{u}, {v}], {d.axis})",
                f"{k} = {u}.expand(2, *{u}.shape)",
                f"{k} = {u}.exp()",
                f"{k} = {u}.std()",
                f"{k} = {u}.float()",
                f"{k} = {u}.amax()",
                f"{k} = torch.relu({u})",
                f"{k} = {u}.transpose(0, -1)",
                f"{k} = {u}.new_zeros(2)",
                f"{k} = {u}.median()",
                f"{k} = {u}.topk(1, -1)[0]",
                f"{k} = torch.logsumexp({u}, -1)",
            )
        )
    )
    if done:
        d.kept.append(k)


def read_again(d: Draft) -> None:
    """A kept value that flows back into a stream."""
    if not d.kept:
        return kept(d)
    u, k = d.pick(d.streams), d.pick(d.kept)
    d.emit(
        d.pick(
            (
                f"{u} = {u} + {k}",
                f"{u} = {u} * torch.sigmoid({k}.mean())",
                f"{u} = {u} + 0.1 * {k}.sum()",
                f"{u} = torch.where({k} > 0, {u}, {u} * 0.5)",
                f"{u} = {u} - {k}.double().mean()",
                f"{u} = {u} * 0.5 + {k}",
                f"{u} = {u} + {k}.relu()",
            )
        )
    )


def compared(d: Draft) -> None:
    """A stream with what it was before something was added that is zero in places: so the two are equal there."""
    u, v = d.two()
    k = d.fresh("k")
    added = d.pick(("torch.relu({})", "F.dropout({}, 0.5)", "({0} * ({0} > 0))", "torch.relu({}).mul(0.5)"))
    d.emit(d.pick((f"{k} = {u}.detach()", f"{k} = {u}")))
    d.emit(f"{u} = {u} + {added.format(d.function(v, u))}")
    if d.chance(1, 2):
        d.emit(f"{v} = {v} + {d.function(u, v)}")
    compared = d.emit(
        d.pick(
            (
                f"{k} = torch.maximum({u}, {k})",
                f"{k} = torch.relu({u} - {k})",
                f"{k} = ({u} > {k}) * {u}",
                f"{k} = torch.stack([{u}, {k}]).amin(0)",
                f"{k} = torch.relu({u}.exp() - {k}.exp())",
                f"{k} = ({u} - {k}).abs()",
                f"{k} = torch.where({u} == {k}, {u}, -{u})",
                f"{k} = torch.relu({u}.sum(-1, keepdim=True) - {k}.sum(-1, keepdim=True)) + {u}",
            )
        )
    )
    if compared:
        d.emit(f"{v} = {v} + {d.function(k, v)}")


def integers(d: Draft) -> None:
    u, v = d.two()
    n = d.width(u)
    table = d.member(f"nn.Embedding(3, {n})", "table")
    whole = next((i.name for i in d.inputs if i.kind == "whole"), None)
    boolean = next((i.name for i in d.inputs if i.kind == "boolean"), None)
    d.emit(
        d.pick(
            (
                f"{u} = {u} + ({v}.mean() > 0)",
                f"{u} = {u} + {v}.argmax(-1, keepdim=True)",
                f"{u} = {u} + {table}({whole or f'{v}.argmax(-1) % 3'})",
                f"{u} = {u} * torch.where({boolean or f'({u} > 0)'}, 2.0, 1.5)",
                f"{u} = torch.where({boolean or f'({u}[:1] > 0)'}, {u}, -{u})",
                f"{u} = {u} + torch.arange({u}.shape[-1])",
                f"{u} = torch.gather({u}, -1, {u}.argsort(-1))",
                f"{u} = {u}.index_select(0, {u}.flatten(1).sum(1).argsort())",
                f"{u} = {u}[torch.randperm({u}.shape[0])]",
                f"{u} = {u}[{whole or f'{u}.flatten(1).sum(1).argsort()'} % {max(d.rows, 1)}]",
                f"{u} = {u} * (1 + ({v}.sum(-1, keepdim=True) > 0))",
                f"{u} = {u} + F.one_hot({v}.argmax(-1), {u}.shape[-1])",
                f"{u} = {u} * 2**({v}.detach().mean() > 0)",
            )
        )
    )


def unusual(d: Draft) -> None:
    """Code that plans have to respect."""
    u, v = d.two()
    h = d.fresh()
    f = d.function(v, u)
    running = d.member("buffer:torch.ones(1)", "running")  # dynamo loses writes to one without dimensions, in fp64
    d.emit(
        d.pick(
            (
                f"{running}.mul_(0.5).add_({u}.detach().mean())\n{u} = {u} * {running}.sigmoid()",
                f"{u} = {u} + 0.1 * torch.randn_like({u})",
                f"{u} = {u} + torch.bernoulli(torch.full({u}.shape, 0.5))",
                f"if self.training:\n    {u} = {u} + {f}\nelse:\n    {u} = {u} - {f}",
                f"if {u}.requires_grad:\n    {u} = {u} * 1.5",
                f"{h} = [{u}, {v}]\n{u} = {h}[0] + {f}",
                f"if {u}.shape[0] > 3:\n    {u} = {u} * 2",
                f"with torch.no_grad():\n    {h} = {f}\n{u} = {u} + {h}",
                f"with torch.autocast('cpu', torch.bfloat16):\n    {h} = {f}\n{u} = {u} + {h}",
                f"{u} = {u} + torch.autograd.functional.vjp(torch.sin, {v}.mean())[1]",
                f"{u} = {u} + torch.utils.checkpoint.checkpoint(torch.tanh, {f}, use_reentrant=False)",
                f"{u} = torch.utils.checkpoint.checkpoint(lambda x, y: x + y, {u}, {f}, use_reentrant=False)",
                f"{u} = {u}.detach() + {f}",
                f"{u} = {u} + torch.func.vmap(torch.sin)({f})",
                f"{h} = dict(x={u})\n{u} = {h}.pop('x') + {f}",
                f"{u} = {u} + torch.einsum('...i,...i->...', {v}, {v}).mean()",
                f"{u} = torch.nan_to_num({u})",
                f"assert {u}.shape[0] < 100, 'too many'",
            )
        )
    )


def unrecordable(d: Draft) -> None:
    """Code that `torch.compile` has to capture."""
    if d.recordable:
        return unusual(d)
    u, v = d.two()
    f, h = d.function(v, u), d.fresh()
    count = d.member("buffer:torch.zeros(1)", "count")
    d.emit(
        d.pick(
            (
                f"{count} += 1\n{u} = {u} + {count}",
                f"if float({u}.detach().sum()) > 0:\n    {u} = {u} + {f}",
                f"{u} = {u} + {u}.detach().mean().item()",
                f"{u} = {u}.detach().requires_grad_() * 1 + {f}",
                f"torch.manual_seed(5)\n{u} = {u} + torch.rand({u}.shape[-1])",
                f"{h} = {u} * 1\nif {h}.requires_grad:\n    {h}.register_hook(lambda g: g * 2)\n{u} = {h} + {f}",
                f"{u} = {u} + {d.member(f'Branches({d.width(v)}, {d.width(u)})')}({v})",
            )
        )
    )


def into_inputs(d: Draft) -> None:
    """A write to an argument of the model, or a read of one."""
    x = d.pick([i.name for i in d.inputs])
    u = d.pick(d.streams)
    d.emit(
        d.pick(
            (
                f"{u} = {u} + {x}.sum()",
                f"{u} = {u} * torch.sigmoid({x}.mean())",
                f"{x} = {x} + 1",
                f"with torch.no_grad():\n    {x}.add_(1)",
                f"{x}.detach().mul_(0.5)",
                f"{x}.mul_(0.5)",
            )
        )
    )


BETWEEN: tuple[Kind, ...] = (
    with_atoms,
    with_atoms,
    irreversible, broadcast, in_place, kept, kept, read_again, integers, unusual, broadcast, irreversible, into_inputs,
    unrecordable, compared,
)  # fmt: skip
