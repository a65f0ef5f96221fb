"""What code mentions, of globals, imports and attributes, and which methods run unasked."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from revfx.mentions import classes, functions, is_followed, mentions, unasked


SCALE = 1.0


class Base(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def __getitem__(self, key: str) -> Any:
        return key

    def named(self) -> None: ...

    @property
    def both(self) -> int:
        return 1

    @both.setter
    def both(self, value: int) -> None: ...

    @functools.cached_property
    def once(self) -> int:
        return 1

    @classmethod
    def made(cls) -> None: ...


class Derived(Base):
    def forward(self, input: Any) -> Any:
        import json.decoder

        def inner() -> Any:
            return self.bias, SCALE

        return super().forward(input), inner, json.decoder.JSONDecoder, self.text, [2 for _ in unknown()]


def unknown() -> list[int]:
    return []


def test_names_of_globals_imports_and_attributes_also_of_inner_functions() -> None:
    found = mentions(Derived.forward.__code__)
    assert {"SCALE", "unknown"} <= set(found.globals) and "bias" not in found.globals
    assert found.imports == ("json.decoder",)
    assert {"forward", "bias", "decoder", "JSONDecoder", "text"} <= found.attributes and "SCALE" not in found.attributes
    assert mentions(Derived.forward.__code__) is found


def test_classes_of_torch_and_python_are_left_out() -> None:
    assert classes(Derived) == (Derived, Base) and classes(nn.Linear) == ()
    assert is_followed(Derived) and not is_followed(types) and not is_followed(len)


def test_forward_and_operators_run_unasked() -> None:
    assert unasked(Derived) == {"forward"} and unasked(Base) == {"__getitem__"}


def test_functions_in_descriptors() -> None:
    names = {n: [f.__name__ for f in functions(v)] for n, v in vars(Base).items()}
    assert (names["both"], names["once"], names["made"], names["named"]) == (
        ["both"] * 2,
        ["once"],
        ["made"],
        ["named"],
    )
