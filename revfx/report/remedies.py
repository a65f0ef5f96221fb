"""What a user can do about each reason for which a place of a model is left as it was."""

from __future__ import annotations


# the first entry is given of which some words, parted by `|`, occur in the reason
REMEDIES: tuple[tuple[str, str], ...] = (
    (
        "computed from itself",
        "split the stream in two: `y1 = x1 + f(x2); y2 = x2 + g(y1)`, or wrap this layer in torch.utils.checkpoint",
    ),
    ("bounded away from zero", "bound the factor: `exp(tanh(s))`, or `sigmoid(s) + 0.1`"),
    ("the factor is", "leave out the product, or use a factor that is not zero"),
    ("exact zeros", "let the function end in something that makes no exact zeros, such as a linear layer"),
    (
        "may tell its numbers",
        "start with a layer that mixes the data, such as a linear layer, or let the function that is named do so first",
    ),
    ("injective|saturates", "move it into the function that is added to the other stream"),
    ("loses bits|turns torch.", "keep each stream in one dtype, and cast inside the functions"),
    ("broadcasts", "add something of the stream's own shape, for instance by `expand`"),
    ("the same value", "write `2 * a` for `a + a`"),
    ("in place|writes its argument", "work on a copy: `x.clone()`, or write `x = x + ...`"),
    ("values of a tensor", "use `torch.where` for the branch, or `convert(model, capture='dynamo')`"),
    ("nowhere registered|neither an argument nor a parameter", "use `register_buffer`"),
    ("its forward sets `", "set it before: in `__init__`, by `register_buffer`, or in a call under `torch.no_grad()`"),
    ("has hooks", "take the hooks off this module, or put them on the modules inside"),
    ("permutation", "keep the permutation in a buffer"),
    ("draws from", "draw from torch's default generator"),
    ("no inverse rule", "give it one by `revfx.register_inverse`, or move it into the function of a coupling"),
    ("has no inverse", "move it into the function that is added to the other stream"),
    ("custom operator", "call it inside the function that is added to the other stream"),
    ("half precision", "keep the streams in float32; autocast may run the functions in half precision"),
    ("read nowhere", "return it, or compute it from what is returned"),
)


def remedy(reason: str) -> str | None:
    """Return what to do about a refusal, or None where nothing general can be said."""
    return next((advice for words, advice in REMEDIES if any(w in reason for w in words.split("|"))), None)
