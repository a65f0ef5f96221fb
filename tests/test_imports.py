"""Which folder imports which, where torch's private API is used, and how long a file is."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest


BOTTOM = {"_fake", "_fsdp", "_substitute", "_torch", "errors", "ambient", "parts", "units"}
CODES = {"codes", "layout"}
# What the files of a folder, or a file of the package's own folder, may import besides their own folder.
MAY: dict[str, set[str]] = {
    "_torch": set(),
    "_fsdp": {"_torch", "_substitute"},
    "_substitute": set(),
    "_fake": {"_torch"},
    "errors": set(),
    "arguments": set(),
    "units": set(),
    "ambient": {"_torch", "errors"},
    "parts": {"_torch", "_fsdp", "ambient", "errors"},
    "traced": {"_torch", "compiled"},  # called only where `torch.compile` traces
    "rules": BOTTOM,
    "passes": {"_torch", "errors", "rules"},
    "passes.joint": {"errors", "rules", "passes"},
    "layout": {"_torch"},
    "codes": {"_torch", "layout"},
    "engine": {*BOTTOM, *CODES, "passes"},
    "plan": {*BOTTOM, *CODES, "rules", "passes", "passes.joint", "engine", "info"},
    "modes": {*BOTTOM, *CODES, "engine"},
    "block": {*BOTTOM, "modes", "plan", "traced", "world"},
    "info": {"errors", "passes", "units"},
    "compiled": {*BOTTOM, *CODES, "rules", "passes", "passes.joint", "modes"},
    "world": BOTTOM,
    "fit": {*BOTTOM, *CODES, "info", "passes", "engine", "plan", "modes", "world"},
}
MAY["conversion"] = {*BOTTOM, "info", "passes", "plan", "modes", "compiled", "fit", "world"}
MAY["converted"] = {*BOTTOM, "conversion", "info", "traced"}
MAY["converting"] = {*BOTTOM, "compiled", "conversion", "converted", "modes", "fit"}
MAY["inverting"] = {*BOTTOM, "arguments", "converted", "engine", "passes", "plan"}
MAY["inspection"] = {*BOTTOM, "arguments", "passes", "engine", "plan"}
MAY["debug"] = {*MAY["inspection"], "codes", "inspection"}
MAY["testing"] = {*MAY["debug"], "modes", "block", "inverting", "rules", "converting", "converted"}
MAY["report"] = {*MAY["testing"], *CODES, "plan", "conversion", "compiled", "fit", "passes.joint", "testing", "world"}
MAY["cli_models"] = {"errors"}
MAY["cli"] = MAY["__main__"] = MAY[""] = {*MAY, *MAY["report"], "report", "cli", "cli_models"}
# The passes that the eager mode may use: their data, and the order of a step's derivations.
PROGRAMS = {"_torch", "closure", "composed", "cuts", "program", "regions", "rounding", "schedule"}
# What `__init__` and the command line import only when it is used: most programs never ask for a report.
LATER = {"report"}
ASK_LATER = {"", "__main__", "cli", "debug", "testing"}
# Imports against the direction, each with its reason.
EXCEPTIONS: dict[tuple[str, str], str] = {}
# Names at module level that several files of the folders of `test_names_mean_one_thing` define, each to the same.
SHARED_NAMES = {"aten", "_log"}
PRIVATE = ("torch._C", "torch._subclasses", "torch._functorch", "torch._dynamo", "torch._inductor", "functorch")
TESTS = Path(__file__).parent


@functools.cache
def modules() -> dict[str, Path]:
    """The files of the package by the names of their modules; `passes` lies elsewhere in a source tree."""
    found: dict[str, Path] = {}
    for package in ("revfx", "revfx.passes"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        folder = Path(next(iter(spec.submodule_search_locations)))
        for file in sorted(folder.rglob("*.py")):
            parts = (package, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


def folder_of(module: str) -> str:
    """The folder of a module, without `revfx`; of a file in the package's own folder its name, of `revfx` itself ""."""
    parts = module.split(".")[1:]
    folders = parts if modules()[module].name == "__init__.py" else parts[:-1]
    return ".".join(folders or parts)


def imports(module: str) -> Iterator[tuple[str, bool, int]]:
    """What a module imports of the package as it runs: its name, whether a call waits for it, and the line."""

    def walk(node: ast.AST, called: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue  # for checkers alone
            if isinstance(child, ast.Import):
                yield from ((alias.name, called, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module is not None:
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                yield from ((n if n in modules() else child.module, called, child.lineno) for n in names)
            yield from walk(child, called or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    found = dict.fromkeys(walk(ast.parse(modules()[module].read_text()), False))
    return ((name, called, line) for name, called, line in found if name.partition(".")[0] == "revfx")


@pytest.mark.parametrize("folder", sorted({folder_of(m) for m in modules()}), ids=lambda f: f or "revfx")
def test_imports_go_one_way(folder: str) -> None:
    against: list[str] = []
    for module in (m for m in modules() if folder_of(m) == folder):
        for name, called, line in imports(module):
            target = folder_of(name)
            right = target == folder or target in MAY[folder] or name == "revfx"
            if folder == "eager" and target == "passes":
                right = name.rpartition(".")[2] in PROGRAMS
            if target in LATER and folder in ASK_LATER:
                right = called
            if not right and (module, name) not in EXCEPTIONS:
                against.append(f"{module}:{line} imports {name}{' when called' if called else ''}")
    assert not against, "\n".join(against)


def test_no_exception_is_left_that_nothing_needs() -> None:
    found = {(module, name) for module in modules() for name, *_ in imports(module)}
    assert set(EXCEPTIONS) <= found


def test_every_folder_has_its_place() -> None:
    assert {folder_of(m) for m in modules()} == set(MAY)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Also where an import waits for a call: two files that need each other are one, or stand on a third."""
    graph = nx.DiGraph((m, name) for m in modules() for name, *_ in imports(m) if name != "revfx")
    circles = [" -> ".join(circle) for circle in nx.simple_cycles(graph)]
    assert not circles, "\n".join(circles)


def names_of(module: str) -> Iterator[str]:
    """The names that a module defines at its level, but for dunder names."""
    for node in ast.parse(modules()[module].read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        else:
            continue
        yield from (name for name in found if not name.startswith("__"))


def test_names_mean_one_thing() -> None:
    """In these folders, and in the package's own files, no name is defined in two files."""
    folders = {"compiled", "passes", "passes.joint", "report", "rules"}
    users: dict[str, set[str]] = {}
    for module in modules():
        if folder_of(module) in folders or module.count(".") < 2:
            for name in names_of(module):
                users.setdefault(name, set()).add(module)
    twice = [f"{name}: {sorted(found)}" for name, found in users.items() if len(found) > 1 and name not in SHARED_NAMES]
    assert not twice, "\n".join(twice)


def test_private_torch_api_is_used_in_few_modules() -> None:
    users: set[str] = set()
    for module, file in modules().items():
        text = file.read_text()
        names = [n.module or "" for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
        names += [a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names]
        if any(name.startswith(PRIVATE) for name in names) or re.search(r"torch\._(C|ops|dynamo)", text):
            users.add(module)
    of_parts = {"revfx.compiled._inductor", "revfx.engine.dispatch", "revfx.passes._torch"}
    assert users == {"revfx._fake", "revfx._torch", *of_parts}


def test_no_file_is_long() -> None:
    for most, files in ((400, modules().values()), (500, TESTS.rglob("*.py"))):
        for file in files:
            assert len(file.read_text().splitlines()) <= most, file
