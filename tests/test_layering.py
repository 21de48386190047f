"""The floors of the package, read from its imports: they go down only, and each room imports only what the table allows."""

import ast
import pathlib

import pytest

import f2llm_jax

PACKAGE = pathlib.Path(f2llm_jax.__file__).parent
# Every room or single module of the package, from the ground up, with the rooms it may import besides itself.
FLOORS = {
    "errors": set(),
    "cli": {"errors"},
    "jax_version": set(),
    "storage": {"cli", "errors"},
    "hf_settings": {"errors"},
    "tokenizer_settings": {"errors", "storage"},
    "text": {"errors", "hf_settings", "storage", "tokenizer_settings"},
    "batch": set(),
    "inputs": {"errors", "storage", "text"},
    "sharding": {"batch", "errors"},
    "objectives": {"batch", "errors", "sharding"},
    "model": {"batch", "errors", "jax_version", "sharding"},
    "weights": {"errors", "hf_settings", "model", "sharding", "storage", "text"},
    "data": {"batch", "cli", "errors", "sharding", "storage", "text"},
    "preparation": {"data", "errors", "inputs", "storage", "text"},
    "inference": {"cli", "data", "errors", "model", "sharding", "storage", "text", "weights"},
    "teachers": {"cli", "data", "errors", "inference", "inputs", "storage", "text", "weights"},
    "training": {
        "batch",
        "cli",
        "data",
        "errors",
        "jax_version",
        "model",
        "objectives",
        "preparation",
        "sharding",
        "storage",
        "text",
        "weights",
    },
    "evaluation": {"cli", "data", "errors", "inference", "inputs", "model", "storage", "text", "training", "weights"},
    "reporting": {"data", "errors", "evaluation", "inference", "model", "storage", "text", "weights"},
    "compilation": {"batch", "data", "errors", "jax_version", "model", "sharding", "storage", "training"},
    "pruning": {"batch", "cli", "data", "errors", "inference", "model", "sharding", "text", "weights"},
    "mining": {"errors", "inference", "inputs", "preparation", "sharding", "storage", "text", "weights"},
    "release": {"cli", "errors", "inference", "model", "pruning", "reporting", "storage", "text", "weights"},
    "chain": {"data", "errors", "evaluation", "inference", "inputs", "model", "storage", "weights"},
}  # any other module at the top is a command and may import every room, but no other command


def module_name(file):
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    module_name(file): ast.parse(file.read_text(encoding="utf-8"))
    for file in sorted(PACKAGE.rglob("*.py"))
    if file != PACKAGE / "__init__.py"
}


def room(module):
    return module.split(".")[0]


def own_imports(module):
    """Modules of the package that `module` imports, anywhere in the file, without the package's name."""
    found = set()
    for node in ast.walk(FILES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("f2llm_jax.") for name in names if name.startswith("f2llm_jax.")}
    # What is imported from a module may be a module itself or a name in it.
    return {name if name in FILES else name.rpartition(".")[0] for name in found - {"__version__"}}


EDGES = [(module, target) for module in FILES for target in own_imports(module)]


def test_the_walk_sees_the_imports():
    """Guards the tests below: known imports of each spelling are among the edges, and every edge ends at a file."""
    known = {
        ("training.run", "sharding"),  # from f2llm_jax import sharding
        ("training.validation", "training.step"),  # from f2llm_jax.training.step import ...
        ("training.run", "training.start"),  # from f2llm_jax.training import start
        ("main", "training.run"),  # inside a function
    }
    assert known <= set(EDGES)
    assert [edge for edge in EDGES if edge[1] not in FILES] == []


def test_the_table_goes_down_only():
    order = list(FLOORS)
    assert [(name, below) for name in FLOORS for below in FLOORS[name] if order.index(below) >= order.index(name)] == []


@pytest.mark.parametrize("name", FLOORS)
def test_a_room_imports_only_the_floors_below_that_it_may(name):
    assert {room(target) for source, target in EDGES if room(source) == name} - {name} <= FLOORS[name]


def test_commands_import_no_command():
    command = lambda module: room(module) not in FLOORS  # noqa: E731
    assert [edge for edge in EDGES if command(edge[0]) and command(edge[1])] == []


def test_no_module_is_in_a_cycle():
    below = {module: {target for source, target in EDGES if source == module} for module in FILES}
    while leaves := {module for module, targets in below.items() if not targets}:
        below = {module: targets - leaves for module, targets in below.items() if module not in leaves}
    assert below == {}


def test_no_drawer_for_everything():
    assert [name for name in FILES if {"utils", "util", "helpers", "common", "misc"} & set(name.split("."))] == []


def test_torch_and_its_kin_are_imported_late_and_by_evaluation_only():
    """Training, conversion and encoding run without them."""
    kin = {"torch", "transformers", "sentence_transformers", "mteb", "tensorflow"}
    for module, parsed in FILES.items():
        for node in ast.walk(parsed):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            if kin & {name.split(".")[0] for name in names}:
                assert module in ("release.verify", "teachers.sentence_transformers") or room(module) == "evaluation", module
                assert node not in parsed.body, f"{module}: imported at the top"


def test_no_test_imports_another_test_module():
    for file in pathlib.Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not [name for name in names if name.startswith("test_")], f"{file.name}: {ast.unparse(node)}"
