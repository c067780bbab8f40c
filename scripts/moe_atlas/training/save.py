"""Checkpoints in the Hub's format, put in place without a moment in which half of one is there."""

import os
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from moe_atlas.training.tokenizer import save_tokenizer


def save_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, shard_size: int) -> list[str]:
    """Write config, safetensors (with an index if sharded) and tokenizer into `folder`; return their names.

    Everything is written to a folder beside it and then moved file by file, weights first; weight files of
    an earlier run that this one did not write are removed. `shard_size` in bytes, 0 for one file.
    """
    disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    temporary.mkdir()
    try:
        model.save_pretrained(temporary, max_shard_size=shard_size or "1TB")
        save_tokenizer(tokenizer, temporary, model.config.max_position_embeddings)
        names = sorted(path.name for path in temporary.iterdir())
        for name in sorted(names, key=lambda name: not name.endswith(".safetensors")):
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary)
    for path in folder.glob("*.safetensors*"):
        if path.name not in names:
            path.unlink()
    return names
