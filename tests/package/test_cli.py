from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastcompat
from fastcompat import _native, _ops, demo, selfcheck
from fastcompat.commands import terminal
from fastcompat.commands.app import app
from fastcompat.commands.output import OutputFolder

COMMAND = "from fastcompat.commands.app import main; main()"


def python(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, away from the source folder."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def call(*arguments: str):
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        pytest.fail("training began")

    monkeypatch.setattr(demo, "run", run)


def test_info_shows_every_kernel_on_every_level():
    result = call("info")
    assert result.exit_code == 0, result.output
    table = result.output.partition("self-check")[2].splitlines()[1:]
    assert table[0].split() == ["kernel", *_native.simd_levels()]
    assert [row.split() for row in table[1:]] == [
        [kernel, *["ok"] * len(_native.simd_levels())] for kernel in selfcheck.CHECKS
    ]


def with_a_wrong_end(right):
    """A kernel whose first result is wrong in its last number."""

    def wrong(*arguments: object):
        found = right(*arguments)
        first = found[0] if isinstance(found, tuple) else found
        if first.numel():
            first.view(-1)[-1] += 1 + 0.05 * first.view(-1)[-1].abs().to(first.dtype)
        return found

    return wrong


@pytest.mark.parametrize("kernel", [name for name in selfcheck.CHECKS if name != "pack"])
def test_info_fails_for_a_wrong_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch):
    level = _native.simd_levels()[-1]
    monkeypatch.setattr(_ops, kernel, with_a_wrong_end(getattr(_ops, kernel)))
    monkeypatch.setattr(_native, "simd_levels", lambda: [level])
    before = _native.simd()
    result = call("info")
    assert _native.simd() == before
    assert result.exit_code == 1
    assert f"FAIL {kernel}, {level}, float32:" in result.output
    others = [line for line in result.output.splitlines() if line.endswith(" ok")]
    assert len(others) == len(selfcheck.CHECKS) - 1


def test_info_fails_for_keys_packed_wrong(monkeypatch: pytest.MonkeyPatch):
    levels = [level for level in ("avx2", "avx512", "amx") if level in _native.simd_levels()]
    if not levels:
        pytest.skip("no instruction set here searches packed keys")
    right = _native.pack
    monkeypatch.setattr(_native, "pack", lambda *arguments: right(*arguments).roll(64))
    monkeypatch.setattr(_native, "simd_levels", lambda: levels[:1])
    result = call("info")
    assert result.exit_code == 1 and f"FAIL pack, {levels[0]}, float32:" in result.output


def test_an_operator_without_a_check_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_ops, "_SCHEMAS", (*_ops._SCHEMAS, "brand_new(Tensor query) -> Tensor"))
    monkeypatch.setattr(_native, "simd_levels", lambda: ["generic"])
    failed = {check.kernel for check in selfcheck.run() if check.problem}
    assert "brand_new" in failed and "topk" not in failed


def test_info_fails_for_a_kernel_that_gives_nan(monkeypatch: pytest.MonkeyPatch):
    right = _ops.pair_scores
    monkeypatch.setattr(_ops, "pair_scores", lambda *a: right(*a) * torch.nan)
    monkeypatch.setattr(_native, "simd_levels", lambda: ["generic"])
    assert call("info").exit_code == 1


def image(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (9, 7), shade).save(path)


def classes(root: Path, sizes: dict[str, int]) -> Path:
    root.mkdir()
    for name, size in sizes.items():
        for i in range(size):
            image(root / name / f"{i}.png")
    return root


def no_class(root: Path) -> None:
    root.mkdir()


def one_class(root: Path) -> None:
    classes(root, {"only": 5})


def one_image(root: Path) -> None:
    classes(root, {"many": 5, "few": 1})


def stray(root: Path) -> None:
    image(classes(root, {"a": 3, "b": 3}) / "stray.png")


def parts(root: Path) -> None:
    classes(root, {"train/a": 3, "test/a": 3})


def unreadable(root: Path) -> None:
    (classes(root, {"a": 3, "b": 3}) / "b" / "2.png").write_bytes(b"no image")


def truncated(root: Path) -> None:
    path = classes(root, {"a": 3, "b": 3}) / "b" / "2.png"
    path.write_bytes(path.read_bytes()[:-30])


def not_a_zip(root: Path) -> None:
    root.write_bytes(b"PK no zip")


def zip_without_directory(root: Path) -> None:
    with zipfile.ZipFile(root, "w") as archive:
        archive.writestr("a/0.png", b"")
    root.write_bytes(root.read_bytes().replace(b"PK\x01\x02", b"xxxx"))


def damaged_zip(root: Path) -> None:
    folder = root.parent / "folder"
    classes(folder, {"a": 3, "b": 3})
    with zipfile.ZipFile(root, "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    content = bytearray(root.read_bytes())
    at = content.index(b"IDAT") + 6  # inside the first image: its checksum no longer fits
    content[at] ^= 0xFF
    root.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (None, "no file or folder"),
        (no_class, "at least 2 class sub-folders"),
        (one_class, "at least 2 class sub-folders"),
        (one_image, "class `few` of"),
        (stray, "`stray.png` lies beside the class sub-folders"),
        (parts, "look like parts of a data set"),
        (unreadable, "cannot read the image `b/2.png`"),
        (truncated, "cannot read the image `b/2.png`"),
        (not_a_zip, "neither a folder nor a sound zip"),
        (zip_without_directory, "neither a folder nor a sound zip"),
        (damaged_zip, "cannot read the image `a/0.png`"),
    ],
)
def test_bad_data_is_named_before_any_training(
    make: Callable[[Path], None] | None, expected: str, tmp_path: Path, no_training: None
):
    data, out = tmp_path / "data", tmp_path / "out" / "deep"
    if make is not None:
        make(data)
    result = call("demo", "--data", str(data), "--out", str(out))
    assert result.exit_code == 2, result.output
    assert "error: `--data`" in result.output
    assert expected in result.output
    assert "Traceback" not in result.output
    assert not out.parent.exists()


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_that_cannot_be_written_is_named_before_any_training(out: str, tmp_path: Path, no_training: None):
    (tmp_path / "file").write_text("kept")
    result = call("demo", "--out", str(tmp_path / out))
    assert result.exit_code == 2, result.output
    assert "error: `--out`: cannot write to the folder" in result.output
    assert (tmp_path / "file").read_text() == "kept"


def test_a_missing_extra_is_named_with_the_command_that_installs_it(tmp_path: Path):
    script = """
import sys
from typer.testing import CliRunner
from fastcompat.commands.app import app
for extra in ("sklearn", "matplotlib", "jinja2", "PIL"):
    for name in [n for n in sys.modules if n.startswith(("fastcompat.demo", "fastcompat.commands.report"))]:
        del sys.modules[name]
    sys.modules[extra] = None
    result = CliRunner().invoke(app, ["demo"])
    print(result.exit_code, result.output.strip())
    del sys.modules[extra]
"""
    found = python(tmp_path, script)
    assert found.stdout.splitlines() == [
        f'2 error: the demonstration needs {extra}: pip install "fastcompat[demo]"'
        for extra in ("sklearn", "matplotlib", "jinja2", "PIL")
    ]


def test_info_needs_no_extra(tmp_path: Path):
    script = (
        "import sys\n"
        "for extra in ('sklearn', 'matplotlib', 'jinja2', 'PIL'): sys.modules[extra] = None\n"
        "sys.argv[1:] = ['info']\n"
        "from fastcompat.commands.app import main; main()"
    )
    assert python(tmp_path, script).returncode == 0


def test_version_help_and_completion(tmp_path: Path):
    command = [sys.executable, "-m", "fastcompat", "--version"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, f"fastcompat {fastcompat.__version__}\n")
    assert "evaluate [OPTIONS]" in call("evaluate", "-h").output
    words = {
        "_FASTCOMPAT_COMPLETE": "complete_bash",
        "COMP_WORDS": "fastcompat evaluate --qu",
        "COMP_CWORD": "2",
    }
    result = CliRunner().invoke(app, [], prog_name="fastcompat", env=words)
    assert set(result.output.split()) == {"--query-old", "--query-new", "--query-labels"}


def sparse_zip(root: Path) -> None:
    """128 MiB of zeros in 128 KiB."""
    with zipfile.ZipFile(root, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"):
            with archive.open(name, "w") as member:
                for _ in range(128 if name == "b/1.png" else 0):
                    member.write(bytes(2**20))
                if name != "b/1.png":
                    Image.new("L", (9, 7)).save(member, "png")


def endless(root: Path) -> None:
    (classes(root, {"a": 3, "b": 2}) / "b" / "2.png").symlink_to("/dev/zero")


def pipe_inside(root: Path) -> None:
    os.mkfifo(classes(root, {"a": 3, "b": 2}) / "b" / "2.png")


def bomb(root: Path) -> None:
    """An image of 400 million pixels in half a megabyte."""
    Image.new("1", (20_000, 20_000)).save(classes(root, {"a": 3, "b": 2}) / "b" / "2.png")


def large_bomb(root: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(classes(root, {"a": 3, "b": 2}) / "b" / "2.png")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (sparse_zip, "(134,217,728 bytes, and at most 67,108,864 are read)"),
        (endless, "cannot read the image `b/2.png`"),
        (pipe_inside, "(a pipe or a device)"),
        (os.mkfifo, "is a pipe or a device"),
        (lambda root: root.symlink_to("/dev/zero"), "is a pipe or a device"),
        (bomb, "could be decompression bomb DOS attack"),
        (large_bomb, "could be decompression bomb DOS attack"),
    ],
)
def test_data_without_end_is_refused_before_memory_fills(
    make: Callable[[Path], None], expected: str, tmp_path: Path, no_training: None
):
    make(tmp_path / "data")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = call("demo", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and "error: `--data`" in result.output and expected in result.output
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("name", ("report.html", "curves.png"))
def test_a_folder_where_a_file_goes_is_named_before_the_work(name: str, tmp_path: Path, no_training: None):
    (tmp_path / "out" / name).mkdir(parents=True)
    result = call("demo", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and f"(`{name}` is a folder there)" in result.output


def test_a_name_too_long_is_named_before_the_work(tmp_path: Path):
    for letters in (245, 300):
        options = [word for name in ("old", "new", "labels") for word in (f"--{name}", "none.npy")]
        result = call("evaluate", *options, "--out", str(tmp_path / ("r" * letters + ".html")))
        assert result.exit_code == 2 and "(File name too long)" in result.output
        assert not list(tmp_path.iterdir())


WIDE = [("serving", *(f"figure {i}" for i in range(5))), *(("both models", *["0.123"] * 5) for _ in range(2))]


@pytest.mark.parametrize(
    ("columns", "first"), [(80, "both models "), (40, "figure 0 "), (20, "  figure 0: 0.123")]
)
def test_a_table_fits_the_terminal(
    columns: int, first: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal.print_report(
        "A description of several words", WIDE, [("How", "to\n\n    copy(this, " + "x" * 80 + ")")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(first) for line in lines) in (1, 2)
    assert "      copy(this, " + "x" * 80 + ")" in lines
    assert all(len(line) <= columns for line in lines if "copy(" not in line)
    assert sum(line.count("0.123") for line in lines) == 10


def test_a_terminal_without_unicode_stops_nothing(tmp_path: Path):
    name = "caf\\udce9 caf\\u00e9 \\u6570"
    script = f"from fastcompat.commands import app, terminal; app._command(); terminal.fail('{name}')"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert b"error: caf\\udce9 caf\xe9 \\u6570" in ran.stderr


def test_ctrl_c_leaves_nothing(tmp_path: Path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, "demo", "--out", str(out)]
    # A shell's background jobs ignore the signal, and so would this one if the tests run in such a job.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, preexec_fn=heed)
    while not out.exists() and process.poll() is None:  # made just before training
        time.sleep(0.02)
    assert out.exists()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in errors
    assert not out.exists()


def test_an_interrupted_write_keeps_the_report_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "report.html").write_text("before")
    with OutputFolder(tmp_path, ("report.html",)) as folder, monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            folder.write({"curves.png": b"now", "report.html": b"now"})
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "before"


def test_demo_on_digits_from_end_to_end(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("kept")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = python(tmp_path, COMMAND, "demo", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    # Under a minute on an idle machine; the processor's time does not grow with what else runs there.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png",
        "figures.json",
        "mine.txt",
        "report.html",
    ]
    figures = json.loads((tmp_path / "figures.json").read_text())
    old, (alone, bct, ract) = figures["old"]["map"], figures["candidates"]
    assert [alone["name"], bct["name"], ract["name"]] == ["independent", "BCT", "RACT"]
    assert alone["self_test"]["map"] > old + 0.2
    assert alone["cross_test"]["map"] < 0.4 < old < min(bct["cross_test"]["map"], ract["cross_test"]["map"])
    assert alone["update_gain"] is None
    for new in (bct, ract):
        gain = (new["cross_test"]["map"] - old) / (alone["self_test"]["map"] - old)
        assert new["update_gain"] == pytest.approx(gain)
    for words in ("300 queries", "means nothing", "What this data cannot show", "independent"):
        assert words in " ".join(result.stdout.split())
        assert words in (tmp_path / "report.html").read_text()
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1600, 800)


@pytest.mark.parametrize("command", ["info", "demo"])
def test_an_unknown_instruction_set_is_refused_by_its_variable(command: str, tmp_path: Path):
    forced = {**os.environ, "FASTCOMPAT_SIMD": "avx9"}
    ran = subprocess.run(
        [sys.executable, "-c", COMMAND, command], cwd=tmp_path, env=forced, capture_output=True, text=True
    )
    assert ran.returncode == 2 and "FASTCOMPAT_SIMD" in ran.stderr and "avx9" in ran.stderr
    assert "Traceback" not in ran.stderr and not list(tmp_path.iterdir())
