"""Variable adapter structure (VAS, eq. 19 and figure 4): one budget of ranks, shared out over all sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def allocate(
    variances: Mapping[str, Sequence[float]],
    budget: int,
    min_rank: int = 0,
    max_rank: int | None = None,
) -> dict[str, int]:
    """Ranks by the top-K rule: all relative variances in one list, the K largest win, a site's count is its rank.

    Args:
        variances: per site v_m = s_m²/Σ s², all of them, descending; their number is the largest rank of the site.
        budget: K, the sum of all ranks.
        min_rank: every site gets this many first (or all it has, if fewer).
        max_rank: no site gets more; None for min(k, d).

    Returns:
        {site: rank}; ranks of 0 are possible when `min_rank` is 0. Ties go to the lower m, then to the name that sorts
        first, so the result does not depend on the order of the sites.

    Raises:
        ValueError: if the budget is not between Σ min_rank and the sum of what the sites can take.
    """
    caps = {n: len(v) if max_rank is None else min(max_rank, len(v)) for n, v in variances.items()}
    floors = {n: min(min_rank, cap) for n, cap in caps.items()}
    low, high = sum(floors.values()), sum(caps.values())
    if budget < 1 or not low <= budget <= high:
        raise ValueError(
            f"rank_budget: expected between {max(low, 1)} (the sum of min_rank) and {high} (the sum of the largest "
            f"ranks of the {len(caps)} sites), got {budget}; change rank_budget, min_rank or max_rank"
        )
    contest = sorted(
        (-float(variances[name][m]), m, name) for name in variances for m in range(floors[name], caps[name])
    )
    ranks = dict(floors)
    for _, _, name in contest[: budget - low]:
        ranks[name] += 1
    return ranks
