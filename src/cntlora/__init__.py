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

from .version import VERSION as __version__

if TYPE_CHECKING:
    from .analysis.comparison import AdapterComparison, compare_adapters, snapshot
    from .analysis.diagnostics import StartDiagnostics, start_curvature, start_diagnostics
    from .analysis.learning_rate import ProposedRate, propose_learning_rate
    from .api import apply_plan, compute_plan, initialize, initialize_from_trainer
    from .config import InitConfig
    from .files.saving import save_adapter
    from .methods import *  # noqa: F403 (its `__all__`: a method is added in one place)
    from .methods import __all__ as _method_classes
    from .methods.method import methods
    from .model.writer import freeze_offset
    from .plan import InitPlan
    from .report import InitReport
    from .site_plan import SitePlan

    __all__ = [
        "AdapterComparison",
        "InitConfig",
        "InitPlan",
        "InitReport",
        "ProposedRate",
        "SitePlan",
        "StartDiagnostics",
        "__version__",
        "apply_plan",
        "compare_adapters",
        "compute_plan",
        "freeze_offset",
        "initialize",
        "initialize_from_trainer",
        "methods",
        "propose_learning_rate",
        "save_adapter",
        "snapshot",
        "start_curvature",
        "start_diagnostics",
    ]
    __all__ += _method_classes

_HOMES: dict[str, tuple[str, ...]] = {
    "analysis.comparison": ("AdapterComparison", "compare_adapters", "snapshot"),
    "analysis.diagnostics": ("StartDiagnostics", "start_curvature", "start_diagnostics"),
    "analysis.learning_rate": ("ProposedRate", "propose_learning_rate"),
    "api": ("apply_plan", "compute_plan", "initialize", "initialize_from_trainer"),
    "config": ("InitConfig",),
    "files.saving": ("save_adapter",),
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
