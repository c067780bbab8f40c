"""Tune one model on one task in some arms of a study: all their seeds, at learning rates chosen on a validation set."""

import argparse
import os

# Set before transformers is imported: tuning reads nothing from the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# On a GPU torch refuses to repeat a product exactly without a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from moe_atlas import devices, tables
from moe_atlas.log import run, say
from moe_atlas.tuning.settings import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, help="file with models, tasks, arms and learning rates (yaml)")
    parser.add_argument("--study", required=True, help="id of the study in it")
    parser.add_argument("--model", required=True, help="id of the model")
    parser.add_argument("--task", required=True, help="id of the task")
    parser.add_argument("--part", required=True, type=int, help="which of the study's groups of arms, from 1")
    parser.add_argument("--examples", required=True, help="table emoe_tasks of the task (parquet)")
    parser.add_argument("--device", default=devices.default(), help="cpu or cuda")
    parser.add_argument("--runs", required=True, help="table emoe_runs to write (parquet)")
    parser.add_argument("--selection", required=True, help="table emoe_training_selection to write (parquet)")
    arguments = parser.parse_args()
    settings = load_settings(arguments.settings)
    job = settings.job(arguments.study, arguments.model, arguments.task, arguments.part)
    device = devices.claim_found(arguments.device)

    from transformers.utils import logging  # after --help and wrong names: it takes seconds

    from moe_atlas.tuning.run import run_job

    logging.set_verbosity_error()  # a new head is what is wanted here, not a warning
    logging.disable_progress_bar()
    runs, selection = run_job(settings, job, tables.read("emoe_tasks", arguments.examples), device)
    tables.write("emoe_runs", runs, arguments.runs)
    tables.write("emoe_training_selection", selection, arguments.selection)
    say(f"{len(runs)} values written to {arguments.runs}")


if __name__ == "__main__":
    run(main)
