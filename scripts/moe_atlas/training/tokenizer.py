"""The one tokenizer of the demo models: byte-level BPE trained on the demo's training texts."""

import os
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moe_atlas.corpora import demo_texts
from moe_atlas.files import write_json

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
PAD, MASK = "<pad>", "<mask>"  # of models that need them
PAD_ID, MASK_ID = 3, 4


def train_tokenizer(texts: list[str], size: int, masks: bool = False) -> Tokenizer:
    """A byte-level BPE of `size` entries; `<unk>` is 0, `<s>` 1 and put before every text, `</s>` 2.

    With `masks` `<pad>` is 3 and `<mask>` 4, and there are two merges fewer.
    """
    # The merges do not depend on the number of threads, but a forked worker would make the library warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[UNK, BOS, EOS, *((PAD, MASK) if masks else ())],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def demo_tokenizer(size: int, masks: bool = False) -> Tokenizer:
    """The tokenizer that all demo models share, or with `masks` all encoders, trained on prose-train and code-train."""
    texts = [text for name in ("prose-train", "code-train") for _, text in demo_texts(name)]
    return train_tokenizer(texts, size, masks)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": UNK, "bos_token": BOS, "eos_token": EOS}
    others = {"pad_token": PAD, "mask_token": MASK}
    special |= {name: token for name, token in others.items() if tokenizer.token_to_id(token) is not None}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
        },
    )
