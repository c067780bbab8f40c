"""Measure, without tuning, whether the FFNs of a dense model are modular: EMoE's experts beside random ones."""

import argparse
from pathlib import Path

import numpy as np
import polars as pl

from moe_atlas import devices, tables
from moe_atlas.errors import AtlasError
from moe_atlas.log import Progress, run, say
from moe_atlas.manifest import open_checkpoint
from moe_atlas.modularity import frames
from moe_atlas.modularity.grid import default_layers, loss_arms, read_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--checkpoint", required=True, help="checkpoint.json of a dense causal language model")
    parser.add_argument(
        "--corpus", required=True, nargs=2, action="append", metavar=("ID", "FILE"), help="corpus parquet; repeat"
    )
    parser.add_argument(
        "--grid", required=True, help='experts and chosen experts, N:k,k ...; "16:4,8 32:8" (the first is the main one)'
    )
    parser.add_argument(
        "--layers", nargs="*", type=int, default=[], help="masked layers (default: every second, the last too)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="clusterings, and random splits, of each layer")
    parser.add_argument(
        "--loss-tokens", type=int, default=4096, help="tokens of a corpus that losses are over, at most about"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="precision of the run")
    parser.add_argument("--device", default=devices.default(), help="cpu or cuda")
    parser.add_argument("--mechanism", required=True, type=Path, help="table emoe_mechanism to write (parquet)")
    parser.add_argument("--selection", required=True, type=Path, help="table emoe_selection to write (parquet)")
    parser.add_argument("--correlation", required=True, type=Path, help="table emoe_correlation to write (parquet)")
    arguments = parser.parse_args()
    grid = read_grid(arguments.grid)
    device = devices.claim_found(arguments.device)

    from moe_atlas.modularity.masked_loss import masked_losses
    from moe_atlas.modularity.observe import LayerSplits, observe
    from moe_atlas.modularity.text import read_text, thinned
    from moe_atlas.stream import LayerStream

    checkpoint, manifest = open_checkpoint(arguments.checkpoint)
    if manifest["N"]:
        raise AtlasError(f"{arguments.checkpoint}: {arguments.model} has experts already; name a dense model.")
    layers = sorted(set(arguments.layers)) or default_layers(manifest["L"])
    if layers[0] < 0 or layers[-1] >= manifest["L"]:
        raise AtlasError(f"--layers {layers}: {arguments.model} has layers 0 to {manifest['L'] - 1}.")
    made, arms = LayerSplits(grid, arguments.seeds), loss_arms(grid, layers, arguments.seeds)
    progress = Progress(len(arguments.corpus) * (layers[-1] + 1 + manifest["L"]), "layer")
    mechanism, selection, maps, observed = [], [], [], {}

    def stream() -> LayerStream:
        return LayerStream(checkpoint, arguments.dtype, device, arguments.mechanism.parent)

    for number, (corpus, file) in enumerate(arguments.corpus):
        generator = np.random.default_rng([arguments.seed, number])
        text = read_text(checkpoint.directory, file)
        observed[corpus] = {}
        for layer, kept in observe(stream(), text.batches, text.index, layers, made, progress.step):
            rows = frames.choice_rows(kept.sums, generator)
            tokens = int(kept.sums[0].tokens.sum())
            rows += frames.correlation_rows(kept.sums, kept.correlation, tokens, generator)
            mechanism.append(frames.mechanism_frame(arguments.model, corpus, layer, rows))
            chosen = frames.selection_rows(kept.sums, generator)
            selection.append(frames.selection_frame(arguments.model, corpus, layer, chosen))
            maps.append(frames.correlation_frame(arguments.model, corpus, layer, kept.sums[0], kept.correlation))
            observed[corpus][layer] = kept.sums
            del kept  # its correlations, before the next layer's
        short = thinned(text, arguments.loss_tokens)
        sums, tokens = masked_losses(
            stream(), short.batches, short.index.block, arms,
            lambda layer, arm: made.labels(layer, arm.rule, arm.experts, arm.seed), progress.step,
        )  # fmt: skip
        for layer, row in frames.loss_rows(arms, sums, tokens, generator):
            mechanism.append(frames.mechanism_frame(arguments.model, corpus, layer, [row]))
        say(f"{corpus}: loss {sums[0].sum() / tokens.sum():.3f} nats a token, {len(arms)} ways to mask the model")
    generator = np.random.default_rng([arguments.seed, len(observed)])
    for layer in layers:
        rows = frames.domain_rows({corpus: sums[layer] for corpus, sums in observed.items()}, generator)
        mechanism.append(frames.mechanism_frame(arguments.model, None, layer, rows))
    written = {"emoe_mechanism": (mechanism, arguments.mechanism), "emoe_selection": (selection, arguments.selection)}
    for name, (parts, path) in (written | {"emoe_correlation": (maps, arguments.correlation)}).items():
        tables.write(name, pl.concat(parts), path)


if __name__ == "__main__":
    run(main)
