"""One revision of a model repository: which of its files a run needs, and what each of them must be."""

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from moe_atlas.checkpoints.checkpoint import LAYOUTS, shards_of_index
from moe_atlas.errors import AtlasError
from moe_atlas.hub.errors import hub_errors, page, token
from moe_atlas.hub.file import HubFile

# Everything a run reads besides the weights: the configuration and the tokenizer, in every form the Hub has. No code.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model*",
    "*.tiktoken",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Repository:
    """The files of one revision that a run needs.

    name: OWNER/NAME; revision: 40 hex digits; licence: as the Hub's card says, "" if it does not. weights: the weight
    files in order, of the one format that is read; small: configuration, tokenizer and index. shard_of: tensor name ->
    weight file, empty where there is one file and no index.
    """

    name: str
    revision: str
    licence: str
    weights: tuple[HubFile, ...]
    small: tuple[HubFile, ...]
    shard_of: dict[str, str]


def look_up(name: str, revision: str) -> Repository:
    """Ask the Hub what is in a repository and choose the files to fetch; reads no weights.

    Of several formats of the same weights one is taken: safetensors before .bin, and never the copies in other layouts
    that many repositories ship beside them (consolidated.*, original/, metal/, *.gguf).
    Raises AtlasError: not there, gated, no such revision, no network, no weights in a format that is read.
    """
    with hub_errors(name, revision):
        api = HfApi(token=token())
        api.auth_check(name)  # what a gated repository holds is public, its files are not
        info = api.model_info(name, revision=revision, files_metadata=True)
        found = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        index, single = next(
            ((index, single) for index, single in LAYOUTS if index in found or single in found), (None, None)
        )
        if index is None:
            others = sorted({Path(file).suffix for file in found} - {".md", ".py", ".json", ""})
            raise AtlasError(
                f"hf:{name}: there are no weights in a format that is read ({' or '.join(x for _, x in LAYOUTS)}), "
                f"only files of the suffixes {', '.join(others) or 'none'}; name a converted repository, "
                f"see {page(name)}."
            )
        shard_of = {}
        if index in found:
            path = hf_hub_download(name, index, revision=revision, token=token())
            shard_of = shards_of_index(Path(path))
    shards = sorted(set(shard_of.values())) or [single]
    missing = [shard for shard in shards if shard not in found]
    if missing:
        raise AtlasError(f"hf:{name}: the shard {missing[0]} is named by {index} but not there; take another revision.")
    small = [
        file for file in sorted(found) if file == index or any(fnmatch.fnmatch(file, form) for form in SMALL_FILES)
    ]
    return Repository(
        name,
        info.sha,
        _licence(info),
        tuple(HubFile.of(found[file]) for file in shards),
        tuple(HubFile.of(found[file]) for file in small if "/" not in file),
        shard_of,
    )


def _licence(info) -> str:
    """The licence of the model card, else of the repository's tags."""
    card = info.card_data.get("license") if info.card_data else None
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    return card if isinstance(card, str) else next(iter(tags), "")
