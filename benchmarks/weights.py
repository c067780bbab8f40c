"""Contenders that take statistics of one layer's weights: all of them, one matching, one set of components.

The paper's method (A Closer Look into Mixture-of-Experts, arXiv 2406.18219) is written anew from its description:
cosines pair by pair, components by a full decomposition of standardised rows. It rounded to bfloat16 where float32 is
kept here. Values that several contenders give have the same name.
"""

import importlib
import itertools

import numpy as np
import torch
from torch.nn import functional

from benchmarks.measured import Run

Values = dict[str, np.ndarray]
COMPONENTS, KEPT = 3, 2048


def read_layer(run: Run, roles: tuple[str, ...] = ("up", "act", "down"), experts: int = 0) -> dict[str, torch.Tensor]:
    """The first layer's matrices (N, rows, columns) by role, and its router (N, d), by safetensors' own loading."""
    from safetensors import safe_open

    shape, found = run.shape, {}
    router = next(name for name in shape.others if name.endswith("gate.weight")).format(l=0)
    path = sorted(run.directory.glob("*.safetensors"))[1]
    with safe_open(path, framework="pt") as file:
        names = [dict(zip(shape.names, shape.expert(0, e), strict=True)) for e in range(experts or shape.experts)]
        for role in roles:
            found[role] = torch.stack([file.get_tensor(of_expert[role]) for of_expert in names])
        found["router"] = file.get_tensor(router).clone()
    return found


def _neurons(stack: torch.Tensor, role: str) -> torch.Tensor:
    """(N, m, d): neurons are rows of up and act, columns of down."""
    return stack.mT if role == "down" else stack


def weights_atlas(run: Run) -> Values:
    """Similarity at both levels, components at both levels with outliers, and the null of each; the layer's reading."""
    from moe_atlas.checkpoints import Checkpoint
    from moe_atlas.layerwise import each_layer
    from moe_atlas.parametric.together import WeightStatistics

    with run.timed():
        checkpoint = Checkpoint(run.directory)
        statistics = WeightStatistics("model", matched_layers=[])
        for index, bank, reference in each_layer(checkpoint, None, [0]):
            statistics.add(index, bank, reference)
        tables = statistics.tables()
    run.found["weights_read"] = checkpoint.bytes_read
    values = {}
    for (matrix, level), part in tables["similarity"].group_by("matrix", "level"):
        routed = part.filter(part["a"].str.contains(r"^\d+$") & part["b"].str.contains(r"^\d+$"))
        pairs = {(int(a), int(b)): cosine for a, b, cosine in routed.select("a", "b", "cosine").iter_rows()}
        values[f"cosine {matrix} {level}"] = np.array([pairs[pair] for pair in sorted(pairs)])
    for (matrix, level), part in tables["explained_variance"].group_by("matrix", "level"):
        values[f"ratio {matrix} {level}"] = part.sort("component")["ratio"].to_numpy()
    return values


def weights_paper(run: Run) -> Values:
    """The same similarities and components without nulls and outliers; the layer's reading."""
    importlib.import_module("sklearn.decomposition")
    values = {}
    with run.timed():
        matrices = read_layer(run)
        values["cosine router matrix"] = _pair_loop(list(matrices.pop("router")))
        for role, stack in matrices.items():
            neurons = _neurons(stack, role)
            values[f"cosine {role} matrix"] = _pair_loop(list(stack.flatten(1)))
            values[f"cosine {role} neuron_mean"] = _pair_loop([part.float().mean(0) for part in neurons])
            for level, rows in (("matrix", stack.flatten(1)), ("neuron", neurons.flatten(0, 1))):
                values[f"ratio {role} {level}"] = _sklearn(rows, "full")[0]
    return values


def _pair_loop(vectors: list[torch.Tensor]) -> np.ndarray:
    """Cosine of each pair, the diagonal included, one pair at a time."""
    pairs = itertools.combinations_with_replacement(vectors, 2)
    return np.array([functional.cosine_similarity(a.float(), b.float(), dim=0).item() for a, b in pairs])


def _sklearn(rows: torch.Tensor, solver: str) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the variance and coordinates of rows (n, c), standardised, by scikit-learn."""
    from sklearn.decomposition import PCA

    rows = rows.float()
    rows = ((rows - rows.mean(0)) / rows.std(0)).numpy()
    found = PCA(min(COMPONENTS, len(rows) - 1), svd_solver=solver)
    coordinates = found.fit_transform(rows)
    return found.explained_variance_ratio_, coordinates


def _pair(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons of up of two experts, (m, d) float32, on the run's device."""
    first, second = read_layer(run, ("up",), experts=2)["up"].float().to(run.device)
    return first, second


def _matched(order: np.ndarray, first: torch.Tensor, second: torch.Tensor) -> Values:
    """The sum of the matched cosines in float64."""
    pairs = functional.cosine_similarity(first.cpu().double(), second.cpu().double()[torch.from_numpy(order)])
    return {"order": order, "sum": pairs.sum().numpy()}


def matching_atlas(run: Run) -> Values:
    """Neurons of two experts by one matrix: cosines as one product, float32 costs."""
    from moe_atlas.parametric.matching import assign, directions

    first, second = _pair(run)
    with run.timed():
        order = assign(directions(first)[0] @ directions(second)[0].T)
    return _matched(order, first, second)


def matching_scipy(run: Run) -> Values:
    """The same with the cosines as one product and scipy's assignment, which wants float64."""
    from scipy.optimize import linear_sum_assignment

    first, second = _pair(run)
    with run.timed():
        cosines = functional.normalize(first) @ functional.normalize(second).T
        order = linear_sum_assignment(cosines.double().cpu().numpy(), maximize=True)[1]
    return _matched(order, first, second)


def matching_paper(run: Run) -> Values:
    """The same with the cosines neuron by neuron, and scipy's assignment."""
    from scipy.optimize import linear_sum_assignment

    first, second = _pair(run)
    with run.timed():
        cosines = torch.empty(len(first), len(second), dtype=torch.float64)
        for row, neuron in zip(cosines, first, strict=True):
            row.copy_(functional.cosine_similarity(neuron[None], second))
        order = linear_sum_assignment(cosines.numpy(), maximize=True)[1]
    return _matched(order, first, second)


def pca_atlas(run: Run) -> Values:
    """Components of all neurons of a layer by one matrix, and coordinates of 2,048 of them."""
    from moe_atlas.parametric.projection import evenly, neuron_components

    stack = read_layer(run, ("up",))["up"].to(run.device)
    with run.timed():
        found = neuron_components(list(stack), evenly(stack.shape[0] * stack.shape[1], KEPT))
    return {"ratio": found.ratios, "coordinates": found.coordinates}


def _pca(run: Run, solver: str) -> Values:
    from moe_atlas.parametric.projection import evenly

    importlib.import_module("sklearn.decomposition")
    rows = read_layer(run, ("up",))["up"].flatten(0, 1)
    with run.timed():
        ratios, coordinates = _sklearn(rows, solver)
    return {"ratio": ratios, "coordinates": coordinates[evenly(len(rows), KEPT)]}


def pca_sklearn(run: Run) -> Values:
    """The same by scikit-learn's full decomposition, as in the paper."""
    return _pca(run, "full")


def pca_sklearn_covariance(run: Run) -> Values:
    """The same by scikit-learn's eigenvectors of the covariance matrix."""
    return _pca(run, "covariance_eigh")
