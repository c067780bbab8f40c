"""Small dense models of several families and what is asked of them: for the tests of EMoE checkpoints."""

import torch
from model_types import token_ids
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from moe_atlas import architectures
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.stream import LayerStream

architectures.register()

IDS = torch.tensor(token_ids([11, 11], vocabulary=64))
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
FAMILIES = {
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES),  # GELU, two norms after the sublayers
    # One matrix with a bias before a GELU, stored the other way round; the embeddings are the head's weights.
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    # Gate and up in one matrix.
    "phi3": Phi3Config(**{key: value for key, value in SIZES.items() if key != "head_dim"}),
}


def dense_model(name, seed=0, dtype=torch.float32):
    """A dense model whose FFNs matter to its logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(FAMILIES[name]).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return network.to(dtype)


def logits(network):
    with torch.no_grad():
        return network(IDS, use_cache=False).logits


def loaded(folder, **arguments):
    network, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return network.eval()


def streamed(folder, ids=IDS):
    stream = LayerStream(Checkpoint(folder))
    stream.begin([ids])
    for index in range(len(stream)):
        with stream.layer(index):
            stream.step(0)
    return stream.logits(0)


def tensors(folder):
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
