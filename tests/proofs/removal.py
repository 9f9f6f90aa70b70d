"""Remove one guard from the service and check that its tests fail.

A guard is found in the syntax tree, so comments, line breaks and a move to another file do not matter. The changed
module is laid over the real one by an import hook: nothing is copied, and no file is written. This module imports
nothing of the project, because its processes must import the service only after the hook is in place.
"""

import ast
import contextlib
import difflib
import functools
import importlib.machinery
import io
import multiprocessing
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 600
# Third-party modules that the tests import; each process starts with them loaded, and without ours.
_PRELOADED = [
    *("apsw", "faiss", "fastapi", "fastapi.testclient", "fastapi_swagger", "httpx2", "hypothesis", "numpy"),
    *("onnx", "onnxruntime", "orjson", "PIL.Image", "playwright.sync_api", "psutil", "pytest", "python_multipart"),
    *("pydantic", "pytest_timeout", "sklearn.datasets", "starlette.testclient", "pyarrow.parquet"),
]


class Removal(NamedTuple):
    """A guard, and the tests of which one must fail without it."""

    where: str
    """The function or class that holds the guard, by its bare name; "" for a refusal, whose message finds it."""
    guard: str
    """An expression or a statement; for a refusal a part of the message, with {} for each value in it."""
    instead: str
    """What stands in its place; for a refusal, nothing is raised."""
    tests: tuple[str, ...]
    """How the tests' names begin, with a parameter where one is enough."""

    def __str__(self) -> str:
        return f"{self.where}: {self.guard}" if self.where else f"refusal: {self.guard}"


class Changed(NamedTuple):
    """A module of the service without one guard."""

    name: str
    source: str


class Outcome(NamedTuple):
    """The tests that failed, and everything that pytest wrote."""

    failed: tuple[str, ...]
    output: str


def refusal(message: str, *tests: str) -> Removal:
    """Suppress the error with this message."""
    return Removal("", message, "pass", tests)


def code(where: str, guard: str, instead: str, *tests: str) -> Removal:
    """Replace an expression or a statement in a function or class by other code."""
    return Removal(where, guard, instead, tests)


def change(removal: Removal) -> Changed:
    """Return the module of service/ that has the guard, without it.

    Raises:
        LookupError: no module has it, or several do; candidates are listed.
    """
    found = []
    seen: list[str] = []
    for path in sorted((ROOT / "service").rglob("*.py")):
        text, messages = _source(path)
        seen += messages if not removal.where else []
        if removal.where not in text or (not removal.where and not any(removal.guard in one for one in messages)):
            continue
        remover = _Remover(removal)
        tree = remover.visit(ast.parse(text))
        if remover.count:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found.append(Changed(name, ast.unparse(ast.fix_missing_locations(tree))))
        if not remover.count:
            seen += map(ast.unparse, remover.passed)
    if len(found) != 1:
        names = ", ".join(one.name for one in found)
        near = [f"in {names}"] if found else difflib.get_close_matches(removal.guard, seen, 5, 0.4)
        problem = "found in several modules" if found else "not found"
        raise LookupError(f"guard {problem}: {removal}; candidates:\n  " + "\n  ".join(near or ["none"]))
    return found[0]


@functools.cache
def _source(path: Path) -> tuple[str, list[str]]:
    """Return a module's text and the messages of the errors that it raises."""
    text = path.read_text()
    return text, [_message(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Raise)]


class _Remover(ast.NodeTransformer):
    """Replaces a guard wherever its function or class has it, and keeps the other code there as candidates."""

    def __init__(self, removal: Removal) -> None:
        self._removal, self._inside = removal, 0
        pattern = ast.parse(removal.guard).body[0] if removal.where else ast.Pass()
        instead = ast.parse(removal.instead).body[0]
        self._instead: ast.AST
        if isinstance(pattern, ast.Expr):
            assert isinstance(instead, ast.Expr), f"{removal.instead}: expected an expression, as the guard is one"
            self._pattern, self._instead = ast.dump(pattern.value), instead.value
        else:
            self._pattern, self._instead = ast.dump(pattern), instead
        self.count = 0
        self.passed: list[ast.expr | ast.stmt] = []

    def visit(self, node: ast.AST) -> Any:
        if not self._removal.where:
            refused = isinstance(node, ast.Raise) and self._removal.guard in _message(node)
            return self._replace() if refused else self.generic_visit(node)
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        entered = named and getattr(node, "name", "") == self._removal.where
        self._inside += entered
        try:
            if self._inside and isinstance(node, ast.expr | ast.stmt):
                if ast.dump(node) == self._pattern:
                    return self._replace()
                if not named:
                    self.passed.append(node)
            return self.generic_visit(node)
        finally:
            self._inside -= entered

    def _replace(self) -> ast.AST:
        self.count += 1
        return self._instead


def _message(node: ast.Raise) -> str:
    """Return the text of the error that is raised, with {} for each value in it."""
    if not isinstance(node.exc, ast.Call) or not node.exc.args:
        return ""
    text = node.exc.args[0]
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)


class Prover:
    """Runs tests against changed modules, each time in a process of its own.

    A fork server loads third-party modules once; a process begins as its copy and imports the service and the
    tests itself.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._names = self._collect()

    def select(self, removal: Removal) -> list[str]:
        """Return the ids of the removal's tests. Raises LookupError for a name that no test has."""
        chosen = []
        for wanted in removal.tests:
            matching = [id for id in self._names if id.partition("::")[2].startswith(wanted)]
            if not matching:
                tests = [id.partition("::")[2] for id in self._names]
                near = difflib.get_close_matches(wanted, tests, 5, 0.4)
                raise LookupError(f"test not found: {wanted}; candidates:\n  " + "\n  ".join(near or ["none"]))
            chosen += matching
        return chosen

    def run(self, changed: Changed | None, tests: Sequence[str]) -> Outcome:
        """Run tests until one fails, with a module of the service replaced, or with the service as it is."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_run_tests, args=(sender, changed, tests))
        process.start()
        sender.close()
        try:
            if not receiver.poll(_TIMEOUT_S):
                return Outcome((), f"no test failed within {_TIMEOUT_S} s")
            failed, output = receiver.recv()
            return Outcome(failed, output)
        except EOFError:
            return Outcome((), "the process ended without an answer")
        finally:
            process.kill()
            process.join()

    def _collect(self) -> list[str]:
        """Return the ids of all tests of the service."""
        return self.run(None, ["--collect-only", "tests/service"]).output.splitlines()


class _Reports:
    """A pytest plugin that keeps the ids of collected tests and of those that failed by themselves."""

    def __init__(self) -> None:
        self.collected: list[str] = []
        self.failed: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = [item.nodeid for item in session.items]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A failure while a fixture is set up proves nothing: the service may simply no longer start.
        if report.failed and report.when == "call":
            self.failed.append(report.nodeid)


class _Overlay:
    """An import hook that gives one module another source."""

    def __init__(self, changed: Changed) -> None:
        self._changed = changed

    def find_spec(self, name: str, path: Any = None, _: Any = None) -> ModuleSpec | None:
        if name != self._changed.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(spec.origin, self._changed)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the changed source, and neither reads nor writes cached bytecode."""

    def __init__(self, path: str, changed: Changed) -> None:
        super().__init__(changed.name, path)
        self._changed = changed

    def get_code(self, _: str) -> Any:
        return compile(self._changed.source, self.path, "exec")


def _run_tests(sender: Connection, changed: Changed | None, arguments: Sequence[str]) -> None:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    ours = [name for name in sys.modules if name == "service" or name.startswith("service.")]
    assert not ours, f"loaded before the guard was taken out: {ours}"
    if changed is not None:
        sys.meta_path.insert(0, _Overlay(changed))
    # Plugins that these tests do not use would take seconds to load in every process.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-qx", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--timeout", "20"]
    reports = _Reports()
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        pytest.main([*options, *arguments], plugins=[reports])
    text = "\n".join(reports.collected) if "--collect-only" in arguments else output.getvalue()
    sender.send((tuple(reports.failed), text))
