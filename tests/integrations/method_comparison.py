"""PEFT's method comparison with a tiny model on a CPU: plain LoRA, and our start as a row beside it.

    python -m tests.integrations.method_comparison ../peft      # or: make test-comparison PEFT=../peft

Its folder MetaMathQA is copied, and its run.py runs as it is. Stand-ins: rows in the columns of its three data sets, a
tiny random Llama whose tokenizer knows six letters (run.py wants a loss between 1 and 2 on Wikipedia), the memory
counters of a GPU, and the git state of PEFT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LETTERS = ("a", "b", "c", "d")
STEPS = {"max_steps": 4, "eval_steps": 2, "batch_size": 4, "batch_size_eval": 8, "dtype": "float32"}
START = """
import sys
sys.path[:0] = [{root!r}, {source!r}]
from tests.integrations.method_comparison import stand_in
stand_in()
"""


class Cpu(str):
    """The name of the CPU, which passes where utils.py asks for a GPU."""

    def __eq__(self, other: object) -> bool:
        return other in ("cpu", "cuda")

    __hash__ = str.__hash__


def stand_in() -> None:
    """Stand in for what is missing, in the process of run.py before it is loaded."""
    import peft.utils
    import torch

    peft.utils.infer_device = lambda: Cpu("cpu")
    for name in ("reset_peak_memory_stats", "manual_seed_all", "empty_cache"):
        setattr(torch.cpu, name, lambda *_: None)
    for name in ("max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(torch.cpu, name, lambda *_: 0)
    torch.cpu.get_device_name = lambda *_: "CPU"  # type: ignore[attr-defined]
    sys.path.insert(0, str(Path.cwd()))
    import utils  # of the copied folder

    peft.utils.infer_device = utils.infer_device = lambda: "cpu"  # type: ignore[attr-defined]
    utils.device = "cpu"  # type: ignore[attr-defined]
    utils.get_peft_branch = lambda: "main"  # type: ignore[attr-defined]
    utils.get_git_hash = lambda _: None  # type: ignore[attr-defined]


def make_model(folder: Path) -> None:
    """A random Llama over four classes of letters, a space and the end."""
    import torch
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["</s>", " ", *LETTERS]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="d"))
    classes = {"a": "[aeiouAEIOU]", "b": "[b-mB-M]", "c": "[n-zN-Z]", " ": r"\\s"}
    made.normalizer = normalizers.Sequence([normalizers.Replace(Regex(of), letter) for letter, of in classes.items()])
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokens), eos_token_id=0, bos_token_id=0, max_position_embeddings=1024, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_data(home: Path) -> None:
    """Make what `load_dataset` looks for first: folders of the data sets' names."""
    question = "A farmer has {} hens and buys {} more. How many hens are there?"

    def rows(path: str, made: list[dict[str, Any]]) -> None:
        file = home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, made)))

    pairs = [(3 + i, 2 + i % 5) for i in range(40)]
    asked = [question.format(*pair) for pair in pairs]
    answers = [f"{a} and {b} are {a + b}. The answer is: {a + b}" for a, b in pairs]
    rows("meta-math/MetaMathQA/train.jsonl", [
        {"type": "GSM", "query": q, "original_question": q, "response": r} for q, r in zip(asked, answers, strict=True)
    ])  # fmt: skip
    for split in ("train", "test"):
        made = [{"question": q, "answer": f"#### {sum(pair)}"} for q, pair in zip(asked[:12], pairs, strict=False)]
        rows(f"openai/gsm8k/main/{split}.jsonl", made)
    (home / "openai/gsm8k/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train.jsonl\n"
        "  - split: test\n    path: main/test.jsonl\n---\n"
    )
    rows("HuggingFaceFW/finewiki/train.jsonl", [{"text": " ".join(asked[i : i + 3])} for i in range(20)])


def smoke(checkout: Path, home: Path) -> dict[str, dict[str, Any]]:
    """The records of both experiments, by name; the report of ours under "report"."""
    source = checkout / "method_comparison" / "MetaMathQA"
    wanted = hashlib.sha256((source / "run.py").read_bytes()).hexdigest()
    shutil.copytree(source, home, ignore=shutil.ignore_patterns("results", "*_results"), dirs_exist_ok=True)
    (home / "results").mkdir()
    make_model(home / "model")
    make_data(home)
    lora = home / "experiments" / "lora" / "llama-3.2-3B-rank32"
    config = json.loads((lora / "adapter_config.json").read_text()) | {"r": 4, "lora_alpha": 8}
    params = STEPS | {"model_id": "model", "generation_kwargs": {"max_length": 200, "max_new_tokens": 4}}
    script = home / "smoke.py"
    script.write_text(
        START.format(root=str(ROOT), source=str(ROOT / "src"))
        + "from cntlora.integrations.method_comparison import main\nmain(sys.argv[1:])\n"
    )
    for kind in ("lora", "cntlora"):
        folder = home / "experiments" / kind / "tiny-rank4"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "training_params.json").write_text(json.dumps(params))
        if kind == "cntlora":
            (folder / "cntlora.json").write_text('{"method": "descent", "num_batches": 4}')
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(home / "hub")}
        command = [sys.executable, "-W", "ignore", str(script), "run.py", "-v", f"experiments/{kind}/tiny-rank4"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{kind}: run.py ended with code {done.returncode}\n{done.stderr[-4000:]}")
    assert hashlib.sha256((home / "run.py").read_bytes()).hexdigest() == wanted
    found = {path.stem: json.loads(path.read_text()) for path in sorted((home / "results").glob("*.json"))}
    return found | {"report": json.loads((folder / "cntlora_report.json").read_text())}


def check(found: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each experiment: name, status, steps, training loss at the end, trainable parameters.

    Raises:
        AssertionError: if an experiment is missing or was cancelled, or our start did not change the training.
    """
    rows = []
    for name in ("lora--tiny-rank4", "cntlora--tiny-rank4"):
        info = found[name]["train_info"]
        last = info["metrics"][-1]
        rows.append((
            found[name]["run_info"]["experiment_name"], info["status"], str(last["step"]), f"{last['train loss']:.4f}",
            str(info["num_trainable_params"]),
        ))  # fmt: skip
    assert [row[1] for row in rows] == ["success"] * 2, rows
    assert rows[0][3] != rows[1][3], "both end with the same loss: was the start used?"
    sites = found["report"]["sites"]
    assert len(sites) == 4 and all(site["tokens"] > 0 for site in sites.values()), sites
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the PEFT repository")
    checkout = parser.parse_args().checkout.resolve()
    if not (checkout / "method_comparison" / "MetaMathQA" / "run.py").is_file():
        parser.error(f"{checkout}: expected a checkout of the PEFT repository, found no method_comparison in it")
    with tempfile.TemporaryDirectory() as folder:
        for row in (
            ("experiment", "status", "steps", "train loss", "trainable"),
            *check(smoke(checkout, Path(folder))),
        ):
            sys.stdout.write("  ".join(f"{cell:<20}" for cell in row).rstrip() + "\n")


if __name__ == "__main__":
    main()
