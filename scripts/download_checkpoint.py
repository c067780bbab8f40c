"""Fetch a model of the Hub into the client's cache, check every file, and write its checkpoint.json."""

import argparse

from moe_atlas.files import sha256, write_json
from moe_atlas.hub.download import fetch
from moe_atlas.hub.repository import look_up
from moe_atlas.log import run
from moe_atlas.manifest import describe, shape_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--repository", required=True, help="OWNER/NAME on the Hub")
    parser.add_argument("--revision", required=True, help="commit of the repository, 40 hex digits")
    parser.add_argument("--dense-allowed", action="store_true", help="accept a model without experts")
    parser.add_argument("--output", required=True, help="checkpoint.json to write")
    arguments = parser.parse_args()

    repository = look_up(arguments.repository, arguments.revision)
    # A model that cannot be looked into is refused before its weights are fetched.
    shape_of(arguments.model, fetch(repository, repository.small), arguments.dense_allowed)
    directory = fetch(repository, repository.weights)
    files = [
        {"name": file.name, "bytes": file.bytes, "sha256": file.sha256 or sha256(directory / file.name)}
        for file in repository.weights
    ]
    description = describe(
        arguments.model,
        f"hf:{repository.name}",
        repository.revision,
        directory,
        arguments.dense_allowed,
        licence=repository.licence,
        files=files,
    )
    write_json(arguments.output, description)


if __name__ == "__main__":
    run(main)
