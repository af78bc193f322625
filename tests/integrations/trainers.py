"""Trainers of others, installed beside the environment, and what holds of a run of any of them.

`CNTLORA_TRAINERS` may name a folder that keeps them from one session to the next.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.tiny import base_model
from tests.trainer_cases import text, tokenizer
from torch import Tensor

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "other_trainers.md").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r"<!-- script: (\w+) -->\n```(?:python|yaml)\n(.*?)```", GUIDE, re.DOTALL))
"""Name → the file that the guide shows."""
TARGETS = ("q_proj", "v_proj")
CHAT = "{% for message in messages %}{{ message['role'][:0] + message['content'] + ' ' }}{% endfor %}"


def installed(name: str, *requirements: str) -> Path:
    """The folder of packages without their dependencies; what they import besides is in the environment."""
    home = Path(os.environ.get("CNTLORA_TRAINERS") or tempfile.gettempdir()) / f"cntlora-{name}"
    stamp = home / "installed"
    if not stamp.exists() or stamp.read_text() != "\n".join(requirements):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(home)]
        done = subprocess.run([*pip, *requirements], capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        stamp.write_text("\n".join(requirements))
    return home


def environment(name: str, requirement: str) -> Path:
    """The Python of an environment with a trainer and the versions that it asks for, beside the torch of this one.

    Packages of torch that are not built for this torch (PyPI has those of its CUDA build only) are taken out. An empty
    torchaudio stands in where a trainer imports it; no audio is read.
    """
    home = Path(os.environ.get("CNTLORA_TRAINERS") or tempfile.gettempdir()) / f"cntlora-env-{name}"
    python, stamp = home / "bin" / "python", home / "installed"
    if not stamp.exists() or stamp.read_text() != requirement:
        _done([sys.executable, "-m", "venv", "--clear", home])
        _done([python, "-m", "pip", "install", "--quiet", requirement, f"torch=={torch.__version__.split('+')[0]}"])
        for module in ("torchvision", "torchaudio"):
            if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
                _done([python, "-m", "pip", "uninstall", "--quiet", "--yes", module])
        (packages,) = home.glob("lib/python*/site-packages")
        if not (packages / "torchaudio").is_dir():
            (packages / "torchaudio.py").write_text("")
        stamp.write_text(requirement)
    return python


def _done(command: list[Any]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@dataclass
class Workplace:
    """A folder with a tiny model and data, where trainers run in processes of their own.

    `packages` go before those of this environment; `python` is that of another one, in which nothing else is found.
    """

    folder: Path
    packages: Path | None = None
    python: Path = Path(sys.executable)

    def __post_init__(self) -> None:
        made = tokenizer()
        made.chat_template = CHAT
        made.save_pretrained(self.folder / "model")
        base_model("llama").save_pretrained(self.folder / "model")

    def run(self, *arguments: object, check: bool = True) -> str:
        """Output of Python with these arguments, in the folder."""
        paths = [*filter(None, [self.packages]), self.folder, ROOT / "src", ROOT]
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / "home"), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
            "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "WANDB_MODE": "disabled",
            "MODELSCOPE_CACHE": str(self.folder / "home"),
        }  # fmt: skip
        done = subprocess.run(
            [str(self.python), *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=self.folder,
            timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or not check, (done.stdout + done.stderr)[-6000:]
        return done.stdout + done.stderr

    def factors(self, out: str) -> dict[str, Tensor]:
        """The factors in an adapter that a trainer saved."""
        found = sorted((self.folder / out).rglob("adapter_model.safetensors"), key=lambda path: len(path.parts))
        assert found, f"{out}: no adapter was saved"
        return load_file(found[0])


def rows(count: int = 24) -> list[dict[str, Any]]:
    """Instructions and answers that the tokenizer knows."""
    return [{"instruction": text(i, 3 + i % 3), "input": "", "output": text(100 + i, 4)} for i in range(count)]


def assert_ours_and_trained(plain: dict[str, Tensor], start: dict[str, Tensor], end: dict[str, Tensor]) -> None:
    """The saved adapters of three runs: without cntlora, with it at a learning rate of zero, with it at a real one."""
    halves = [key for key in start if "lora_" in key]
    assert halves and set(start) == set(plain) == set(end)
    assert all(not plain[key].any() for key in halves if "lora_B" in key)  # control: B is zero without us
    assert all(start[key].any() for key in halves)
    assert [key for key in halves if torch.equal(start[key], end[key])] == []  # the optimizer has the new factors
