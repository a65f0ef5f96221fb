"""`convert`: the same model through another class, which frees and regenerates its activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from revfx.compiled.functions import compile_blocks
from revfx.conversion import Options
from revfx.converted import Reversible, reversible
from revfx.fit.budget import Budget, checked_memory
from revfx.passes.grid import checked_exact, checked_grid
from revfx.passes.plan import checked_every


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    exact: bool = True,
    grid: int | None = None,
    memory: float | str | Budget | None = None,
    compile: bool = False,
    anchor_every: int | None = None,
    capture: str = "auto",
    strict: bool = False,
) -> nn.Module:
    """Return a module that computes what `model` does, bit for bit, gradients too, with a fraction of its activation
    memory.

    It is the same model seen through another class: all attributes are shared, with parameters, buffers, sub-modules
    and hooks; `state_dict` keys, call signature, `train()`/`eval()`, `deepcopy` and pickling are the model's own. At
    its first call for given shapes, dtypes, `requires_grad` and training state the forward is recorded on fake
    tensors, regions whose values can be derived from their outputs are looked for, and from then on their activations
    are freed in the forward and regenerated, layer by layer, during the backward: `x1 = y1 - f(x2)` where the model
    computes `y1 = x1 + f(x2)`. What rounding makes this miss is stored as a code, of 0.1 to 0.6 bytes an element
    usually; an activation whose code would be no smaller is kept.

    Args:
        model: any module; it is not changed (but see `compile`), and not run on real data for analysis.
        example_inputs: a tuple of arguments (or a dict of keyword arguments, or the only argument, a tensor) to make
            the plan for now.
        exact: make the regenerated activations those of the forward, bit for bit, by codes. False: have none, so that
            memory is flat in depth and gradients are right up to rounding, which a warning says where it grows; and so
            it is where `torch.compile` captures.
        grid: in regions round what a coupling adds, and the streams that enter, to multiples of 2^-k for `grid=k`,
            which float32 has room for up to 2^(24-k): regenerated activations are then those of this coarser forward,
            bit for bit, and memory is flat in depth. Beyond the range, and for numbers that are not finite, a
            RangeError is raised. Gradients pass through the rounding unchanged. Streams in half precision are carried
            in float32. Additive couplings keep nothing for it; momentum, and factors bounded from below by m, keep
            ceil(log2(ceil(1/m))) bits per element and coupling; others are refused. Where `torch.compile` captures,
            only calls that need gradients are rounded, and no streams in half precision.
        memory: train within this budget, without changing a bit: a share of what the plain model's step takes at its
            peak, a float in (0, 1], or bytes, as an int or a text such as "2GiB". Any model will do: at its first call
            a step is recorded (on fake tensors; where code asks for numbers, on real ones), the costs of its operators
            are measured, and what autograd would keep is kept, computed again, or kept as one bit an element, as is
            fastest within the budget. What is reversible is one way among others. The peak counts from before the
            step, with gradients there already. Where `torch.compile` captures, the model runs uncompiled.
        compile: compile each module that a region calls, by `torch.compile` with its defaults; those that are alike
            once, at their first call. The same kernels run in the forward and again in the backward, so gradients are
            those of the model with the same compiled modules, bit for bit. A module that the compiler can't take runs
            as it is, and `.revfx.refusals` says so. With `memory`: compile the blocks of the model instead, in place,
            as `block.compile()` does, and keep all that compiled code saves of one or run it again whole. Blocks are
            the members of lists, the innermost ones, that have modules of their own; what is compiled already, by
            `part.compile()` or `torch.compile(part)`, needs no `compile=True`.
        anchor_every: keep the activations before every so many couplings of a region as well (each line such as
            `x = x + f(y)` is one), from which the backward goes on: memory then grows with depth / anchor_every, and
            rounding, with `exact=False`, only from one anchor to the next.
        capture: how the forward is recorded. "fx": once, on fake tensors, which takes code that asks for no value of a
            tensor and leaves nothing behind. "dynamo": by `torch.compile`, at the first call, in as many graphs as it
            takes, run by eager kernels. It takes more, and gives up more: where a region was found the backward can't
            be differentiated again (`create_graph=True` raises and names the remedy), a module with backward hooks ends
            the graph, and under FSDP2 the model runs plainly. "auto": "fx" where it can; of a root that it can't
            record, "dynamo" if a region lies in the root's own code, else "fx" for its sub-modules.
        strict: raise for every part that is left as it was, rather than leave it; where `torch.compile` captures, raise
            if nothing reversible is found in any graph, after the first call.

    Raises:
        NotReversibleError: `strict` was given and something is left as it was.
        BudgetError: no plan stays within `memory`; the text says what the least feasible budget is, and what holds it.
            It is raised by the first call, before anything runs, or here, given `example_inputs`.
        ValueError: an unknown `capture`; a `memory` that is no budget, or has another option beside it; an `exact`,
            `grid`, `compile` or `anchor_every` that makes no sense; `example_inputs` for `capture="dynamo"`, which
            captures real calls only.

    Warns:
        RevfxWarning: nothing reversible was found; the text says why, and the model runs as it was. Also where "auto"
            does something else than "fx".
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`convert` takes an nn.Module, not a {type(model).__name__}.")
    if capture not in ("auto", "fx", "dynamo"):
        raise ValueError(f"`capture={capture!r}` is not known; use 'auto', 'fx' or 'dynamo'.")
    if capture == "dynamo" and example_inputs is not None:
        raise ValueError("`capture='dynamo'` captures the first real call; leave `example_inputs` out.")
    every, grid = checked_every(anchor_every), checked_grid(grid)
    if compile and capture == "dynamo":
        raise ValueError("`compile=True` compiles what a recorded forward calls; `capture='dynamo'` records nothing.")
    exact = checked_exact(exact, grid)
    budget = checked_memory(memory)
    if budget is not None and (not exact or strict or capture != "auto" or (grid, every) != (None, None)):
        raise ValueError(f"`{budget.text}` changes no bit and decides by itself what is kept: leave other options out.")
    options = Options(exact, grid, every, capture, strict, compile=compile, memory=budget)
    if isinstance(model, Reversible):
        if options in (model.revfx.options, Options()):
            return model
        raise ValueError(
            f"`convert`: this {type(model).__name__} is converted already, with other options; convert the model that"
            " it was made of."
        )
    converted = reversible(model, options)
    if compile and budget is not None:
        converted.revfx.compiled_functions += compile_blocks(model)
    if example_inputs is not None:
        kwargs = example_inputs if isinstance(example_inputs, dict) else {}
        args = (example_inputs,) if isinstance(example_inputs, Tensor) else () if kwargs else tuple(example_inputs)
        converted.revfx.ready(converted, args, kwargs)
    return converted
