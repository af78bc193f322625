"""The options of `run` and `compare` that say where runs are done: here, on a Ray cluster, and which part of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..extras import require

if TYPE_CHECKING:
    from ..lab.experiments.cluster import Cluster
    from ..lab.experiments.shards import Shard

Engine = Annotated[
    str, typer.Option(help="local: processes of this machine; ray: a Ray cluster, which places, retries and cancels.")
]
_ADDRESS = "Of a running Ray cluster. [default: RAY_ADDRESS; without it a cluster of this machine, started for this]"
Address = Annotated[str | None, typer.Option(help=_ADDRESS)]
Cpus = Annotated[int, typer.Option(help="CPUs that Ray sets aside for each run.", min=1)]
_GPUS = "GPUs that Ray sets aside for each run, such as 0.5. [default: 1 if the cluster has any]"
Gpus = Annotated[float | None, typer.Option(help=_GPUS, min=0)]
_SHARD = "Run the third of 16 parts (3/16), for the jobs of an array on a shared folder. [default: all]"
ShardText = Annotated[str | None, typer.Option("--shard", metavar="N/COUNT", help=_SHARD)]


@dataclass(frozen=True)
class Places:
    """The place of the runs: on this machine or a Ray cluster, and which part of them."""

    engine: str = "local"
    address: str | None = None
    cpus: int = 1
    gpus: float | None = None
    shard: str | None = None

    def check(self) -> None:
        """Tell what is wrong before libraries are imported."""
        if self.engine not in ("local", "ray"):
            raise ValueError(f"--engine: expected local or ray, got {self.engine!r}")
        if self.engine == "ray":
            require("ray", "--engine ray")
        elif (self.address, self.cpus, self.gpus) != (None, 1, None):
            raise ValueError(
                "--address, --cpus and --gpus are for --engine ray; on one machine --jobs shares the cores"
            )
        _ = self.part

    @property
    def part(self) -> Shard | None:
        """The part of the runs that --shard names."""
        from ..lab.experiments.shards import Shard

        return Shard.parse(self.shard) if self.shard else None

    def cluster(self, jobs: int | None) -> Cluster | None:
        """The Ray cluster; None for this machine."""
        from ..lab.experiments.cluster import Cluster

        return Cluster(self.address, self.cpus, self.gpus, jobs) if self.engine == "ray" else None
