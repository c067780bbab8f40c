"""Token by token: output norms beside router scores, and which experts each token chose."""

import math

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap, Normalize

from moe_atlas.plotting.arrays import chosen_labels, load_array, pages_of, token_experts, token_index
from moe_atlas.plotting.base import Drawing, Experiment, Limits, Page
from moe_atlas.plotting.maps import token_titles, tokens_drawn
from moe_atlas.plotting.style import (
    NORM_COLOUR,
    SCORE_COLOUR,
    WIDTH,
    add_axes,
    bars,
    heading,
    new_figure,
    thinned,
    visible,
)

# Not chosen is white; the smallest weight is a visible blue.
BLUES = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.15, 1, 256))).with_extremes(bad="white")
_ROW_TOKENS, _MOST_TOKENS = 48, 192


class NormScore(Experiment):
    """Paired bars for each token: norm of every expert's output (left axis), its router score (right axis)."""

    cell = (1.4, 0.9)
    columns = 4
    overview_title = (
        "Mean over the tokens drawn: output norm (blue, against the layer's largest, which is printed) and score "
        "(orange, one scale for all layers); layer on top"
    )

    def read(self, tables):
        tokens = token_index(tables["tokens"], tokens_drawn(tables["norm_score"]["expert"].n_unique()))
        self.total = len(tables["tokens"])
        routing = pages_of(tables["routing"]) if "routing" in tables else {}
        pages = []
        for key, part in pages_of(tables["norm_score"]).items():
            experts = part["expert"].n_unique()
            chosen = chosen_labels(routing[key], tokens) if key in routing else [[]] * len(tokens)
            data = {
                "norm": token_experts(part, tokens, "norm", experts),
                "score": token_experts(part, tokens, "score", experts),
                "titles": token_titles(tokens["token"].to_list(), chosen),
                "chosen": chosen,
            }
            pages.append(Page(*key, data))
        return pages

    def limits(self, page: Page, whole: bool) -> Limits:
        return {key: (0.0, 1.18 * float(page.data[key].max())) for key in ("norm", "score")}

    def draw(self, page: Page) -> Drawing:
        norms, scores, titles = page.data["norm"], page.data["score"], page.data["titles"]
        tokens, experts = norms.shape
        across = min(3 if experts <= 20 else 2, tokens)
        left, right, gap, head, height, between, foot = 0.55, 0.58, 0.14, 0.82, 0.95, 0.32, 0.42
        width = (WIDTH - left - right - gap * (across - 1)) / across
        down = math.ceil(tokens / across)
        figure = new_figure(WIDTH, head + down * height + (down - 1) * between + foot)
        cut = f" (first {tokens} of {self.total})" if self.total > tokens else ""
        heading(
            figure,
            self.title(page),
            f"Output norm (blue, left axis) and router score (orange, right axis) for each token{cut};\n"
            "▾ marks the experts the token chose, title: token, chosen experts",
        )
        positions, texts = thinned([str(e) for e in range(experts)], width)
        x = np.arange(experts, dtype=np.float64)
        left_axes, right_axes = [], []
        for i in range(tokens):
            row, column = divmod(i, across)
            axes = add_axes(figure, left + column * (width + gap), head + row * (height + between), width, height)
            twin = axes.twinx()
            twin.spines["right"].set_visible(True)
            bars(axes, x - 0.42, norms[i], 0.4, NORM_COLOUR)
            bars(twin, x + 0.02, scores[i], 0.4, SCORE_COLOUR)
            if page.data["chosen"][i]:
                marks = page.data["chosen"][i]
                transform = axes.get_xaxis_transform()
                axes.plot(
                    marks, [0.96] * len(marks), linestyle="none", marker="v", markersize=3, color="0.2",
                    transform=transform,
                )  # fmt: skip
            twin.axhline(1 / experts, color=SCORE_COLOUR, linestyle=":", linewidth=0.8)
            axes.set_xlim(-0.7, experts - 0.3)
            axes.set_xticks(positions, texts if i + across >= tokens else [""] * len(positions))
            axes.set_title(titles[i].replace("\n", " · "), fontsize=7, pad=2)
            axes.locator_params(axis="y", nbins=4)
            twin.locator_params(axis="y", nbins=4)
            axes.tick_params(labelleft=column == 0)
            twin.tick_params(labelright=column == across - 1 or i == tokens - 1)
            left_axes.append(axes)
            right_axes.append(twin)
        middle = down // 2 if down % 2 else 0
        left_axes[min(middle * across, tokens - 1)].set_ylabel("norm", color=NORM_COLOUR)
        right_axes[min(middle * across + across - 1, tokens - 1)].set_ylabel("score", color="#9a6a00")
        left_axes[min((down - 1) * across, tokens - 1)].set_xlabel("expert")

        def apply(limits: Limits, which: str) -> None:
            for axes, twin in zip(left_axes, right_axes, strict=True):
                axes.set_ylim(limits["norm"])
                twin.set_ylim(limits["score"])

        return Drawing(figure, apply)

    def mini(self, axes, page: Page, part: int, limits: Limits):
        norm, score = page.data["norm"].mean(axis=0), page.data["score"].mean(axis=0)
        x = np.arange(len(norm), dtype=np.float64)
        bars(axes, x - 0.42, norm / max(norm.max(), 1e-30), 0.4, NORM_COLOUR)
        bars(axes, x + 0.02, score / limits["score"][1], 0.4, SCORE_COLOUR)
        axes.set(xlim=(-0.7, len(norm) - 0.3), ylim=(0, 1.25))
        axes.text(0.02, 0.98, f"{norm.max():.3g}", transform=axes.transAxes, color=NORM_COLOUR, fontsize=7, va="top")

    def overview_limits(self, pages: list[Page]) -> Limits:
        return {"score": (0.0, max(float(page.data["score"].mean(axis=0).max()) for page in pages))}

    def caption(self, page: Page, which: str) -> str:
        tokens, experts = page.data["norm"].shape
        cut = f"the first {tokens} of {self.total}" if self.total > tokens else f"each of the {tokens}"
        scale = "the range of this layer" if which == "auto" else "the same for all layers"
        return (
            f"L2 norm of every expert's output before the routing weight (left axis) and softmax score of the router "
            f"over all {experts} experts (right axis) in {page.text} {self.place} for {cut} tokens; a score of "
            f"1/{experts} is what an even router gives (dotted), axes are {scale}."
        )


class ChosenExperts(Experiment):
    """Expert by token: the weight the model applied, zero where the expert was not chosen."""

    cell = (1.95, 0.9)
    columns = 3
    overview_title = "Chosen experts (vertical) for each token (horizontal), every layer, one colour range"
    overview_label = "routing weight applied"

    def read(self, tables):
        tokens = token_index(tables["tokens"], _MOST_TOKENS)
        self.total = len(tables["tokens"])
        load = pages_of(tables["load"])
        pages = []
        for key, part in pages_of(tables["routing"]).items():
            experts, ranks = load_array(load[key]).shape
            data = {
                "weights": token_experts(part, tokens, "weight", experts),
                "tokens": tokens["token"].to_list(),
                "sequence": tokens["sequence"].to_numpy(),
                "k": ranks,
            }
            pages.append(Page(*key, data))
        return pages

    def limits(self, page: Page, whole: bool) -> Limits:
        return {"colour": (0.0, float(page.data["weights"].max()))}

    def draw(self, page: Page) -> Drawing:
        weights, tokens = page.data["weights"], page.data["tokens"]
        total, experts = weights.shape
        rows = math.ceil(total / _ROW_TOKENS)
        per_row = math.ceil(total / rows)
        left, bar, head, foot = 0.42, 0.75, 0.62, 0.95
        height = min(max(0.15 * experts, 0.9), 2.6)
        width = (WIDTH - left - bar) * (1 if total > 16 else 0.5)
        figure = new_figure(WIDTH, head + rows * (height + foot))
        cut = f", first {total} of {self.total} tokens" if self.total > total else ""
        heading(
            figure,
            self.title(page),
            f"Routing weight the model applied to each chosen expert; {page.data['k']} of {experts} experts "
            f"a token{cut}",
        )
        norm = Normalize(0, 1)
        positions, texts = thinned([str(e) for e in range(experts)], height)
        for row in range(rows):
            part = weights[row * per_row : (row + 1) * per_row]
            shown = tokens[row * per_row : (row + 1) * per_row]
            top = head + row * (height + foot)
            axes = add_axes(figure, left, top, width * len(part) / per_row, height)
            image = axes.imshow(_chosen(part), cmap=BLUES, norm=norm, interpolation="nearest", aspect="auto")
            axes.spines[["top", "right"]].set_visible(True)
            axes.set_yticks(positions, texts)
            axes.set_xticks(range(len(part)), [visible(token, 14) for token in shown], rotation=90, fontsize=7)
            axes.set_ylabel("expert")
            sequence = page.data["sequence"][row * per_row : (row + 1) * per_row]
            for edge in np.flatnonzero(np.diff(sequence)):
                axes.axvline(edge + 0.5, color="0.2", linewidth=0.8)
        cax = add_axes(figure, left + width + 0.12, head, 0.1, height)
        figure.colorbar(image, cax=cax, label="routing weight")

        def apply(limits: Limits, which: str) -> None:
            norm.vmin, norm.vmax = limits["colour"]

        return Drawing(figure, apply)

    def mini(self, axes, page: Page, part: int, limits: Limits):
        axes.spines[["top", "right"]].set_visible(True)
        norm = Normalize(*limits["colour"])
        return axes.imshow(_chosen(page.data["weights"]), cmap=BLUES, norm=norm, interpolation="nearest", aspect="auto")

    def caption(self, page: Page, which: str) -> str:
        total, experts = page.data["weights"].shape
        cut = f"the first {total} of {self.total} tokens" if self.total > total else f"the {total} tokens"
        scale = "0 to the layer's largest weight" if which == "auto" else "0 to the model's largest weight"
        return (
            f"Experts chosen in {page.text} {self.place} for {cut}; the colour is the weight the model applied "
            f"({scale}), white is not chosen, and an even router would choose each expert for "
            f"{page.data['k']}/{experts} of the tokens."
        )


def _chosen(weights: np.ndarray) -> np.ndarray:
    """(T, N) weights as the (N, T) map that is drawn, nan where an expert was not chosen."""
    return np.where(weights.T > 0, weights.T, np.nan)
