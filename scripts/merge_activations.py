"""Put the parts of one extraction together, as one run over the whole corpus would have written them."""

import argparse

from moe_atlas.extraction import Corpus, Reader
from moe_atlas.log import run, say
from moe_atlas.manifest import open_checkpoint
from moe_atlas.parts import merge_parts
from moe_atlas.record import digest
from moe_atlas.resume import checkpoint_version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--corpus", required=True, help="row id of config/corpora.tsv, a long corpus")
    parser.add_argument("--checkpoint", required=True, help="the model's checkpoint.json")
    parser.add_argument("--corpus-file", required=True, help="parquet file with the column text")
    parser.add_argument("--parts", required=True, nargs="+", help="all that extract_activations.py --parts wrote")
    parser.add_argument("--activations", required=True, help="activations.safetensors to write")
    parser.add_argument("--tokens", required=True, help="tokens.parquet to write")
    parser.add_argument("--intermediate", required=True, help="intermediate.safetensors to write, without tensors")
    arguments = parser.parse_args()

    checkpoint, manifest = open_checkpoint(arguments.checkpoint)
    written = arguments.activations, arguments.tokens, arguments.intermediate
    corpus = Corpus(arguments.corpus, "long", arguments.corpus_file, *written)
    reader = Reader(checkpoint.directory)
    text = reader.read(corpus)
    run_of = {"model": arguments.model, "corpus": arguments.corpus, "text": digest([text])}
    record = merge_parts(arguments.parts, run_of | {"checkpoint": checkpoint_version(manifest)})
    reader.write(arguments.model, corpus, text, record)
    say(f"{len(record.sites)} layers and sites of {len(arguments.parts)} parts")


if __name__ == "__main__":
    run(main)
