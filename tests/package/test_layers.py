"""The house rules: who imports whom, who alone knows what, and lists that must agree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcompat import _native, _ops, selfcheck

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastcompat"
# Lowest first. A module imports from floors below its own, and freely inside its own folder. A name is a
# module or a folder of the package; `folder.module` places one module of a folder apart from the rest.
FLOORS = (
    "_types _torch_hooks _files _arrays commands.terminal",  # tuples; private torch; files; arrays; terminal
    "_native _autocast",
    "_checks commands.output commands.npy_files",  # errors in arguments; files of the commands
    "_inputs _operands _normalise reference serving.folder",  # what users pass in; rows; the specification
    "_ops",  # torch operators
    "_search _autograd selfcheck",  # the one search front; gradients; are the kernels right
    "_promoted prototypes",  # wide queries; class vectors
    "functional",  # the public functions
    "losses serving judging",  # modules; galleries and lists of results; figures
    "transforms serving.job commands.report commands.evaluation",
    "training __init__",
    "demo",
    "commands",
    "__main__",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
FILES = sorted(PACKAGE.rglob("*.py"))


def module(path: Path) -> tuple[str, ...]:
    """The module's name below the package; a folder's __init__ has the folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


def exists(name: tuple[str, ...]) -> bool:
    return PACKAGE.joinpath(*name).is_dir() or PACKAGE.joinpath(*name).with_suffix(".py").exists()


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules of the package that a file imports, anywhere in it; `_C` is not one of them."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (tuple(name[1:]) or ("__init__",) for name in names if name[0] == "fastcompat")
        elif isinstance(node, ast.ImportFrom):
            parts = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                start = (*folder[: len(folder) - node.level + 1], *parts)
            elif parts[:1] == ("fastcompat",):
                start = parts[1:]
            else:
                continue
            for alias in node.names:
                name = (*start, alias.name)
                if name != ("_C",):
                    yield name if exists(name) else start or ("__init__",)


def place(name: tuple[str, ...]) -> tuple[str, int]:
    """The entry of FLOORS that a module belongs to, and its floor."""
    for entry in (".".join(name), name[0]):
        if entry in FLOOR:
            return entry, FLOOR[entry]
    raise AssertionError(f"{'.'.join(name)} has no floor: add it to FLOORS in {Path(__file__).name}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own, floor = place(module(path))
    for name in set(imported(path)):
        target, below = place(name)
        if target != own:
            assert below < floor, f"{own} (floor {floor}) imports {'.'.join(name)} (floor {below})"


def test_gradients_know_no_search() -> None:
    names = {name[0] for path in ("_autograd", "_normalise") for name in imported(PACKAGE / f"{path}.py")}
    assert not names & {"_search", "_promoted", "functional"}


def test_every_entry_of_the_table_exists() -> None:
    assert {name for name in FLOOR if not exists(tuple(name.split(".")))} == set()


def test_one_importer_of_the_native_module_and_one_user_of_torch_library() -> None:
    assert [path.name for path in FILES if re.search(r"import _C\b", path.read_text())] == ["_native.py"]
    assert [path.name for path in FILES if "torch.library." in path.read_text()] == ["_ops.py"]


def test_one_file_knows_pybind11_and_none_knows_torch() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert [path.name for path in sources if "#include <pybind11" in path.read_text()] == ["bindings.cpp"]
    assert not [path.name for path in sources if re.search(r"#include <(torch|ATen|c10)/", path.read_text())]


@pytest.mark.parametrize(
    ("enum", "names"),
    (
        ("Metric", _native.METRICS),
        ("DType", [str(dtype).removeprefix("torch.") for dtype in _native.DTYPES]),
    ),
)
def test_enums_are_numbered_alike_on_both_sides(enum: str, names: tuple[str, ...]) -> None:
    header = (ROOT / "csrc" / "fastcompat.h").read_text()
    found = re.search(rf"enum class {enum} : int \{{(.*?)\}}", header, re.DOTALL)
    assert found
    members = re.findall(r"(\w+) = (\d+)", found[1])
    assert [int(number) for _, number in members] == list(range(len(names)))
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    assert [name for name, _ in members] == [short.get(name, name) for name in names]


OPERATORS = {schema.partition("(")[0] for schema in _ops._SCHEMAS}


def test_every_operator_is_self_checked() -> None:
    assert OPERATORS - set(selfcheck.CHECKS) == set()


def test_every_operator_runs_on_the_emulated_gpu_or_is_the_cpus_alone() -> None:
    text = (ROOT / "tests" / "gpu" / "reroute.py").read_text()
    kernels = re.search(r"KERNELS = \((.*?)\)", text, re.DOTALL)
    assert kernels
    assert set(re.findall(r'"(\w+)"', kernels[1])) == OPERATORS - set(_ops._CPU_ALONE)
