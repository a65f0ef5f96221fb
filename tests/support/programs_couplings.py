"""The couplings of random programs: every kind that the rules know, in the ways that people spell them."""

from __future__ import annotations

from collections.abc import Callable

from programs_draft import Draft


Kind = Callable[[Draft], None]


def additive(d: Draft) -> None:
    u, v = d.two()
    f, g = d.function(v, u), d.function(v, u)
    h = d.fresh()
    d.emit(
        d.pick(
            (
                f"{u} = {u} + {f}",
                f"{u} = {u} - {f}",
                f"{u} = {f} + {u}",
                f"{u} = {f} - {u}",
                f"{u} += {f}",
                f"{u} = torch.add({u}, {f}, alpha=0.5)",
                f"{u} = torch.add(input={u}, other={f})",
                f"{u} = torch.add({f}, {u}, alpha=-2)",
                f"{u} = {u}.sub({f}, alpha=2)",
                f"{u} = torch.rsub({u}, {f})",
                f"{u} = torch.lerp({u}, {f}, 0.3)",
                f"{u} = torch.addcmul({u}, {f}, {g}, value=0.5)",
                f"{u} = torch.addcdiv({u}, {f}, 1.5 + {g}.square())",
                f"{u} = {u}.add_({f})",
                f"{h} = {f}\n{h} += {u}\n{u} = {h}",
                f"{h} = {f}\n{u} = {h}.mul(0.5).add_({u})",
                f"{h} = {f}\n{h} = {u} + {h}\n{u} = {h}",
                f"{u} = 0.5 * ({u} + {f}) + 0.5 * {u}",
                f"{u} = {u} + {f}\n{u} = {u} + {g}",
                f"{u} = ({u} + {f}) - {u}.detach() * 0.25",
                f"{u} = sum([{u}, {f}])",
                f"with torch.enable_grad():\n    {u} = {u} + {f}",
            )
        )
    )


def affine(d: Draft) -> None:
    u, v = d.two()
    f, g = d.function(v, u), d.function(v, u)
    log, s = d.fresh("log"), d.fresh("s")
    done = d.emit(
        d.pick(
            (
                f"{s} = 0.5 * torch.tanh({f})\n{log} = {s}.sum()\n{u} = {u} * torch.exp({s}) + {g}",
                f"{u} = {u} * factor({f}) + {g}",
                f"{u} = ({u} + {g}) * factor({f}, 'sigmoid')",
                f"{u} = {u} / factor({f}) - {g}",
                f"{u} = {g} + factor({f}, 'sigmoid') * {u}",
                f"{u} = {u} * torch.exp({f})",
                f"{u} = {u} * torch.sigmoid({f}) + {g}",
                f"{u} = {u} * torch.sigmoid(12 * {f}) + {g}",
                f"{u} = {u} * -2.0 + {f}",
                f"{u} = -{u} / 4 + {f}",
                f"{u} = {u} * torch.exp(-30 * {f}.square()) + {g}",
                f"{u} = {u} * {f} + {g}",
                f"{u} = {u}.mul(torch.clamp({f}, 0.5, 2)).add({g})",
                f"{u} = ({u} * torch.exp({f}.clamp(-1, 1))).add_({g})",
                f"{u} *= factor({f})\n{u} += {g}",
                f"{u} = {u} * F.softplus({f}) + {g}",
                f"{u} = torch.addcmul({g}, {u}, factor({f}))",
            )
        )
    )
    if done and log in d.values:
        d.kept.append(log)


def conditioner(d: Draft) -> None:
    """Factor and shift from one module; the factor's logarithm is collected."""
    u, v = d.two()
    s, t, total = d.fresh("s"), d.fresh("t"), d.fresh("log")
    if d.layout == "images":
        return
    f = d.member(f"Splits({d.width(v)}, {d.width(u)})")
    if d.emit(f"{s}, {t} = {f}({v})\n{u} = {u} * {s} + {t}\n{total} = {s}.log().sum(-1)"):
        d.kept.append(total)


def momentum(d: Draft) -> None:
    u, v = d.two()
    gamma = d.pick((0.9, 0.5, 0.99))
    d.emit(f"{v} = {gamma} * {v} + {1 - gamma} * {d.function(u, v)}\n{u} = {u} + {v}")


def leapfrog(d: Draft) -> None:
    q, p = d.two()
    d.emit(f"{p} = {p} - 0.05 * {d.function(q, p)}\n{q} = {q} + 0.1 * {p}\n{p} = {p} - 0.05 * {q}")


def midpoint(d: Draft) -> None:
    u, v = d.two()
    d.emit(f"{u}, {v} = {v}, {u} + 0.2 * {d.function(v, u)}")


def masked(d: Draft) -> None:
    """One stream, of which a mask keeps a part."""
    u, _ = d.two()
    n = d.width(u)
    shape = f"({n}, 1, 1)" if d.layout == "images" else f"({n},)"
    text = d.pick((f"buffer:(torch.arange({n}) % 2 == 0).view{shape}", f"buffer:(torch.arange({n}) < 1).view{shape}"))
    kind, k, m = d.number(0, 6), d.fresh("k"), d.fresh("m")
    mask = d.member(text + (".double()" if kind >= 3 else ""), "mask")
    d.emit(f"{m} = {d.pick((mask, f'1 - {mask}' if kind >= 3 else f'~{mask}'))}")
    kept = f"{m} * {u}" if kind >= 3 else f"torch.where({m}, {u}, 0.0)"
    if not d.emit(f"{k} = {kept}"):
        return
    f, g = d.function(k, u), d.function(k, u)
    d.emit(
        (
            f"{u} = torch.where({m}, {u}, {u} * factor({f}) + {g})",
            f"{u} = torch.where({m}, {u}, {u} + {g})",
            f"{u} = torch.where({m}, {k}, ({u} - {g}) / factor({f}))",
            f"{u} = {m} * {u} + (1 - {m}) * ({u} * factor({f}) + {g})",
            f"{u} = {k} + (1 - {m}) * ({u} + {g})",
            f"{u} = {u} + (1 - {m}) * {g}",
            f"{u} = {u} * factor((1 - {m}) * {f}) + (1 - {m}) * {g}",
        )[kind]
    )


def differences(d: Draft) -> None:
    """A function of what a stream got since, of which zeros are left where that is nothing."""
    u, v = d.two()
    if d.layout == "images":
        return
    first, n = d.fresh("first"), d.width(u)
    f, w = d.function(v, u), d.member(f"nn.Linear({n}, {d.width(v)}, bias=False)")
    g = d.member(f"nn.Linear({d.width(v)}, {d.width(v)})")
    less = d.pick((first, f"{first}.detach()", f"{u}.mean({d.axis}, keepdim=True)", f"{u}.roll(1, 0)"))
    d.emit(f"{first} = {u}\n{u} = {u} + {f}\n{v} = {v} + {g}(torch.relu({w}({u} - {less})))")


def swapped(d: Draft) -> None:
    u, v = d.two()
    d.emit(f"{u}, {v} = {v}, {u}")


def moved(d: Draft) -> None:
    """One stream through operations that only move its elements."""
    u, _ = d.two()
    n = d.width(u)
    a = d.axis
    texts = [
        f"{u} = {u}.flip({a})",
        f"{u} = {u}.roll(1, {a})",
        f"{u} = torch.roll({u}, 2)",
        f"{u} = {u}.transpose(0, {a}).contiguous().transpose(0, {a})",
        f"{u} = {u}.reshape(-1).flip(0).view({u}.shape)",
        f"{u} = {u}.unsqueeze(1).squeeze(1)",
        f"{u} = {u}.clone()",
        f"{u} = {u}.contiguous()",
        f"{u} = {u}.transpose(0, -1).transpose(0, -1)",
        f"{u} = {u}.index_select({a}, {d.member(f'buffer:torch.randperm({n})', 'order')})",
        f"{u} = torch.cat([{u}.narrow({a}, 1, {n - 1}), {u}.narrow({a}, 0, 1)], {a})",
        f"{u} = torch.stack({u}.unbind({a})[::-1], {a})",
        f"{u} = {u}.movedim({a}, 0).movedim(0, {a})",
        f"{u} = {u}.to(torch.float64)",
        f"{u} = {u}[..., torch.arange({u}.shape[-1] - 1, -1, -1)]",
        f"{u} = {u}[:]",
        f"{u} = {u}[..., ::2].repeat_interleave(2, -1)[..., :{u}.shape[-1]]",
        f"{u} = torch.cat([{u}[..., ::2], {u}[..., 1::2]], -1)",
        f"{u} = {u}.view_as({u}).mT.mT",
        f"{u} = torch.complex({u}, {u} * 0).real",
        f"{u} = {u}.expand({u}.shape)",
        f"{u} = F.pad({u}, (1, 1))[..., 1:-1]",
    ]
    if d.layout == "images":
        texts += [
            f"{u} = F.pixel_shuffle(F.pixel_unshuffle({u}, 2), 2)",
            f"{u} = torch.channel_shuffle({u}, 2)",
            f"{u} = {u}.contiguous(memory_format=torch.channels_last)",
        ]
    d.emit(d.pick(texts))


def joined(d: Draft) -> None:
    """Streams put together and taken apart again, evenly or not, perhaps into another number of them."""
    x, a = d.fresh("x"), d.axis
    names = ", ".join(d.streams)
    total = sum(d.width(s) for s in d.streams)
    count = d.pick((len(d.streams), 2, 3))
    if total < count or len({(*d.shape(s)[:1], len(d.shape(s))) for s in d.streams}) > 1:
        return
    new = ["a", "b", "c", "d"][:count]
    even = total % count == 0
    first = d.number(1, total - count + 1)
    rest = [1] * (count - 2)
    sizes = [first, *rest, total - first - len(rest)]
    parts = d.pick(
        (
            f"{x}.chunk({count}, {a})" if even else f"{x}.split({sizes}, {a})",
            f"{x}.split({sizes}, {a})",
            f"torch.tensor_split({x}, {count}, {a})",
            f"({', '.join(f'{x}.narrow({a}, {sum(sizes[:i])}, {n})' for i, n in enumerate(sizes))})",
        )
    )
    move = d.pick(("", "", f".flip({a})", f".roll(1, {a})", " * 1.5"))
    before, d.streams = d.streams, []
    if d.emit(f"{x} = torch.cat([{names}], {a}){move}\n{', '.join(new)} = {parts}"):
        d.streams = new
    else:
        d.streams = before


def stacked(d: Draft) -> None:
    u, v = d.two()
    x = d.fresh("x")
    d.emit(f"{x} = torch.stack([{u}, {v}], {d.pick((0, 1, -1))})\n{u}, {v} = {x}.unbind({d.pick((0, 1, -1))})")


def as_module(d: Draft) -> None:
    u, v = d.two()
    if d.layout == "images" or d.width(u) != d.width(v):
        return
    block = d.member(f"Block({d.width(v)}, {d.width(u)})", "block")
    d.emit(f"{u}, {v} = {block}({u}, {v})")


def in_modules(d: Draft) -> None:
    """Couplings that only modules know of."""
    u, v = d.two()
    n = d.width(u)
    if d.layout == "images" or n < 2:
        return looped(d)
    log, speed = d.fresh("log"), d.fresh("v")
    kinds = [d.number(0, 3) for _ in range(3)]
    text = d.pick(
        (
            f"{u} = {d.member(f'nn.Sequential(*(CatSplit({n}, k) for k in {kinds}))', 'blocks')}({u})",
            f"{log} = {v}.sum()\nfor m in {d.member(f'nn.ModuleList(LogDet({n}) for _ in range(3))', 'flow')}:\n"
            f"    {u}, {log} = m({u}, {log})",
            f"{speed} = torch.zeros_like({u})\n"
            f"for m in {d.member(f'nn.ModuleList(Momentum({n}) for _ in range(3))', 'layers')}:\n"
            f"    {u}, {speed} = m({u}, {speed})",
            f"for m in {d.member(f'nn.ModuleList([CatSplit({n}, {kinds[0]})] * 2)', 'same')}:\n    {u} = m({u})",
        )
    )
    if d.emit(text):
        d.kept.extend(name for name in (log, speed) if name in d.values)


def looped(d: Draft) -> None:
    """Modules in a list, run over in Python."""
    u, v = d.two()
    if d.layout == "images":
        return
    p, q = d.width(u), d.width(v)
    kinds = [d.pick(("mlp", "relu_first", "noisy", "layer_normed")) for _ in range(2)]
    fs = d.member(f"nn.ModuleList({kinds[0]}({q}, {p}) for _ in range(3))", "fs")
    gs = d.member(f"nn.ModuleList({kinds[1]}({p}, {q}) for _ in range(3))", "gs")
    d.emit(f"for f, g in zip({fs}, {gs}):\n    {u} = {u} + f({v})\n    {v} = {v} + g({u})")


def sided(d: Draft) -> None:
    """A function that reads a side input."""
    u, v = d.two()
    if d.layout == "images" or not d.sides:
        return additive(d)
    side = d.pick(d.sides)
    f = d.member(f"Sided({d.width(v)}, {d.width(u)}, {d.width(side)})")
    d.emit(f"{u} = {u} + {f}({v}, {side})")


def along(d: Draft) -> None:
    """A mask, whole numbers or a table that goes along with the streams, and is moved or made anew at each coupling."""
    u, v = d.two()
    name = d.pick([n for n in ("gate", "table") if n in d.values] or ["gate"])
    if name not in d.values:
        made = (
            f"{v}.detach() > 0",
            f"({v}.detach() * 3).long()",
            f"torch.ones({v}.shape, dtype=torch.bool).triu()",
            f"torch.arange({v}.numel()).view({v}.shape)",
            f"torch.complex({v}, {v})",
            f"torch.cat([{v} > 0, {v} < 0])[:{v}.shape[0]]",
        )
        d.emit(f"gate = {d.pick(made)}")
    else:
        changes = ("roll(1, 0)", "flip(-1)", "roll((1, 1), (0, -1))", "clone()", "relu()", "contiguous()")
        texts = [f"{name} = {name}.{change}" for change in changes]
        texts += [f"{name} = torch.cat([{name}[:1], {name}[1:]])", f"{name} = {name} | {name}.roll(1, 0)"]
        d.emit(d.pick((*texts, f"{name} = torch.cat([{name}[..., 1:], {name}[..., :1]], -1)")))
    read = f"{name}[..., :1]" + (".real" if name in d.values and d.values[name].is_complex() else "")
    d.emit(d.pick((f"{u} = {u} + {d.function(v, u)} * {read}", f"{u} = {u} + {d.function(v, u)} + 0.1 * {read}")))


def blocks(d: Draft) -> None:
    """`rev_block` in the model, or what it computes."""
    u, v = d.two()
    p, q, n = d.width(u), d.width(v), d.number(1, 3)
    fs = [d.function(v, u).partition("(")[0] for _ in range(n)]
    gs = [d.function(u, v).partition("(")[0] for _ in range(n)]
    if any(not f.startswith("self.") for f in (*fs, *gs)):
        fs, gs = [d.member(f"mlp({q}, {p})")] * n, [d.member(f"mlp({p}, {q})")] * n
    sides = ""
    if d.sides and d.layout != "images" and d.chance(1, 2):
        side = d.pick(d.sides)
        fs = [d.member(f"Sided({q}, {p}, {d.width(side)})") for _ in range(n)]
        gs = [d.member(f"Sided({p}, {q}, {d.width(side)})") for _ in range(n)]
        sides = f", {d.pick((side, f'[{side}]'))}, {d.pick((side, f'[{side}]'))}"
    given = f"[{', '.join(fs)}], [{', '.join(gs)}]"
    if d.chance(1, 3):
        given = f"{fs[0]}, {gs[0]}"
    d.emit(f"{u}, {v} = couple({u}, {v}, {given}, {n}{sides})")


COUPLINGS: tuple[Kind, ...] = (
    additive, additive, affine, affine, conditioner, momentum, leapfrog, midpoint, masked, differences, swapped, moved,
    joined, stacked, as_module, in_modules, looped, sided, along, blocks,
)  # fmt: skip
BLOCKS: tuple[Kind, ...] = (blocks, blocks, blocks, blocks, additive, joined)
