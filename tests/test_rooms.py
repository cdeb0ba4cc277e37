"""The rooms of dnd_jax: imports go down the list only, lazily imported modules included."""

import ast
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "dnd_jax"
DOWN = (
    "core config data parallel ops loop base encoders lora generator scoring serving costs studies"
)
ROOMS = DOWN.split()
ORDER = {name: place for place, name in enumerate((*ROOMS, "main", "__main__"))}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE / "configs"]
TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in FILES
}
# Packages that take longer than 0.2 s to import. core/packages.py imports them, when one of their
# names is used; the exceptions are what runs in a process of its own, as PyTorch's side.
SLOW = (
    "torch peft orbax transformers datasets matplotlib lm_eval huggingface_hub pyarrow wandb "
    "tensorboardX fastapi uvicorn prometheus_client pydantic starlette"
)
OPPONENT = {
    "costs.bench.torch_answering": {"torch", "transformers"},
    "costs.bench.torch_collecting": {"torch", "transformers"},
    "costs.bench.torch_generator": {"torch"},
    "costs.bench.torch_worker": {"torch", "transformers"},
}


def imports(tree: ast.AST) -> set[str]:
    """The modules that a tree's import statements may name: of `from a import b`, a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def ours(tree: ast.AST) -> set[str]:
    """The modules of dnd_jax that a tree imports, without `dnd_jax.`."""
    return {name.removeprefix("dnd_jax.") for name in imports(tree)} & TREES.keys()


def at_the_top(tree: ast.Module) -> ast.Module:
    """A module without what its functions do when they are called."""
    body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return ast.Module(body, [])


@pytest.mark.parametrize("name", [name for name in TREES if not name.endswith("__init__")])
def test_imports_go_down(name):
    place = ORDER[name.partition(".")[0]]
    up = [there for there in ours(TREES[name]) if ORDER[there.partition(".")[0]] > place]
    assert not up, "a room may import from those before it in ROOMS only"
    lazy = ours(TREES[name]) - ours(at_the_top(TREES[name]))
    assert name == "main" or not lazy, "only main.py, which imports the stage asked for, waits"


def test_no_cycles():
    list(
        graphlib.TopologicalSorter(
            {name: ours(tree) for name, tree in TREES.items()}
        ).static_order()
    )


def test_slow_packages_are_imported_in_one_place():
    found = {
        name: {there.partition(".")[0] for there in imports(tree)} & set(SLOW.split())
        for name, tree in TREES.items()
    }
    assert {name: slow for name, slow in found.items() if slow} == OPPONENT


def test_rooms_say_what_they_are_for():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"configs"}
    assert folders == set(ROOMS)
    assert all(ast.get_docstring(tree) for tree in TREES.values())
    for room in folders:
        assert len(TREES[f"{room}.__init__"].body) == 1, "a room's __init__ imports nothing"


def test_modules_are_short():
    lines = {name: path.read_text().count("\n") for name, path in zip(TREES, FILES, strict=True)}
    long = {name for name, count in lines.items() if count > (150 if name == "main" else 350)}
    assert not long
