"""Time the balanced clustering of an FFN's keys, and set its objective beside two others.

    python -m benchmarks.emoe_split [--shapes 3072x768 14336x4096] [--experts 64]

Keys of two kinds: `random`, independent normal numbers, which have no groups; `planted`, about the directions of as
many groups as experts, of sizes in proportion to 1 ... N, which balance has to break up. The objective is the sum of
squared distances of the unit keys to their clusters' means (moe_atlas/emoe/split.py): of the balanced clusters, of
k-means without balance (scikit-learn, one start) and of a random split. Prints seconds of the wall.
"""

import argparse
import time

import torch
from sklearn.cluster import KMeans

from moe_atlas.emoe.split import objective, split_neurons, unit_keys


def random_keys(neurons: int, width: int, experts: int) -> torch.Tensor:
    """Keys (F, H) float32 without groups."""
    return torch.randn(neurons, width, generator=torch.Generator().manual_seed(0))


def planted_keys(neurons: int, width: int, experts: int) -> torch.Tensor:
    """Keys (F, H) float32 in groups of unequal sizes."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.multinomial(torch.arange(1.0, experts + 1), neurons, replacement=True, generator=generator)
    centres = torch.randn(experts, width, generator=generator)
    return centres[groups] + 0.5 * torch.randn(neurons, width, generator=generator)


def measure(keys: torch.Tensor, experts: int) -> dict[str, float]:
    """Seconds and objectives of one set of keys."""
    start = time.perf_counter()
    balanced = split_neurons(keys, experts)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    free = KMeans(experts, n_init=1, random_state=0).fit(unit_keys(keys)).labels_
    return {
        "seconds": seconds,
        "k-means, seconds": time.perf_counter() - start,
        "balanced": objective(keys, balanced),
        "k-means": objective(keys, free),
        "random": objective(keys, split_neurons(keys, experts, rule="random")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["3072x768", "14336x4096"], help="neurons x width")
    parser.add_argument("--experts", type=int, default=64)
    arguments = parser.parse_args()
    header = None
    for shape in arguments.shapes:
        neurons, width = map(int, shape.split("x"))
        for kind, make in (("random", random_keys), ("planted", planted_keys)):
            values = measure(make(neurons, width, arguments.experts), arguments.experts)
            if header is None:
                header = "".join(f"{name:>18}" for name in values)
                print(f"{'keys':24}{header}")
            print(f"{f'{shape} {kind}':24}" + "".join(f"{value:18.1f}" for value in values.values()), flush=True)


if __name__ == "__main__":
    main()
