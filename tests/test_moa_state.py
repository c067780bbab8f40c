"""A training that was killed ends as if it had not been, and the mean of weights at the last looks by hand."""

from dataclasses import replace

import pytest
import torch

from moe_atlas import architectures
from moe_atlas.architectures.moa_config import MoAConfig
from moe_atlas.architectures.moa_models import MoAForTranslation
from moe_atlas.moa.registry import objective_of
from moe_atlas.moa.run import _state
from moe_atlas.moa.settings import Schedule, Task
from moe_atlas.moa.state import StateFile
from moe_atlas.moa.train import train

SCHEDULE = Schedule(2, 4, 1, 0.5, 0.5, 4, 12, 0.0, 0.1, accumulate=2, shape="inverse-sqrt")
PLATEAU = replace(SCHEDULE, shape="plateau", most=30, gain=0.9)


class Killed(Exception):
    """What ends a run in these tests."""


@pytest.fixture(scope="module")
def objective():
    numbers = {"tokenizer": 60, "length": 6, "batch": 8, "validation": 16, "seeds": 1, "selection_seeds": 1}
    task = Task("translation", "demo:translation", rates=(0.01,), schedule=SCHEDULE, model={}, data={"most": 20},
                kind="translation", **numbers)  # fmt: skip
    return objective_of(task)


def fresh(objective) -> MoAForTranslation:
    """The same model each time, with dropout, and the generator of random numbers where it was."""
    architectures.register()
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_encoder_layers": 1, "dropout": 0.2}
    sizes |= {"num_attention_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
    entries = objective.tokenizer.get_vocab_size()
    return MoAForTranslation(MoAConfig(vocab_size=entries, objective="translation", **sizes, **objective.special))


class KilledAfter:
    """An objective whose batches end a run after so many of them."""

    def __init__(self, objective, batches: int):
        self.objective, self.most = objective, batches

    def __getattr__(self, name: str):
        return getattr(self.objective, name)

    def batches(self, seed: int):
        for count, batch in enumerate(self.objective.batches(seed)):
            if count == self.most:
                raise Killed
            yield batch


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("schedule", [SCHEDULE, replace(SCHEDULE, average=2), PLATEAU], ids=["last", "mean", "plateau"])
def test_a_killed_run_ends_as_if_it_had_not_been(objective, tmp_path, schedule):
    whole = fresh(objective)
    wanted = train(whole, objective, 0.01, schedule, 3)
    model = fresh(objective)
    state = StateFile(tmp_path / "state.pt", "told")
    with pytest.raises(Killed):  # in the first of two batches of step 11, after the look at step 8
        train(model, KilledAfter(objective, 20), 0.01, schedule, 3, state=state)
    assert state.path.is_file() and not equal(whole, model)
    again = fresh(objective)
    found = train(again, objective, 0.01, schedule, 3, state=state)
    assert equal(whole, again)
    assert replace(found, seconds=0) == replace(wanted, seconds=0) and found.tokens > 0
    # A run that has ended is not trained again.
    ended = fresh(objective)
    torch.manual_seed(7)
    assert train(ended, KilledAfter(objective, 0), 0.01, schedule, 3, state=state) == found and equal(ended, whole)


def test_the_state_of_another_run_is_not_used(objective, tmp_path):
    one, two = (StateFile(tmp_path / "state.pt", told) for told in ("one", "two"))
    train(fresh(objective), objective, 0.05, SCHEDULE, 3, state=one)
    plain = fresh(objective)
    train(plain, objective, 0.01, SCHEDULE, 3)
    model = fresh(objective)
    train(model, objective, 0.01, SCHEDULE, 3, state=two)
    assert equal(plain, model)


def test_a_state_is_of_the_same_texts_and_settings(objective, tmp_path):
    """Token ids that were prepared anew are others under the same settings."""
    config, task = fresh(objective).config, Task(
        "translation", "data:file.yaml", 60, 6, 8, 16, 1, 1, (0.01,), SCHEDULE, {}, {}, "translation"
    )  # fmt: skip
    first, again = (_state(tmp_path, objective, task, config, 0.01, 0) for _ in range(2))
    assert first == again
    other = replace(objective, pairs=objective.pairs | {"train": objective.pairs["validation"]})
    for changed in (
        _state(tmp_path, other, task, config, 0.01, 0),
        _state(tmp_path, objective, replace(task, batch=4), config, 0.01, 0),
    ):
        assert changed.path == first.path and changed.digest != first.digest


def test_the_mean_is_that_of_the_weights_at_the_last_looks(objective):
    ends = []
    for most in (8, 12):
        ends.append(fresh(objective))
        train(ends[-1], objective, 0.01, replace(SCHEDULE, most=most), 3)
    model = fresh(objective)
    found = train(model, objective, 0.01, replace(SCHEDULE, average=2), 3)
    for name, value in model.state_dict().items():
        one, two = (end.state_dict()[name].double() for end in ends)
        torch.testing.assert_close(value.double(), (one + two) / 2, rtol=1e-6, atol=1e-7)
    losses = [loss for _, split, loss in found.curve if split == "validation"]
    assert losses[-1] == found.validation and len(losses) == 3
