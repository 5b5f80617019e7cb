"""Compile report of the CUDA kernels: registers, occupancy, and the instructions that came out.

It reads the machine code in a wheel. A kernel states beside its source what it uses:

    // report: softmax_kernel 128 registers; HMMA.*, LDGSTS.*128

That is the most that it uses on any architecture, to the next eight, and at least one instruction matches
each pattern (with ! in front: none). A kernel without such a line is an error, as is a line without a
kernel, a kernel missing on an architecture, every spill, and wgmma that the compiler has made to wait
one for another.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import glob
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

Compiled by nvcc {nvcc}; written by `tests/emulator/run.sh report`, which fails where a kernel spills
registers or uses others than it states. *KiB shared*: dynamic shared memory of a block, at 4,096 queries,
65,536 keys and D from 64 to 1,024 (searches: also 128 queries, k = 100). *blocks*: how many a multiprocessor
holds at once, by registers, shared memory and threads, in the order of the architectures. *matrix*: HMMA
or HGMMA instructions in the code. *128 bits*: share of the loads and copies from global memory that are
16 bytes wide; *tensor*: the tensor copy engine loads.

Neither tier has run on a GPU yet, the portable one (sm_80 and newer) no more than Hopper's (sm_90a): both are
tested on an emulator, thread by thread, and by what is in their machine code. Times in `bench/LADDER.md` that
concern a GPU are predictions.

"""
Code = dict[str, dict[str, dict[str, Any]]]  # {architecture: {mangled kernel: facts}}
Launches = dict[str, dict[int, tuple[int, int]]]  # {kernel: {D: (threads, bytes of shared memory)}}


def run(command: list[str], **options: Any) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **options).stdout


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


def machine_code(wheel: pathlib.Path) -> tuple[str, Code]:
    """The kernels in a wheel and the version of nvcc that compiled them."""
    code: Code = {}
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        module = next(name for name in archive.namelist() if re.match(r"fastcompat/_C\b", name))
        path = pathlib.Path(archive.extract(module, folder))
        nvcc = run(
            [sys.executable, "-c", "import _C; print(_C.build()['cuda'] or '')"], cwd=path.parent
        ).strip()
        if not nvcc:
            sys.exit(f"{wheel} has no CUDA kernels")
        run([find_tool("cuobjdump"), "-xelf", "all", str(path)], cwd=folder)
        with ThreadPoolExecutor() as pool:
            for arch, kernels in pool.map(disassemble, pathlib.Path(folder).glob("*.cubin")):
                code.setdefault(arch, {}).update(kernels)
    return nvcc, code


def disassemble(cubin: pathlib.Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The architecture and {mangled kernel: facts}."""
    usage = run([find_tool("cuobjdump"), "-res-usage", str(cubin)])
    kernels: dict[str, dict[str, Any]] = {
        name: {"registers": int(registers), "stack": int(stack)}
        for name, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage)
    }
    text = run([find_tool("nvdisasm"), "-ndf", "-c", str(cubin)])
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*)", section)
        wgmma = [operands for op, operands in found if op.startswith("HGMMA")]
        kernels[re.match(r"\w+", section)[0]] |= {
            "opcodes": collections.Counter(op for op, _ in found if op != "NOP"),
            "serialized": bool(wgmma) and all("gsb0" in operands for operands in wgmma),  # each awaited
        }
    return cubin.suffixes[-2].removeprefix(".sm_"), kernels


def launches(program: pathlib.Path, arch: str) -> Launches:
    """What the engine launches with at each D; the largest where there are several."""
    _, block, units, _, _ = CHIPS[arch]
    capability = "90" if arch == "90a" else "80"  # which tier
    lines = run([str(program), capability, str(block << 10), str(units)]).splitlines()
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
    text = run(["c++filt"], input="\n".join(names))
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
        "stack": facts["stack"],
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


def problems(code: Code, titles: dict[str, str]) -> Iterator[str]:
    """Yield what is not as the kernels state it."""
    known = limits()
    used: dict[str, int] = dict.fromkeys(known, 0)
    if set(code) != {*PORTABLE, *HOPPER}:
        yield f"machine code for {', '.join(code)}, not for {', '.join(PORTABLE + HOPPER)}"
    for arch, kernels in code.items():
        for name, facts in kernels.items():
            base = re.split(r"[<(]", titles[name])[0].split("::")[-1]
            where = f"{titles[name]} (sm_{arch})"
            spills = [op for op in facts["opcodes"] if op.split(".")[0] in ("STL", "LDL")]
            if facts["stack"] or spills:
                yield f"{where}: {facts['stack']} bytes of stack, {', '.join(spills) or 'not used'}"
            if facts["serialized"]:
                yield f"{where}: every wgmma waits for the one before"
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
            yield f"{base}: stated, but there is no such kernel"
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
    parser.add_argument("wheel", type=pathlib.Path, help="a wheel with the kernels for every architecture")
    parser.add_argument("--launches", type=pathlib.Path, required=True, help="the program launches")
    parser.add_argument("--json", type=pathlib.Path, required=True, help="where to write the report")
    parser.add_argument("--page", type=pathlib.Path, required=True, help="where to write its table")
    args = parser.parse_args()
    nvcc, code = machine_code(args.wheel)
    titles = demangle(sorted({name for kernels in code.values() for name in kernels}))
    rows: dict[str, dict[str, Any]] = {}
    for arch, kernels in sorted(code.items(), key=lambda item: int(item[0].rstrip("a"))):
        launched = launches(args.launches, arch)
        for name, facts in kernels.items():
            rows.setdefault(titles[name], {})[arch] = row_of(arch, facts, launched.get(titles[name], {}))
    report = {"nvcc": nvcc, "kernels": dict(sorted(rows.items()))}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1)
    args.json.write_text(
        re.sub(r"\n {4,}", " ", re.sub(r"\n {3}\}", "}", text)) + "\n"
    )  # an architecture a line
    args.page.write_text(PAGE.format(nvcc=report["nvcc"]) + "\n".join(table(report)))
    print(args.page.read_text())
    errors = list(problems(code, titles))
    for error in errors:
        print(f"error: {error}")
    print(f"{len(rows)} kernels, {len(errors)} errors; {args.json}")
    return 1 if errors or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
