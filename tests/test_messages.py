"""Every message that a user can meet stands in the page about troubleshooting, and nothing else does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path


ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = [f for folder in ("revfx", "passes") for f in sorted((ROOT / folder).rglob("*.py"))]
INTERNAL = {
    "AssertionError",
    "AttributeError",
    "BypassFxGraphCache",
    "FileNotFoundError",
    "LookupError",
    "Unrecordable",
    "Unreplayable",
}


def literals(tree: ast.AST) -> str:
    """Return all literal text below a node, with gaps where something is filled in."""
    found = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return " ... ".join(found)


def assigned(body: Iterable[ast.AST]) -> dict[str, str]:
    """Return the literal text that is given to each name."""
    found: dict[str, str] = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = literals(node.value)
    return found


CONSTANTS: dict[str, str] = {}
for source in SOURCES:
    CONSTANTS.update(assigned(ast.parse(source.read_text()).body))


def messages(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each error and warning of a file."""
    for function in ast.walk(ast.parse(file.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        named = CONSTANTS | assigned(ast.walk(function))
        for node in ast.walk(function):
            call: ast.AST | None = node
            if isinstance(node, ast.Raise | ast.Return):
                call = node.exc if isinstance(node, ast.Raise) else node.value
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func).rpartition(".")[2]
            is_error = isinstance(node, ast.Raise) and name not in INTERNAL and name[0].isupper()
            if not is_error and name not in ("warn", "_warn", "BudgetError"):
                continue
            names = [n.id for n in ast.walk(call.args[0]) if isinstance(n, ast.Name)]
            text = " ".join((literals(call.args[0]), *(named.get(name, "") for name in names)))
            if len(text.split()) > 2:
                yield f"{file.relative_to(ROOT)}:{call.lineno}", text


def test_the_page_has_all_messages() -> None:
    known = re.findall(r"^\| `(.+?)` \|", PAGE.read_text(), re.MULTILINE)
    said = [message for file in SOURCES if file.name != "testing.py" for message in messages(file)]
    assert len(said) > 60
    missing = [f"{where}: {text[:120]}" for where, text in said if not any(part in text for part in known)]
    assert not missing, "\n".join(missing)
    gone = [part for part in known if not any(part in text for _, text in said)]
    assert not gone, gone
