"""`fastcompat info` finds faults planted in the kernels, each in a native module of its own for AVX2.

pip install pybind11 && pytest tests/mutants      # a compiler, AVX2, about a minute and a half
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
import torch
from mutants.faults import FAULTS, Fault

from fastcompat import _native, selfcheck

SOURCES = Path(__file__).parents[2] / "csrc"
LEVEL = "avx2"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", "-DFASTCOMPAT_X86=1"]
MADE_FOR = ["-mavx2", "-mfma", "-mf16c"]
NAMES = ['-DFASTCOMPAT_VERSION="mutant"', '-DFASTCOMPAT_COMPILER="any"']
KERNELS = "isa_avx2.cpp"  # includes every .inl and simd_avx2.h

pytestmark = pytest.mark.skipif(LEVEL not in _native.simd_levels(), reason="this machine has no AVX2")


def compiler(*arguments: object) -> None:
    command = [*os.environ.get("CXX", "c++").split(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compiled(source: Path, folder: Path) -> Path:
    made = folder / f"{source.stem}.o"
    extra = MADE_FOR if source.name == KERNELS else NAMES if source.name == "bindings.cpp" else []
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    compiler(*FLAGS, *extra, *includes, "-c", source, "-o", made)
    return made


def other_levels(folder: Path) -> Path:
    """The tables of the instruction sets that are not built, which nobody looks into."""
    named = set(re.findall(r"kernels_\w+", (SOURCES / "cpu/dispatch.cpp").read_text())) - {f"kernels_{LEVEL}"}
    tables = "".join(f'extern const Kernels {name};\nconst Kernels {name}{{"{name}"}};\n' for name in named)
    source = folder / "other_levels.cpp"
    source.write_text(f'#include "{SOURCES}/cpu/kernels.h"\nnamespace fastcompat {{\n{tables}}}\n')
    return source


def linked(objects: list[Path], folder: Path) -> Path:
    made = folder / "_C.so"
    compiler("-shared", *objects, "-lpthread", "-ldl", "-o", made)
    return made


class Builder:
    """The unchanged objects, and modules with one of them exchanged."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.folder = folder
        wanted = [x for x in (SOURCES / "cpu").glob("*.cpp") if not x.name.startswith("isa_")]
        wanted += [SOURCES / "cpu" / KERNELS, SOURCES / "bindings.cpp", other_levels(folder)]
        self.objects = list(pool.map(lambda source: compiled(source, folder), wanted))

    def unchanged(self) -> Path:
        return linked(self.objects, self.folder)

    def with_fault(self, number: int, fault: Fault) -> Path | str:
        """The module, or why there is none."""
        folder = self.folder / str(number)
        shutil.copytree(SOURCES, folder / "csrc", ignore=shutil.ignore_patterns("cuda"))
        path = folder / "csrc" / "cpu" / fault.file
        before = path.read_text()
        if before.count(fault.line) != 1:
            return f"{fault.file} holds this {before.count(fault.line)} times instead of once: {fault.line}"
        path.write_text(before.replace(fault.line, fault.wrong))
        source = path if path.suffix == ".cpp" else path.with_name(KERNELS)
        made = compiled(source, folder)
        return linked([made if x.name == made.name else x for x in self.objects], folder)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builder = Builder(tmp_path_factory.mktemp("mutants"), pool)
        made = pool.map(lambda pair: builder.with_fault(*pair), enumerate(FAULTS.values()))
        return {"unchanged": builder.unchanged(), **dict(zip(FAULTS, made, strict=True))}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def failing(module: Path | str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that the self-check finds wrong in this module."""
    assert isinstance(module, Path), module
    # pybind11 makes one module of a name, whatever its file.
    spec = importlib.util.spec_from_file_location(f"{module.parent.name}._C", module)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    monkeypatch.setattr(_native, "_C", native)
    monkeypatch.setattr(_native, "simd_levels", lambda: [LEVEL])
    return {check.kernel for check in selfcheck.run() if check.problem}


def test_without_a_fault_nothing_is_found(
    modules: dict[str, Path | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failing(modules["unchanged"], monkeypatch) == set()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, modules: dict[str, Path | str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = failing(modules[name], monkeypatch)
    assert found >= set(FAULTS[name].found_by), f"found wrong: {sorted(found)}"
