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
from .version import VERSION as __version__

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
