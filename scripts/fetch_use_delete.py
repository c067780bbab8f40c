"""Look into a model of the Hub that is larger than the disk: fetch its shards, use them, delete them, in one pass.

Writes what download_checkpoint.py, weight_statistics.py and extract_activations.py write for a model that is kept.
At most three shards lie on disk at a time; each is checked against the Hub's hash before it is used.
"""

import argparse
from pathlib import Path

from moe_atlas import devices, probe, tables
from moe_atlas.architectures.view import dense_view, expert_bank
from moe_atlas.checkpoints.fetched import MAX_SHARDS, FetchedCheckpoint
from moe_atlas.extraction import Corpus, Reader
from moe_atlas.files import write_json
from moe_atlas.hub.download import ShardFolder, fetch
from moe_atlas.hub.repository import look_up
from moe_atlas.log import Progress, run, say, size
from moe_atlas.manifest import describe, open_checkpoint, shape_of
from moe_atlas.parametric.arguments import add_options, statistics_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--repository", required=True, help="OWNER/NAME on the Hub")
    parser.add_argument("--revision", required=True, help="commit of the repository, 40 hex digits")
    parser.add_argument("--dense-reference", help="checkpoint.json of the dense model whose FFN is F")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="precision of the run")
    parser.add_argument("--device", default=devices.default(), help="cpu or cuda")
    parser.add_argument("--shards", required=True, type=Path, help="folder for the shards, emptied at the end")
    parser.add_argument(
        "--corpus",
        action="append",
        required=True,
        nargs=6,
        metavar=("NAME", "KIND", "FILE", "ACTIVATIONS", "TOKENS", "INTERMEDIATE"),
        help="a corpus: id, short or long, its parquet file, and the three files to write; once for each corpus",
    )
    add_options(parser)
    parser.add_argument("--output", required=True, help="checkpoint.json to write")
    arguments = parser.parse_args()
    device = devices.claim_found(arguments.device)

    repository = look_up(arguments.repository, arguments.revision)
    directory = fetch(repository, repository.small)
    shape = shape_of(arguments.model, directory, dense_allowed=False)
    reference = open_checkpoint(arguments.dense_reference)[0] if arguments.dense_reference else None
    reader = Reader(directory, reference and reference.directory)
    corpora = [Corpus(*values) for values in arguments.corpus]
    texts = [reader.read(corpus) for corpus in corpora]

    folder = ShardFolder(repository, arguments.shards)
    folder.check_space()
    checkpoint = FetchedCheckpoint(directory, folder.shard_of(), folder)
    wanted = sum(file.bytes for file in repository.weights)
    say(f"{len(repository.weights)} shards, {size(wanted)}, at most {MAX_SHARDS} of them in {arguments.shards}")
    statistics = statistics_of(arguments, shape["moe_layers"])
    progress = Progress(shape["L"], "layer")

    def use(index, layer, dense_layer) -> None:
        if index in shape["moe_layers"]:
            statistics.add(index, expert_bank(layer), dense_view(dense_layer))
        progress.step(f"{size(checkpoint.bytes_read)} read, {len(checkpoint.fetched)} shards fetched")

    records = probe.extract_texts(
        checkpoint,
        texts,
        dtype=arguments.dtype,
        reference=reference,
        device=device,
        spill_directory=arguments.shards,
        on_layer=use,
        whole=True,
    )
    description = describe(
        arguments.model,
        f"hf:{repository.name}",
        repository.revision,
        directory,
        dense_allowed=False,
        licence=repository.licence,
        files=[file.as_record() for file in repository.weights],
        fetched=checkpoint,
    )
    checkpoint.close()
    folder.remove()
    say(f"{len(checkpoint.fetched)} shards fetched, at most {checkpoint.most} on disk at a time")
    for corpus, text, record in zip(corpora, texts, records, strict=True):
        reader.write(arguments.model, corpus, text, record)
    for name, frame in statistics.tables().items():
        tables.write(name, frame, getattr(arguments, name))
    write_json(arguments.output, description)


if __name__ == "__main__":
    run(main)
