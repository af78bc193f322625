"""The pytest plugin inside PEFT's test session: which tests run, on which starts, and what came of each.

pytest -p peft_suite.plugin --cntlora-method self --cntlora-base offset --cntlora-outcomes FILE …
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
PLAIN = "plain"
"""The method that leaves PEFT's own initialisation."""
_KEY: pytest.StashKey[Any] = pytest.StashKey()


class EveryModelIsCached(defaultdict):  # type: ignore[type-arg]
    """Stand-in for PEFT's record of models that were fetched: all were, so that its tests never go online."""

    def __init__(self) -> None:
        super().__init__(int)

    def __contains__(self, key: object) -> bool:
        return True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cntlora-method", default=PLAIN, help=f"a method of cntlora, or {PLAIN!r} for PEFT's own start")
    parser.addoption("--cntlora-base", default="offset", help="the base policy of adapters that start as identity")
    parser.addoption("--cntlora-outcomes", help="file to which a line of JSON is added for each test")
    parser.addoption("--cntlora-every", type=int, default=1, help="run every n-th test only")
    parser.addoption("--cntlora-refusals", default="[]", help="JSON: patterns of the messages of expected refusals")


def pytest_configure(config: pytest.Config) -> None:
    _stand_in_for_data()
    if config.getoption("--cntlora-method") == PLAIN:
        return
    from . import starts

    session = starts.Session(
        config.getoption("--cntlora-method"),
        config.getoption("--cntlora-base"),
        tuple(json.loads(config.getoption("--cntlora-refusals"))),
    )
    starts.install(session)
    config.stash[_KEY] = session


def _stand_in_for_data() -> None:
    """The two data sets that PEFT's tests ask the hub for: one image, and lines of text."""
    import datasets
    import numpy as np

    known = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **options: Any) -> Any:
        if path == "huggingface/cats-image":
            pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype("uint8")
            from PIL import Image

            return {"test": {"image": [Image.fromarray(pixels)]}}
        if path == "ybelkada/english_quotes_copy":
            lines = [" ".join(f"word{(7 * row + column) % 100}" for column in range(12)) for row in range(64)]
            return datasets.DatasetDict(train=datasets.Dataset.from_dict({"quote": lines}))
        return known(path, *args, **options)

    datasets.load_dataset = load_dataset


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> None:
    """Put LoRA among the cases of test_quantization.py, which PEFT tests there for its other methods only."""
    from peft import LoraConfig

    cases = getattr(collector.obj, "TEST_CASES", None)
    if name == "TestQuantization" and cases and not any(kind is LoraConfig for kind, _ in cases):
        cases.append((LoraConfig, {"target_modules": ["q_proj", "v_proj"]}))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for module in list(sys.modules.values()):
        if hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = EveryModelIsCached()
    kept = [item for item in items if concerns_lora(item)][:: config.getoption("--cntlora-every")]
    wanted = {id(item) for item in kept}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in wanted])
    items[:] = kept


def concerns_lora(item: Any) -> bool:
    """Return whether a test is about LoRA: by its parameters, else by its source, its class, its name or its file."""
    from peft import LoraConfig

    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if "config_cls" in parameters:
        return parameters["config_cls"] is LoraConfig
    configs = [value for value in parameters.values() if hasattr(value, "peft_type")]
    if configs:
        return any(type(value) is LoraConfig for value in configs)
    if "lora" in item.nodeid.lower() or "LoraConfig" in inspect.getsource(item.function):
        return True
    return not parameters and item.cls is not None and "LoraConfig" in inspect.getsource(item.cls)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[Any]:
    session = item.config.stash.get(_KEY, None)
    if session is not None:
        session.test, session.loading, session.starts = item, 0, []
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[Any]:
    report = yield
    if report.when == "call" or (report.outcome != "passed" and report.when == "setup") or report.failed:
        session = item.config.stash.get(_KEY, None)
        outcome = "expected by PEFT" if hasattr(report, "wasxfail") else report.outcome
        line = {
            "test": item.nodeid,
            "outcome": outcome,
            "seconds": round(report.duration, 2),
            "message": _message(report) if outcome in ("failed", "skipped") else "",
            "starts": [] if session is None else list(session.starts),
        }
        _write(item.config, line)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[Any]:
    report = yield
    if report.failed:
        lines = [text for text in str(report.longrepr).splitlines() if text.startswith("E  ")]
        message = lines[-1][1:].strip() if lines else str(report.longrepr)[-200:]
        _write(collector.config, {"test": collector.nodeid, "outcome": "not collected", "message": message})
    return report


def _write(config: pytest.Config, line: dict[str, Any]) -> None:
    path = config.getoption("--cntlora-outcomes")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _message(report: Any) -> str:
    """The line of a report that says what happened."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])[:300]
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash else report.longrepr).split())[:400]
