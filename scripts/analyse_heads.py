"""Look at the attention experts of a model, and at FFN experts beside them: load, tokens, circuits, maps, ablation."""

import argparse
from pathlib import Path

from moe_atlas import devices, tables
from moe_atlas.log import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="what the tables call the model")
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="checkpoint.json, a folder in the Hub's format, or a file beside such a checkpoint",
    )
    parser.add_argument(
        "--corpus", required=True, nargs=2, action="append", metavar=("ID", "FILE"),
        help="parquet with a column text, or of a translation model source and target; repeat",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a corpus whose choices are counted, about")
    parser.add_argument("--loss-tokens", type=int, default=4096, help="tokens whose losses without an expert are taken")
    parser.add_argument("--map-tokens", type=int, default=1024, help="tokens whose attention maps are compared")
    parser.add_argument("--map-length", type=int, default=128, help="tokens of a window of which maps are compared")
    parser.add_argument("--longest", type=int, default=0, help="tokens of a window else (default: the model's longest)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling, exchanges and masks")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="precision of the run")
    parser.add_argument("--device", default=devices.default(), help="cpu or cuda")
    parser.add_argument("--output-dir", required=True, type=Path, help="where the tables go, one parquet each")
    arguments = parser.parse_args()
    device = devices.claim_found(arguments.device)

    from moe_atlas.heads.material import read_material
    from moe_atlas.heads.model import open_host
    from moe_atlas.heads.run import Analysis, Settings
    from moe_atlas.manifest import open_checkpoint

    path = arguments.checkpoint
    if path.name == "checkpoint.json":
        directory = open_checkpoint(path)[0].directory
    else:
        directory = path if path.is_dir() else path.parent
    host = open_host(directory, arguments.dtype, device, arguments.output_dir)
    read = {name: read_material(directory, file, host.objective) for name, file in arguments.corpus}
    settings = Settings(
        arguments.tokens, arguments.loss_tokens, arguments.map_tokens, arguments.map_length,
        arguments.longest or None, arguments.seed,
    )  # fmt: skip
    names = next(iter(read.values()))[1]
    found = Analysis(host, arguments.model, names, settings).tables({name: own for name, (own, _) in read.items()})
    for name, frame in found.items():
        tables.write(name, frame, arguments.output_dir / f"{name}.parquet")


if __name__ == "__main__":
    run(main)
