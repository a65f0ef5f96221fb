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
    """Compile `gm`, whose reversible regions keep no activations for the backward.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        mode: a mode of `torch.compile`, for inductor.
        options: `inner`: "inductor" (default), or "aot_eager", which runs eager kernels. `exact`, the default with
            "aot_eager": codes give the gradients of torch's own "aot_eager", bit for bit. `strict`: see
            `ReversiblePartitioner`. Everything else is a setting of inductor, as without `backend`.

    Raises:
        ValueError: an unknown option.
        NotReversibleError: a graph is left as it was under `strict`.
    """
    if "memory" in (options or {}):
        raise ValueError("a budget is kept by eager code: `revfx.convert(model, memory=...)`; see its `compile`.")
    settings = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    inner = settings.pop("inner", "inductor")
    if inner not in ("inductor", "aot_eager"):
        raise ValueError(f"`inner={inner!r}` is not known; use 'inductor' or 'aot_eager'.")
    exact = settings.pop("exact", inner == "aot_eager")
    check_exact(exact)
    if exact and inner == "inductor":
        raise ValueError(
            "`exact=True`: inductor's kernels may round a function otherwise when it runs again in the backward, so a"
            " graph that it compiles can't be lossless. `options={'inner': 'aot_eager'}` is, and so is"
            " `revfx.convert(model, compile=True)` in eager mode."
        )
    partitioner = ReversiblePartitioner(strict=settings.pop("strict", False)).with_facts_of(example_inputs)
    known = _inductor.inductor_config.get_config_copy()
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"unknown options {unknown}: neither revfx ({', '.join(OWN)}) nor inductor has them.")
    if inner == "aot_eager":
        if settings or mode is not None:
            raise ValueError(f"inner='aot_eager' takes no mode and no options of inductor: {mode or sorted(settings)}.")
        if exact:
            partitioner.options = replace(partitioner.options, coder=Coder)
        return _inductor.run_by_eager_kernels(gm, example_inputs, partitioner.partition)
    if "custom_partitioner_fn" in settings:
        raise ValueError(
            "`custom_partitioner_fn` is what the backend 'revfx' sets; give one to the backend 'inductor'."
        )
    mode_options = _inductor.list_mode_options(mode) if mode else {}
    patches = {**mode_options, **settings, "custom_partitioner_fn": partitioner}
    return cast(Any, _inductor.compile_fx)(gm, list(example_inputs), config_patches=patches)
