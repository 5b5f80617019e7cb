"""Compile report of the CUDA kernels: registers, spills, and the instructions that came out.

Every csrc/cuda/*.cu is compiled for each of its architectures. A kernel states beside its code what it uses:

    // report: softmax_kernel 128 registers; HMMA.*, LDGSTS.*128

At most so many registers on every architecture, no spills, and at least one instruction that matches each
pattern (with ! in front: none). A kernel without such a line is an error, as is a line without a kernel.
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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
PORTABLE = ["80", "86", "89", "90", "100", "120"]
HOPPER = ["90a"]
# What is worth counting, by prefix; the rest is "other".
GROUPS = [
    "HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "UBLKCP", "LDG", "STG", "LDS", "STS", "LDL", "STL", "MUFU",
    "SHFL", "FFMA", "FMUL", "FADD", "FMNMX", "BAR", "SYNCS", "WARPGROUP", "IMAD", "ATOM",
]  # fmt: skip


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


def compile_one(nvcc: str, nvdisasm: str, source: pathlib.Path, arch: str) -> dict[str, dict[str, Any]]:
    """{mangled kernel: facts} of one source on one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernels.cubin")
        target = f"arch=compute_{arch},code=sm_{arch}"
        options = [
            "-std=c++17",
            "-O3",
            "-cubin",
            "-gencode",
            target,
            "-Xptxas",
            "-v",
            "-I",
            str(ROOT / "csrc"),
        ]
        done = run([nvcc, *options, str(source), "-o", cubin], check=False)
        log = done.stdout + done.stderr
        if done.returncode or "are serialized" in log:  # the second: wgmma that waits for itself
            sys.exit(f"{source.name} for sm_{arch}:\n{log}")
        code = run([nvdisasm, "-c", cubin]).stdout
    kernels: dict[str, dict[str, Any]] = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.S):
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        used = re.search(r"Used (\d+) registers", text)
        if not stack or not used:
            sys.exit(f"{source.name} for sm_{arch}: nvcc says nothing of {name}:\n{text}")
        spill = int(stack[2]) + int(stack[3])
        kernels[name] = {"registers": int(used[1]), "stack": int(stack[1]), "spill": spill}
    for section in re.split(r"^\s*\.section\s", code, flags=re.M):
        title = re.match(r"\s*\.text\.(\w+)", section)
        if title and title[1] in kernels:
            opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", section)
            kernels[title[1]]["opcodes"] = collections.Counter(op for op in opcodes if op != "NOP")
    return kernels


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names without the argument list."""
    text = run(["c++filt"], input="\n".join(names)).stdout
    out = {}
    for name, full in zip(names, text.splitlines(), strict=True):
        full = re.sub(r"^void ", "", full)
        full = re.sub(r"\(\w[\w:]*\)", "", full)  # casts of template arguments
        out[name] = re.sub(r"\(.*\)$", "", full).replace("fastcompat::cuda::", "")
    return out


def widths(opcodes: collections.Counter[str], load: str) -> dict[str, int]:
    """Loads by width in bits."""
    out: collections.Counter[str] = collections.Counter()
    for op, count in opcodes.items():
        if op.split(".")[0] == load:
            found = re.search(r"\.(128|64|U16|S16|U8|S8|16|8)\b", op)
            out[found[1].lstrip("US") if found else "32"] += count
    return dict(sorted(out.items(), key=lambda kv: -int(kv[0])))


def main() -> int:
    parser = argparse.ArgumentParser(description="compile report of the CUDA kernels")
    parser.add_argument("--json", type=pathlib.Path, required=True, help="where to write the report")
    args = parser.parse_args()
    nvcc, nvdisasm = find_tool("nvcc"), find_tool("nvdisasm")
    jobs = [(s, a) for s in sorted(SOURCES.glob("*.cu")) for a in (HOPPER if "sm90" in s.name else PORTABLE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compile_one(nvcc, nvdisasm, *job), jobs))

    known, seen, errors = limits(), set(), []
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for (source, arch), kernels in zip(jobs, results, strict=True):
        readable = demangle(list(kernels))
        for name, facts in kernels.items():
            title = readable[name]
            base = re.split(r"[<(]", title)[0].split("::")[-1]
            where = f"{title} (sm_{arch}, {source.name})"
            opcodes = facts["opcodes"]
            if facts["spill"] or facts["stack"]:
                errors.append(f"{where}: {facts['spill']} bytes spilled, {facts['stack']} bytes of stack")
            if base not in known:
                errors.append(f"{where}: no line '// report: {base} N registers; PATTERNS' beside the kernel")
            else:
                seen.add(base)
                registers, patterns = known[base]
                if facts["registers"] > registers:
                    errors.append(f"{where}: {facts['registers']} registers, stated are {registers}")
                for pattern in patterns:
                    found = any(fnmatch.fnmatchcase(op, pattern.lstrip("!")) for op in opcodes)
                    if found == pattern.startswith("!"):
                        errors.append(f"{where}: {'an' if found else 'no'} instruction matches {pattern}")
            groups: collections.Counter[str] = collections.Counter()
            for op, count in opcodes.items():
                groups[next((g for g in GROUPS if op.split(".")[0] == g), "other")] += count
            rows.setdefault(title, {})[arch] = {
                "registers": facts["registers"],
                "instructions": sum(opcodes.values()),
                "mix": dict(groups.most_common()),
                "loads": widths(opcodes, "LDG"),
                "copies": widths(opcodes, "LDGSTS"),
            }
    errors += [f"{name}: stated, but no such kernel was compiled" for name in known.keys() - seen]

    print(f"{'kernel':72} registers by architecture; stated; matrix instructions; loads and copies by bits")
    for title, archs in sorted(rows.items()):
        last = archs[next(reversed(archs))]
        base = re.split(r"[<(]", title)[0].split("::")[-1]
        registers = " ".join(f"{arch}:{facts['registers']}" for arch, facts in archs.items())
        mix = last["mix"]
        loads = ", ".join(f"{last[kind]}" for kind in ("loads", "copies") if last[kind])
        stated = known.get(base, ("?",))[0]
        tensor = mix.get("HGMMA", 0) + mix.get("HMMA", 0)
        print(f"{title[:72]:72} {registers}; {stated}; {tensor} of {last['instructions']}; {loads}")
    for error in errors:
        print(f"error: {error}")
    version = re.search(r"release \S+, (\S+)", run([nvcc, "--version"]).stdout)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"nvcc": version[1] if version else "", "kernels": rows}
    args.json.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    print(f"{len(rows)} kernels, {len(jobs)} compilations, {len(errors)} errors; {args.json}")
    return 1 if errors or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
