"""Compile report of the CUDA kernels: registers, occupancy, and the instructions that came out.

Every csrc/cuda/*.cu is compiled for each of its architectures. A kernel states beside its code what it uses:

    // report: softmax_kernel 128 registers; HMMA.*, LDGSTS.*128

That is the most that it uses on any architecture, to the next eight, and at least one instruction matches
each pattern (with ! in front: none). A kernel without such a line is an error, as is a line without a
kernel, and every spill.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import glob
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
PORTABLE = ["80", "86", "89", "90", "100", "120"]
HOPPER = ["90a"]
# KiB of shared memory of a multiprocessor and of a block; multiprocessors; threads and blocks of one.
CHIPS = {
    "80": (164, 163, 108, 2048, 32),
    "86": (100, 99, 84, 1536, 16),
    "89": (100, 99, 142, 1536, 24),
    "90": (228, 227, 132, 2048, 32),
    "90a": (228, 227, 132, 2048, 32),
    "100": (228, 227, 148, 2048, 32),
    "120": (100, 99, 188, 1536, 24),
}
PAGE = """# The machine code of the CUDA kernels

Compiled by nvcc {nvcc}; written by `tests/device/run.sh report`, which fails where a kernel spills
registers or uses others than it states. *KiB shared*: dynamic shared memory of a block, at 4,096 queries,
65,536 keys and D from 64 to 1,024 (searches: also 128 queries, k = 100). *blocks*: how many a multiprocessor
holds at once, by registers, shared memory and threads, in the order of the architectures. *matrix*: HMMA
or HGMMA instructions in the code. *128 bits*: share of the loads and copies from global memory that are
16 bytes wide; *tensor*: the tensor copy engine loads.

"""
Launches = dict[str, dict[int, tuple[int, int]]]  # {kernel: {D: (threads, bytes of shared memory)}}


def run(command: list[str], check: bool = True, input: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=check, input=input)


def find_tool(name: str) -> str:
    """The tool on PATH, or the one that pip has put into nvidia/cu13/bin."""
    found = shutil.which(name) or next(
        (tool for path in sys.path for tool in glob.glob(f"{path}/nvidia/cu*/bin/{name}")), None
    )
    if not found:
        sys.exit(f"{name} is neither on PATH nor installed by pip (nvidia-cuda-{name})")
    return found


def limits() -> dict[str, tuple[int, list[str]]]:
    """What every kernel says of itself: {name: (registers, patterns)}."""
    out = {}
    for path in [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]:
        for name, registers, patterns in re.findall(
            r"^// report: (\w+) (\d+) registers(?:; (.*))?$", path.read_text(), re.M
        ):
            out[name] = (int(registers), [p.strip() for p in patterns.split(",") if p.strip()])
    return out


def to_ptx(nvcc: str, source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """PTX of a source: one for all portable architectures, as in the wheel (cmake/cuda.cmake)."""
    ptx = folder / f"{source.stem}.ptx"
    arch = HOPPER[0] if "sm90" in source.name else PORTABLE[0]
    options = ["-std=c++17", "-O3", "-ptx", f"-arch=compute_{arch}", "-I", str(ROOT / "csrc")]
    done = run([nvcc, *options, str(source), "-o", str(ptx)], check=False)
    if done.returncode:
        sys.exit(f"{source.name}:\n{done.stdout}{done.stderr}")
    return ptx


def assemble(ptxas: str, nvdisasm: str, ptx: pathlib.Path, arch: str) -> dict[str, dict[str, Any]]:
    """{mangled kernel: facts} of one source on one architecture."""
    cubin = str(ptx.with_suffix(f".{arch}.cubin"))
    done = run([ptxas, "-O3", "-v", f"-arch=sm_{arch}", str(ptx), "-o", cubin], check=False)
    log = done.stdout + done.stderr
    if done.returncode or "are serialized" in log:  # the second: wgmma that waits for itself
        sys.exit(f"{ptx.stem} for sm_{arch}:\n{log}")
    code = run([nvdisasm, "-ndf", "-c", cubin]).stdout
    kernels: dict[str, dict[str, Any]] = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.S):
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        used = re.search(r"Used (\d+) registers", text)
        if not stack or not used:
            sys.exit(f"{ptx.stem} for sm_{arch}: ptxas says nothing of {name}:\n{text}")
        spill = int(stack[2]) + int(stack[3])
        kernels[name] = {"registers": int(used[1]), "stack": int(stack[1]), "spill": spill}
    for section in re.split(r"^\s*\.section\s", code, flags=re.M):
        title = re.match(r"\s*\.text\.(\w+)", section)
        if title and title[1] in kernels:
            opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", section)
            kernels[title[1]]["opcodes"] = collections.Counter(op for op in opcodes if op != "NOP")
    return kernels


def compile_all(folder: pathlib.Path) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """{(source, architecture): kernels}; what takes longest starts first and goes on without waiting."""
    nvcc, ptxas, nvdisasm = map(find_tool, ("nvcc", "ptxas", "nvdisasm"))
    sources = sorted(
        SOURCES.glob("*.cu"), key=lambda s: ("softmax" not in s.name, "sm90" not in s.name, s.name)
    )
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}

    def machine_code(ptx: pathlib.Path, source: pathlib.Path, arch: str) -> None:
        found[source.name, arch] = assemble(ptxas, nvdisasm, ptx, arch)

    def compile_one(source: pathlib.Path) -> list[Future[None]]:
        ptx = to_ptx(nvcc, source, folder)
        first, *others = HOPPER if "sm90" in source.name else PORTABLE
        jobs = [pool.submit(machine_code, ptx, source, arch) for arch in others]
        machine_code(ptx, source, first)
        return jobs

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for started in [pool.submit(compile_one, source) for source in sources]:
            for job in started.result():
                job.result()
    return dict(sorted(found.items(), key=lambda job: (job[0][0], int(job[0][1].rstrip("a")))))


def launches(program: pathlib.Path, arch: str) -> Launches:
    """What the engine launches with at each D; the largest where there are several."""
    _, block, units, _, _ = CHIPS[arch]
    capability = "90" if arch == "90a" else "80"  # which tier
    lines = run([str(program), capability, str(block << 10), str(units)]).stdout.splitlines()
    titles = demangle([line.split()[0] for line in lines])  # mangled, a tensor map's type is another here
    found: Launches = {}
    for line in lines:
        kernel, dim, threads, smem = line.split()
        by_dim = found.setdefault(titles[kernel], {})
        by_dim[int(dim)] = max(by_dim.get(int(dim), (0, 0)), (int(threads), int(smem)))
    return found


def resident(arch: str, registers: int, threads: int, smem: int) -> int:
    """Blocks that a multiprocessor holds at once."""
    memory, _, _, most_threads, most_blocks = CHIPS[arch]
    warps = -(-threads // 128) * 4
    by_registers = 65536 // (warps * (-(-registers // 8) * 256))
    by_memory = (memory << 10) // (-(-smem // 128) * 128 + 1024)  # the system takes 1 KiB of each block
    return min(by_registers, by_memory, most_threads // threads, most_blocks)


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names without the argument list."""
    text = run(["c++filt"], input="\n".join(names)).stdout
    out = {}
    for name, full in zip(names, text.splitlines(), strict=True):
        full = re.sub(r"^void ", "", full).replace("(anonymous namespace)::", "")
        full = re.sub(r"\(\w[\w:]*\)", "", full)  # casts of template arguments
        out[name] = re.sub(r"fastcompat::cuda::(sm\d+::)?(?=\w)", "", re.sub(r"\(.*\)$", "", full))
    return out


def widths(opcodes: collections.Counter[str], load: str) -> dict[str, int]:
    """Loads by width in bits."""
    out: collections.Counter[str] = collections.Counter()
    for op, count in opcodes.items():
        if op.split(".")[0] == load:
            found = re.search(r"\.(128|64|U16|S16|U8|S8|16|8)\b", op)
            out[found[1].lstrip("US") if found else "32"] += count
    return dict(sorted(out.items(), key=lambda kv: -int(kv[0])))


def row_of(arch: str, facts: dict[str, Any], launched: dict[int, tuple[int, int]]) -> dict[str, Any]:
    """What the report keeps of a kernel on an architecture."""
    opcodes, registers = facts["opcodes"], facts["registers"]
    kinds = collections.Counter()
    for op, count in opcodes.items():
        kinds[op.split(".")[0]] += count
    return {
        "registers": registers,
        "spilled": facts["spill"],
        "threads": max((threads for threads, _ in launched.values()), default=0),
        "shared memory": {dim: smem for dim, (_, smem) in launched.items()},
        "blocks": {dim: resident(arch, registers, *sizes) for dim, sizes in launched.items()},
        "instructions": sum(opcodes.values()),
        "HMMA": kinds["HMMA"],
        "HGMMA": kinds["HGMMA"],
        "loads": widths(opcodes, "LDG"),
        "copies": widths(opcodes, "LDGSTS"),
        "tensor copies": kinds["UTMALDG"] + kinds["UBLKCP"],
    }


def problems(
    compiled: dict[tuple[str, str], dict[str, dict[str, Any]]], titles: dict[str, str]
) -> Iterator[str]:
    """Yield what is not as the kernels state it."""
    known = limits()
    used: dict[str, int] = dict.fromkeys(known, 0)
    for (source, arch), kernels in compiled.items():
        for name, facts in kernels.items():
            base = re.split(r"[<(]", titles[name])[0].split("::")[-1]
            where = f"{titles[name]} (sm_{arch}, {source})"
            if facts["spill"] or facts["stack"]:
                yield f"{where}: {facts['spill']} bytes spilled, {facts['stack']} bytes of stack"
            if base not in known:
                yield f"{where}: no line '// report: {base} N registers; PATTERNS' beside the kernel"
                continue
            used[base] = max(used[base], facts["registers"])
            for pattern in known[base][1]:
                found = any(fnmatch.fnmatchcase(op, pattern.lstrip("!")) for op in facts["opcodes"])
                if found == pattern.startswith("!"):
                    yield f"{where}: {'an' if found else 'no'} instruction matches {pattern}"
    for base, registers in used.items():
        if not registers:
            yield f"{base}: stated, but no such kernel was compiled"
        elif not registers <= known[base][0] < registers + 8:
            yield f"{base}: {registers} registers at most, stated are {known[base][0]}"


def table(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a markdown table, one for each kernel."""

    def several(values: Iterable[Any]) -> str:
        found = sorted(set(values))
        if len(found) < 2:
            return "".join(map(str, found))
        return f"{found[0]} to {found[-1]}"

    for tier in (PORTABLE, HOPPER):
        archs = ", ".join(tier)
        yield f"| kernel | threads | registers on sm_{archs} | KiB shared | blocks | matrix | 128 bits |"
        yield "|---|---|---|---|---|---|---|"
        for title, chips in report["kernels"].items():
            if list(chips) != tier:
                continue
            rows = list(chips.values())
            loads = collections.Counter()
            for row in rows:
                loads.update(row["loads"])
                loads.update(row["copies"])
            share = f"{loads['128'] / loads.total():.0%}" if loads.total() else ""
            if any(row["tensor copies"] for row in rows):
                share = "tensor"
            yield (
                "| "
                + " | ".join(
                    [
                        f"`{title}`",
                        several(row["threads"] for row in rows if row["threads"]),
                        " ".join(str(row["registers"]) for row in rows),
                        several(round(smem / 1024) for row in rows for smem in row["shared memory"].values()),
                        ", ".join(several(row["blocks"].values()) for row in rows),
                        several(row["HMMA"] + row["HGMMA"] for row in rows),
                        share,
                    ]
                )
                + " |"
            )
        yield ""


def main() -> int:
    parser = argparse.ArgumentParser(description="compile report of the CUDA kernels")
    parser.add_argument("--launches", type=pathlib.Path, required=True, help="the program launches")
    parser.add_argument("--json", type=pathlib.Path, required=True, help="where to write the report")
    parser.add_argument("--page", type=pathlib.Path, required=True, help="where to write its table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_all(pathlib.Path(folder))
    titles = demangle([name for kernels in compiled.values() for name in kernels])
    launched = {arch: launches(args.launches, arch) for arch in CHIPS}
    rows: dict[str, dict[str, Any]] = {}
    for (_, arch), kernels in compiled.items():
        for name, facts in kernels.items():
            rows.setdefault(titles[name], {})[arch] = row_of(
                arch, facts, launched[arch].get(titles[name], {})
            )
    version = re.search(r"release \S+, (\S+)", run([find_tool("nvcc"), "--version"]).stdout)
    report = {"nvcc": version[1] if version else "", "kernels": dict(sorted(rows.items()))}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1)
    args.json.write_text(
        re.sub(r"\n {4,}", " ", re.sub(r"\n {3}\}", "}", text)) + "\n"
    )  # an architecture a line
    args.page.write_text(PAGE.format(nvcc=report["nvcc"]) + "\n".join(table(report)))
    print(args.page.read_text())
    errors = list(problems(compiled, titles))
    for error in errors:
        print(f"error: {error}")
    print(f"{len(rows)} kernels, {len(compiled)} compilations, {len(errors)} errors; {args.json}")
    return 1 if errors or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
