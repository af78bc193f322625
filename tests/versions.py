"""Marks of tests that need newer libraries than the oldest that pyproject.toml admits, each with its cause.

`make test-oldest` shows them as skipped; with the versions in constraints.txt none is. Where the cause is a feature,
the mark asks for the feature and not for a version.
"""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig
from typer.testing import CliRunner


def before(distribution: str, release: str) -> bool:
    """Return whether an older release of a distribution than this one is installed."""
    return Version(version(distribution)) < Version(release)


def cli_runner() -> CliRunner:
    """Make a runner that keeps stderr apart from stdout, which click does by itself from 8.2 on."""
    options = {"mix_stderr": False} if before("click", "8.2") else {}
    return CliRunner(**options)  # type: ignore[arg-type]


TIED_FACTORS = pytest.mark.skipif(
    "ensure_weight_tying" not in {field.name for field in fields(LoraConfig)},
    reason="this PEFT has no ensure_weight_tying, by which a head shares the factors of the embedding",
)
FSDP_ON_CPU = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="FSDP2 cannot run on CPUs with this torch: its torch.cpu.Stream has no record_event",
)
