"""A small BERT, pre-trained on the demo texts by predicting masked tokens: the encoder of the embedded fine-tuning."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM

from moe_atlas.errors import AtlasError
from moe_atlas.files import sha256, write_json
from moe_atlas.log import Progress, say
from moe_atlas.training.data import Batches, encode, pack, texts_of, unigram
from moe_atlas.training.loop import learning_rate_factor, make_deterministic
from moe_atlas.training.recipes import load
from moe_atlas.training.save import save_checkpoint
from moe_atlas.training.tokenizer import EOS_ID, UNK_ID, demo_tokenizer

DOMAINS = ("prose", "code")
STEPS, BATCH, LENGTH, RATE = 800, 8, 64, 3e-3
# `<unk>` is in no text of a byte-level tokenizer, so that it is free to be the mask; `</s>` is the padding.
MASK_ID, PAD_ID = UNK_ID, EOS_ID
_MASKED = 0.2
_IGNORED = -100


def encoder_config(vocabulary: int) -> BertConfig:
    """Width, depth and FFN of demo-mistral."""
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
        type_vocab_size=2,
        pad_token_id=PAD_ID,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
    )


def mask(ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets) of token ids (batch, length): a fifth of them, never the first, behind the mask.

    Targets are -100 where nothing is to be predicted. In BERT's manner of 10 such tokens 8 are masked, one is another
    token and one stays (Devlin et al. 2018, section 3.1).
    """
    drawn = torch.rand(ids.shape, generator=generator)
    chosen = drawn < _MASKED
    chosen[:, 0] = False
    inputs = ids.clone()
    inputs[chosen & (drawn < 0.8 * _MASKED)] = MASK_ID
    other = chosen & (drawn >= 0.9 * _MASKED)
    inputs[other] = torch.randint(EOS_ID + 1, int(ids.max()) + 1, (int(other.sum()),), generator=generator)
    return inputs, ids.masked_fill(~chosen, _IGNORED)


def train_encoder(output: Path, steps_factor: float = 1.0, seed: int = 0) -> dict:
    """Train it, write the checkpoint beside `output` (training.json) and return what that file says.

    Raises AtlasError when it predicts held-out tokens no better than their frequencies do.
    """
    make_deterministic(seed)
    steps = max(2, round(STEPS * steps_factor))
    tokenizer = demo_tokenizer(next(iter(load().values())).tokenizer_size)
    model = BertForMaskedLM(encoder_config(tokenizer.get_vocab_size()))
    trained = {domain: encode(tokenizer, texts_of(domain, training=True)) for domain in DOMAINS}
    batches = Batches(trained, dict.fromkeys(DOMAINS, 1 / len(DOMAINS)), BATCH, LENGTH, seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    output.unlink(missing_ok=True)  # while weights change, nothing vouches for them
    progress = Progress(steps, "step")
    model.train()
    for _ in range(steps):
        loss = _loss(model, *mask(batches.next(), generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.step(f"loss {loss.item():.3f}")
    model.eval()
    found, baseline = _held_out(model, tokenizer, trained)
    say(f"held-out masked tokens: perplexity {math.exp(found):.1f}, unigram model {math.exp(baseline):.1f}")
    if not found < (0.95 * baseline if steps_factor >= 1 else math.log(tokenizer.get_vocab_size())):
        raise AtlasError(f"{output.parent.name}: it has not learned to predict masked tokens; give it more steps.")
    names = save_checkpoint(model, tokenizer, output.parent, 0)
    record = {"seed": seed, "steps": steps, "perplexity": math.exp(found), "unigram_perplexity": math.exp(baseline)}
    record["files"] = {name: sha256(output.parent / name) for name in names}
    write_json(output, record)
    return record


def _loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats) of the masked tokens."""
    logits = model(input_ids=inputs).logits
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)


@torch.no_grad()
def _held_out(model: nn.Module, tokenizer, trained: dict) -> tuple[float, float]:
    """(loss, unigram model's loss) of masked tokens of held-out texts, nats a token."""
    import numpy as np

    texts = [ids for domain in DOMAINS for ids in encode(tokenizer, texts_of(domain, training=False))]
    ids = torch.from_numpy(pack(texts, LENGTH, np.random.default_rng(0)))
    inputs, targets = mask(ids, torch.Generator().manual_seed(0))
    probabilities = unigram(trained, tokenizer.get_vocab_size())
    baseline = -np.log(probabilities[targets[targets != _IGNORED].numpy()]).mean()
    losses, counts = zip(
        *(
            (float(_loss(model, part, goal)), int((goal != _IGNORED).sum()))
            for part, goal in zip(inputs.split(32), targets.split(32), strict=True)
        ),
        strict=True,
    )
    return float(np.average(losses, weights=counts)), float(baseline)
