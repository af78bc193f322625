"""PEFT's method comparison on MetaMathQA with our start, its run.py unchanged. In method_comparison/MetaMathQA:

    python -m cntlora.integrations.method_comparison run.py -v experiments/cntlora/llama-3.2-3B-rank32

An experiment is a folder as PEFT has them, with `cntlora.json` beside `adapter_config.json`: the options of
`cntlora.InitConfig`, `{}` for the defaults. An experiment without that file runs as run.py alone would run it, so
`make RUN_SCRIPT="-m cntlora.integrations.method_comparison run.py"` runs them all. Initialisation reads the batches
that training begins with, made as run.py makes them, and comes before the optimizer. Its seconds are in the record's
total time and in the experiment's `cntlora_report.json`, not in PEFT's train time.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..api import initialize
from ..atomic import write_atomically
from ..config import InitConfig
from ..console import one_line_errors

OPTIONS, REPORT = "cntlora.json", "cntlora_report.json"
BUCKET_FACTOR = 20
"""Batches in one bucket of similar lengths, as in run.py."""


def main(arguments: list[str]) -> None:
    """Run run.py as a program, with the initialisation in front of its optimizer.

    Args:
        arguments: run.py, then its own: options and the folder of the experiment.
    """
    with one_line_errors("cntlora.integrations.method_comparison"):
        script, experiment = _checked(arguments)
        sys.path.insert(0, str(script.parent))
        import utils  # type: ignore[import-not-found]  # of PEFT's method comparison

        options = experiment / OPTIONS
        if options.is_file():
            config = InitConfig.from_dict(json.loads(options.read_text(encoding="utf-8")))
            utils.get_optimizer_and_scheduler = initialised_first(utils, experiment, config)
    sys.argv = arguments
    runpy.run_path(str(script), run_name="__main__")


def _checked(arguments: list[str]) -> tuple[Path, Path]:
    """The script and the folder of the experiment."""
    script = Path(arguments[0]).resolve() if arguments else Path()
    folders = [Path(argument) for argument in arguments[1:] if Path(argument).is_dir()]
    if not (script.is_file() and (script.parent / "utils.py").is_file()) or len(folders) != 1:
        raise ValueError(
            f"expected run.py of method_comparison/MetaMathQA and the folder of one experiment, got {arguments}; for "
            "example run.py -v experiments/cntlora/llama-3.2-3B-rank32"
        )
    return script, folders[0]


def initialised_first(utils: Any, experiment: Path, config: InitConfig) -> Callable[..., Any]:
    """`get_optimizer_and_scheduler` of PEFT's utils, which run.py calls first of all, after our initialisation."""
    make_optimizer = utils.get_optimizer_and_scheduler

    def made(model: nn.Module, **options: Any) -> Any:
        batches = () if config.method is not None and config.method.reads == "weights" else _batches(utils, experiment)
        report = initialize(model, batches, config)
        sys.stderr.write(f"{report}\n")
        write_atomically(experiment / REPORT, json.dumps(report.to_dict(), indent=1).encode())
        return make_optimizer(model, **options)

    return made


def _batches(utils: Any, experiment: Path) -> Iterator[dict[str, Any]]:
    """The batches that run.py trains on, in their order, with its labels."""
    from data import get_train_valid_test_datasets  # type: ignore[import-not-found]  # of PEFT's

    params = utils.get_train_config(os.path.join(experiment, utils.FILE_NAME_TRAIN_PARAMS))  # noqa: PTH118, as run.py
    tokenizer = utils.get_tokenizer(model_id=params.model_id, max_seq_length=params.max_seq_length)
    train, _, _ = get_train_valid_test_datasets(
        tokenizer=tokenizer, query_template=params.query_template, print_fn=lambda *_: None
    )
    buckets = utils.BucketIterator(
        train, batch_size=params.batch_size, bucket_factor=BUCKET_FACTOR, delete_cols=["response"]
    )
    for rows in buckets:
        lengths = [len(ids) for ids in rows["input_ids"]]
        batch = tokenizer.pad(rows, return_tensors="pt").to(utils.device)
        labels = batch["input_ids"].clone()
        for i, length in enumerate(lengths):
            labels[i, length + 1 :] = -100  # of the padding, which is the end token, the first one is learned
        yield {**batch, "labels": labels}


if __name__ == "__main__":
    main(sys.argv[1:])
