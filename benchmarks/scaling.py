"""Growth of the cost of an initialisation, and what that foretells for large models.

    python benchmarks/scaling.py            # under 6 minutes on 2 cores; writes benchmarks/records/scaling.json
    python benchmarks/scaling.py --quick    # seconds, small sizes, for tests
    python benchmarks/scaling.py --rates --device cuda    # the rates of a GPU: records/gpu/rates.json

Measured: seconds beyond the forward pass on a stack of linear layers, against d, tokens, batches and layers, and the
rate of every part on this machine. Predicted: Llama shapes (LoRA on all linear layers, rank 16, 8 batches of 4 × 512
tokens), on this processor and, where one has been measured, on a GPU from these rates, else on H100s from assumed ones
(benchmarks/predict.py). Where the workload llama-7b-block has been measured (init_cost.py), its figures stand beside
what the parts foretell.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmarks import predict
from benchmarks.machine import RESULTS, describe
from benchmarks.parts import measured_rates
from benchmarks.scaling_tables import rates_markdown, scaling_markdown
from benchmarks.standin import Size, sweep

from cntlora.atomic import write_atomically

Plan = list[tuple[Size, str, tuple[int, ...]]]

FULL: Plan = [
    (Size(tokens=256, layers=1), "d", (384, 576, 768, 1024, 1536, 2048, 4096)),  # b < d: by the dual
    (Size(tokens=2304, layers=1), "d", (384, 576, 768, 1024, 1536, 2048)),  # b > d: by G
    (Size(), "tokens", (64, 128, 256, 512, 1024, 2048, 4096)),
    (Size(), "batches", (1, 2, 4, 8)),
    (Size(), "layers", (1, 2, 4, 8)),
]
QUICK: Plan = [
    (Size(d=32, tokens=16, layers=1, rank=2), "d", (32, 64)),
    (Size(d=32, tokens=16, layers=1, rank=2), "tokens", (16, 64)),
    (Size(d=32, tokens=16, layers=1, rank=2), "batches", (1, 2)),
    (Size(d=32, tokens=16, layers=1, rank=2), "layers", (1, 2)),
]


def block_record(folder: Path) -> dict[str, Any] | None:
    """The record of the workload llama-7b-block, if `init_cost.py` has written one."""
    path = folder / "llama-7b-block.json"
    return json.loads(path.read_text()) if path.exists() else None


def gpu_record(folder: Path) -> dict[str, Any] | None:
    """The rates of a GPU, if `--rates --device cuda` has written them."""
    path = folder / "gpu" / "rates.json"
    return json.loads(path.read_text()) if path.exists() else None


def measure_rates(device: torch.device, threads: int, folder: Path) -> None:
    """Measure the rates of a device, print and write them."""
    rates = measured_rates((512, 1024, 2048, 4096, 8192), 3, 4.0, device)
    record = {"machine": describe(threads, device), "rates": rates}
    print(rates_markdown(rates), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "rates.json", json.dumps(record, indent=1).encode())


def measure(quick: bool, threads: int, folder: Path) -> dict[str, Any]:
    """The whole record."""
    repeats, limit = (1, 5.0) if quick else (3, 12.0)
    rates = measured_rates((64, 128) if quick else (256, 512, 1024, 2048), repeats, 4.0)
    sweeps = [sweep(size, what, values, repeats, limit) for size, what, values in (QUICK if quick else FULL)]
    return with_predictions({"machine": describe(threads), "quick": quick, "sweeps": sweeps, "rates": rates}, folder)


def with_predictions(measured: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record with what follows from its sweeps and rates."""
    sweeps, rates, block, gpu = measured["sweeps"], measured["rates"], block_record(folder), gpu_record(folder)
    return measured | {
        "parts_against_measured": predict.against_points(rates, sweeps),
        "block_against_measured": predict.against_block(rates, block),
        "block_machine": block["machine"] if block else None,
        "gpu": gpu,
        "assumptions": [] if gpu else predict.assumptions(),
        "predictions": predict.predictions(rates, gpu),
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, for tests")
    parser.add_argument("--table", action="store_true", help="only print the tables of the record in --out")
    parser.add_argument("--predict", action="store_true", help="only predict again, from the measurements in --out")
    parser.add_argument("--rates", action="store_true", help="only the rates of the parts, into --out/rates.json")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of --rates: cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of scaling.json")
    options = parser.parse_args(arguments)
    path = options.out / "scaling.json"
    if (options.table or options.predict) and not path.exists():
        raise SystemExit(f"{path}: expected the record of an earlier run, found none; run it without --table first")
    if options.table:
        print(scaling_markdown(json.loads(path.read_text())))
        return
    torch.set_num_threads(options.threads)
    if options.rates:
        measure_rates(options.device, options.threads, options.out)
        return
    if options.predict:
        record = with_predictions(json.loads(path.read_text()), options.out)
    else:
        record = measure(options.quick, options.threads, options.out)
    print(scaling_markdown(record))
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
