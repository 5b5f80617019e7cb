# ruff: noqa: E501
"""What the build does about CUDA, and what it says: CMake with stand-ins for nvcc and nvidia-smi.

Needs CMake, Ninja, a C++ compiler and pybind11 on PATH (`.ci/requirements.txt`): `pytest tests/packaging`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("cmake", "ninja", "c++", "g++", "gcc", "cc", "ld", "as", "ar", "sh", "uname")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The only folder on PATH: the tools of the machine, without nvcc."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    return tools


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def configure(folder: Path, *options: str) -> tuple[int, list[str], str]:
    """Return CMake's status, its lines about CUDA, and everything it said."""
    command = ["cmake", "-S", str(ROOT), "-B", str(folder.parent / "build"), "-G", "Ninja"]
    names = ("-DSKBUILD_PROJECT_NAME=fastcompat", "-DSKBUILD_PROJECT_VERSION=0")
    pybind11 = subprocess.check_output(["pybind11-config", "--cmakedir"], text=True).strip()
    python = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}")
    # A toolkit in its usual place is not part of the test.
    elsewhere = ("-DCMAKE_SYSTEM_IGNORE_PATH=/usr/local/cuda/bin", "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA", "CMAKE"))}
    done = subprocess.run(
        [*command, *names, *python, *elsewhere, *options],
        env={**environment, "PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    return done.returncode, [line for line in said.splitlines() if "fastcompat: " in line], said


VERSION = "Cuda compilation tools, release {0}, V{0}.140"
OLD = f'echo "{VERSION.format("12.2")}"'
REFUSED = f"""case "$*" in
  --version) echo "{VERSION.format("12.6")}" ;;
  *) echo "host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 13" >&2; exit 1 ;;
esac"""
BROKEN = 'echo "libcudart.so.12: cannot open shared object file: No such file" >&2; exit 127'


@pytest.mark.parametrize(
    ("script", "reason"),
    (
        (None, "there is no nvcc; put nvcc on PATH"),
        (OLD, "is CUDA 12.2.140, the kernels need 12.5 or newer"),
        (REFUSED, "unsupported GNU version! gcc versions later than 13"),
        (BROKEN, "does not say its version: libcudart.so.12: cannot open shared object file"),
    ),
)
def test_without_a_compiler_auto_builds_for_the_cpu_and_on_fails_and_both_say_why(
    script: str | None, reason: str, folder: Path
) -> None:
    if script:
        stand_in(folder, "nvcc", script)
    status, lines, said = configure(folder)
    assert status == 0, said
    assert len(lines) == 1 and lines[0].startswith("-- fastcompat: CUDA kernels are not built: "), said
    assert reason in lines[0]
    status, _, said = configure(folder, "-DFASTCOMPAT_CUDA=ON")
    assert status != 0
    assert reason in " ".join(said.split())


def test_off_asks_no_compiler(folder: Path) -> None:
    stand_in(folder, "nvcc", f"touch {folder}/asked")
    status, lines, said = configure(folder, "-DFASTCOMPAT_CUDA=OFF")
    assert status == 0, said
    assert lines == ["-- fastcompat: CUDA kernels are not built: FASTCOMPAT_CUDA=OFF"]
    assert not (folder / "asked").exists()


NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
@pytest.mark.parametrize(
    ("gpus", "option", "built"),
    (
        (
            "8.6\\n8.6",
            (),
            "for 86,PTX 80,90a (the GPUs of this machine; FASTCOMPAT_CUDA=ON builds for every GPU)",
        ),
        ("7.5\\n8.9\\n12.0", (), "for 89,120,PTX 80,90a (the GPUs of this machine"),
        ("8.6", ("-DFASTCOMPAT_CUDA=ON",), "for 80,86,89,90,100,120,PTX 80,90a (every GPU from 8.0 on)"),
        ("8.6", ("-DCMAKE_CUDA_ARCHITECTURES=89-real",), "for 89,90a (CMAKE_CUDA_ARCHITECTURES)"),
        (None, (), "for 80,86,89,90,100,120,PTX 80,90a (every GPU from 8.0 on)"),
    ),
)
def test_auto_builds_for_the_gpus_at_hand_and_for_all_where_there_is_none(
    gpus: str | None, option: tuple[str, ...], built: str, folder: Path
) -> None:
    stand_in(folder, "nvcc", f'PATH="{os.environ["PATH"]}" exec {NVCC} "$@"')
    answer = f"printf '{gpus}\\n'" if gpus else 'echo "NVIDIA-SMI has failed" >&2; exit 9'
    stand_in(folder, "nvidia-smi", answer)
    status, lines, said = configure(folder, *option)
    assert status == 0, said
    assert len(lines) == 1 and built in lines[0], said
