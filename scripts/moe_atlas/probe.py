"""One forward pass over one or more corpora: what every expert answers to every token, as sufficient statistics.

The pass is layer-major: each layer is read once and all tokens go through it. Short corpora keep a row
a token; long ones keep counts and sums, so memory and disk do not grow with the text. The layout of
the result is described in results/README.md (activations.safetensors).
"""

import contextlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from moe_atlas import merge, recorders
from moe_atlas.architectures.ffn import dense_ffn, ffn_activation
from moe_atlas.architectures.sites import ExpertSite, find_sites
from moe_atlas.budget import Budget
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.choices import random_router
from moe_atlas.chunk import Chunk, Recorder
from moe_atlas.cross_ranks import CrossRanks
from moe_atlas.errors import AtlasError
from moe_atlas.log import say
from moe_atlas.record import Record, Text, digest, packed, unpacked
from moe_atlas.resume import SavedState
from moe_atlas.router_rule import RouterRule
from moe_atlas.states import ActivationHistogram, States
from moe_atlas.stream import UNBOUNDED, LayerStream
from moe_atlas.text_index import TextIndex

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


def _batches_of(text: Text, batch_tokens: int) -> list[Batch]:
    """The batches of a text or of a part. A part runs batches of the whole text: others would round differently."""
    batches = make_batches(text.sequences, batch_tokens)
    # They come by length, so that the parts take about the same time.
    return batches if text.part is None else batches[text.part.number - 1 :: text.part.count]


@dataclass(frozen=True)
class DenseRun:
    """What the dense reference's FFN got and gave on its own hidden states, for one batch: (b * t, d) each."""

    inputs: torch.Tensor
    outputs: torch.Tensor


@dataclass
class SiteProbe:
    """Watches one expert site of one layer over all batches (an architectures.sites.Observer)."""

    site: ExpertSite
    layer: int
    index: TextIndex
    stream: LayerStream  # through which the layer came
    keep_tokens: bool = False  # a row a token, for short texts
    reference: nn.Module | None = None  # dense FFN for F_same_input
    has_own: bool = False  # whether the dense FFN's run on its own hidden states comes with each batch
    labels: list[str] = field(init=False)
    batch: Batch | None = None
    own: DenseRun | None = None  # of the current batch

    def __post_init__(self):
        self.labels = [str(expert) for expert in range(self.site.num_experts)]
        self.labels += ["F"] * self.has_own + ["F_same_input"] * (self.reference is not None)
        self.labels += ["SE"] * (self.site.shared is not None)
        self.at_once = self.stream.at_once
        self.recorders: list[Recorder] = []  # of all batches: what they keep does not depend on the order
        self.of_batch: list[Recorder] = []  # of the current one: sums of float64 numbers
        self.sums: dict[str, torch.Tensor] = {}  # of the batches before, as merge.joined has them
        self.histogram: ActivationHistogram | None = None
        self.states = States(len(self.index), self.site.num_experts) if self.keep_tokens else None

    def tokens(self) -> torch.Tensor:
        return self.batch.tokens

    def ready(self, experts: slice) -> None:
        self.stream.wait_for(experts)

    def done(self, experts: slice) -> None:
        self.stream.done_with(experts)

    def start(self, batch: Batch, own: DenseRun | None) -> None:
        """What the following calls of the site belong to."""
        self._end_batch()
        self.batch, self.own = batch, own
        self._row_of = torch.zeros(batch.ids.numel(), dtype=torch.int64)
        self._row_of[batch.tokens.cpu()] = batch.rows
        self._inactive: torch.Tensor | None = None  # (b * t,) neurons of all experts at most 0.001

    def activation(self, tokens: torch.Tensor, experts: slice, activation: torch.Tensor) -> None:
        if self.histogram is None:
            self.histogram = ActivationHistogram(self.site.num_experts, activation.device)
        if self._inactive is None:
            self._inactive = torch.zeros(self.batch.ids.numel(), dtype=torch.int64, device=activation.device)
        self._neurons = self.site.num_experts * activation.shape[2]
        self._inactive[tokens] += self.histogram.add(experts, activation)
        if self.states is not None:
            asked = self.has_own and experts.start == 0
            own = ffn_activation(self.reference, self.own.inputs[tokens]) if asked else None
            self.states.add(self._row_of[tokens.cpu()], experts, activation, own)

    def _begin(self, top_k: int) -> None:
        """Make the recorders: how many experts a token may choose is known from the first call."""
        experts, choice = self.site.num_experts, self.site.choice()
        self.top_k = top_k
        self.random_router = random_router(self.site.router_weight, seed=self.layer).float()
        self.recorders = [
            recorders.Rule(RouterRule(experts, choice.bias, choice.groups, choice.jitter)),
            recorders.Choices(self.index, experts, top_k),
        ]
        if self.keep_tokens:
            self.recorders.append(recorders.Tokens(len(self.index)))

    def _begin_batch(self, device: torch.device) -> None:
        experts, blocks = self.site.num_experts, self.index.blocks
        self.of_batch = [
            recorders.Ranks(experts, device),
            recorders.Load(experts, self.top_k),
            recorders.Pairs(len(self.labels), blocks, device),
            recorders.Documents(self.labels, experts, blocks, device),
            recorders.Importance(experts, blocks, device),
            recorders.Confidence(self.index, experts, self.top_k),
            CrossRanks(experts, device),
        ]

    def _end_batch(self) -> None:
        """Add what the batch gave to what those before gave, exactly: the sums are the same in parts, too."""
        for recorder in self.of_batch:
            self.sums = merge.joined(self.sums, merge.opened(recorder.arrays()))
        self.of_batch = []

    def record(self, tokens, inputs, logits, ids, weights, outputs) -> None:
        if not self.recorders:
            self._begin(ids.shape[1])
        if not self.of_batch:
            self._begin_batch(outputs.device)
        compared = []
        if self.has_own:
            compared.append(self.own.outputs[tokens][None])
        if self.reference is not None:
            compared.append(self.reference(inputs)[None])
        if self.site.shared is not None:
            compared.append(self.site.shared(inputs)[None])
        rows, own_logits = self._row_of[tokens.cpu()], self.site.own_logits
        ordered = _by_weight(ids, weights, self.site.num_experts)
        random_logits = functional.linear(self.site.routed[tokens].float(), self.random_router)
        chunk = Chunk(
            rows=rows,
            first=(self.index.position[rows] == 0).to(outputs.device),
            block=self.index.block[rows].to(outputs.device),
            blocks=self.index.blocks,
            own_logits=logits if own_logits is None else own_logits[tokens],
            logits=logits,
            router_ids=ids,
            router_weights=weights,
            ids=ordered[0],
            weights=ordered[1],
            random_ids=random_logits.topk(min(self.top_k, self.site.num_experts), dim=-1).indices,
            outputs=outputs,
            others=torch.cat([part.to(outputs.dtype) for part in compared]) if compared else None,
            active=None if self._inactive is None else 1 - self._inactive[tokens].to(torch.float64) / self._neurons,
        )
        # Ranks are asked first.
        for recorder in (*self.of_batch, *self.recorders):
            recorder.add(chunk)

    def arrays(self) -> dict[str, torch.Tensor]:
        """All statistics of the batches by name, on the CPU, as merge.joined has them."""
        self._end_batch()
        arrays = dict(self.sums)
        for recorder in self.recorders:
            arrays |= merge.opened(recorder.arrays())
        if self.histogram is not None:
            arrays |= self.histogram.arrays()
        return {name: array.cpu().contiguous() for name, array in arrays.items()}

    def description(self) -> dict:
        """What the metadata of activations.safetensors says of this site."""
        return {
            "layer": self.layer,
            "site": self.site.name,
            "experts": self.site.num_experts,
            "top_k": self.top_k,
            "labels": self.labels,
        }


def _by_weight(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts with the largest weight first; an empty slot (an id of N) becomes -1, last, weight 0."""
    used = ids < experts
    order = weights.masked_fill(~used, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ids = torch.where(used, ids, -1).gather(1, order)
    return ids, torch.where(used, weights, 0).gather(1, order)


@contextlib.contextmanager
def _runs_of(module: nn.Module | None):
    """Collect what a module's next calls get and give, flattened to (b * t, d)."""
    seen: list[DenseRun] = []
    if module is None:
        yield seen
        return

    def remember(_module, args, kwargs, output):
        called_with = args[0] if args else next(iter(kwargs.values()))
        seen.append(DenseRun(called_with.flatten(0, -2), output.flatten(0, -2)))

    handle = module.register_forward_hook(remember, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class LayerObserver(Protocol):
    """Who wants to see each layer while it is in memory."""

    def __call__(self, index: int, layer: nn.Module, dense_layer: nn.Module | None) -> None:
        """The decoder layer, and the dense reference's layer of the same index where there is one.

        Its experts' weights are those of the layer only where the run was asked for whole layers.
        """


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
    spill_directory: str | os.PathLike | None = None,
    budget: Budget = UNBOUNDED,
    on_layer: LayerObserver = lambda index, layer, dense_layer: None,
    whole: bool = False,
    state: SavedState | None = None,
) -> list[Record]:
    """Run texts through a checkpoint in one pass over its layers and return what its experts did on each.

    The record of a part of a text has expansions in the place of sums (see merge.py), and is empty where the text has
    fewer batches than parts.

    reference: a dense checkpoint of the same width and tokenizer; its FFN of the same layer is compared
    as F (on its own hidden states) and F_same_input (on the MoE's inputs; A Closer Look, 5.1 has F only).
    spill_directory: where hidden states go that do not fit into memory (see stream.py). A dense model has no sites.
    budget: what the run may hold; the next layer is read while one is at work where that allows it, and where it does
    not allow a layer, experts are read one by one, again for each chunk of tokens.
    whole: keep all experts of a layer until on_layer has seen it; else the next layer's are read in their place.
    state: where to keep what is known after each layer, and to go on from; layers that are done already are not read,
    and on_layer is not called for them. It must be of these checkpoints; the caller removes it when it has the records.
    Raises AtlasError when the reference has another width, or when two experts do not fit into the budget.
    """
    dense = LayerStream(reference, dtype, device, spill_directory) if reference is not None else None
    if dense is not None and budget.memory is not None:
        sizes = dense.sizes()
        budget = budget.less(2 * max(sizes.layers) + sizes.outside)
    stream = LayerStream(checkpoint, dtype, device, spill_directory, budget, whole)
    if dense is not None and dense.config.hidden_size != stream.config.hidden_size:
        raise AtlasError(
            f"{reference.directory}: hidden size {dense.config.hidden_size} differs from the "
            f"{stream.config.hidden_size} of {checkpoint.directory}; name another dense_reference or none."
        )
    if budget.memory is not None:
        say(f"in memory at a time: {stream.held.value}")
    indices = [TextIndex.of(text.sequences, text.documents) for text in texts]
    batches = [_batches_of(text, batch_tokens) for text in texts]
    for batch in itertools.chain(*batches):
        batch.tokens = batch.tokens.to(device)
    if not any(batches):
        return [Record() for _ in texts]
    runs = {name: run for name, run in (("model", stream), ("dense", dense)) if run is not None}
    records, start = [Record() for _ in texts], 0
    if state is not None:
        precision = {"dtype": [str(run.model.dtype) for run in runs.values()], "device": stream.device.type}
        parts = {"part": [str(text.part) for text in texts]}
        start = state.open({"text": digest(texts), "batch size": batch_tokens} | parts | precision)
        for kept in state.records():
            _join(records, unpacked(*kept))
    ids = [batch.ids for batch in itertools.chain(*batches)]
    for name, run in _with_layer(start, runs).items():
        run.begin(ids, start)
        for number in range(len(ids) if start else 0):
            run.set_state(number, state.hidden(f"{name}_{number}"))
    for index in range(start, len(stream)):
        of_layer = [Record() for _ in texts]
        paired = dense is not None and index < len(dense)
        with (
            stream.layer(index) as layer,
            dense.layer(index) if paired else contextlib.nullcontext() as dense_layer,
        ):
            first = 0
            for text, place, own, record in zip(texts, indices, batches, of_layer, strict=True):
                if not own:
                    continue
                probes = [_probe(site, index, place, text, dense_layer, stream) for site in find_sites(layer)]
                _observe(stream, dense if paired else None, dense_layer, probes, own, first)
                first += len(own)
                for probe in probes:
                    arrays = probe.arrays() if text.part else merge.closed(probe.arrays())
                    record.add(probe.description(), arrays, probe.states)
            on_layer(index, layer, dense_layer)
        _join(records, of_layer)
        if state is not None:
            going_on = _with_layer(index + 1, runs).items()
            hidden = ((f"{name}_{number}", run.state(number)) for name, run in going_on for number in range(len(ids)))
            state.keep(index, *packed(of_layer), hidden)
    return records


def _with_layer(index: int, runs: dict[str, LayerStream]) -> dict[str, LayerStream]:
    """The runs that layer `index` of the model will use."""
    return {name: run for name, run in runs.items() if index < min(len(run), len(runs["model"]))}


def _join(records: list[Record], others: list[Record]) -> None:
    for record, other in zip(records, others, strict=True):
        record.join(other)


def _probe(
    site: ExpertSite, layer: int, index: TextIndex, text: Text, dense_layer: nn.Module | None, stream: LayerStream
) -> SiteProbe:
    """A probe of one site, which compares FFN experts with the FFN of the dense reference's layer, if there is one."""
    ffn = dense_ffn(dense_layer) if dense_layer is not None and site.name == "ffn" else None
    return SiteProbe(site, layer, index, stream, text.keep_tokens, ffn, has_own=ffn is not None)


def _observe(
    stream: LayerStream,
    dense: LayerStream | None,
    dense_layer: nn.Module | None,
    probes: list[SiteProbe],
    batches: list[Batch],
    first: int,
) -> None:
    """Send one text's batches, number `first` and on of the stream, through the layer in memory."""
    ffn = dense_ffn(dense_layer) if dense is not None else None
    with contextlib.ExitStack() as stack:
        for probe in probes:
            stack.enter_context(probe.site.observed(probe))
        for number, batch in enumerate(batches, start=first):
            with _runs_of(ffn) as own:
                if dense is not None:
                    dense.step(number)
            for probe in probes:
                probe.start(batch, own[0] if own and probe.has_own else None)
            stream.step(number)
