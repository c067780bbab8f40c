"""The whole analysis of one model: its texts in, the tables of moe_atlas.tables.heads out."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from moe_atlas.architectures.attention_experts import RoutedExperts
from moe_atlas.behavioral.resampling import block_weights
from moe_atlas.heads import ablation, association, circuits, classes, compare, load, maps
from moe_atlas.heads.frames import Row, frame, place
from moe_atlas.heads.material import Material, Names
from moe_atlas.heads.model import Host
from moe_atlas.heads.reading import Reading
from moe_atlas.heads.record import ChoiceRecord, MapRecord
from moe_atlas.log import Progress, say
from moe_atlas.tables import FORMS, HEADS

FAMILIES = {"form": FORMS, "frequency": classes.FREQUENCIES}


@dataclass(frozen=True)
class Settings:
    """How much is read of each text: tokens whose choices are counted, whose losses are taken, whose maps are compared,
    the latter in windows of map_length. longest: of a window else, None for the model's own. seed: of all that is
    drawn.
    """

    tokens: int = 16384
    loss_tokens: int = 4096
    map_tokens: int = 1024
    map_length: int = 128
    longest: int | None = None
    seed: int = 0


@dataclass
class _Side:
    """What the layers that read one side of a text share: the resamples of its documents and the exchanges."""

    drawn_blocks: np.ndarray
    counted: np.ndarray
    frequent: np.ndarray
    exchanges: association.Exchanges
    named: dict[str, dict[int, str]]


class Analysis:
    """Fills the tables text by text. `model` is what the tables call it."""

    def __init__(self, host: Host, model: str, names: Names, settings: Settings):
        self.host, self.model, self.names, self.settings = host, model, names, settings
        self.parts: dict[str, list[pl.DataFrame]] = {name: [] for name in HEADS}
        self.summaries: dict[tuple, dict[str, compare.Summary]] = defaultdict(dict)

    def tables(self, texts: Mapping[str, Material]) -> dict[str, pl.DataFrame]:
        """Every table, by name. texts: corpus -> what is read."""
        progress = Progress((1 + 3 * len(texts)) * self.host.layers, "layer")
        for experts in self.host.each():
            if experts.site == "attention":
                self._add("moa_circuits", circuits.circuit_rows(experts.circuits(), self.settings.seed), None, experts)
        progress.step("circuits", self.host.layers)
        for number, (corpus, material) in enumerate(texts.items()):
            generator = np.random.default_rng([self.settings.seed, number])
            shares = self._choices(corpus, material, generator, progress)
            self._maps(corpus, material, generator, progress)
            self._ablation(corpus, material, shares, generator, progress)
        self._sites(np.random.default_rng([self.settings.seed, len(texts)]))
        return {name: pl.concat([frame(name, []), *parts]) for name, parts in self.parts.items()}

    def _add(self, table: str, rows: list[Row], corpus: str | None, experts: RoutedExperts | None = None, **more):
        fields = {"model": self.model} | (place(experts) if experts else {}) | more
        fields |= {} if corpus is None else {"corpus": corpus}
        fields = {name: value for name, value in fields.items() if name in HEADS[table].schema}
        self.parts[table].append(frame(table, rows, **fields))

    def _reading(self, material: Material, most: int, longest: int | None = None, **more) -> Reading:
        longest = min(filter(None, (longest, self.settings.longest, self.host.longest)), default=None)
        return material.reading(self.host.objective, self.names, most, longest, **more)

    def _side(self, record: ChoiceRecord, generator: np.random.Generator) -> _Side:
        index, counted = record.index, record.counted
        types = index.token.numpy()[counted]
        kinds, at, counts = np.unique(types, return_inverse=True, return_counts=True)
        frequent = counts[at] >= association.FEWEST
        texts = {int(one): self.names.text(int(one)) for one in np.unique(index.token.numpy())}
        named = {"form": classes.forms(list(texts), texts, self.names.special), "frequency": classes.frequencies(types)}
        exchanges = association.Exchanges(index.sequence.numpy()[counted][frequent], generator)
        return _Side(block_weights(index.blocks, generator), counted, frequent, exchanges, named)

    def _choices(self, corpus: str, material: Material, generator: np.random.Generator, progress: Progress) -> dict:
        """Load and association; (site, kind, layer) -> family -> log shares of classes (E, C), and the sides."""
        read = self._reading(material, self.settings.tokens)
        sides: dict[str, _Side] = {}
        shares: dict = {"sides": sides, "experts": {}}
        for record in self.host.observe(read.batches, lambda one: ChoiceRecord(one, read), progress.step):
            if record.side not in sides:
                sides[record.side] = self._side(record, generator)
            side, experts = sides[record.side], record.experts
            key = experts.site, experts.kind, experts.layer
            kept, ids, size = side.counted, record.ids[side.counted].astype(np.int64), experts.experts
            blocks, types = record.index.block.numpy()[kept], record.index.token.numpy()[kept]
            loads = load.by_block(ids, np.ones(ids.shape), blocks, size, record.index.blocks)
            weights = load.by_block(ids, record.weights[kept], blocks, size, record.index.blocks)
            self._add("moa_load", load.load_rows(loads, weights, side.drawn_blocks, len(ids)), corpus, experts)
            rows = load.routing_rows(loads, side.drawn_blocks, len(ids), experts.top_k, generator)
            self._add("moa_routing", rows, corpus, experts)
            sequences = record.index.sequence.numpy()[kept]
            for router, chosen in (
                ("frozen" if experts.frozen else "learned", ids),
                ("random", record.random_ids[kept].astype(np.int64)),
            ):
                choices = association.Choices(chosen, types, sequences, blocks, size, record.index.blocks)
                found = association.associate(choices.of(side.frequent), side.exchanges, side.drawn_blocks)
                row = association.association_row(found)
                self._add("moa_association", [row], corpus, experts, router=router)
                self._add("moa_tokens", association.token_rows(found, self.names.text), corpus, experts, router=router)
                if router != "random":
                    summary = compare.Summary(loads, side.drawn_blocks, found.corrected)
                    self.summaries[key][corpus] = summary
            shares["experts"][key] = experts, record.side, {
                family: ablation.log_shares(
                    ids, ablation.class_of(types, side.named[family], own), size, len(own)
                )
                for family, own in FAMILIES.items()
            }  # fmt: skip
        return shares

    def _maps(self, corpus: str, material: Material, generator: np.random.Generator, progress: Progress) -> None:
        length = self.settings.map_length
        read = self._reading(material, self.settings.map_tokens, length, batch_tokens=4 * length)
        weights = {side: block_weights(index.blocks, generator) for side, index in read.index.items()}
        for record in self.host.observe(read.batches, lambda one: MapRecord(one, read), progress.step):
            experts = record.experts
            if experts.site == "attention":
                distances = experts.kind != "cross"
                rows = maps.map_rows(record.sums, weights[record.side], generator, distances)
                self._add("moa_maps", rows, corpus, experts)

    def _ablation(
        self, corpus: str, material: Material, shares: dict, generator: np.random.Generator, progress: Progress
    ) -> None:
        read = self._reading(material, self.settings.loss_tokens, hidden=self.settings.seed)
        side = read.side("decoder")
        index, named = read.index[side], shares["sides"][side].named
        arms, losses = self.host.losses(read.batches, progress.step)
        losses = losses.numpy()
        say(f"{corpus}: loss {losses[0].mean():.3f} nats a token, {len(arms)} experts left out one by one")
        blocks = np.concatenate([batch.blocks.numpy() for batch in read.batches])
        rows_read = np.concatenate([batch.read.numpy() for batch in read.batches])
        predicted = np.concatenate([batch.labels.numpy() for batch in read.batches])
        by = {"predicted": predicted} if (rows_read < 0).all() else {
            "read": index.token.numpy()[rows_read], "predicted": predicted,
        }  # fmt: skip
        drawn_blocks = block_weights(index.blocks, generator)
        for key, (experts, own_side, log_shares) in shares["experts"].items():
            own = [place for place, (of, _) in enumerate(arms, start=1) if of == key]
            deltas = losses[own] - losses[0]
            everywhere = ablation.Classes("predicted", "all", ("all",), np.zeros(len(predicted), dtype=np.int64))
            found = ablation.costs(deltas, everywhere, blocks, drawn_blocks)
            self._add("moa_ablation", ablation.ablation_rows(found, everywhere, None), corpus, experts)
            for who, types in by.items():
                for family, of in FAMILIES.items():
                    known = own_side == side and (who == "read" or len(by) == 1)
                    one = ablation.Classes(who, family, of, ablation.class_of(types, named[family], of))
                    found = ablation.costs(deltas, one, blocks, drawn_blocks)
                    rows = ablation.ablation_rows(found, one, log_shares[family] if known else None)
                    self._add("moa_ablation", rows, corpus, experts)
                    if known and family == "form":
                        row = ablation.correlation_row(found, log_shares[family], generator)
                        router = "frozen" if experts.frozen else "learned"
                        self._add("moa_association", [row], corpus, experts, router=router)

    def _sites(self, generator: np.random.Generator) -> None:
        for (site, _, layer), attention in self.summaries.items():
            ffn = self.summaries.get(("ffn", "ffn", layer))
            if site == "attention" and ffn:
                for corpus in attention:
                    self._add("moa_sites", compare.site_rows(attention[corpus], ffn[corpus]), corpus, layer=layer)
                self._add("moa_sites", compare.domain_rows(attention, ffn, generator), None, layer=layer)
