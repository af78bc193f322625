"""Runs tests under other CPU kernels and numbers of threads, which round in other ways: one line a setting.

    python -m tests.kernels                       # the numeric core: every kernel with one thread, then 2 and 4 threads
    python -m tests.kernels --all tests           # the whole fast suite under every kernel with 1, 2 and 4 threads
    python -m tests.kernels --only portable,sse2  # some kernels

A kernel is chosen by environment variables, which PyTorch and its libraries read when they start. Not every CPU heeds
all of them (MKL_ENABLE_INSTRUCTIONS is for Intel alone); where small products come out as they do without the setting,
the line says "as default".
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = (
    "linalg/test_[!r]*.py", "methods/test_[!f]*.py", "methods/test_family.py", "execution/test_compute.py",
    "model/test_layers.py", "model/test_masks.py", "data/test_memory.py", "test_plan.py",
)  # fmt: skip
"""Where the numbers are made, and nothing that takes long to import."""
KERNELS = {
    "default": {},
    "portable": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "MKL_CBWR": "AVX2"},
    "mkl-sse4": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "sse2": {"MKL_CBWR": "COMPATIBLE"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
}
"""What is set for PyTorch's own kernels (ATEN), for products and LAPACK (MKL), and for convolutions (oneDNN)."""
PROBE = """
import hashlib, torch
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
a = torch.randn(96, 200, generator=g)
x, w = torch.randn(2, 8, 16, 16, generator=g), torch.randn(8, 8, 3, 3, generator=g)
found = (a @ a.mT, torch.linalg.svdvals(a.double()), a.softmax(-1), a.exp().sum(-1), torch.nn.functional.gelu(a),
         torch.nn.functional.conv2d(x, w))
print(hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in found)).hexdigest())
"""


def environment(kernel: str, threads: int) -> dict[str, str]:
    """Environment of a run under `kernel`; what another kernel sets is taken away."""
    others = {name for variables in KERNELS.values() for name in variables}
    plain = {name: value for name, value in os.environ.items() if name not in others}
    return {**plain, "CNTLORA_TEST_THREADS": str(threads), **KERNELS[kernel]}


def fingerprint(kernel: str) -> str:
    """A digest of small products, which differ in their last bits where other kernels are used."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment(kernel, 1), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def settings(kernels: list[str], everything: bool, once: bool) -> list[tuple[str, int]]:
    """Every kernel with one thread, and the first with 2 and 4; or all with all; or no more than each once."""
    if everything:
        return [(kernel, threads) for kernel in kernels for threads in (1, 2, 4)]
    return [(kernel, 1) for kernel in kernels] + [(kernels[0], threads) for threads in (2, 4) if not once]


def run(kernel: str, threads: int, arguments: list[str]) -> tuple[bool, str]:
    """Return whether pytest passed, and a line that says what it counted and how long it took."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "auto", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(kernel, threads), capture_output=True, text=True, check=False
    )
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout.rpartition("\n=")[2])
    line = f"{kernel}, {threads} threads: {', '.join(counts) or 'nothing ran'}; {time.perf_counter() - start:.0f} s"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "\n".join([line, *failed, *([] if counts else [done.stdout[-3000:], done.stderr])])


def main(arguments: list[str] | None = None) -> int:
    """Command line; what it does not know goes to pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KERNELS), help=f"some of {', '.join(KERNELS)}")
    parser.add_argument("--all", action="store_true", help="every kernel with 1, 2 and 4 threads")
    parser.add_argument("--once", action="store_true", help="every kernel with 1 thread, and no more")
    options, rest = parser.parse_known_args(arguments)
    kernels = options.only.split(",")
    unknown = [kernel for kernel in kernels if kernel not in KERNELS]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is not known; expected some of {', '.join(KERNELS)}")
    files = rest or sorted(str(path) for pattern in CORE for path in (ROOT / "tests").glob(pattern))
    default = fingerprint("default")
    same = {kernel for kernel in kernels if kernel != "default" and fingerprint(kernel) == default}
    good = True
    for kernel, threads in settings(kernels, options.all, options.once):
        passed, line = run(kernel, threads, files)
        good &= passed
        print(line + (" (as default)" if kernel in same else ""), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
