"""cntlora: start a LoRA from the pretrained weights and a few batches of your data. No training, any trainer.

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16))   # plain PEFT, as always
    report = cntlora.initialize(model, train_loader)               # the one line
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)              # only then the optimizer

`InitConfig` holds the choices (method, base, ranks, ...), each method is a class with its own options
(`InitConfig(method=Self(root="cholesky"))`), `compute_plan` and `apply_plan` are the two halves of
`initialize` (a plan is one file), `initialize_from_trainer` does it for the trainers of transformers, TRL and
sentence-transformers, and `save_adapter` writes an ordinary LoRA for the untouched base, whatever `base` was.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .version import VERSION

if TYPE_CHECKING:  # `X as X` is public for type checkers; `_HOMES` imports the same when asked
    from .analysis.comparison import AdapterComparison as AdapterComparison
    from .analysis.comparison import compare_adapters as compare_adapters
    from .analysis.comparison import snapshot as snapshot
    from .analysis.diagnostics import StartDiagnostics as StartDiagnostics
    from .analysis.diagnostics import start_curvature as start_curvature
    from .analysis.diagnostics import start_diagnostics as start_diagnostics
    from .analysis.head import fit_head as fit_head
    from .analysis.learning_rate import ProposedRate as ProposedRate
    from .analysis.learning_rate import fit_learning_rate as fit_learning_rate
    from .analysis.learning_rate import propose_learning_rate as propose_learning_rate
    from .api import apply_plan as apply_plan
    from .api import compute_plan as compute_plan
    from .api import initialize as initialize
    from .api import initialize_from_trainer as initialize_from_trainer
    from .config import InitConfig as InitConfig
    from .files.saving import save_adapter as save_adapter
    from .fitted_head import FittedHead as FittedHead
    from .methods import *  # noqa: F403 (its `__all__`: a method is added in one place)
    from .methods.function import from_function as from_function
    from .methods.method import methods as methods
    from .model.writer import freeze_offset as freeze_offset
    from .plan import InitPlan as InitPlan
    from .report import InitReport as InitReport
    from .site_plan import SitePlan as SitePlan

__version__ = VERSION

_HOMES: dict[str, tuple[str, ...]] = {
    "analysis.comparison": ("AdapterComparison", "compare_adapters", "snapshot"),
    "analysis.diagnostics": ("StartDiagnostics", "start_curvature", "start_diagnostics"),
    "analysis.head": ("fit_head",),
    "analysis.learning_rate": ("ProposedRate", "fit_learning_rate", "propose_learning_rate"),
    "api": ("apply_plan", "compute_plan", "initialize", "initialize_from_trainer"),
    "config": ("InitConfig",),
    "files.saving": ("save_adapter",),
    "fitted_head": ("FittedHead",),
    "methods.function": ("from_function",),
    "model.writer": ("freeze_offset",),
    "plan": ("InitPlan",),
    "report": ("InitReport",),
    "site_plan": ("SitePlan",),
}
"""Module → its public names, imported when they are first asked for, so that `cntlora --help` does not wait for torch.
The classes of the methods are those of `cntlora.methods`, which is a module and the function of that name in one."""


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is first asked for."""
    if name == "__all__":
        return [*_own_names(), *import_module(".methods", __name__).__all__]
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "")
    if not home and find_spec(f"{__name__}.{name}"):
        return import_module(f".{name}", __name__)
    module = import_module(f".{home or 'methods'}", __name__)
    if not home and name not in module.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


def _own_names() -> list[str]:
    return sorted(["__version__", "methods", *(name for names in _HOMES.values() for name in names)])
