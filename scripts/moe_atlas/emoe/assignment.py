"""The cheapest assignment of points to clusters of equal size, exactly.

A transportation problem: every point goes to one cluster, every cluster takes as many, and the sum of costs is least.
Solved by successive shortest paths (Ahuja, Magnanti and Orlin 1993, Network Flows, section 9.7) on a graph whose nodes
are the clusters: an edge a -> b costs as much as moving that point of a which is cheapest to move. This graph is small
however many points there are. Costs are integers, so that no rounding comes into it.
"""

import numpy as np

# Far above any sum of costs along a path, and far below what overflows when two are added.
_UNREACHED = np.int64(2**61)
_LARGEST_COST = 2**48


def equal_assignment(costs: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (F,) int64 of least total cost with F / N points in each cluster, and prices (N,) int64 that prove it.

    `costs` (F, N) are integers (int64), at most 2^48 in size; N must divide F. `prices` are those of an earlier answer
    for costs much like these, which makes this one faster, or zeros. A cluster's price is taken off the costs of its
    column: each point is then in its cheapest cluster, so that no other assignment of equal sizes costs less. Several
    assignments may cost the same; which one is returned depends on costs and prices alone.
    """
    points, clusters = costs.shape
    if points % clusters:
        raise ValueError(f"{points} points do not make {clusters} clusters of equal size.")
    if np.abs(costs).max(initial=0) > _LARGEST_COST:
        raise ValueError("Costs are above 2^48, so that sums of them could overflow.")
    size = points // clusters
    # Each point in its cheapest cluster is the cheapest assignment of those sizes; every step keeps that true.
    labels = (costs - prices).argmin(axis=1)
    counts = np.bincount(labels, minlength=clusters)
    moves, movers = np.empty((clusters, clusters), np.int64), np.empty((clusters, clusters), np.int64)
    for cluster in range(clusters):
        _cheapest_moves(costs, labels, cluster, moves, movers)
    while (counts > size).any():
        distance, before = _shortest_paths(moves, counts > size)
        short = np.flatnonzero(counts < size)
        end = last = int(short[distance[short].argmin()])
        path = [end]
        while before[path[-1]] != path[-1]:
            path.append(int(before[path[-1]]))
        moved = [(int(movers[start, stop]), stop) for stop, start in zip(path, path[1:], strict=False)]
        for point, stop in moved:
            labels[point] = stop
        counts[path[-1]] -= 1
        counts[last] += 1
        for cluster in path:
            _cheapest_moves(costs, labels, cluster, moves, movers)
    return labels, _shortest_paths(moves, np.ones(clusters, bool))[0]


def _cheapest_moves(costs: np.ndarray, labels: np.ndarray, cluster: int, moves: np.ndarray, movers: np.ndarray) -> None:
    """Write what leaving `cluster` for each other one costs, and the point that leaves, into rows of (N, N)."""
    members = np.flatnonzero(labels == cluster)
    if members.size == 0:
        moves[cluster] = _UNREACHED
        return
    change = costs[members] - costs[members, cluster, None]
    cheapest = change.argmin(axis=0)
    moves[cluster] = change[cheapest, np.arange(len(cheapest))]
    movers[cluster] = members[cheapest]


def _shortest_paths(moves: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least cost from any start to each cluster (N,), and the cluster before it, itself at a start (Bellman-Ford)."""
    distance = np.where(starts, np.int64(0), _UNREACHED)
    before = np.arange(len(moves))
    for _ in moves:
        through = distance[:, None] + moves
        best = through.argmin(axis=0)
        cost = through[best, np.arange(len(moves))]
        better = cost < distance
        if not better.any():
            break
        distance, before = np.where(better, cost, distance), np.where(better, best, before)
    return distance, before
