"""Send a corpus through a checkpoint layer by layer and keep what its experts did."""

import argparse
import json

import polars as pl
import torch
from safetensors.torch import save_file

from moe_atlas import probe, tables, tokens
from moe_atlas.errors import AtlasError
from moe_atlas.files import atomic_path
from moe_atlas.log import Progress, run, say
from moe_atlas.manifest import open_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--corpus", required=True, help="row id of config/corpora.tsv")
    parser.add_argument("--kind", required=True, choices=("short", "long"), help="short corpora keep a row a token")
    parser.add_argument("--checkpoint", required=True, help="the model's checkpoint.json")
    parser.add_argument("--dense-reference", help="checkpoint.json of the dense model whose FFN is F")
    parser.add_argument("--corpus-file", required=True, help="parquet file with the column text")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="precision of the run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--activations", required=True, help="activations.safetensors to write")
    parser.add_argument("--tokens", required=True, help="tokens.parquet to write")
    arguments = parser.parse_args()

    checkpoint, manifest = open_checkpoint(arguments.checkpoint)
    reference = open_checkpoint(arguments.dense_reference)[0] if arguments.dense_reference else None
    texts = pl.read_parquet(arguments.corpus_file)["text"].to_list()
    tokenizer = tokens.load_tokenizer(checkpoint.directory)
    sequences = tokens.encode(tokenizer, texts)
    if not any(sequences):
        raise AtlasError(f"{arguments.corpus_file}: the corpus has no tokens; correct its row in the corpora sheet.")
    if reference is not None and tokens.encode(tokens.load_tokenizer(reference.directory), texts) != sequences:
        raise AtlasError(
            f"{reference.directory}: its tokenizer gives other tokens than that of {checkpoint.directory}; "
            "name another dense_reference or none."
        )
    say(f"{sum(map(len, sequences))} tokens in {len(sequences)} sequences on {arguments.device}")
    progress = Progress(manifest["L"], "layer")
    descriptions, tensors = probe.extract(
        checkpoint,
        sequences,
        keep_tokens=arguments.kind == "short",
        dtype=arguments.dtype,
        reference=reference,
        device=arguments.device,
        on_layer=lambda layer, layers: progress.step(),
    )
    atlas = {
        "model": arguments.model,
        "corpus": arguments.corpus,
        "kind": arguments.kind,
        "layers": descriptions,
    }
    tables.write(
        "tokens", tokens.token_table(tokenizer, sequences, arguments.model, arguments.corpus), arguments.tokens
    )
    with atomic_path(arguments.activations) as temporary:
        save_file(tensors, temporary, metadata={"atlas": json.dumps(atlas)})


if __name__ == "__main__":
    run(main)
