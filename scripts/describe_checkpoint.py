"""Check a checkpoint directory and write its checkpoint.json: shape, files, sizes, sha256."""

import argparse

from moe_atlas.files import write_json
from moe_atlas.log import run
from moe_atlas.manifest import describe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--source", required=True, help="the row's source, kept for the record")
    parser.add_argument("--revision", default="", help="the row's revision, kept for the record")
    parser.add_argument("--directory", required=True, help="checkpoint in the Hub's format")
    parser.add_argument("--dense-allowed", action="store_true", help="accept a model without experts")
    parser.add_argument("--output", required=True, help="checkpoint.json to write")
    arguments = parser.parse_args()
    write_json(
        arguments.output,
        describe(arguments.model, arguments.source, arguments.revision, arguments.directory, arguments.dense_allowed),
    )


if __name__ == "__main__":
    run(main)
