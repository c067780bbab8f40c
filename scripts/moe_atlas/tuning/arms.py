"""What is compared: each arm of fine-tuning as a row of settings. Nothing here imports torch.

From EMoE (arXiv 2310.10908) and its released code: dense, EMoE, EMoE-learn, GMoE, the split by index, the experts of
the lowest score, noisy tuning, LoRA. Controls that these lack: a split at random; a learned gate of weight 1, which
begins at what the chosen neurons give and not at 1/k of it; the same experts for every token (is it routing or
pruning?); and the dropout that the released code adds to converted layers, in a dense model.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One way to tune a model.

    form: "dense"; "mask", the FFN's neurons as experts; or "copies", each expert a copy of the FFN.
    split, gate ("avg-k" or "cosine"), choose ("top", "bottom" or "static": the k that the untuned model uses most) and
    weights: of the experts. noise: width of the uniform noise that is added to every weight before tuning, in standard
    deviations of the weight. dropout: of the pre-activations of the layers that other arms convert. lora: only low-rank
    updates of the attention, and the head, are tuned.
    toggled: name under which the tuned model is evaluated with the mask off, or, if it is dense, on; "": it is not.
    """

    form: str = "dense"
    split: str = "cluster"
    gate: str = "avg-k"
    choose: str = "top"
    weights: str = "one"
    noise: float = 0.0
    dropout: float = 0.0
    lora: bool = False
    toggled: str = ""

    @property
    def routed(self) -> bool:
        """Whether different tokens can go to different experts."""
        return self.form != "dense" and self.choose != "static"


ARMS: dict[str, Arm] = {
    "dense": Arm(toggled="dense2emoe"),
    "emoe": Arm("mask", toggled="emoe2dense"),
    "emoe-learn-one": Arm("mask", gate="cosine"),
    "emoe-learn-softmax": Arm("mask", gate="cosine", weights="softmax"),
    "gmoe": Arm("copies", gate="cosine", weights="softmax"),
    "random-split": Arm("mask", split="random"),
    "contiguous-split": Arm("mask", split="contiguous"),
    "bottom-k": Arm("mask", choose="bottom"),
    "static-mask": Arm("mask", choose="static"),
    "dense-noise": Arm(noise=0.15),
    "dense-dropout": Arm(dropout=0.1),
    "lora": Arm(lora=True, toggled="lora2emoe"),
    "lora-emoe": Arm("mask", lora=True, toggled="emoe2lora"),
}

TOGGLED = {arm.toggled: name for name, arm in ARMS.items() if arm.toggled}


def baseline_of(arm: str) -> str:
    """The dense arm that this one is compared with: tuned in full, or by LoRA."""
    return "lora" if ARMS[TOGGLED.get(arm, arm)].lora else "dense"


def contrasts() -> list[tuple[str, str]]:
    """(arm, baseline): each arm with its dense one, EMoE with each control, and each toggled model with itself."""
    names = [*ARMS, *TOGGLED]
    pairs = [(name, baseline_of(name)) for name in names if name != baseline_of(name)]
    pairs += [("emoe", name) for name, arm in ARMS.items() if name != "emoe" and arm.form != "dense" and not arm.lora]
    return pairs + [(toggled, name) for toggled, name in TOGGLED.items() if name != baseline_of(toggled)]
