"""Every value of every table, as the command-line programs write them, against tests/reference.py."""

import subprocess
import sys
from pathlib import Path

import families
import polars as pl
import pytest
import reference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moe_atlas import tables
from moe_atlas.behavioral.tables import FROM_LAYERS, FROM_SUMS, FROM_TOKENS
from moe_atlas.parametric.gather import NAMES

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["the router picks two experts", "an expert is a feed-forward network", "experts of one layer", "the end"]


def program(name: str, *arguments: object) -> None:
    """Run one of the scripts as a user would, and show what it said if it fails."""
    command = [sys.executable, f"scripts/{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def save_tokenizer(directory: Path) -> Tokenizer:
    """A byte-level BPE of 96 tokens that begins every text with <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted({character for text in TEXTS for character in text.replace(" ", "Ġ")})
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=96, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return tokenizer


@pytest.mark.parametrize("family", ["mixtral", "deepseek"])
def test_every_table_value_equals_a_float64_recomputation(tmp_path, family):
    checkpoints = {"m": tmp_path / "checkpoint"} | ({"dense": tmp_path / "dense"} if family == "mixtral" else {})
    families.save(family, checkpoints["m"], max_shard_size="40KB")
    if "dense" in checkpoints:
        families.save("mistral", checkpoints["dense"])
    for name, directory in checkpoints.items():
        tokenizer = save_tokenizer(directory)
        described = ("--model", name, "--source", f"path:{directory}", "--directory", directory, "--dense-allowed")
        program("describe_checkpoint", *described, "--output", tmp_path / f"{name}.json")
    corpus = tmp_path / "corpus.parquet"
    pl.DataFrame({"text": TEXTS}).write_parquet(corpus)
    dense = ("--dense-reference", tmp_path / "dense.json") if "dense" in checkpoints else ()
    source = ("--model", "m", "--checkpoint", tmp_path / "m.json", *dense)
    written = {name: tmp_path / f"{name}.parquet" for name in tables.TABLES}

    options = [part for name in NAMES for part in (f"--{name.replace('_', '-')}", written[name])]
    program("weight_statistics", *source, *options)
    regression = ("--similarity", written["similarity"], "--seed", 0, "--output", written["regression"])
    program("router_regression", *regression)
    recorded = ("--activations", tmp_path / "a.safetensors", "--tokens", written["tokens"])
    states = ("--intermediate", tmp_path / "i.safetensors")
    texts = ("--corpus", "c", "--kind", "short", "--corpus-file", corpus)
    program("extract_activations", *source, *texts, *recorded, *states)
    behavioral = [*FROM_SUMS, *FROM_LAYERS, *FROM_TOKENS]
    options = [part for name in behavioral for part in (f"--{name.replace('_', '-')}", written[name])]
    program("behavioral_tables", *recorded, *options)

    sequences = [tokenizer.encode(text).ids for text in TEXTS]
    tokens = tables.read("tokens", written["tokens"])
    assert tokens["token_id"].to_list() == [index for ids in sequences for index in ids]
    assert "".join(tokens.filter(pl.col("sequence") == 1)["token"]) == "<s>" + TEXTS[1]
    second = reference.Reference(checkpoints["m"], checkpoints.get("dense"))
    expected = {"similarity": second.similarity("m"), "regression": second.regression("m")}
    expected |= second.behavior("m", "c", sequences)
    assert set(expected) == {"similarity", "regression", *FROM_SUMS, *FROM_TOKENS}
    for name, frame in expected.items():
        ours = tables.read(name, written[name])
        assert len(ours) > 0
        for column, difference in reference.largest_difference(name, ours, frame).items():
            assert difference < 1e-5, (name, column, difference)
