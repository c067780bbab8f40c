"""What runs on a GPU gives what the processor gives. Skipped where there is none."""

import copy

import families
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from test_emoe_tuning import frame
from transformers import BertConfig, BertForMaskedLM

from moe_atlas.architectures.moa import MoAAttention
from moe_atlas.architectures.moa_config import MoAConfig
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.layer_weights import Stack
from moe_atlas.probe import extract
from moe_atlas.training.save import save_checkpoint
from moe_atlas.training.tokenizer import train_tokenizer
from moe_atlas.tuning.run import run_job
from moe_atlas.tuning.settings import Settings, Shape, Study

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SEQUENCES = families.token_ids([11, 5, 11, 8, 30, 2])


@pytest.fixture(autouse=True)
def whole_products(monkeypatch):
    """Products in whole float32, and as the programs are run: each repeats exactly."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name != "mistral"])
def test_every_statistic_is_the_processors(family, tmp_path):
    """Choices are the same; numbers agree to rounding. A value beside an edge may fall on its other side."""
    families.save(family, tmp_path)
    here, there = (
        extract(Checkpoint(tmp_path), SEQUENCES, keep_tokens=True, device=device, batch_tokens=16)
        for device in ("cpu", "cuda")
    )
    assert here[0] == there[0] and set(here[1]) == set(there[1])
    for name, tensor in here[1].items():
        found = there[1][name]
        assert found.device.type == "cpu" and found.dtype == tensor.dtype, name
        if name.endswith("_histogram"):
            shift = (found - tensor).cumsum(-1).abs()
            assert shift.max() <= 2 and shift.sum() <= 0.002 * tensor.sum(), name
            continue
        atol = 0.01 if name.endswith("document_sum") else 1e-4
        torch.testing.assert_close(found, tensor, atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_run_gives_the_same_bytes(dtype, tmp_path):
    families.save("mixtral", tmp_path)
    first, second = (
        extract(Checkpoint(tmp_path), SEQUENCES, keep_tokens=True, device="cuda", dtype=dtype)[1] for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("arm", ["emoe", "emoe-learn-softmax", "gmoe", "static-mask", "lora-emoe", "dense-dropout"])
def test_an_arm_is_tuned_and_repeats(arm, tmp_path):
    """Masks, routers and copies go where the model goes; two runs give the same table."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    tokenizer = train_tokenizer(["red green blue one two three four"], 300)
    save_checkpoint(BertForMaskedLM(config), tokenizer, tmp_path, 0)
    study = Study("s", ("m",), ("t",), (arm,), (Shape(8, 2, (1,)),), (1.0,), 2, 1, {"full": (0.01,), "lora": (0.01,)})
    settings = Settings(
        models={"m": {"folder": str(tmp_path), "ready": ""}},
        tasks={"t": {"source": "demo:t", "metric": "accuracy"}},
        defaults={},
        studies={"s": study},
        training={"length": 16, "steps": 8, "batch": 8, "evaluate": 4, "patience": 2, "weight_decay": 0.01},
        copies={"experts": 4, "k": 2},
        arms_per_job=1,
        job_needs={},
    )
    (job,) = settings.jobs()
    first, second = (run_job(settings, job, frame(), "cuda") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_frame_equal(one, other)
    assert first[0].filter(pl.col("test") == "shifted")["value"].is_finite().all()


def test_experts_on_their_way_to_a_gpu_lie_in_locked_pages():
    """Until the memory is let go: then CUDA must forget it, or a later use of the same addresses would fail."""
    for _ in range(3):
        stack = Stack(torch.Size((4, 1024, 1024)), torch.float32, locked=True)
        stack.tensor.fill_(1.0)
        assert stack.tensor.is_pinned() and not Stack(torch.Size((4, 8)), torch.float32).tensor.is_pinned()
        assert stack.tensor.to("cuda").sum().item() == stack.tensor.numel()
        place = stack.tensor
        del stack
        assert not place.is_pinned() and place.sum().item() == place.numel()


@pytest.mark.parametrize("dispatch", ["auto", "gather", "sparse"])
def test_attention_experts_give_what_the_processor_gives(dispatch):
    """Outputs and gradients of both ways of evaluating them; on a GPU "auto" evaluates all."""
    config = MoAConfig(hidden_size=16, head_dim=8, num_attention_experts=16, num_experts_per_tok=2)
    torch.manual_seed(0)
    here = MoAAttention(config, 0, "causal")
    for parameter in here.parameters():
        torch.nn.init.normal_(parameter)
    there = copy.deepcopy(here).to("cuda")
    there.dispatch = dispatch
    assert there.gathers() == (dispatch != "sparse")
    hidden, found = torch.randn(3, 20, 16), []
    for block in (here, there):
        output = block(hidden.to(block.query.device)).output
        output.square().sum().backward()
        found.append([output.cpu(), *(parameter.grad.cpu() for parameter in block.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)
