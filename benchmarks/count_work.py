"""Operations, bytes, launches and waits of every method on two whole models, and what they would take on an H100.

    python benchmarks/count_work.py --case smollm2 --rows "forward pass,descent,self"   # adds to records/work.json
    python benchmarks/count_work.py --table                                             # what the record has
    python benchmarks/count_work.py --rerate                                            # by the rates of today

Some blocks of the model run on a CPU with all their batches, in the dtype and with the choices of a GPU, so that what
depends on values is decided by them: which Cholesky factors hold, how many steps an iteration takes. The counts are
then multiplied by the share of blocks. The output head has 64 classes: the whole one is under 1 % of the forward pass.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmarks.machine import RESULTS
from benchmarks.rows import FLOOR, OURS, Bench
from benchmarks.work import Solvers, Work, WorkCounter
from benchmarks.workloads import LLAMA_TARGETS, WORKLOADS, Batch, Workload, language_batch
from torch import Tensor, nn

from cntlora.atomic import write_atomically
from cntlora.execution import executor
from cntlora.linalg import filtered_svd, spectrum, truncated_svd
from cntlora.linalg.low_rank import HALF
from cntlora.methods import estimator

ROWS = (FLOOR, "forward and backward pass", "descent", "whitened", "self", "cross", "cross (rtol 1e-3)", "eva", "corda",
        "lora_ga")  # fmt: skip
CLASSES = 64


@dataclass(frozen=True)
class Case:
    """A workload cut to so many of the blocks of a whole model.

    Attributes:
        about: one line for tables. workload: of the cut model. blocks: of the whole one over those that run.
    """

    about: str
    workload: Callable[[], Workload]
    blocks: float


def _cut(workload: Workload, build: Callable[[], nn.Module], batches: Callable[[], list[Batch]]) -> Workload:
    def cut() -> nn.Module:
        model: Any = build()
        head = nn.Linear(model.lm_head.in_features, CLASSES, bias=False, dtype=model.dtype)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nn.init.normal_(head.weight, std=0.02)
        model.lm_head, model.config.vocab_size = head, CLASSES
        return model  # type: ignore[no-any-return]

    def labelled() -> list[Batch]:
        return [{**batch, "labels": batch["labels"] % CLASSES} for batch in batches()]

    return replace(workload, build=cut, batches=labelled)


def _llama_7b() -> Workload:
    from benchmarks.workloads import _llama_7b as whole

    return _cut(WORKLOADS["llama-7b"], lambda: whole(1), WORKLOADS["llama-7b"].batches)


def _smollm2(blocks: int = 3, rows: int = 64, tokens: int = 48) -> Workload:
    base = WORKLOADS["smollm2"]

    def build() -> nn.Module:
        model: Any = base.build()
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
        return model.to(torch.bfloat16)  # type: ignore[no-any-return]

    def batches() -> list[Batch]:
        from cntlora.lab.recipes.samples.models import smollm2, tweets

        text = "\n".join(tweets().texts)
        ids = smollm2()[1](text, return_tensors="pt")["input_ids"][0]
        ids = ids.repeat(-(-8 * rows * tokens // len(ids)))[: 8 * rows * tokens]
        return [language_batch(x) for x in ids.view(8, rows, tokens)]

    options = {"r": 16, "lora_alpha": 32, "target_modules": list(LLAMA_TARGETS), "task_type": "CAUSAL_LM"}
    return _cut(replace(base, lora=options), build, batches)


def _tiny() -> Workload:
    return _cut(WORKLOADS["tiny"], WORKLOADS["tiny"].build, WORKLOADS["tiny"].batches)


CASES = {
    "llama-7b": Case("Llama-7B shapes, 224 sites, r 16, 8 x 4 x 512 tokens, bfloat16, random weights", _llama_7b, 32),
    "smollm2": Case("SmolLM2-135M, 210 sites, r 16, 8 x 64 x 48 tokens, bfloat16, real weights", _smollm2, 10),
    "tiny": Case("a Llama of 2 layers, for tests", _tiny, 1),
}


@contextmanager
def choices_of_a_gpu(counter: WorkCounter) -> Iterator[None]:
    """Context in which the code takes the ways of a GPU where they differ from those of a CPU."""
    ways: dict[str, Any] = {
        "symmetric_product": _one_product,
        "sums_in_float32": lambda dtype, device: dtype in HALF,
        "product_of_halves": counter.product_of_halves,
    }
    with ExitStack() as stack:
        looks = truncated_svd.FIRST_LOOK
        stack.enter_context(patch.dict(looks, cpu=looks["cuda"]))
        stack.enter_context(patch.object(truncated_svd, "CHOLESKY_QR", ("cpu", "cuda")))
        stack.enter_context(patch.object(filtered_svd, "FREE_LOOKS", ()))
        stack.enter_context(patch.object(executor, "STACKING", ("cpu", "cuda")))
        stack.enter_context(patch.object(spectrum, "FILTERED", ("cpu", "cuda")))
        stack.enter_context(patch.object(estimator, "END_TO_END", ()))
        for module in [m for name, m in sys.modules.items() if name.startswith("cntlora.")]:
            for name, instead in ways.items():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, instead))
        yield


def _one_product(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    return (rows if weights is None else rows * weights[:, None]).mT @ rows


def rates() -> dict[str, Any]:
    """The rates that were measured on a GPU."""
    found: dict[str, Any] = json.loads((RESULTS / "gpu" / "rates.json").read_text())["rates"]
    return found


def counted(case: Case, row: str) -> Work:
    """The work of one row on the whole model."""
    torch.set_num_threads(1)  # what a pool of threads did would not be seen
    bench = Bench(case.workload(), torch.device("cpu"))
    job = bench.job(row)
    model = job.prepare()
    bench.batches  # noqa: B018 (made before the counting)
    counter = WorkCounter()
    with choices_of_a_gpu(counter), counter as work:
        job.run(model)
    return work.times(case.blocks)


def rerated(found: dict[str, Any], solvers: Solvers) -> dict[str, Any]:
    """A row of the record with the seconds of its factorisations by other rates; its counts stay as they are."""
    work = Work(waits=found["waits"])
    for name, count in found["factorisations"].items():
        kind, dtype, m, n, stack = re.fullmatch(r"(\w+) (\w+) (\d+) x (\d+)(?:, stacks of (\d+))?", name).groups()  # type: ignore[union-attr]
        work.calls[kind, dtype, int(m), int(n), int(stack or 1)] = count
    work.seconds.update({name: found["seconds"][name] for name in ("other", "products")})
    again = work.record(solvers)
    return {**found, "seconds": again["seconds"], "h100_seconds": again["h100_seconds"]}


def table(record: dict[str, Any]) -> str:
    """Markdown, a table for each case."""
    parts = []
    for rows in record.values():
        lines = [
            f"{rows['about']}\n",
            "| | products, TFLOP | factorised, TFLOP | moved, GB | launches | waits | H100, s | PyTorch 2.11 | most |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row, found in ((name, rows["rows"][name]) for name in ROWS if name in rows["rows"]):
            loops = rerated(found, Solvers(rates(), batched=False))["h100_seconds"]
            products = sum(n for key, n in found["operations"].items() if key.startswith("product"))
            rest = sum(found["operations"].values()) - products
            most = sorted(found["seconds"].items(), key=lambda item: -item[1])[:3]
            said = ", ".join(f"{name} {seconds:.2g}" for name, seconds in most)
            lines.append(
                f"| `{row}` | {products / 1e12:.3g} | {rest / 1e12:.3g} | {found['bytes'] / 1e9:.3g} | "
                f"{found['launches']:.0f} | {found['waits']:.0f} | {found['h100_seconds']:.2g} | {loops:.2g} | {said} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="smollm2")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--out", type=Path, default=RESULTS / "work.json")
    parser.add_argument("--table", action="store_true", help="only print what the record has")
    parser.add_argument("--rerate", action="store_true", help="only put today's rates into the record; counts stay")
    options = parser.parse_args(arguments)
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.rerate:
        solvers = Solvers(rates())
        for of_case in record.values():
            of_case["rows"] = {row: rerated(found, solvers) for row, found in of_case["rows"].items()}
        write_atomically(options.out, json.dumps(record, indent=1).encode())
    elif not options.table:
        case = CASES[options.case]
        for row in options.rows.split(","):
            if row not in (*ROWS, *OURS):
                raise SystemExit(f"--rows: {row!r} is not known; expected some of: {', '.join(ROWS)}")
            of_case = record.setdefault(options.case, {"about": case.about, "torch": torch.__version__, "rows": {}})
            of_case["rows"][row] = counted(case, row).record(Solvers(rates()))
            write_atomically(options.out, json.dumps(record, indent=1).encode())
    print(table(record))


if __name__ == "__main__":
    main()
