"""PEFT's own tests on adapters that cntlora initialised.

    python benchmarks/peft_suite ../peft               # everything; ../peft is a checkout of the PEFT repository
    python benchmarks/peft_suite ../peft --every 20    # a sample of the tests, minutes
    python benchmarks/peft_suite ../peft --suites mixed low_level_api --settings self+keep
    python benchmarks/peft_suite ../peft --record      # also the table in docs/reliability/peft_tests.md

The tests of the checkout run against the PEFT that is installed, so take a checkout of about that version. Nothing is
written into it and nothing is downloaded: models that the tests ask the hub for are tiny random ones of the same
classes. A setting is METHOD+BASE; "plain", which leaves PEFT's own initialisation, runs first, and what fails there is
counted apart. The exit code is 1 if a test fails and neither fails in plain PEFT nor stands in expected.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peft_suite.outcomes import (
    PLAIN,
    VERDICTS,
    Failure,
    Judged,
    Refusal,
    by_suite,
    judge,
    read_expected,
    read_outcomes,
    rows,
    total,
)
from benchmarks.tables import table

ROOT = Path(__file__).parents[2]
EXPECTED = Path(__file__).with_name("expected.toml")
SUITES = (
    "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "seq_classifier",
    "vision_models", "stablediffusion", "target_parameters", "lora_variants", "lora_conversion", "lora_intruders",
    "mixed", "low_level_api", "quantization", "initialization", "tuners_utils", "helpers", "trainable_tokens",
)  # fmt: skip
"""Files of PEFT's tests, without `test_`, that have tests of LoRA which run on a CPU."""
SETTINGS = tuple(f"{method}+{base}" for method in ("self", "pissa") for base in ("offset", "keep", "paired"))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    failures, refusals = read_expected(options.expected)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(options.out or name)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{setting}.jsonl" for setting in options.settings]
        earlier = [path for path in paths if options.resume and path.exists()]  # by the seconds of their tests
        begun = time.monotonic() - sum(line.get("seconds", 0.0) for path in earlier for line in read_outcomes(path))
        results, broken = _run_all(options, folder, failures, refusals)
        minutes = (time.monotonic() - begun) / 60
    print(report(results, minutes))
    for text in broken:
        print(f"\nERROR {text}")
    unexpected = sum(len(part.unexpected) for suites in results.values() for part in suites.values())
    if options.record and not (unexpected or broken):
        _record(results, minutes, options)
    return 1 if unexpected or broken else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="peft_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="folder of the PEFT repository")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="METHOD+BASE, as many as you like")
    parser.add_argument("--suites", nargs="+", default=None, help=f"by default {', '.join(SUITES)}")
    parser.add_argument("--every", type=int, default=1, help="run every n-th test only")
    parser.add_argument("--select", default="", help="pytest's -k")
    parser.add_argument("--out", type=Path, help="keep outcomes and pytest's output in this folder")
    parser.add_argument("--resume", action="store_true", help="take what --out has, run the rest")
    parser.add_argument("--expected", type=Path, default=EXPECTED, help="the list of expected failures")
    parser.add_argument("--record", action="store_true", help="write the record and docs/reliability/peft_tests.md")
    options = parser.parse_args(arguments)
    options.checkout = options.checkout.resolve()
    tests = options.checkout / "tests"
    if not tests.is_dir():
        parser.error(f"{options.checkout}: expected a checkout of the PEFT repository, found no folder tests in it")
    options.suites = options.suites or [s for s in SUITES if (tests / f"test_{s}.py").exists()]
    missing = [suite for suite in options.suites if not (tests / f"test_{suite}.py").exists()]
    if missing or not options.suites:
        parser.error(f"{tests}: expected test_{(missing or SUITES)[0]}.py, which is not there")
    wrong = [setting for setting in options.settings if setting != PLAIN and setting.count("+") != 1]
    if wrong:
        parser.error(f"--settings: expected METHOD+BASE such as self+offset, got {wrong[0]!r}")
    options.settings = [PLAIN, *(setting for setting in options.settings if setting != PLAIN)]
    return options


def _run_all(
    options: argparse.Namespace, folder: Path, failures: list[Failure], refusals: list[Refusal]
) -> tuple[dict[str, dict[str, Judged]], list[str]]:
    """Every suite in every setting, and what did not run at all."""
    results: dict[str, dict[str, Judged]] = {}
    broken, plain = [], {}
    environment = _environment(options, folder)
    for setting in options.settings:
        path = folder / f"{setting}.jsonl"
        if not (options.resume and path.exists()):
            problem = _run(options, setting, path, refusals, environment)
            broken += [problem] if problem else []
        lines = by_suite(read_outcomes(path))
        plain = lines if setting == PLAIN else plain
        broken += [f"{line['test']}, {setting}: {line['message']}" for line in lines.pop("", [])]
        suites = [suite for suite in options.suites if suite in lines]
        results[setting] = {
            suite: judge(setting, lines[suite], plain.get(suite, []), failures, refusals) for suite in suites
        }
        counts = total(results[setting].values()).counts
        shown = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in VERDICTS if counts[verdict])
        print(f"{setting}: {shown or 'no test'}", file=sys.stderr, flush=True)
    return results, broken


def _environment(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The variables of the test sessions, with the stand-ins of the models in place."""
    from benchmarks.peft_suite import models

    cache = folder / "hub"
    tests = options.checkout / "tests"
    files = [*(tests / f"test_{suite}.py" for suite in options.suites), *tests.glob("testing_*.py")]
    models.fill_cache(cache, "".join(path.read_text(encoding="utf-8") for path in files))
    path = os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**models.environment(cache), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _run(
    options: argparse.Namespace, setting: str, path: Path, refusals: list[Refusal], environment: dict[str, str]
) -> str | None:  # fmt: skip
    """Run the suites in one setting; what stopped them as a whole, or None."""
    path.unlink(missing_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    method, _, base = setting.partition("+")
    command = [
        sys.executable, "-W", "ignore", "-m", "pytest", "-q", "--tb=short",
        *(str(options.checkout / "tests" / f"test_{suite}.py") for suite in options.suites),
        "--continue-on-collection-errors",
        "-c", os.devnull, f"--rootdir={options.checkout}", "-p", "no:cacheprovider", "-p", "peft_suite.plugin",
        f"--cntlora-method={method}", f"--cntlora-base={base or 'offset'}", f"--cntlora-every={options.every}",
        f"--cntlora-outcomes={unfinished.absolute()}",
        f"--cntlora-refusals={json.dumps([refusal.message for refusal in refusals])}",
        *(["-k", options.select] if options.select else []),
    ]  # fmt: skip
    with path.with_suffix(".log").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            command, cwd=path.parent, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode in (0, 1, 5):  # 5: no test was selected
        unfinished.touch()
        unfinished.replace(path)
        return None
    return f"{setting}: pytest ended with exit code {done.returncode}, see {path.with_suffix('.log')} (--out keeps it)"


def report(results: dict[str, dict[str, Judged]], minutes: float) -> str:
    """The table, every unexpected failure by name, and the reasons of the expected ones."""
    parts = [table(*rows(results)), f"{minutes:.0f} minutes"]
    found = {setting: total(suites.values()) for setting, suites in results.items()}
    for setting, whole in found.items():
        parts += [f"FAILED {setting} {test}\n    {message}" for test, message in whole.unexpected]
    return "\n\n".join([*parts, *_explained(found)])


def _explained(found: dict[str, Judged]) -> list[str]:
    """The reasons of expected failures and of refusals, with their numbers over all settings."""
    parts = []
    for title, name in (("Expected failures", "reasons"), ("Adapters left as PEFT made them", "refused")):
        counts: Counter[str] = sum((getattr(whole, name) for whole in found.values()), Counter())
        if counts:
            parts.append(f"{title}:\n\n{table(['number', 'reason'], [[f'{n:,}', r] for r, n in counts.most_common()])}")
    return parts


def _record(results: dict[str, dict[str, Judged]], minutes: float, options: argparse.Namespace) -> None:
    """The record of this run, and the tables of the document from it."""
    from benchmarks.machine import describe
    from benchmarks.peft_suite.document import DOCUMENT, RECORD, put_table

    from cntlora.atomic import write_atomically

    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": describe(1),
        "minutes": round(minutes),
        "every": options.every,
        "settings": {
            setting: {suite: vars(part) for suite, part in suites.items()} for setting, suites in results.items()
        },
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_atomically(RECORD, f"{text}\n".encode())
    put_table(DOCUMENT, record)


if __name__ == "__main__":
    sys.exit(main())
