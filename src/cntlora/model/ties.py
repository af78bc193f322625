"""Sites that share one set of factors: found by the memory that their parameters lie in, initialised once, kept as one.

PEFT's `ensure_weight_tying` lets the head of a language model stand on the factors of the embedding, transposed: both
weights are one, and so is what is added to them. Any two layers may share their factors, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .lora_layers import config_holder, factor_of, factor_slots, lora_layers
from .sharded import address, is_sharded

if TYPE_CHECKING:
    from ..plan import InitPlan
    from .sites import Site


@dataclass(frozen=True)
class Tied:
    """A site whose factors are those of another one.

    Attributes:
        site, leader: the site that follows, and the one that is initialised.
        crossed: whether A is Bᵀ of the leader and B its Aᵀ, as between an embedding and the head that is tied to it.
    """

    site: Site
    leader: Site
    crossed: bool

    @property
    def shares_memory(self) -> bool:
        """Return whether both lie in one memory; those that PEFT was asked to tie may not, before they are written."""
        ours, theirs = ((_place(s.A), _place(s.B)) for s in (self.site, self.leader))
        return ours == (theirs[::-1] if self.crossed else theirs)


@dataclass(frozen=True)
class Group:
    """Sites with one set of factors, in the order of the model.

    Attributes:
        crossed: of each site, whether it has the factors of the first one crossed.
        unfit: why they cannot be initialised as one, or None.
    """

    sites: tuple[Site, ...]
    crossed: tuple[bool, ...]
    unfit: str | None = None

    def led_by(self, leader: str) -> list[Tied]:
        """The others, as followers of one of them."""
        at = [site.name for site in self.sites].index(leader)
        return [
            Tied(site, self.sites[at], crossed != self.crossed[at])
            for site, crossed in zip(self.sites, self.crossed, strict=True)
            if site.name != leader
        ]


def groups(model: nn.Module, sites: Sequence[Site], adapter: str) -> list[Group]:
    """The sites that share factors, also those that PEFT was asked to tie and has not (a cast parts what it ties)."""
    asked = set(asked_to_tie(model, sites, adapter))
    linked: dict[str, list[Site]] = {site.name: [site] for site in sites}
    embedding = tied_embedding(model, sites, adapter) if asked else None
    heads = [(embedding.name, name) for name in asked] if embedding is not None else []
    for one, other in (*_neighbours(sites), *heads):
        if linked[one] is not linked[other]:
            linked[one].extend(linked[other])
            linked.update(dict.fromkeys((site.name for site in linked[other]), linked[one]))
    order = {site.name: index for index, site in enumerate(sites)}
    found = {id(members): members for members in linked.values() if len(members) > 1}
    others = _places(model, adapter)
    return [_group(sorted(m, key=lambda s: order[s.name]), asked, others) for m in found.values()]


def _neighbours(sites: Iterable[Site]) -> Iterator[tuple[str, str]]:
    """Names of pairs of sites of which a factor of one lies where a factor of the other does."""
    held: dict[Any, str] = {}
    for site in sites:
        for factor in (site.A, site.B):
            yield held.setdefault(_place(factor), site.name), site.name


def _place(factor: Tensor) -> Any:
    """Return what two parameters have in common that share their values."""
    at = 0 if factor.device.type == "meta" else address(factor)
    return (factor.device, at) if at else id(factor)


def _places(model: nn.Module, adapter: str) -> dict[Any, set[str]]:
    """Return where factors lie, with the names of all layers that have one there, also of such as are no site."""
    found: dict[Any, set[str]] = {}
    for name, layer in lora_layers(model, adapter):
        for owner, key in factor_slots(layer, adapter):
            if isinstance(getattr(owner, key, None), nn.Parameter):
                found.setdefault(_place(factor_of(owner, key)), set()).add(name)
    return found


def tied_embedding(model: nn.Module, sites: Iterable[Site], adapter: str) -> Site | None:
    """The site that PEFT ties others to: the input embedding."""
    holder = config_holder(model, adapter)
    give = None if holder is None else getattr(holder[1], "get_input_embeddings", None)
    if not callable(give):
        return None
    layer = give()
    return next((site for site in sites if site.layer is layer and adapter not in layer.lora_A), None)


def asked_to_tie(model: nn.Module, sites: Sequence[Site], adapter: str) -> Iterator[str]:
    """Names of the sites whose factors PEFT's configuration wants to be those of the embedding."""
    holder = config_holder(model, adapter)
    config: Any = None if holder is None else holder[1].peft_config[adapter]  # type: ignore[index,union-attr]
    names = getattr(config, "target_modules_to_tie", None) if getattr(config, "ensure_weight_tying", False) else None
    embedding = tied_embedding(model, sites, adapter) if names else None
    if names is None or embedding is None:
        return
    for site in sites:
        tied = site.name in names or site.name.endswith(tuple(f".{name}" for name in names))
        # on different devices they cannot share memory, and what fully_shard holds cannot be replaced
        together = adapter in site.layer.lora_A and site.A.device == embedding.A.device and not is_sharded(site.A)
        crossed = (site.in_features, site.out_features) == (embedding.out_features, embedding.in_features)
        if tied and together and crossed:
            yield site.name


def _group(members: Sequence[Site], asked: set[str], places: Mapping[Any, set[str]]) -> Group:
    first = members[0]
    alike = [_alike(first, site, asked) for site in members]
    crossed = tuple(bool(how) for how in alike)
    names = {site.name for site in members}
    strangers = sorted({n for s in members for f in (s.A, s.B) for n in places.get(_place(f), ())} - names)
    return Group(tuple(members), crossed, _unfit(members, alike, strangers))


def _alike(first: Site, site: Site, asked: set[str]) -> bool | None:
    """Return whether a site has the factors of the first crossed; None where it shares a part of them only."""
    ours, theirs = ((_place(s.A), _place(s.B)) for s in (first, site))
    if theirs == ours and site.A.shape == first.A.shape and site.B.shape == first.B.shape:
        return False
    if theirs == ours[::-1] and site.A.shape == first.B.shape[::-1] and site.B.shape == first.A.shape[::-1]:
        return True
    if {first.name, site.name} & asked and ours[0] not in theirs and ours[1] not in theirs:
        both = {first.name, site.name} <= asked  # two heads on one embedding are alike
        return not both
    return None


def _unfit(members: Sequence[Site], alike: Sequence[bool | None], strangers: Sequence[str]) -> str | None:
    """Return why sites that share factors cannot be initialised as one, or None."""
    named = " and ".join(site.name for site in members)
    if strangers:
        return f"it shares its factors with {strangers[0]}, which cannot be initialised; give each layer its own"
    if None in alike:
        return (
            f"{named} share one of their two factors, and no start fits both; let them share A and B, or give each "
            "layer its own"
        )
    for one, other in combinations(members, 2):
        mine, theirs = ((s.rank, s.scaling, s.use_rslora) for s in (one, other))
        if mine != theirs:
            return (
                f"{named} share their factors, and rank {mine[0]} with scaling {mine[1]:g} is not rank {theirs[0]} "
                f"with scaling {theirs[1]:g}; give them the same in rank_pattern and alpha_pattern"
            )
    return None


def leader_of(group: Group, reads: str) -> str:
    """The site whose weight and inputs decide: the first one whose inputs can be read, where the method reads them."""
    readable = [site for site in group.sites if reads != "inputs" or site.unseen is None]
    return (readable or group.sites)[0].name


def tied_as_planned(found: Iterable[Group], plan: InitPlan) -> list[Tied]:
    """The sites of a model that follow others, as a plan has it.

    Raises:
        ValueError: if the plan gives sites that share their factors different ones.
    """
    tied = []
    for group in found:
        planned = [site.name for site in group.sites if site.name in plan.sites]
        if not planned:
            continue
        leaders = {plan.shared.get(name, name) for name in planned}
        if group.unfit is not None or len(planned) < len(group.sites) or len(leaders) > 1:
            names = " and ".join(site.name for site in group.sites)
            raise ValueError(
                f"site {planned[0]}: {names} share one set of factors in this model, and the plan has others for each; "
                "make a plan for this model"
            )
        tied += group.led_by(leaders.pop())
    return tied


def tie_factors(tied: Tied) -> None:
    """Put the factors of the leader into the site that follows, where they are not in one memory any more."""
    slots = (factor_slots(s.layer, s.adapter) for s in (tied.site, tied.leader))
    mine, theirs = slots
    for (owner, name), (source_owner, source) in zip(mine, theirs[::-1] if tied.crossed else theirs, strict=True):
        old, new = factor_of(owner, name), factor_of(source_owner, source)
        if _place(old) == _place(new) and old.numel() == new.numel():
            continue
        if tied.crossed:  # a view: PEFT ties them the same way
            new = nn.Parameter(new.detach().mT, requires_grad=old.requires_grad)
        setattr(owner, name, new)


def owners_of(model: nn.Module) -> Mapping[int, list[str]]:
    """The id of every parameter → the paths of the modules that hold it."""
    found: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            found[id(parameter)].append(path)
    return found
