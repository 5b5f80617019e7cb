"""The tests run against the installed package, and the package is whole."""

import importlib.metadata
import sysconfig
from pathlib import Path

import fastcompat as fc

ROOT = Path(__file__).parents[2]


def test_the_installed_package_is_tested_not_the_source_beside_it():
    package = Path(fc.__file__).resolve().parent
    assert package != ROOT / "fastcompat"
    assert package.is_relative_to(Path(sysconfig.get_path("platlib")).resolve())


def test_version_is_the_metadata_version():
    assert fc.build_info()["version"] == importlib.metadata.version("fastcompat")


def test_the_wheel_holds_every_source_file_and_one_native_module():
    package = Path(fc.__file__).parent
    source = {p.relative_to(ROOT / "fastcompat") for p in (ROOT / "fastcompat").rglob("*.py")}
    assert source <= {p.relative_to(package) for p in package.rglob("*.py")}
    assert len(list(package.glob("_C*"))) == 1
    assert (package / "py.typed").exists()


def test_no_torch_and_no_blas_is_linked():
    # The dynamic section names every library the module asks for.
    module = next(Path(fc.__file__).parent.glob("_C*")).read_bytes()
    for library in (b"libtorch", b"libc10", b"libgomp", b"libiomp", b"blas", b"libmkl"):
        assert library not in module
