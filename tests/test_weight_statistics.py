"""All statistics of a model's weights: one read, and the same bytes from any number of jobs and threads."""

import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from workflow_runs import ROOT, copy_repository, snakemake, write_sheet

from moe_atlas import tables
from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.files import sha256
from moe_atlas.log import size
from moe_atlas.parallel import each
from moe_atlas.parametric import matching
from moe_atlas.parametric.chosen import Share
from moe_atlas.parametric.gather import NAMES, gathered
from moe_atlas.parametric.matching import neuron_matching
from moe_atlas.parametric.projection import project_experts
from moe_atlas.parametric.similarity import weight_similarity

DEEPSEEK = ROOT / "tests/data/oracle/checkpoints/deepseek"
FILES = [f"results/models/deepseek/parametric/{name}.parquet" for name in NAMES]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A copy of the repository with one model: four layers, of which the first is dense, 16 experts, a shared one."""
    folder = copy_repository(tmp_path_factory.mktemp("parts") / "atlas")
    write_sheet(folder / "config/models.tsv", [{"model": "deepseek", "source": f"path:{DEEPSEEK}"}])
    return folder


def made(folder: Path, parts: int, matching_parts: int, threads: int = 1) -> tuple[str, dict[str, str]]:
    """Take the statistics in so many jobs; what Snakemake said, and the sha256 of each table."""
    numbers = "--config", f"parts={parts}", f"matching_parts={matching_parts}"
    text = snakemake(folder, *FILES, *numbers, "--set-threads", f"weight_statistics={threads}")
    return text, {name: sha256(folder / path) for name, path in zip(NAMES, FILES, strict=True)}


@pytest.fixture(scope="module")
def alone(atlas) -> dict[str, str]:
    """The tables of one job with one thread."""
    return made(atlas, 1, 1)[1]


def test_one_job_reads_the_layers_with_experts_once(atlas, alone):
    checkpoint = Checkpoint(DEEPSEEK)
    wanted = [
        info.stop - info.start
        for name, info in checkpoint.tensors.items()
        if name.startswith(tuple(f"model.layers.{layer}." for layer in (1, 2, 3)))
    ]
    log = (atlas / "results/logs/weight_statistics/deepseek.log").read_text()
    assert f"3 layers, {size(sum(wanted))} ({sum(wanted)} bytes) read" in log
    frame = tables.read("similarity", atlas / FILES[0])
    assert sorted(frame["layer"].unique()) == [1, 2, 3]


@pytest.mark.parametrize(("parts", "matching_parts", "threads"), [(2, 1, 2), (3, 2, 1), (5, 1, 1)])
def test_the_tables_do_not_depend_on_the_number_of_jobs(atlas, alone, tmp_path, parts, matching_parts, threads):
    folder = shutil.copytree(atlas, tmp_path / "atlas", symlinks=True)
    text, found = made(folder, parts, matching_parts, threads)
    assert found == alone
    assert text.count("rule weight_statistics:") == parts * matching_parts
    assert text.count("rule gather_weight_statistics:") == 1
    assert not [path for path in (folder / "results/models/deepseek/parametric").rglob("*-of-*") if path.is_file()]
    if parts > 3:  # an empty range reads nothing
        log = (folder / "results/logs/weight_statistics/deepseek/1-of-5/1-of-1.log").read_text()
        assert "0 layers, 0 B (0 bytes) read" in log
    if matching_parts > 1:
        assert "Nothing to be done" in snakemake(folder, "-n", *FILES, "--config", "parts=3", "matching_parts=2")


@pytest.mark.parametrize(("items", "shares"), [(7, 3), (0, 4), (3, 5), (6, 1)])
def test_shares_are_contiguous_even_and_everything(items, shares):
    dealt = [Share(number, shares).of(range(items)) for number in range(1, shares + 1)]
    assert [item for share in dealt for item in share] == list(range(items))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_parts_are_put_together_by_layer():
    layers, pairs = [4, 4, 9, 9], ["0", "1", "0", "1"]
    whole = pl.DataFrame({"layer": layers, "a": pairs})
    parts = [whole[:1], whole.filter(pl.col("a") == "0")[:0], whole[[1]], whole[[2]], whole[3:]]
    assert gathered([parts[0], parts[3], parts[1], parts[2], parts[4]]).equals(whole)


def ffn(m: int, d: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in (("up", (m, d)), ("act", (m, d)))}
    return drawn | {"down": torch.randn(d, m, generator=generator)}


@pytest.fixture
def threads():
    """Set the number of torch's threads, and set it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(130, 70), (1400, 300)])
def test_threads_and_memory_change_no_bit(monkeypatch, threads, shape):
    m, d = shape
    experts = [ffn(m, d, seed) for seed in range(3)]
    stacked = {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}
    bank = ExpertBank(**stacked, router=torch.randn(3, d), shared=FFN(**ffn(2 * m // 3, d, 8)))
    reference, found = FFN(**ffn(m, d, 9)), []
    # The products of one pair by all threads; pairs side by side; one thread.
    for count, memory in ((3, 1), (3, 1 << 30), (1, 1 << 30)):
        monkeypatch.setattr(matching, "COST_BYTES", memory)
        matching.null_matches.cache_clear()
        threads(count)
        fixed = {"model": "m", "layer": 0, "reference": reference}
        frames = [neuron_matching(bank, **fixed), weight_similarity(bank, **fixed), *project_experts(bank, **fixed)]
        assert torch.get_num_threads() == count
        found.append(frames)
    for other in found[1:]:
        assert all(one.equals(two) for one, two in zip(found[0], other, strict=True))


def test_work_is_done_in_order_by_so_many_threads_with_one_each(threads):
    threads(3)
    assert each(lambda item: (item, torch.get_num_threads()), range(20)) == [(item, 1) for item in range(20)]
    assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError):
        each(lambda item: 1 / item, [1, 0])
    assert torch.get_num_threads() == 3
