"""Prints the oldest versions that pyproject.toml admits, as constraints for pip: `make test-oldest`.

Of the extras that the package itself imports; the tools of the tests and the docs are taken as they are released.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import Version

ROOT = Path(__file__).parents[1]
TOOLS = {"dev", "docs", "peft-tests"}


def minima() -> dict[str, str]:
    """Distribution → its oldest version; where extras differ, the highest of them, since all are installed together."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {extra: texts for extra, texts in project["optional-dependencies"].items() if extra not in TOOLS}
    found: dict[str, str] = {}
    for text in [*project["dependencies"], *(text for texts in extras.values() for text in texts)]:
        requirement = Requirement(text)
        for specifier in requirement.specifier:
            if specifier.operator == ">=":
                known = found.get(requirement.name, "0")
                found[requirement.name] = max(known, specifier.version, key=Version)
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in sorted(minima().items())))
