"""Checkpoints in the Hub's format, put in place without a moment in which half of one is there."""

import os
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from moe_atlas.files import replaced_checkpoint
from moe_atlas.training.tokenizer import save_tokenizer


def save_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, shard_size: int) -> list[str]:
    """Write config, safetensors (with an index if sharded) and tokenizer into `folder`; return their names.

    `shard_size` in bytes, 0 for one file.
    """
    disable_progress_bar()
    with replaced_checkpoint(folder) as temporary:
        model.save_pretrained(temporary, max_shard_size=shard_size or "1TB")
        save_tokenizer(tokenizer, temporary, model.config.max_position_embeddings)
        return sorted(os.listdir(temporary))
