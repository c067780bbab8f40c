"""A text run in parts and put together is the text run at once, bit for bit."""

import families
import pytest
import torch

from moe_atlas import merge
from moe_atlas.behavioral.activations import _shapes
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.parts import merge_parts, write_part
from moe_atlas.probe import extract_texts, make_batches
from moe_atlas.record import Part, Record, Text, digest
from moe_atlas.resume import SavedState

# Few types, so that some are frequent enough to be counted; documents of several sequences that lie in several batches.
SEQUENCES = [[token % 9 + 1 for token in ids] for ids in families.token_ids([11, 5, 1, 30, 8, 17, 9, 9, 23, 12])]
DOCUMENTS = [0, 0, 1, 1, 2, 3, 3, 3, 4, 0]
BATCH_TOKENS = 32
BATCHES = len(make_batches(SEQUENCES, BATCH_TOKENS))
RUN = {"checkpoint": "one", "text": "this"}


def run(checkpoint: Checkpoint, part: Part | None = None, **options) -> Record:
    text = Text(SEQUENCES, keep_tokens=False, documents=DOCUMENTS, part=part)
    (record,) = extract_texts(checkpoint, [text], batch_tokens=BATCH_TOKENS, **options)
    return record


def written(folder, count: int, checkpoint: Checkpoint, **options) -> list:
    """The files of all parts, the last first."""
    paths = []
    for number in range(count, 0, -1):
        paths.append(folder / f"{number}-of-{count}" / "activations.safetensors")
        part = Part(number, count)
        write_part(paths[-1], part, run(checkpoint, part, **options), RUN)
    return paths


def assert_same(found: Record, expected: Record) -> None:
    assert found.sites == expected.sites and found.tensors.keys() == expected.tensors.keys()
    assert found.states == expected.states == {} and found.state_labels == expected.state_labels == {}
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and found.tensors[name].shape == tensor.shape, name
        assert found.tensors[name].numpy().tobytes() == tensor.numpy().tobytes(), name


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Models with routed, shared and attention experts, and a dense one."""
    root = tmp_path_factory.mktemp("families")
    for family in ("mixtral", "mistral", "deepseek", "jetmoe"):
        families.save(family, root / family, num_hidden_layers=2)
    return root


def test_the_text_has_what_is_tested():
    assert BATCHES > 3


CASES = {
    "with a dense reference": ("mixtral", {"reference": "mistral", "dtype": "float32"}),
    "with a shared expert": ("deepseek", {"dtype": "bfloat16"}),
    "with attention experts": ("jetmoe", {"dtype": "float32"}),
    "without experts": ("mistral", {}),
}


@pytest.mark.parametrize("count", [1, 2, 3, BATCHES + 2])
@pytest.mark.parametrize("case", CASES)
def test_parts_put_together_are_the_whole(checkpoints, tmp_path, case, count):
    family, options = CASES[case]
    if "reference" in options:
        options = options | {"reference": Checkpoint(checkpoints / options["reference"])}
    checkpoint = Checkpoint(checkpoints / family)
    whole = run(checkpoint, **options)
    found = merge_parts(written(tmp_path, count, checkpoint, **options), RUN)
    assert_same(found, whole)
    if family != "mistral":
        of_types = [tensor for name, tensor in found.tensors.items() if name.endswith("choice_input")]
        assert of_types and all(tensor.sum() > 0 for tensor in of_types)
        assert {site["site"] for site in found.sites} == ({"attention", "ffn"} if family == "jetmoe" else {"ffn"})


def test_a_part_without_batches_reads_no_weights(checkpoints):
    checkpoint = Checkpoint(checkpoints / "mixtral")
    assert run(checkpoint, Part(BATCHES + 1, BATCHES + 1)) == Record()
    assert checkpoint.bytes_read == 0


def test_texts_in_one_pass_have_parts_of_their_own(checkpoints):
    short, last = Text(SEQUENCES[:2], keep_tokens=True), Part(BATCHES + 1, BATCHES + 1)
    texts = [short, Text(SEQUENCES, False, DOCUMENTS, last), Text(SEQUENCES, False, DOCUMENTS, Part(2, 2))]
    checkpoint = Checkpoint(checkpoints / "mixtral")
    found = extract_texts(checkpoint, texts, batch_tokens=BATCH_TOKENS)
    assert found[1] == Record()
    assert_same(found[2], run(checkpoint, Part(2, 2)))
    (alone,) = extract_texts(checkpoint, [short], batch_tokens=BATCH_TOKENS)
    assert all(torch.equal(found[0].tensors[name], tensor) for name, tensor in alone.tensors.items())


def test_every_array_of_a_long_text_can_be_put_together(checkpoints):
    """As tables read them, and as the probe records them."""
    site = {"layer": 0, "site": "ffn", "experts": 4, "top_k": 2, "labels": [*"0123"]}
    recorded = {name.split(".")[2] for name in run(Checkpoint(checkpoints / "mixtral")).tensors}
    assert recorded == set(merge._WAYS) == set(_shapes(site, "long"))
    with pytest.raises(KeyError):
        merge.joined({"something new": torch.zeros(1)}, {"something new": torch.zeros(1)})


def test_the_order_does_not_show():
    """Not even in the sign of a zero."""
    zeros = [torch.tensor([[x, x]], dtype=torch.float64) for x in (0.0, -0.0)]
    for names in (merge.SUMS, merge._LARGEST, merge._BOUNDS):
        for first, second in (zeros, zeros[::-1]):
            parts = [merge.opened(dict.fromkeys(names, zero)) for zero in (first, second)]
            for array in merge.closed(merge.joined(*parts)).values():
                assert array.tolist() == [[0, 0]] and not array.signbit().any()


class Stopped(Exception):
    """In the place of what kills a run."""


def test_a_stopped_part_goes_on_and_no_other_part_does(checkpoints, tmp_path, capsys):
    checkpoint, part, seen = Checkpoint(checkpoints / "mixtral"), Part(1, 2), []

    def stop(index: int, *_layers: object) -> None:
        if index == 1:
            raise Stopped

    with pytest.raises(Stopped):
        run(checkpoint, part, on_layer=stop, state=SavedState(tmp_path, RUN))
    found = run(checkpoint, part, on_layer=lambda index, *_: seen.append(index), state=SavedState(tmp_path, RUN))
    assert seen == [1]
    assert_same(found, run(checkpoint, part))
    for other in (Part(2, 2), None):
        assert_same(run(checkpoint, other, state=SavedState(tmp_path, RUN)), run(checkpoint, other))
        assert "the state is of another part; what was kept there is deleted" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "count"), [(0, 2), (3, 2), (1, 0)])
def test_there_is_no_such_part(number, count):
    with pytest.raises(AtlasError, match=f"there is no part {number} of {count}"):
        Part(number, count)


@pytest.fixture
def parts(tmp_path):
    """Three parts of a run without layers."""
    paths = [tmp_path / f"{number}.safetensors" for number in (1, 2, 3)]
    for number, path in enumerate(paths, start=1):
        write_part(path, Part(number, 3), Record(), RUN | {"dtype": "auto"})
    assert merge_parts(paths, RUN) == Record()
    return paths


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def another(part: Part, record: Record | None = None, **run: str):
    return lambda path: write_part(path, part, record or Record(), RUN | {"dtype": "auto"} | run)


SITE = {"layer": 0, "site": "ffn"}
FAULTS = {
    "absent": (lambda path: path.unlink(), "2.safetensors: there is no such file; run the extraction of this part"),
    "cut": (cut, "2.safetensors: this is not a whole file of a part of a corpus; delete it and run"),
    "text": (another(Part(2, 3), text="other"), "2.safetensors: this part is of another text; delete it and run"),
    "dtype": (
        another(Part(2, 3), dtype="float32"),
        "2.safetensors: this part differs from .*1.safetensors in its dtype",
    ),
    "count": (another(Part(2, 4)), "2.safetensors: this part differs from .*1.safetensors in its number of parts"),
    "twice": (another(Part(1, 3)), "1.safetensors: part 1 is there twice"),
    "array": (
        another(Part(2, 3), Record([SITE], {"layer_0.ffn.tokens": torch.zeros(2)})),
        "2.safetensors: its arrays layer_0.ffn.* cannot be used",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_sentence(parts, fault):
    change, sentence = FAULTS[fault]
    if fault == "array":
        another(Part(1, 3), Record([SITE], {"layer_0.ffn.tokens": torch.zeros(3)}))(parts[0])
    change(parts[1])
    with pytest.raises(AtlasError, match=sentence):
        merge_parts(parts, RUN)


def test_a_missing_part_is_a_sentence(parts):
    with pytest.raises(AtlasError, match="1.safetensors: of its 3 parts there is no 2 and no 3; run the extraction of"):
        merge_parts(parts[:1], RUN)
    with pytest.raises(AtlasError, match="of its 3 parts there is no 2; run the extraction"):
        merge_parts([parts[0], parts[2]], RUN)


def test_the_digest_is_that_of_the_whole_text():
    assert digest([Text(SEQUENCES, False, DOCUMENTS, Part(1, 2))]) == digest([Text(SEQUENCES, False, DOCUMENTS)])
