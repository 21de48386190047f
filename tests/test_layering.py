"""The house's four bands, read from the imports: they go down only, and each room knows only what it may."""

import ast
import pathlib

import pytest

import f2llm_jax

PACKAGE = pathlib.Path(f2llm_jax.__file__).parent
GROUND, PARTS, WORK, RUN = range(4)
BANDS = {
    **dict.fromkeys(("sharding", "batch", "text"), GROUND),
    **dict.fromkeys(("data", "preparation", "model", "weights", "objectives"), PARTS),
    **dict.fromkeys(("training", "inference", "evaluation", "reporting", "release", "pruning", "mining", "chain", "compilation"), WORK),
}  # any other module at the top is a command
# What a room of the two lower bands may import besides itself.
ALLOWED = {
    "batch": set(),
    "text": set(),
    "sharding": {"batch"},  # it places a batch's arrays, so it names them
    "objectives": {"sharding"},
    "data": {"batch", "sharding", "text"},
    "preparation": {"data", "text"},
    "model": {"batch", "sharding"},
    "weights": {"model", "sharding", "text"},
}


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


def test_imports_go_down_only():
    band = lambda module: BANDS.get(room(module), RUN)  # noqa: E731
    assert [edge for edge in EDGES if band(edge[0]) < band(edge[1])] == []


def test_commands_do_not_import_one_another():
    command = lambda module: room(module) not in BANDS  # noqa: E731
    assert [edge for edge in EDGES if command(edge[0]) and command(edge[1])] == []


@pytest.mark.parametrize("name", ALLOWED)
def test_a_lower_room_knows_only_what_it_may(name):
    """Data knows no model, the model no data, and objectives only arrays and where they live."""
    assert {room(target) for source, target in EDGES if room(source) == name} - {name} <= ALLOWED[name]


def test_release_only_writes_out():
    assert {room(source) for source, target in EDGES if room(target) == "release"} - {"release"} <= set(map(room, FILES)) - set(BANDS)


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
                assert module == "release.agreement" or room(module) == "evaluation", module
                assert node not in parsed.body, f"{module}: imported at the top"
