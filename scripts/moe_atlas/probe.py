"""One forward pass over a corpus: what every expert answers to every token, as sufficient statistics.

The pass is layer-major: each layer is read once and all tokens go through it. Short corpora keep a row
a token; long ones keep counts and sums, so memory and disk do not grow with the text. The layout of
the result is described in results/README.md (activations.safetensors).
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from moe_atlas.accumulate import LoadCounts, PairSums, pair_cosines, rank_counts
from moe_atlas.architectures.ffn import dense_ffn
from moe_atlas.architectures.sites import ExpertSite, find_sites
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.stream import LayerStream

# Padded tokens of one batch: attention and norms of a layer work on so many at a time.
BATCH_TOKENS = 4096


@dataclass
class Batch:
    """Sequences of similar length, right-padded to one width."""

    ids: torch.Tensor  # (b, t) int64
    tokens: torch.Tensor  # (n,) indices of the real tokens among the b * t
    rows: torch.Tensor  # (n,) the tokens' places in the corpus


def make_batches(sequences: Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Group token id lists into batches of at most `batch_tokens` padded tokens (at least one sequence each).

    Every token of the corpus is in exactly one batch; `rows` counts tokens in the order of `sequences`.
    """
    starts = torch.tensor([0, *map(len, sequences)]).cumsum(0).tolist()
    groups: list[list[int]] = []
    for index in sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i)):
        width = len(sequences[index])
        if groups and (len(groups[-1]) + 1) * width <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    batches = []
    for group in groups:
        width = len(sequences[group[-1]])
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        tokens, rows = [], []
        for row, index in enumerate(group):
            length = len(sequences[index])
            ids[row, :length] = torch.tensor(sequences[index])
            tokens.append(row * width + torch.arange(length))
            rows.append(starts[index] + torch.arange(length))
        batches.append(Batch(ids, torch.cat(tokens), torch.cat(rows)))
    return batches


@dataclass
class SiteProbe:
    """Watches one expert site of one layer over all batches (an architectures.sites.Observer)."""

    site: ExpertSite
    layer: int
    keep_tokens: int  # tokens of a short corpus, 0 for a long one
    reference: nn.Module | None = None  # dense FFN for F_same_input
    has_own: bool = False  # whether the dense FFN's output on its own hidden states comes with each batch
    labels: list[str] = field(init=False)
    batch: Batch | None = None
    own: torch.Tensor | None = None  # (b * t, d) of the current batch

    def __post_init__(self):
        self.labels = [str(expert) for expert in range(self.site.num_experts)]
        self.labels += ["F"] * self.has_own + ["F_same_input"] * (self.reference is not None)
        self.labels += ["SE"] * (self.site.shared is not None)
        self.load: LoadCounts | None = None
        self.kept: dict[str, torch.Tensor] = {}

    def tokens(self) -> torch.Tensor:
        return self.batch.tokens

    def start(self, batch: Batch, own: torch.Tensor | None) -> None:
        """What the following calls of the site belong to."""
        self.batch, self.own = batch, own
        self._row_of = torch.zeros(batch.ids.numel(), dtype=torch.int64)
        self._row_of[batch.tokens.cpu()] = batch.rows

    def record(self, tokens, inputs, logits, ids, weights, outputs) -> None:
        experts = self.site.num_experts
        if self.load is None:
            self.load = LoadCounts(experts, ids.shape[1])
            self.pairs = PairSums(len(self.labels), outputs.device)
            self.ranks = torch.zeros(experts, experts, dtype=torch.float64, device=outputs.device)
        compared = [outputs]
        if self.has_own:
            compared.append(self.own[tokens][None])
        if self.reference is not None:
            compared.append(self.reference(inputs)[None])
        if self.site.shared is not None:
            compared.append(self.site.shared(inputs)[None])
        cosines = pair_cosines(torch.cat([part.to(outputs.dtype) for part in compared]))
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32).T
        ids, weights = _by_weight(ids, weights, experts)
        self.pairs.add(cosines)
        self.ranks += rank_counts(logits, norms)
        self.load.add(ids, weights)
        if self.keep_tokens:
            rows = self._row_of[tokens.cpu()]
            self._keep(rows, ids=ids, weights=weights.float(), logits=logits, norms=norms, cosine=cosines.float())

    def _keep(self, rows: torch.Tensor, **values: torch.Tensor) -> None:
        for name, value in values.items():
            if name not in self.kept:
                self.kept[name] = torch.empty(self.keep_tokens, *value.shape[1:], dtype=value.dtype)
            self.kept[name][rows] = value.cpu()

    def arrays(self) -> dict[str, torch.Tensor]:
        """All statistics by name, on the CPU."""
        arrays = {**self.pairs.arrays(), **self.load.arrays(), "rank_counts": self.ranks, **self.kept}
        return {name: array.cpu() for name, array in arrays.items()}

    def description(self) -> dict:
        """What the metadata of activations.safetensors says of this site."""
        top_k = self.load.load_tokens.shape[1]
        return {
            "layer": self.layer,
            "site": self.site.name,
            "experts": self.site.num_experts,
            "top_k": top_k,
            "labels": self.labels,
        }


def _by_weight(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts with the largest weight first; an empty slot (an id of N) becomes -1, last, weight 0."""
    used = ids < experts
    order = weights.masked_fill(~used, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ids = torch.where(used, ids, -1).gather(1, order)
    return ids, torch.where(used, weights, 0).gather(1, order)


@contextlib.contextmanager
def _output_of(module: nn.Module | None):
    """Collect the output of a module's next call, flattened to (b * t, d)."""
    seen: list[torch.Tensor] = []
    if module is None:
        yield seen
        return
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.flatten(0, -2)))
    try:
        yield seen
    finally:
        handle.remove()


def extract(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    *,
    keep_tokens: bool,
    dtype: str = "auto",
    reference: Checkpoint | None = None,
    device: str | torch.device = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    on_layer: Callable[[int, int], None] = lambda layer, layers: None,
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Run a corpus through a checkpoint and return what its experts did.

    sequences: token ids, special tokens included. keep_tokens: keep a row a token (short corpora).
    reference: a dense checkpoint of the same width and tokenizer; its FFN of the same layer is compared
    as F (on its own hidden states) and F_same_input (on the MoE's inputs; A Closer Look, 5.1 has F only).
    Returns descriptions of the expert sites and tensors `layer_{l}.{site}.{name}`. A dense model has none.
    """
    batches = make_batches(sequences, batch_tokens)
    total = sum(map(len, sequences)) if keep_tokens else 0
    stream = LayerStream(checkpoint, dtype, device)
    dense = LayerStream(reference, dtype, device) if reference is not None else None
    if dense is not None and dense.config.hidden_size != stream.config.hidden_size:
        raise AtlasError(
            f"{reference.directory}: hidden size {dense.config.hidden_size} differs from the "
            f"{stream.config.hidden_size} of {checkpoint.directory}; name another dense_reference or none."
        )
    for batch in batches:
        batch.tokens = batch.tokens.to(device)
    for run in filter(None, (stream, dense)):
        run.begin([batch.ids for batch in batches])
    descriptions, tensors = [], {}
    for index in range(len(stream)):
        paired = dense is not None and index < len(dense)
        with stream.layer(index) as layer, dense.layer(index) if paired else contextlib.nullcontext() as dense_layer:
            ffn = dense_ffn(dense_layer) if paired else None
            probes = []
            for site in find_sites(layer):
                compared = site.name == "ffn" and ffn is not None
                probes.append(SiteProbe(site, index, total, ffn if compared else None, has_own=compared))
            with contextlib.ExitStack() as stack:
                for probe in probes:
                    stack.enter_context(probe.site.observed(probe))
                for number, batch in enumerate(batches):
                    with _output_of(ffn) as own:
                        if paired:
                            dense.step(number)
                    for probe in probes:
                        probe.start(batch, own[0] if own and probe.has_own else None)
                    stream.step(number)
        for probe in probes:
            descriptions.append(probe.description())
            prefix = f"layer_{index}.{probe.site.name}"
            tensors |= {f"{prefix}.{name}": array for name, array in probe.arrays().items()}
        on_layer(index, len(stream))
    return descriptions, tensors
