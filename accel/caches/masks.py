"""Step masks of cache-dit (SCM): which evaluations must be computed, as bins of computed and of cached ones in turn."""

from __future__ import annotations

from collections.abc import Sequence

Bins = tuple[list[int], list[int]]  # computed, cached

# policy -> bins, for 28 evaluations; for 9 to 15 (they add up to 15), 9 and 8, distilled models; and for all policies
POLICIES = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
FEW = {
    "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
    "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
    "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
    "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
}
NINE = {
    "slow": ((5, 2, 1), (1,)),
    "medium": ((5, 1, 1), (1, 1)),
    "fast": ((4, 1, 1), (1, 2)),
    "ultra": ((3, 1, 1), (2, 2)),
}
EIGHT = {
    "slow": ((5, 1, 1), (1,)),
    "medium": ((4, 1, 1), (1, 1)),
    "fast": ((3, 1, 1), (1, 2)),
    "ultra": ((2, 1, 1), (2, 2)),
}
SHORT = {6: ((3, 1), (2,)), 4: ((2, 1), (1,))}


def steps_mask(
    compute_bins: Sequence[int] | None = None,
    cache_bins: Sequence[int] | None = None,
    total_steps: int | None = None,
    policy: str = "medium",
) -> tuple[int, ...]:
    """A mask for `dbcache(mask=...)`: per evaluation 1 (compute) or 0 (may be reused).

    Args:
      compute_bins, cache_bins: lengths of the runs of 1 and of 0, in turn: (2, 1) and (3,) is 110001. Both or none.
      total_steps: length of the mask, at most what the bins add up to; None is that. Needed for a policy.
      policy: without bins, "slow", "medium", "fast" or "ultra" (18, 15, 11 and 8 of 28 computed); the last evaluation
        is then always computed. Longer runs have the bins of 28 grown in turn, by half of their share of the longer
        run and at least by 1, and then cut; runs of 16 to 27 have them cut; shorter ones, of 8 to 15, 6 and 4, have
        bins of their own.

    References: cache-dit 1.5.3, `steps_mask`.
    """
    if (compute_bins is None) != (cache_bins is None):
        raise ValueError("steps_mask: only one of compute_bins and cache_bins was given; allowed: both or none")
    if compute_bins is not None and cache_bins is not None:
        if min([*compute_bins, *cache_bins, 1]) < 0:
            raise ValueError(f"steps_mask: bins {tuple(compute_bins)}, {tuple(cache_bins)}; allowed: 0 or more")
        together = sum(compute_bins) + sum(cache_bins)
        total = together if total_steps is None else total_steps
        if not 1 <= total <= together:
            raise ValueError(f"steps_mask: total_steps={total}; allowed: 1 to {together}, what the bins add up to")
        return _laid_out((list(compute_bins), list(cache_bins)))[:total]
    if policy not in POLICIES:
        raise ValueError(f"steps_mask: policy={policy!r}; allowed: {', '.join(POLICIES)}")
    if total_steps is None or (total_steps < 8 and total_steps not in SHORT):
        raise ValueError(f"steps_mask: total_steps={total_steps}; a policy has a mask for 4, 6, and 8 or more")
    mask = _laid_out(_cut(_bins(policy, total_steps), total_steps))[:total_steps]
    return (*mask[:-1], 1)


def _bins(policy: str, total: int) -> Bins:
    if total in SHORT:
        computed, cached = SHORT[total]
    elif total < 16:
        computed, cached = ({8: EIGHT, 9: NINE}.get(total, FEW))[policy]
    else:
        computed, cached = POLICIES[policy]
    bins = list(computed), list(cached)
    while sum(bins[0]) + sum(bins[1]) < total:
        for i in range(len(cached)):  # there is one bin of computed ones more
            for kind, base in enumerate((computed, cached)):
                if sum(bins[0]) + sum(bins[1]) < total:
                    bins[kind][i] += max(int(base[i] * (total / 28 * 0.5)), 1)
        if sum(bins[0]) + sum(bins[1]) < total:
            bins[0][-1] += 1
    return bins


def _cut(bins: Bins, total: int) -> Bins:
    """Takes from the end, in turn of the cached and of the computed ones, until no more than `total` are left."""
    kind = 1
    while sum(bins[0]) + sum(bins[1]) > total:
        if bins[kind]:
            bins[kind][-1] -= 1
            if bins[kind][-1] == 0:
                bins[kind].pop()
        kind = 1 - kind
    return bins


def _laid_out(bins: Bins) -> tuple[int, ...]:
    mask: list[int] = []
    for i in range(max(map(len, bins))):
        mask += [1] * (bins[0][i] if i < len(bins[0]) else 0) + [0] * (bins[1][i] if i < len(bins[1]) else 0)
    return tuple(mask)
