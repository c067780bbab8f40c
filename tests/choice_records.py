"""What extraction records of choices, made from given or random ones, for tests."""

import numpy as np
import torch

from moe_atlas.choices import Confidence, choice_arrays


def choose(scores, top_k=2):
    return torch.as_tensor(scores).topk(top_k).indices


def arrays_of(ids, index, experts, random_ids=None):
    """What extraction records of these choices, as numpy; every gate is 1/k, every norm of expert e is 1 + e."""
    ids = torch.as_tensor(ids)
    arrays = choice_arrays(ids, ids if random_ids is None else random_ids, index, experts)
    confidence = Confidence(index, experts, ids.shape[1])
    logits = torch.zeros(len(ids), experts).scatter(1, ids.clamp_min(0), 2.0)
    confidence.add(logits, torch.arange(len(ids)))
    arrays = {name: array.numpy() for name, array in (arrays | confidence.arrays()).items()}
    count = arrays["choice_any"].astype(np.float64)
    arrays |= {
        "importance_count": count,
        "importance_gate": count / ids.shape[1],
        "importance_norm": count * (1 + np.arange(experts)),
        "importance_reap": count * (1 + np.arange(experts)) / ids.shape[1],
        "importance_output_max": np.random.default_rng(9).random(experts, dtype=np.float32),
    }
    return arrays


def noise(index, experts, seed=1):
    return torch.rand(len(index), experts, generator=torch.Generator().manual_seed(seed))
