"""The oldest PEFT that `pyproject.toml` claims, with transformers of its day: it reads our files, and we run with it.

Both are installed beside the environment, which they do not change, and share its torch. `CNTLORA_OLD_PEFT` may name a
folder that has them already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.files.test_saving import NAMED, SAVERS, save
from tests.tiny import KINDS, base_model, logits

pytestmark = [pytest.mark.slow, pytest.mark.packages]
ROOT = Path(__file__).parents[2]
OLD = {
    "peft": "0.15.0",
    "transformers": "4.46.3",
    "tokenizers": "0.20.3",
    "huggingface_hub": "0.26.5",
    "accelerate": "1.1.1",
}
WRITTEN = [
    name
    for name, case in NAMED.items()
    if case.base in ("offset", "subtract") and case.kind in ("bert", "gpt2", "llama")
]
HEAD = """
import sys, warnings
from pathlib import Path
for newer in ("torchao", "bitsandbytes", "trl"):  # of the environment, too new for these
    sys.modules[newer] = None
warnings.simplefilter("ignore")
import peft, torch, transformers
assert (peft.__version__, transformers.__version__) == (sys.argv[1], sys.argv[2]), peft.__version__
torch.set_num_threads(1)
"""
READER = """
import copy
from peft import PeftModel
from safetensors.torch import load_file, save_file
sys.modules["cntlora"] = None
kinds = {"bert": "BertForSequenceClassification", "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
root, outputs = Path(sys.argv[3]), {}
bases = {kind: getattr(transformers, name).from_pretrained(root / "base" / kind).eval() for kind, name in kinds.items()}
for folder in sorted(root.glob("*/*")):
    kind = folder.parent.name.split(".")[0]
    if kind in kinds:
        model = PeftModel.from_pretrained(copy.deepcopy(bases[kind]), folder).eval()
        with torch.no_grad():
            outputs[f"{folder.parent.name}/{folder.name}"] = model(**load_file(root / f"{kind}.safetensors")).logits
save_file(outputs, root / "read.safetensors")
"""
WRITER = """
import tempfile
from peft import PeftModel
from tests.files.test_saving import NAMED, save
from tests.tiny import KINDS, base_model, logits
done = 0
for name in sys.argv[3:]:
    case = NAMED[name]
    batch = {key: value for key, value in KINDS[case.kind].batches(seed=9)[0].items() if key != "labels"}
    model = case.trained()
    wanted, start = logits(model, batch), logits(base_model(case.kind), batch)
    assert (wanted - start).abs().max() > 1e-2, name
    for saver in ("save_pretrained", "folded", "plain alpha"):
        if saver != "save_pretrained" or case.base != "subtract":
            with tempfile.TemporaryDirectory() as folder:
                save(model, Path(folder) / "adapter", saver)
                read = logits(PeftModel.from_pretrained(base_model(case.kind), Path(folder) / "adapter").eval(), batch)
            torch.testing.assert_close(read, wanted, rtol=2e-4, atol=2e-5, msg=f"{name} {saver}")
            done += 1
print("compared", done)
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the old libraries."""
    given = os.environ.get("CNTLORA_OLD_PEFT")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("old")
    wanted = [f"{name}=={version}" for name, version in OLD.items()]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def run_with(old: Path, script: str, folder: Path, *arguments: object) -> str:
    file = folder / "script.py"
    file.write_text(HEAD + script)
    paths = os.pathsep.join(map(str, (old, ROOT, ROOT / "src")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    given = [OLD["peft"], OLD["transformers"], *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, str(file), *given], capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_oldest_version_is_the_one_we_claim() -> None:
    assert f'"peft>={re.sub("[.]0$", "", OLD["peft"])}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.filterwarnings("ignore")
def test_it_reads_files_of_the_current_versions(old: Path, tmp_path: Path) -> None:
    wanted = {}
    for kind in ("bert", "gpt2", "llama"):
        base_model(kind).save_pretrained(tmp_path / "base" / kind)
        batch = {key: value for key, value in KINDS[kind].batches(seed=9)[0].items() if key != "labels"}
        save_file(batch, tmp_path / f"{kind}.safetensors")
    for name in WRITTEN:
        model = NAMED[name].trained()
        for saver in SAVERS:
            if saver != "save_pretrained" or NAMED[name].base != "subtract":
                save(model, tmp_path / name / saver, saver)
                wanted[f"{name}/{saver}"] = logits(model, load_file(tmp_path / f"{NAMED[name].kind}.safetensors"))
    run_with(old, READER, tmp_path, tmp_path)
    read = load_file(tmp_path / "read.safetensors")
    assert read.keys() == wanted.keys() and len(read) > 90
    off = {name: float((read[name] - value).abs().max()) for name, value in wanted.items()}
    assert {name: error for name, error in off.items() if error > 1e-4} == {}
    pristine = logits(base_model(), load_file(tmp_path / "bert.safetensors"))
    assert all((value - pristine).abs().max() > 1e-2 for name, value in read.items() if name.startswith("bert"))


def test_we_run_with_it(old: Path, tmp_path: Path) -> None:
    names = [name for name in WRITTEN if NAMED[name].kind in ("bert", "gpt2", "llama")]
    told = run_with(old, WRITER, tmp_path, *names)
    assert int(told.split("compared ")[1]) > 90
