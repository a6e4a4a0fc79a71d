"""The layout: who imports whom, what is documented, how long a thing may be, and that an import does nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = ["deployments", "flows", "tasks", "storage"]  # each may import itself and what stands to its right
MODULES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
GENERATED = ROOT / "storage" / "migrations" / "versions"
WRITTEN = [path for path in MODULES if GENERATED not in path.parents]
LONGEST_MODULE, LONGEST_FUNCTION = 300, 50
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it, and also those that it names to importlib."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            yield node.module or ""
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))


def definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Every module, class and function with its name within the file; what is inside a function has no name."""

    def inside(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from inside(child, f"{prefix}{child.name}.")

    yield "", tree
    yield from inside(tree, "")


def test_the_layers_are_all_there() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(LAYERS)
    assert len(MODULES) > 40


def test_imports_go_from_deployments_to_storage_and_never_back() -> None:
    back = []
    for path in MODULES:
        layer = LAYERS.index(path.relative_to(ROOT).parts[0])
        for module in imported(path):
            top = module.split(".")[0]
            if top in ("tests", "benchmarks") or (top in LAYERS and LAYERS.index(top) < layer):
                back.append(f"{name_of(path)} imports {module}")
    assert back == []


def test_processors_import_nothing_but_their_own_and_storage() -> None:
    for path in (ROOT / "tasks" / "processors").glob("*.py"):
        ours = {module for module in imported(path) if module.split(".")[0] in LAYERS}
        assert all(module.startswith(("tasks.processors", "storage.")) for module in ours), name_of(path)
        assert not {"time", "datetime", "random", "os", "socket", "pathlib", "secrets", "uuid"} & set(imported(path)), (
            name_of(path)
        )


def test_prefect_appears_only_in_deployments_flows_and_the_thin_task_wrappers() -> None:
    users = {name_of(path) for path in MODULES if any(module.split(".")[0] == "prefect" for module in imported(path))}
    assert [name for name in users if not name.startswith(("deployments/", "flows/"))] == ["tasks/prefect_tasks.py"]


def test_init_files_are_empty() -> None:
    assert [name_of(path) for path in MODULES if path.name == "__init__.py" and path.stat().st_size] == []


def test_every_public_module_class_and_function_has_a_docstring() -> None:
    """A method may have that of the method that it overrides, where that is one of ours."""
    documented: set[str] = set()
    missing: list[tuple[str, str, list[str]]] = []
    for path in WRITTEN:
        bases: dict[str, list[str]] = {}
        for name, node in definitions(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef):
                bases[name] = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
            if ast.get_docstring(node):
                documented.add(name)
            elif path.name != "__init__.py" and not any(part.startswith("_") for part in name.split(".")):
                kind, _, method = name.rpartition(".")
                missing.append((name_of(path), name, [f"{base}.{method}" for base in bases.get(kind, [])]))
    assert [f"{path}: {name or 'the module'}" for path, name, above in missing if not documented & set(above)] == []


def test_no_module_and_no_function_is_too_long() -> None:
    long = []
    for path in WRITTEN:
        text = path.read_text()
        if (lines := len(text.splitlines())) > LONGEST_MODULE:
            long.append(f"{name_of(path)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                    long.append(f"{name_of(path)}: {node.name} has {lines} lines")
    assert long == []


WATCHED = """
import importlib, os, socket, sys, threading

home, modules = sys.argv[1], sys.argv[2:]
seen = []

def watch(event, args):
    writing = event == "open" and (
        (isinstance(args[1], str) and any(letter in args[1] for letter in "wax+"))
        or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    )
    if writing and "__pycache__" not in str(args[0]) or event in ("os.mkdir", "sqlite3.connect", "socket.connect", "subprocess.Popen"):
        seen.append((event, str(args[:1])))

sys.addaudithook(watch)
for module in modules:
    importlib.import_module(module)
assert seen == [], seen
assert threading.active_count() == 1, threading.enumerate()
assert not os.path.exists(home), "HOME was made"
assert "prefect" not in sys.modules, "Prefect was imported"
"""


@pytest.fixture
def modules() -> list[str]:
    """Every module of storage and tasks, but the wrappers for Prefect and what Alembic runs itself."""
    paths = [
        path for path in MODULES if path.parts[len(ROOT.parts)] in ("storage", "tasks") and path.name != "__init__.py"
    ]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name for name in names if name != "tasks.prefect_tasks" and not name.startswith("storage.migrations.")]


def test_importing_storage_and_tasks_writes_nothing_connects_to_nothing_and_does_not_need_prefect(
    modules: list[str], tmp_path: Path
) -> None:
    assert len(modules) > 35
    home = tmp_path / "home"
    env = {**os.environ, "AFTERLOG_HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCHED, str(home), *modules],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr.decode()[-2000:]) == (0, "")
    assert list(tmp_path.iterdir()) == []
