"""The methods, one file each: options, what is read of the data, the equation, and how the factors are made.

A method is one row here: its import, and its class in `__all__`, in the order of tables. The package is called as a
function: `cntlora.methods()` gives the names that `InitConfig(method=...)` takes.
"""

import sys
from types import ModuleType

from .corda import Corda
from .cross import Cross
from .descent import Descent
from .eva import Eva
from .function import from_function
from .gora import Gora
from .lora import Lora
from .lora_da import LoraDa
from .lora_ga import LoraGa
from .lora_one import LoraOne
from .method import METHODS, methods
from .olora import Olora
from .pissa import Pissa
from .self_mode import Self
from .shift import Shift
from .whitened import Whitened, WhitenedDescent

__all__ = [  # noqa: RUF022
    "Cross",
    "Self",
    "Shift",
    "Descent",
    "Whitened",
    "WhitenedDescent",
    "Lora",
    "Pissa",
    "Olora",
    "Eva",
    "Corda",
    "LoraGa",
    "LoraOne",
    "LoraDa",
    "Gora",
]

METHODS.update((cls.name, cls) for cls in map(globals().__getitem__, __all__))
METHODS.of_function = from_function


class _Callable(ModuleType):
    """A module that is also the function `cntlora.methods`, whose name it has."""

    def __call__(self) -> tuple[str, ...]:
        return methods()


sys.modules[__name__].__class__ = _Callable
