"""Values that may stand in a file that travels: names without the paths of this machine, its users or their secrets."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_CACHED = re.compile(r"models--([^/\\]+?)(?:--([^/\\]+))?(?=[/\\]|$)")
_LOCAL = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|\w+://")
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


def public_name(name: str | None) -> str | None:
    """The name of a model as others know it.

    A name on the hub stays, and is read out of the path of the hub's cache; of a folder or an address only the last
    part is kept. None where nothing is left that may be said, such as the home folder itself.
    """
    if not name:
        return None
    cached = _CACHED.search(name)
    if cached is not None:
        return "/".join(part for part in cached.groups() if part)
    if not is_local(name):
        return _without_secrets(name)
    last = re.split(r"[/\\]", name.partition("?")[0].rstrip("/\\"))[-1]
    return None if last in ("", ".", "..", "~", Path.home().name) else _without_secrets(last)


def hub_name(name: str | None) -> str | None:
    """The name on the hub of a model, or of what lies in the hub's cache; None for another folder or an address."""
    return None if name and is_local(name) and not _CACHED.search(name) else public_name(name)


def is_local(name: str) -> bool:
    """Return whether a model's name is a path here or an address, and not a name on the hub."""
    if _LOCAL.match(name) or name.startswith(".") or name.count("/") > 1 or "\\" in name:
        return True
    try:
        return Path(name).is_dir()
    except OSError:  # too long for a path
        return False


def public_values(value: Any) -> Any:
    """Plain values with every absolute path in them cut to its last name, and sets sorted."""
    if isinstance(value, dict):
        return {key: public_values(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(public_values(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [public_values(item) for item in value]
    if isinstance(value, os.PathLike):
        return public_values(os.fspath(value))
    if isinstance(value, str):
        return public_name(value) if _LOCAL.match(value) else _without_secrets(value)
    return value


def _without_secrets(text: str) -> str:
    for name in _SECRETS:
        secret = os.environ.get(name, "")
        if len(secret) > 5:  # shorter ones could be any word
            text = text.replace(secret, "***")
    return text
