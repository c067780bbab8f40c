"""Settings of the MoA experiments: what is shipped is whole, what is faulty is refused with a sentence."""

import copy
from pathlib import Path

import pytest
import yaml

from moe_atlas.errors import AtlasError
from moe_atlas.moa.settings import Job, load_settings

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config" / "moa.yaml"


@pytest.fixture(scope="module")
def settings():
    return load_settings(CONFIG)


def test_the_shipped_settings_ask_what_they_should(settings):
    """E, k and D one at a time around one arm, both matched baselines, controls, three seeds or more."""
    language = [settings.arms[name] for name in settings.studies["language"].arms]
    moa = {(arm.experts, arm.k, arm.head_dim) for arm in language if arm.attention == "moa"}
    (main,) = {arm.of for arm in language if arm.match}
    main = settings.arms[main]
    for place, least in ((0, 3), (1, 3), (2, 2)):
        others = [i for i in range(3) if i != place]
        sizes = (main.experts, main.k, main.head_dim)
        assert len({shape[place] for shape in moa if all(shape[i] == sizes[i] for i in others)}) >= least
    assert any(experts == k for experts, k, _ in moa)
    assert {arm.match for arm in language if arm.match} == {"parameters", "macs"}
    assert len([arm for arm in language if arm.attention == "mha"]) >= 3
    values = {(arm.normalization, arm.balance, arm.z, arm.router) for arm in settings.arms.values()}
    assert {normalization for normalization, *_ in values} == {"none", "detached", "full", None}
    assert ("detached", 0, 0, "learned") in values and ("detached", 0, 0, "frozen") in values
    assert all(task.seeds >= 3 and len(task.rates) > 1 for task in settings.tasks.values())


def test_an_arm_of_several_studies_is_trained_once(settings):
    jobs = settings.jobs()
    trained = {(job.objective, job.arm) for job in jobs}
    assert len(jobs) == len(trained)
    assert trained == {(study.objective, arm) for study in settings.studies.values() for arm in study.arms}
    (main,) = {settings.arms[arm].of for arm in settings.studies["language"].arms} - {None}
    assert settings.owner("router", main) == Job("language", "causal", main) in jobs
    assert settings.owner("masked", main) == Job("masked", "masked", main)
    assert set(settings.kept()) <= set(jobs) and len(settings.kept()) == len(settings.keep)
    with pytest.raises(AtlasError, match="the settings train no mha on the objective causal in the study x"):
        settings.job("x", "causal", "mha")


def test_an_arm_has_the_routing_that_it_does_not_say(settings):
    arms = settings.arms.values()
    assert {(arm.normalization, arm.balance, arm.z, arm.router) for arm in arms if arm.attention == "mha"} == {
        (None, None, None, None)
    }
    assert sum((arm.normalization, arm.balance, arm.router) == ("detached", 0.01, "learned") for arm in arms) >= 4


MOA = {"attention": "moa", "experts": 4, "k": 2, "head_dim": 8}
FAULTS = [
    ({"arms": {"a": MOA | {"k": 5}}}, r"arms, a: k 5 is above the 4 experts"),
    ({"arms": {"a": {"attention": "moa", "experts": 4, "k": 2}}}, "arms, a: MoA is sized by experts, k and head_dim"),
    ({"arms": {"a": MOA | {"heads": 2}}}, "arms, a: MoA is sized by experts, k and head_dim alone"),
    ({"arms": {"a": {"attention": "mha", "heads": 2}}}, "arms, a: multi-head attention is sized by"),
    ({"arms": {"a": {"attention": "mha", "match": "macs"}}}, "arms, a: multi-head attention is sized by"),
    ({"arms": {"a": {"attention": "mha", "heads": 2, "head_dim": 8, "z": 1}}}, "a: multi-head attention has no z"),
    ({"arms": {"a": {"attention": "mha", "match": "macs", "of": "b"}}}, "arms, a, of: b is no MoA arm"),
    ({"arms": {"a": MOA | {"normalization": "half"}}}, "arms, a, normalization: 'half' is not one of"),
    ({"arms": {"a": MOA | {"speed": 1}}}, "arms, a: .*'speed' was unexpected"),
    ({"studies": {"s": {"objective": "causal", "arms": ["x"]}}}, "studies, s, arms: x is not one of a"),
    ({"studies": {"s": {"objective": "masked", "arms": ["a"]}}}, "studies, s, objective: masked is not one of causal"),
    (
        {"studies": {"s": {"objective": "causal", "arms": ["a"], "contrasts": [["a", "b"]]}}},
        "studies, s, contrasts: b is no arm of this study",
    ),
    (
        {"studies": {"s": {"objective": "causal", "arms": ["a"], "contrasts": [["a", "a"]]}}},
        "studies, s, contrasts: a is compared with itself",
    ),
    ({"keep": [["s", "b"]]}, "keep: no study s has an arm b"),
    ({"objectives": {"causal": {"seeds": 1, "selection_seeds": 2}}}, "causal: selection_seeds is above seeds"),
    ({"objectives": {"causal": {"length": 4096}}}, "causal: length is above max_position_embeddings"),
    (
        {"objectives": {"causal": {"training": {"most": 100}}}},
        "causal, training: no plateau can be seen before step",
    ),
    ({"objectives": {"causal": {"training": {"gain": 1}}}}, "causal, training, gain: 1 is greater than or equal"),
    ({"objectives": {"speech": {}}}, "objectives, speech, kind: it is one of causal, masked, translation"),
    ({"objectives": {"speech": {"kind": "spoken"}}}, "objectives, speech, kind: 'spoken' is not one of"),
    ({"objectives": {"causal": {"source": "data:"}}}, "objectives, causal, source: 'data:' does not match"),
    ({"model": {"head_dim": 4}}, "model: 'head_dim' should not be valid"),
    ({"job_needs": {"gpus": 2, "mem_mb": 1, "runtime": 1}}, "job_needs, gpus: 2 is not one of"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_faulty_settings_are_refused(tmp_path, change, message):
    content = copy.deepcopy(yaml.safe_load(CONFIG.read_text()))
    content |= {"arms": {"a": MOA}, "studies": {"s": {"objective": "causal", "arms": ["a"]}}}
    content |= {"objectives": {"causal": {}}, "keep": []}
    path = tmp_path / "moa.yaml"
    path.write_text(yaml.safe_dump(content))
    assert len(load_settings(path).jobs()) == 1
    path.write_text(yaml.safe_dump(content | change))
    with pytest.raises(AtlasError, match=f"{path}.*{message}"):
        load_settings(path)


def test_an_objective_needs_all_its_values(tmp_path):
    content = yaml.safe_load(CONFIG.read_text())
    del content["defaults"]["batch"]
    (tmp_path / "moa.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(AtlasError, match="objectives, causal: batch is missing here and in defaults"):
        load_settings(tmp_path / "moa.yaml")


def test_a_missing_file_of_settings_is_refused(tmp_path):
    with pytest.raises(AtlasError, match="none.yaml: the settings of the MoA experiments cannot be read"):
        load_settings(tmp_path / "none.yaml")
