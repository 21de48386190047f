"""Python functions with their docstrings, from packages that pyproject.toml pins exactly.

The functions are the same on every Python: their text is cut from the source files and not written anew from a syntax tree, which
each Python does in its own way, and the standard library, which differs between Pythons, is not among the packages.
"""

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import textwrap
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from f2llm_jax.errors import UserError

# Imported name: (distribution, the version that the extra `demo` pins). Another version is another corpus.
PACKAGES = {
    "apache_beam": ("apache-beam", "2.77.0"),
    "babel": ("babel", "2.18.0"),
    "tensorflow_datasets": ("tensorflow-datasets", "4.9.10"),
}
SKIPPED_FOLDERS = {"test", "tests", "testing", "__pycache__"}  # tests repeat one another
SKIPPED_FILES = re.compile(r".*_test(_utils?)?\.py|test_.*\.py|.*_pb2\.py")
MAX_CODE, MAX_DOCSTRING, MIN_DOCSTRING_WORDS = 600, 400, 4


class Function(NamedTuple):
    docstring: str  # its first paragraph, on one line
    code: str  # its source without the docstring of any function


def library_functions() -> Iterator[Function]:
    """Documented functions of all `PACKAGES`, by package, file and line.

    Raises:
      UserError: a package is not installed in the version of `PACKAGES`.
    """
    for package, (distribution, version) in PACKAGES.items():
        root = _folder(package, distribution, version)
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
            if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts) and not SKIPPED_FILES.fullmatch(path.name):
                yield from functions_of(path.read_text(encoding="utf-8"))


def functions_of(source: str) -> Iterator[Function]:
    """The documented functions of a file, in the order of their first lines."""
    with warnings.catch_warnings():  # invalid escapes in strings
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    lines = source.split("\n")
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node)]
    docstrings = {line for node in nodes for line in _lines(node.body[0])}
    for node in sorted(nodes, key=lambda node: node.lineno):
        docstring = _first_paragraph(ast.get_docstring(node) or "")
        if len(docstring.split()) < MIN_DOCSTRING_WORDS or len(node.body) < 2 or _shares_its_lines(node):
            continue
        first = min(part.lineno for part in (node, *node.decorator_list))
        kept = [lines[i - 1] for i in range(first, _lines(node).stop) if i not in docstrings]
        yield Function(docstring[:MAX_DOCSTRING], textwrap.dedent("\n".join(kept))[:MAX_CODE])


def _folder(package: str, distribution: str, version: str) -> pathlib.Path:
    """Where the package's files are; found without importing it."""
    spec = importlib.util.find_spec(package)
    found = importlib.metadata.version(distribution) if spec else "none"
    if spec is None or spec.origin is None or found != version:
        raise UserError(
            f"the embedded corpus is made of {distribution} {version}, installed is {found}; run: pip install 'f2llm-jax[demo]'"
        )
    return pathlib.Path(spec.origin).parent


def _first_paragraph(docstring: str) -> str:
    return " ".join(re.split(r"\n\s*\n", docstring)[0].split())


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _shares_its_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a line of the docstring also holds code, which would go with it."""
    docstring = node.body[0]
    return docstring.lineno == node.lineno or node.body[1].lineno in _lines(docstring)
