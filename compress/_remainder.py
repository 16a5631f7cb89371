"""Groups and costs of a network after a cut, from those before it."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from compress.costs import CostTable
from compress.groups import Channels, Group, Member, Structure

__all__ = ["remaining", "remaining_table"]


def remaining(structure: Structure, removed: Mapping[str, Iterable[int]]) -> Structure:
    """What :func:`compress.cutting.cut` leaves of a structure, in the indices of the network that it returns.

    Tracing the smaller network again could find another structure (a grouped
    convolution with one channel per group looks like a depthwise one), and
    would have to prove it again. Here a later cut of the smaller network is a
    cut of the original one, which is proved already.

    Parameters
    ----------
    structure : Structure
        Of the network before the cut.
    removed : dict of str to iterable of int
        Group to channels, in whole units.

    Returns
    -------
    Structure

    Notes
    -----
    Cost: O(n log n) for n entries of all members.

    Examples
    --------
    >>> import torch, compress
    >>> from compress._remainder import remaining
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 1), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    >>> rest = remaining(compress.find_groups(net, torch.zeros(1, 1, 2, 2)), {"0": [1]})
    >>> rest["0"].width, rest["0"].members[-1].index
    (2, ((0, 1, 2, 3), (4, 5, 6, 7)))
    """
    gone = {g.name: set(removed.get(g.name, ())) for g in structure.groups}
    axes: dict[tuple[str, str], set[int]] = defaultdict(set)
    for g in structure.groups:
        for m in g.members:
            axes[m.layer, m.axis].update(m.of(gone[g.name]))
    cuts = {axis: sorted(entries) for axis, entries in axes.items()}

    def moved(m: Member, kept: list[int]) -> Member:
        entries = cuts[m.layer, m.axis]
        index = tuple(tuple(i - bisect_left(entries, i) for i in m.index[j]) for j in kept)
        return replace(m, index=index)

    def rest(g: Group) -> Group:
        kept = [j for j in range(g.width) if j not in gone[g.name]]
        place = {j: k for k, j in enumerate(kept)}
        units: list[Channels] = [tuple(place[j] for j in unit) for unit in g.units if unit[0] in place]
        members = tuple(moved(m, kept) for m in g.members)
        return replace(g, width=len(kept), units=tuple(units), members=members)

    return Structure(tuple(rest(g) for g in structure.groups))


def remaining_table(table: CostTable, removed: Mapping[str, Iterable[int]]) -> CostTable:
    """What a cut leaves of the costs, in the same sense; no pass is needed."""
    gone: dict[tuple[str, str], int] = defaultdict(int)
    for name, channels in removed.items():
        chosen = tuple(channels)
        for m in table.structure[name].members:
            gone[m.layer, m.axis] += len(m.of(chosen))
    stored = table.to_json()
    for entry in stored["tensors"].values():
        shape, follows = entry[0], entry[3]
        cuts = (0 if f is None else gone[f[0], f[1]] // f[2] for f in follows)
        entry[0] = [n - cut for n, cut in zip(shape, cuts, strict=True)]
    for name, (_, after) in table.widths(removed).items():
        stored["layers"][name][2] = after
    return CostTable.from_json(stored, remaining(table.structure, removed))
