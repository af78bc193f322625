"""The work of a piece of code: operations, bytes, kernel launches and waits, counted while it runs on a CPU.

Every operation that PyTorch dispatches is looked at once, below autograd. One that is no view counts as one launch. It
moves the bytes of its arguments and of what it returns. Its floating-point operations are those of a matrix product,
of attention or of a factorisation, else none. A wait is a value that Python asks for: on a GPU it is there only when
all that was queued is done.

What that would take on an H100 is a roofline: for each operation the longest of its launch, its operations at the
peak and its bytes at the bandwidth, with factorisations at rates that were measured, and for each wait a fixed time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from math import log, prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten
BYTES_PER_SECOND, LAUNCH, WAIT = 2.7e12, 5e-6, 20e-6
"""Four fifths of the H100's 3.35 TB/s; seconds of a launch from Python, and of a wait: assumed."""
PEAK = {torch.bfloat16: 6.2e14, torch.float16: 6.2e14, torch.float32: 5.0e13, torch.float64: 5.0e13}
"""Operations a second of large matrix products: bfloat16 and float32 (without TF32) as measured on an H200 at 4096
(`benchmarks/records/gpu/rates.json`), which has the H100's matrix units; float64 assumed to be float32's, as the data
sheet has it."""
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal, aten._linalg_check_errors)
"""Operations that give Python a value, or whose result has a size that depends on values."""
FACTORISATIONS: Mapping[Any, tuple[str, Callable[[int, int], float]]] = {
    aten._linalg_eigh: ("eigh", lambda m, n: 9.0 * n**3),
    aten.linalg_cholesky_ex: ("cholesky", lambda m, n: n**3 / 3),
    aten.cholesky_inverse: ("cholesky", lambda m, n: 2.0 / 3.0 * n**3),
    aten.linalg_solve_triangular: ("triangular", lambda m, n: float(m * m * n)),
    aten.linalg_qr: ("qr", lambda m, n: 4.0 * max(m, n) * min(m, n) ** 2),
    aten._linalg_svd: ("svd", lambda m, n: 14.0 * max(m, n) * min(m, n) ** 2),
    aten.linalg_inv_ex: ("inverse", lambda m, n: 2.0 * n**3),
    aten.linalg_ldl_factor_ex: ("ldl", lambda m, n: n**3 / 3),
}
"""Operation → its name and its floating-point operations at (m, n): (n, n) of one matrix, (rows, right-hand sides) of a
triangular solution."""

BATCHED = ((64, 0.52e-3, 6.7e-5), (128, 0.64e-3, 8.5e-5), (256, 0.91e-3, 1.02e-4), (512, 1.67e-3, 2.05e-4))
"""Eigenvectors by cuSOLVER's batched solver in float32: (rows, seconds of one matrix, of each further one of a stack),
as an engineer of NVIDIA measured them for JAX on a GPU that he does not name, for stacks of up to 64
(https://github.com/jax-ml/jax/issues/31368). Beyond 512 rows the cube of the size is assumed."""


@dataclass
class Work:
    """Counts of operations, bytes, launches and waits.

    Attributes:
        operations: (kind, dtype) → floating-point operations; the kinds are "product" and those of `FACTORISATIONS`.
        calls: (kind, dtype, m, n, matrices in a stack) of a factorisation → how often.
        bytes, launches, waits: of all.
        seconds: on an H100, of "products" and of what is "other"; those of factorisations follow from `calls`.
    """

    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    calls: Counter[tuple[str, str, int, int, int]] = field(default_factory=Counter)
    bytes: float = 0.0
    launches: float = 0.0
    waits: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)

    def times(self, factor: float) -> Work:
        """The same so many times."""
        return Work(
            *(Counter({key: value * factor for key, value in part.items()}) for part in (self.operations, self.calls)),
            *(number * factor for number in (self.bytes, self.launches, self.waits)),
            Counter({key: value * factor for key, value in self.seconds.items()}),
        )

    def record(self, solvers: Solvers) -> dict[str, Any]:
        """Plain values for JSON, with the seconds of factorisations and waits."""
        seconds = Counter(self.seconds)
        for (kind, dtype, m, n, stack), count in self.calls.items():
            at_once = kind in ("cholesky", "triangular") or (kind == "eigh" and n <= 32)  # a kernel for a whole stack
            alone = solvers(kind, m, n, getattr(torch, dtype))
            whole = solvers.stacked(n, stack, alone) if kind == "eigh" and stack > 1 else alone * stack
            seconds[kind] += count * max(LAUNCH, alone if at_once else whole)
        seconds["waits"] = self.waits * WAIT
        return {
            "operations": {" ".join(key): value for key, value in sorted(self.operations.items())},
            "factorisations": {
                f"{kind} {dtype} {m} x {n}" + (f", stacks of {stack}" if stack > 1 else ""): count
                for (kind, dtype, m, n, stack), count in sorted(self.calls.items())
            },
            "bytes": self.bytes,
            "launches": self.launches,
            "waits": self.waits,
            "seconds": dict(sorted(seconds.items())),
            "h100_seconds": sum(seconds.values()),
        }


class Solvers:
    """Seconds of a factorisation on a GPU, from the measured rates of `benchmarks/records/gpu/rates.json` (float32).

    Between measured sizes on the line in log-log, beyond the largest by its rate. Below the smallest by the number of
    columns: a small factorisation takes its columns one after another, and is not bound by its operations.
    "cholesky" was a factor and an inverse: each half. Eigenvectors of up to 512 rows, and of stacks, are those of
    cuSOLVER's batched solver (`BATCHED`), which `torch.linalg.eigh` calls from PyTorch 2.12 on; without `batched` they
    are as measured with 2.11: those of 512 rows in float32 came from a Jacobi method, which was taken from 33 to 512
    rows, all others are placed below those of 1024 rows, and a stack takes its matrices one after another.
    Without a record, and so assumed: an LDLᵀ as two Cholesky factors, an SVD of (m, n) as three times the eigenvectors
    of its smaller side, eigenvalues alone as with vectors, and float64 as float32.
    """

    def __init__(self, rates: Mapping[str, Sequence[tuple[int, float]]], batched: bool = True) -> None:
        self.batched = batched
        counts = {"eigh": 9.0, "cholesky": 1.0, "inverse": 2.0, "qr": 1.0}
        self._seconds = {
            part: [(n / 2 if part == "qr" else n, counts[part] * n**3 / rate) for n, rate in rates[part]]
            for part in counts
        }
        self._jacobi, *self._seconds["eigh"] = self._seconds["eigh"]

    def __call__(self, kind: str, m: int, n: int, dtype: torch.dtype = torch.float32) -> float:
        """Seconds of one of (m, n), or of a triangular solution with (m, m)."""
        if kind == "eigh" and self.batched and n <= BATCHED[-1][0]:
            return _between([(size, first) for size, first, _ in BATCHED], n)
        if kind == "eigh" and dtype == torch.float32 and 32 < n <= self._jacobi[0]:
            return self._jacobi[1] * n / self._jacobi[0]
        if kind in ("cholesky", "triangular"):
            return 0.5 * self._at("cholesky", m)
        if kind == "ldl":
            return self._at("cholesky", n)
        if kind == "svd":
            return 3.0 * self._at("eigh", min(m, n))
        return self._at(kind, min(m, n))

    def _at(self, part: str, size: int) -> float:
        return _between(self._seconds[part], size)

    def stacked(self, n: int, matrices: int, alone: float) -> float:
        """Seconds of the eigenvectors of a stack of (n, n), one of which takes `alone`: at most one after another."""
        more = _between([(size, further) for size, _, further in BATCHED], n) if self.batched else alone
        return alone + (matrices - 1) * min(alone, more)


def _between(points: Sequence[tuple[int, float]], size: int) -> float:
    """Seconds at a size from those at others, which are sorted: in log-log, with the cube of it beyond the largest."""
    if size <= points[0][0]:
        return points[0][1] * size / points[0][0]
    for (low, short), (high, long) in pairwise(points):
        if size <= high:
            return float(short * (long / short) ** (log(size / low) / log(high / low)))
    return float(points[-1][1] * (size / points[-1][0]) ** 3)


class WorkCounter:
    """Context that adds all that is dispatched in this thread to the `Work` that it gives."""

    def __init__(self) -> None:
        self.work, self._stack = Work(), ExitStack()
        self._operations = _Operations(self.work)

    def __enter__(self) -> Work:
        self._stack.enter_context(_Values(self.work))
        self._stack.enter_context(self._operations)
        return self.work

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def product_of_halves(self, left: Tensor, right: Tensor) -> Tensor:
        """left·right in float32 of matrices in half precision, counted as the one product that a GPU takes for it."""
        with _disable_current_modes():
            result = left.float() @ right.float()
        self._operations.count_product(2.0 * left.shape[0] * left.shape[1] * right.shape[1], (left, right, result))
        return result


class _Values(TorchFunctionMode):
    """Count reads of whole tensors, which PyTorch does not dispatch."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self.work.waits += 1
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in WAITS or (packet is aten.index and _by_mask(args[1])):
            self.work.waits += 1
        if not (func.is_view or packet in _FREE):
            self._add(packet, args, kwargs, result)
        return result

    def _add(self, packet: Any, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if operations := _products(packet, args, kwargs, result):
            self.count_product(operations, tensors)
            return
        moved = self._move(tensors)
        if packet in FACTORISATIONS:
            self._factorise(packet, args)
        else:
            self.work.seconds["other"] += max(LAUNCH, moved / BYTES_PER_SECOND)

    def _move(self, tensors: Sequence[Tensor]) -> int:
        """Count one launch, and the bytes of its tensors, which are returned."""
        moved = sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors}.values())
        self.work.bytes += moved
        self.work.launches += 1
        return moved

    def count_product(self, operations: float, tensors: Sequence[Tensor]) -> None:
        """Count a product of so many operations, in the dtype of the first tensor."""
        moved, dtype = self._move(tensors), tensors[0].dtype
        self.work.operations["product", str(dtype)[6:]] += operations
        self.work.seconds["products"] += max(LAUNCH, moved / BYTES_PER_SECOND, operations / PEAK[dtype])

    def _factorise(self, packet: Any, args: Any) -> None:
        kind, count = FACTORISATIONS[packet]
        A = args[0]
        m, n = (A.shape[-1], args[1].shape[-1]) if kind == "triangular" else A.shape[-2:]
        stack, dtype = prod(A.shape[:-2]), str(A.dtype)[6:]
        self.work.operations[kind, dtype] += stack * count(m, n)
        self.work.calls[kind, dtype, m, n, stack] += 1


_FREE = {
    aten.detach, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided,
    aten._unsafe_view, aten.lift_fresh, aten.resize_, aten._local_scalar_dense, aten._linalg_check_errors,
}  # fmt: skip
"""Operations that queue nothing."""


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _products(packet: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Floating-point operations of a product or of attention, else 0."""
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=result))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return float(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 2.5 * sdpa_flop_count(args[1].shape, args[2].shape, args[3].shape)
    if packet in (aten.mv, aten.dot):
        return 2.0 * args[0].numel()
    return 0.0
