"""Write the page that links every model, figure, table and notebook below results/."""

import argparse
from pathlib import Path

from moe_atlas.errors import AtlasError
from moe_atlas.files import atomic_path
from moe_atlas.index import index
from moe_atlas.log import run, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", required=True, nargs="+", help="row ids of the models sheet, in order")
    parser.add_argument("--output", required=True, type=Path, help="index.html, at the top of the results")
    args = parser.parse_args()
    results = args.output.parent
    if not results.is_dir():
        raise AtlasError(f"{results}: there is no such directory; make results before their index.")
    text = index(args.models, results)
    with atomic_path(args.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    say(f"{args.output}: {len(args.models)} models, {text.count('<figure>')} figures shown")


if __name__ == "__main__":
    run(main)
