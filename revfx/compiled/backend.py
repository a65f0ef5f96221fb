"""The backend of `torch.compile(model, backend="revfx")`, which torch finds by its entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import fx

from revfx.compiled import _inductor
from revfx.compiled.coded import Coder
from revfx.compiled.partitioner import ReversiblePartitioner
from revfx.modes import check_exact


OWN = ("inner", "exact", "strict")


def revfx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Return the compiled function of `gm`; its reversible regions keep no activations for the backward.

    Args:
        mode: a mode of `torch.compile`, for inductor.
        options: `inner`: "inductor" (default) or "aot_eager", which runs eager kernels; with `exact` (the default
            there) its gradients are those of torch's own "aot_eager", bit for bit, by codes. `strict`: see
            `ReversiblePartitioner`. Everything else is a setting of inductor, as without `backend`.

    Raises:
        ValueError: an unknown option.
        NotReversibleError: `strict` was given and a graph is left as it was.
    """
    if "memory" in (options or {}):
        raise ValueError("a budget is kept by eager code: `revfx.convert(model, memory=...)`; see its `compile`.")
    given = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    inner = given.pop("inner", "inductor")
    if inner not in ("inductor", "aot_eager"):
        raise ValueError(f"`inner={inner!r}` is not known; use 'inductor' or 'aot_eager'.")
    exact = given.pop("exact", inner == "aot_eager")
    check_exact(exact)
    if exact and inner == "inductor":
        raise ValueError(
            "`exact=True`: inductor's kernels may round a function otherwise when it runs again in the backward, so a"
            " graph that it compiles can't be lossless. `options={'inner': 'aot_eager'}` is, and so is"
            " `revfx.convert(model, compile=True)` in eager mode."
        )
    partitioner = ReversiblePartitioner(strict=given.pop("strict", False)).knowing(example_inputs)
    known = _inductor.inductor_config.get_config_copy()
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"unknown options {unknown}: neither revfx ({', '.join(OWN)}) nor inductor has them.")
    if inner == "aot_eager":
        if given or mode is not None:
            raise ValueError(f"inner='aot_eager' takes no mode and no options of inductor: {mode or sorted(given)}.")
        if exact:
            partitioner.options = replace(partitioner.options, coder=Coder)
        return _inductor.run_by_eager_kernels(gm, example_inputs, partitioner.partition)
    if "custom_partitioner_fn" in given:
        raise ValueError(
            "`custom_partitioner_fn` is what the backend 'revfx' sets; give one to the backend 'inductor'."
        )
    patches = {**(_inductor.list_mode_options(mode) if mode else {}), **given, "custom_partitioner_fn": partitioner}
    return cast(Any, _inductor.compile_fx)(gm, list(example_inputs), config_patches=patches)
