"""What similarity unrelated weights have: the null that every parametric figure shows."""

import math


def null_cosine_sd(shape: tuple[int, ...]) -> float:
    """Standard deviation of the cosine of two independent isotropic random vectors; its mean is 0.

    shape: what is compared. (m, d) for level "matrix" of up, act and down; (d,) for level
    "neuron_mean" and for the router's rows. The variance is exactly 1/n, n the number of
    components, whatever the distribution of the norms.
    """
    components = math.prod(shape)
    if components < 1:
        raise ValueError(f"a vector has at least one component; shape {shape} has none")
    return 1 / math.sqrt(components)
