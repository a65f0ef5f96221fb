"""`convert`: give a model another class, which frees its activations and regenerates them in the backward."""

from __future__ import annotations

from torch import nn

from revfx import _torch
from revfx.compiled.functions import compile_blocks
from revfx.conversion import Options
from revfx.converted import Reversible, conversion_of, reversible
from revfx.errors import NotConvertedWarning, warn
from revfx.fit.budget import Budget, checked_memory
from revfx.modes import check_exact


def convert(
    model: nn.Module,
    *,
    memory: float | str | Budget | None = None,
    compile: bool = False,
    exact: bool = True,
    strict: bool = False,
) -> nn.Module:
    """Convert a model so that it trains in less activation memory, with the gradients of the plain model bit for bit.

    The result is the same model with another class. It shares all attributes: parameters, buffers, sub-modules and
    hooks. `state_dict` keys, call signature, `train()`/`eval()`, `deepcopy` and pickling are the model's own. Public
    methods that get tensors run under plans as `forward` does.

    Without `memory`, revfx looks for values that follow from later ones: `x1 = y1 - f(x2)` if the model computes
    `y1 = x1 + f(x2)`. It frees them in the forward and regenerates them, layer by layer, in the backward. A code
    corrects the rounding of each inverse; it takes 0.1 to 0.6 bytes an element. The model's Python runs once a step:
    revfx records its operators, and the backward recomputes by them. The first call of a kind is recorded, and frees
    the activations that a checkpoint of each block would free. The second one tests every replay before it frees
    anything.

    Args:
        model: any module. It is not changed.
        memory: the budget of a training step, for any model: bytes as an int, a text such as "2GiB" or "65%", or a
            fraction of the plain model's peak as a float in (0, 1]. The budget is for the bytes that the step allocates
            beyond those at its begin: activations, temporary gradients, kernel workspace. Parameters, `.grad` and
            optimizer state do not count. For each activation revfx makes the fastest choice that fits: keep it, keep
            one bit an element, invert it, or recompute it.
        compile: run functions of the model through `torch.compile`, equal ones compiled once. Without `memory`: the
            largest modules that couplings call. With `memory`: the blocks of the model, the members of its innermost
            lists. Gradients are those of the model with the same compiled parts, bit for bit.
        exact: False: store no codes for inverses that only add, or scale by constants. Memory is then flat in depth,
            and gradients are accurate to rounding.
        strict: raise an error if a part of the model is left as it was.

    Raises:
        TypeError: `model` is not a module, or an option has the wrong type.
        ValueError: `memory` is not a budget, or is combined with `exact=False` or `strict=True`; the model is
            converted already, with other options.
        NotReversibleError: a part is left as it was under `strict`; raised by the first call.
        BudgetError: no plan stays within `memory`; raised when the first backward ends. It names the least feasible
            budget.

    Warns:
        NotConvertedWarning: nothing reversible was found, and the model runs as it was.
        BudgetWarning: a step can't stay within `memory`, although earlier ones did.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`convert` takes an nn.Module, not a {type(model).__name__}.")
    check_exact(exact)
    budget = checked_memory(memory)
    if budget is not None and (not exact or strict):
        option = "strict=True" if strict else "exact=False"
        raise ValueError(f"`{budget.text}`: a budget is for any model, and always lossless. Leave `{option}` out.")
    options = Options(exact, strict, compile=compile, memory=budget)
    if isinstance(model, Reversible):
        if options in (conversion_of(model).options, Options()):
            return model
        raise ValueError(
            f"`convert`: this {type(model).__name__} is converted already, with other options. Convert the model that"
            " it was made of."
        )
    if _torch.is_compiled(model):
        consequence = "Nothing is freed" if budget is None else "Nothing is freed, and the budget is not kept"
        warn(
            f"this {type(model).__name__} is compiled as a whole (`model.compile()`), so its calls do not reach revfx."
            f" {consequence}. Compile its blocks instead (`block.compile()`), or use `torch.compile(model,"
            ' backend="revfx")`.',
            NotConvertedWarning,
        )
    converted = reversible(model, options)
    if compile and budget is not None:
        conversion_of(converted).compile_blocks(compile_blocks(model))
    return converted
