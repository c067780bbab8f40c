"""Send a corpus, or a part of it, through a checkpoint layer by layer and keep what its experts did."""

import argparse
from pathlib import Path

from moe_atlas import devices, probe
from moe_atlas.budget import MIB, Budget
from moe_atlas.extraction import Corpus, Reader
from moe_atlas.log import Progress, run
from moe_atlas.manifest import open_checkpoint
from moe_atlas.parts import write_part
from moe_atlas.record import Part, digest
from moe_atlas.resume import SavedState, checkpoint_version, program_version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--corpus", required=True, help="row id of config/corpora.tsv")
    parser.add_argument("--kind", required=True, choices=("short", "long"), help="short corpora keep a row a token")
    parser.add_argument("--checkpoint", required=True, help="the model's checkpoint.json")
    parser.add_argument("--dense-reference", help="checkpoint.json of the dense model whose FFN is F")
    parser.add_argument("--corpus-file", required=True, help="parquet file with the column text")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="precision of the run")
    parser.add_argument("--device", default=devices.default(), help="cpu or cuda")
    parser.add_argument("--memory", type=int, help="MiB that the run may take; without it as much as it needs")
    parser.add_argument("--activations", required=True, help="activations.safetensors to write, or a part of them")
    parser.add_argument("--tokens", help="tokens.parquet to write; not with a part")
    parser.add_argument("--intermediate", help="intermediate.safetensors to write; empty if long; not with a part")
    parser.add_argument("--parts", type=int, help="parts that a long corpus is dealt to, for merge_activations.py")
    parser.add_argument("--part", type=int, default=1, help="the part that is run, from 1")
    parser.add_argument("--state", help="folder that keeps each finished layer, from which a killed run goes on")
    arguments = parser.parse_args()
    whole = arguments.parts is None
    if whole and None in (arguments.tokens, arguments.intermediate):
        parser.error("--tokens and --intermediate are needed, or --parts")
    if not whole and arguments.kind != "long":
        parser.error("only a long corpus can be dealt to parts")
    part = None if whole else Part(arguments.part, arguments.parts)
    device = devices.claim_found(arguments.device)

    checkpoint, manifest = open_checkpoint(arguments.checkpoint)
    reference, dense = open_checkpoint(arguments.dense_reference) if arguments.dense_reference else (None, None)
    written = arguments.activations, arguments.tokens, arguments.intermediate
    corpus = Corpus(arguments.corpus, arguments.kind, arguments.corpus_file, *written)
    reader = Reader(checkpoint.directory, reference and reference.directory)
    text = reader.read(corpus, part)
    # The intermediate states of a short text are kept to the end.
    kept = 4 * sum(map(len, text.sequences)) * (manifest["N"] + 1) * manifest["m"] * len(manifest["moe_layers"])
    budget = Budget(arguments.memory and arguments.memory * MIB, kept if text.keep_tokens else 0)
    progress = Progress(manifest["L"], "layer")
    run_of = {"checkpoint": checkpoint_version(manifest), "dense reference": dense and checkpoint_version(dense)}
    state = None
    if arguments.state:
        program = program_version("scripts/extract_activations.py")
        state = SavedState(arguments.state, {"program version": program} | run_of)

    def on_layer(index: int, *_layers: object) -> None:
        progress.skip(index - progress.done)
        progress.step()

    (record,) = probe.extract_texts(
        checkpoint,
        [text],
        dtype=arguments.dtype,
        reference=reference,
        device=device,
        spill_directory=Path(arguments.activations).parent,
        budget=budget,
        on_layer=on_layer,
        state=state,
    )
    if part is None:
        reader.write(arguments.model, corpus, text, record)
    else:
        run_of |= {"model": arguments.model, "corpus": arguments.corpus, "text": digest([text])}
        write_part(
            arguments.activations, part, record, run_of | {"dtype": arguments.dtype, "device": device.split(":")[0]}
        )
    if state is not None:
        state.remove()


if __name__ == "__main__":
    run(main)
