"""Train one arm of a MoA study: all its seeds up to their plateaus, at a learning rate chosen on a validation set."""

import argparse
import os
from pathlib import Path

# Set before transformers is imported: training reads nothing from the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# On a GPU torch refuses to repeat a product exactly without a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from moe_atlas import devices, tables
from moe_atlas.log import run, say
from moe_atlas.moa.settings import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, help="file with arms, objectives and studies (yaml)")
    parser.add_argument("--study", required=True, help="id of the study in it")
    parser.add_argument("--objective", required=True, help="id of the objective in it")
    parser.add_argument("--arm", required=True, help="id of the arm")
    parser.add_argument("--data", type=Path, help="of a source data:FILE, the folder of its token ids")
    parser.add_argument("--device", default=devices.default(), help="cpu or cuda")
    parser.add_argument("--runs", required=True, help="table moa_runs to write (parquet)")
    parser.add_argument("--curves", required=True, help="table moa_curves to write (parquet)")
    parser.add_argument("--throughput", required=True, help="table moa_throughput to write (parquet)")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the model of seed 0 to write")
    arguments = parser.parse_args()
    settings = load_settings(arguments.settings)
    job = settings.job(arguments.study, arguments.objective, arguments.arm)
    device = devices.claim_found(arguments.device)

    from moe_atlas.moa.registry import objective_of  # after --help and wrong names: it takes seconds
    from moe_atlas.moa.run import run_job

    objective = objective_of(settings.tasks[job.objective], arguments.data)
    found = run_job(settings, job, objective, arguments.checkpoint, device)
    for name, frame in found.items():
        tables.write(name, frame, getattr(arguments, name.removeprefix("moa_")))
    say(f"{len(found['moa_runs'])} values written to {arguments.runs}")


if __name__ == "__main__":
    run(main)
