"""One forward pass over one or more corpora: what every expert answers to every token, as sufficient statistics.

The pass is layer-major: each layer is read once and all tokens go through it. Short corpora keep a row
a token; long ones keep counts and sums, so memory and disk do not grow with the text. The layout of
the result is described in results/README.md (activations.safetensors).
"""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from moe_atlas.accumulate import LoadCounts, PairSums, pair_cosines, rank_counts
from moe_atlas.architectures.ffn import dense_ffn
from moe_atlas.architectures.sites import ExpertSite, find_sites
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.router_rule import RouterRule
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
            choice = self.site.choice()
            self.rule = RouterRule(experts, choice.bias, choice.groups, choice.jitter)
        compared = [outputs]
        if self.has_own:
            compared.append(self.own[tokens][None])
        if self.reference is not None:
            compared.append(self.reference(inputs)[None])
        if self.site.shared is not None:
            compared.append(self.site.shared(inputs)[None])
        cosines = pair_cosines(torch.cat([part.to(outputs.dtype) for part in compared]))
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32).T
        own = self.site.own_logits
        self.rule.add(logits if own is None else own[tokens], ids, weights, logits)
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
        arrays = {**self.pairs.arrays(), **self.load.arrays(), **self.rule.arrays()}
        arrays |= {"rank_counts": self.ranks, **self.kept}
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


@dataclass(frozen=True)
class Text:
    """A corpus as token ids, special tokens included; keep_tokens keeps a row a token (short corpora)."""

    sequences: Sequence[Sequence[int]]
    keep_tokens: bool


@dataclass
class Record:
    """What the experts did on one text: descriptions of the expert sites, tensors `layer_{l}.{site}.{name}`."""

    sites: list[dict] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class LayerObserver(Protocol):
    """Who wants to see each layer while its weights are in memory."""

    def __call__(self, index: int, layer: nn.Module, dense_layer: nn.Module | None) -> None:
        """The decoder layer, and the dense reference's layer of the same index where there is one."""


def extract(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], *, keep_tokens: bool, **options
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """One text through a checkpoint: sites and tensors of its Record. `options` are those of extract_texts."""
    (record,) = extract_texts(checkpoint, [Text(sequences, keep_tokens)], **options)
    return record.sites, record.tensors


def extract_texts(
    checkpoint: Checkpoint,
    texts: Sequence[Text],
    *,
    dtype: str = "auto",
    reference: Checkpoint | None = None,
    device: str | torch.device = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    on_layer: LayerObserver = lambda index, layer, dense_layer: None,
) -> list[Record]:
    """Run texts through a checkpoint in one pass over its layers and return what its experts did on each.

    reference: a dense checkpoint of the same width and tokenizer; its FFN of the same layer is compared
    as F (on its own hidden states) and F_same_input (on the MoE's inputs; A Closer Look, 5.1 has F only).
    A dense model has no sites. Raises AtlasError when the reference has another width.
    """
    stream = LayerStream(checkpoint, dtype, device)
    dense = LayerStream(reference, dtype, device) if reference is not None else None
    if dense is not None and dense.config.hidden_size != stream.config.hidden_size:
        raise AtlasError(
            f"{reference.directory}: hidden size {dense.config.hidden_size} differs from the "
            f"{stream.config.hidden_size} of {checkpoint.directory}; name another dense_reference or none."
        )
    batches = [make_batches(text.sequences, batch_tokens) for text in texts]
    for batch in itertools.chain(*batches):
        batch.tokens = batch.tokens.to(device)
    for run in filter(None, (stream, dense)):
        run.begin([batch.ids for batch in itertools.chain(*batches)])
    records = [Record() for _ in texts]
    for index in range(len(stream)):
        paired = dense is not None and index < len(dense)
        with stream.layer(index) as layer, dense.layer(index) if paired else contextlib.nullcontext() as dense_layer:
            first = 0
            for text, own, record in zip(texts, batches, records, strict=True):
                probes = _observe(stream, dense if paired else None, index, layer, dense_layer, text, own, first)
                first += len(own)
                for probe in probes:
                    record.sites.append(probe.description())
                    prefix = f"layer_{index}.{probe.site.name}"
                    record.tensors |= {f"{prefix}.{name}": array for name, array in probe.arrays().items()}
            on_layer(index, layer, dense_layer)
    return records


def _observe(
    stream: LayerStream,
    dense: LayerStream | None,
    index: int,
    layer: nn.Module,
    dense_layer: nn.Module | None,
    text: Text,
    batches: list[Batch],
    first: int,
) -> list[SiteProbe]:
    """Send one text's batches, number `first` and on of the stream, through the layer in memory."""
    total = sum(map(len, text.sequences)) if text.keep_tokens else 0
    ffn = dense_ffn(dense_layer) if dense is not None else None
    probes = []
    for site in find_sites(layer):
        compared = site.name == "ffn" and ffn is not None
        probes.append(SiteProbe(site, index, total, ffn if compared else None, has_own=compared))
    with contextlib.ExitStack() as stack:
        for probe in probes:
            stack.enter_context(probe.site.observed(probe))
        for number, batch in enumerate(batches, start=first):
            with _output_of(ffn) as own:
                if dense is not None:
                    dense.step(number)
            for probe in probes:
                probe.start(batch, own[0] if own and probe.has_own else None)
            stream.step(number)
    return probes
