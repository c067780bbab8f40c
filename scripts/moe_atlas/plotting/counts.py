"""Counts over a whole corpus: norm rank against score rank, and the load of the experts."""

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.patches import Patch

from moe_atlas.plotting.arrays import balance, diagonal_share, load_array, pages_of, rank_array
from moe_atlas.plotting.base import Drawing, Experiment, Limits, Page
from moe_atlas.plotting.style import WIDTH, add_axes, bars, heading, new_figure, thinned

CIVIDIS = matplotlib.colormaps["cividis"]
_BARS_UP_TO = 16  # experts; a heat map above


class RankCounts(Experiment):
    """How often an expert with norm rank x has score rank y; ranks count up from the smallest."""

    cell = (0.8, 0.8)
    columns = 7
    overview_title = (
        "Tokens with norm rank (horizontal) and score rank (vertical, up), as a share of the norm rank; layer on top"
    )
    overview_label = "share of tokens of a norm rank"

    def read(self, tables):
        pages, sums = [], {}
        for (layer, site), part in pages_of(tables["rank_counts"]).items():
            counts = rank_array(part)
            pages.append(Page(layer, site, {"counts": counts, "layers": 1}))
            sums.setdefault(site, []).append(counts)
        for site, all_counts in sums.items():
            same = [counts for counts in all_counts if counts.shape == all_counts[0].shape]
            if len(same) == len(all_counts):  # ranks of layers with other numbers of experts do not add up
                pages.append(Page("all", site, {"counts": np.sum(same, axis=0), "layers": len(same)}))
        return pages

    def limits(self, page: Page, whole: bool) -> Limits:
        top = float(page.data["counts"].max())
        return {"tokens": (0.0, 1.05 * top if len(page.data["counts"]) <= _BARS_UP_TO else top)}

    def text(self, page: Page) -> str:
        counts = page.data["counts"]
        share = diagonal_share(counts)
        return (
            f"same rank: {np.trace(counts) / counts.sum():.2f} of all, {share[-1]:.2f} of the largest norm "
            f"(chance {1 / len(counts):.3f})"
        )

    def draw(self, page: Page) -> Drawing:
        counts = page.data["counts"]
        experts, chance = len(counts), counts.sum() / counts.size
        summed = f", sum over {page.data['layers']} layers" if page.layer == "all" else ""
        if experts <= _BARS_UP_TO:
            figure = new_figure(WIDTH, 3.0)
            axes = add_axes(figure, 0.62, 0.72, WIDTH - 1.45, 1.8)
            x, width = np.arange(experts, dtype=np.float64), 0.86 / experts
            norm = Normalize(0, experts - 1)
            for score in range(experts):
                bars(axes, x - 0.43 + score * width, counts[score], width, CIVIDIS(norm(score)))
            axes.axhline(chance, color="0.2", linestyle="--", linewidth=0.9)
            axes.text(experts - 0.48, chance, f"chance\n{chance:,.0f}", fontsize=7, va="center", ha="left")
            axes.set(xlim=(-0.6, experts - 0.4), xticks=range(experts), ylabel="tokens")
            mappable = matplotlib.cm.ScalarMappable(norm, CIVIDIS)
            cax = add_axes(figure, WIDTH - 0.5, 0.72, 0.1, 1.8)
            figure.colorbar(mappable, cax=cax, label="score rank", ticks=[0, experts - 1])
        else:
            figure = new_figure(WIDTH, 4.6)
            axes = add_axes(figure, 0.62, 0.72, 3.4, 3.4)
            colour = Normalize(0, 1)
            image = axes.imshow(counts, cmap=CIVIDIS, norm=colour, interpolation="nearest", origin="lower")
            axes.spines[["top", "right"]].set_visible(True)
            positions, texts = thinned([str(e) for e in range(experts)], 3.4)
            axes.set_xticks(positions, texts)
            axes.set_yticks(positions, texts)
            axes.set_ylabel("score rank (0 lowest)")
            colorbar = figure.colorbar(image, cax=add_axes(figure, 4.15, 0.72, 0.1, 3.4))
            colorbar.set_label(f"tokens (chance {chance:,.1f})")
        axes.set_xlabel("norm rank (0 smallest)")
        heading(figure, self.title(page), f"Norm against score rank{summed}; {self.text(page)}")

        def apply(limits: Limits, which: str) -> None:
            if experts <= _BARS_UP_TO:
                axes.set_ylim(limits["tokens"])
            else:
                colour.vmin, colour.vmax = limits["tokens"]

        return Drawing(figure, apply)

    def mini(self, axes, page: Page, part: int, limits: Limits):
        norm = Normalize(*limits["share"])
        share = _by_norm_rank(page.data["counts"])
        axes.spines[["top", "right"]].set_visible(True)
        return axes.imshow(share, cmap=CIVIDIS, norm=norm, interpolation="nearest", aspect="auto", origin="lower")

    def overview_limits(self, pages: list[Page]) -> Limits:
        return {"share": (0.0, max(float(_by_norm_rank(page.data["counts"]).max()) for page in pages))}

    def caption(self, page: Page, which: str) -> str:
        counts = page.data["counts"]
        summed = f" (sum over {page.data['layers']} layers)" if page.layer == "all" else ""
        scale = "this figure's range" if which == "auto" else "one range for all layers of the model"
        return (
            f"Tokens whose expert of a given output-norm rank has a given router-score rank in {page.text}{summed} "
            f"{self.place}; chance is {counts.sum() / counts.size:,.1f} tokens in every place, {self.text(page)}; "
            f"{scale}."
        )


class Load(Experiment):
    """Share of the tokens that chose each expert, stacked by the rank of the choice."""

    cell = (1.4, 0.75)
    columns = 4
    overview_title = "Share of tokens that chose each expert, stacked by rank; dashed: even load; layer on top"

    def read(self, tables):
        return [Page(*key, {"load": load_array(part)}) for key, part in pages_of(tables["load"]).items()]

    def limits(self, page: Page, whole: bool) -> Limits:
        share = _share(page.data["load"]).sum(axis=1)
        ranks, experts = page.data["load"].shape[1], len(share)
        return {"share": (0.0, 1.08 * max(float(share.max()), ranks / experts))}

    def draw(self, page: Page) -> Drawing:
        load = page.data["load"]
        experts, ranks = load.shape
        share, entropy_violation = _share(load), balance(load)
        figure = new_figure(WIDTH, 2.9)
        heading(
            figure,
            self.title(page),
            f"Share of {_tokens(load):,.0f} tokens that chose each expert; entropy {entropy_violation[0]:.3f} of 1, "
            f"largest load {1 + entropy_violation[1]:.2f} × even",
        )
        width = WIDTH - 1.9
        axes = add_axes(figure, 0.62, 0.6, width, 1.8)
        colours = _rank_colours(ranks)
        x, base = np.arange(experts, dtype=np.float64), np.zeros(experts)
        for rank in range(ranks):
            bars(axes, x - 0.4, share[:, rank], 0.8, colours[rank], base)
            base = base + share[:, rank]
        axes.axhline(ranks / experts, color="0.2", linestyle="--", linewidth=0.9)
        positions, texts = thinned([str(e) for e in range(experts)], width)
        axes.set_xticks(positions, texts)
        axes.set(xlim=(-0.7, experts - 0.3), xlabel="expert", ylabel="share of tokens")
        axes.text(experts - 0.25, ranks / experts, f"even load\n{ranks}/{experts}", fontsize=7, va="center", ha="left")
        handles = [Patch(color=colours[rank], label=f"rank {rank}") for rank in reversed(range(ranks))]
        figure.legend(handles=handles, loc="upper right", bbox_to_anchor=(1.0, 0.82), handlelength=1, title_fontsize=7)

        def apply(limits: Limits, which: str) -> None:
            axes.set_ylim(limits["share"])

        return Drawing(figure, apply)

    def mini(self, axes, page: Page, part: int, limits: Limits):
        load = page.data["load"]
        share, base = _share(load), np.zeros(len(load))
        x = np.arange(len(load), dtype=np.float64)
        for rank, colour in enumerate(_rank_colours(load.shape[1])):
            bars(axes, x - 0.4, share[:, rank], 0.8, colour, base)
            base = base + share[:, rank]
        axes.axhline(load.shape[1] / len(load), color="0.2", linestyle="--", linewidth=0.8)
        axes.set(xlim=(-0.7, len(load) - 0.3), ylim=limits["share"])

    def caption(self, page: Page, which: str) -> str:
        load = page.data["load"]
        experts, ranks = load.shape
        entropy, violation = balance(load)
        scale = "the range of this layer" if which == "auto" else "the same for all layers"
        return (
            f"Share of {_tokens(load):,.0f} tokens that chose each expert in {page.text} {self.place}, stacked by the "
            f"rank of the choice; an even load is {ranks}/{experts} (dashed), normalised entropy is {entropy:.3f} "
            f"and MaxVio {violation:.2f}, the axis is {scale}."
        )


def _tokens(load: np.ndarray) -> float:
    """Tokens of the corpus: each has exactly one first choice."""
    return float(load[:, 0].sum())


def _share(load: np.ndarray) -> np.ndarray:
    """(N, k) counts as shares of the tokens."""
    return load / max(_tokens(load), 1.0)


def _rank_colours(ranks: int) -> list:
    """Dark for the first choice, lighter for later ones."""
    return [matplotlib.colormaps["Blues"](0.95 - 0.65 * rank / max(ranks - 1, 1)) for rank in range(ranks)]


def _by_norm_rank(counts: np.ndarray) -> np.ndarray:
    """Counts as shares of each norm rank (columns sum to 1)."""
    return counts / np.maximum(counts.sum(axis=0, keepdims=True), 1e-12)
