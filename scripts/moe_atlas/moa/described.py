"""How large prepared data are, and scores of plain text. No torch."""

from pathlib import Path

import polars as pl
from sacrebleu.metrics import BLEU

from moe_atlas.files import read_json
from moe_atlas.moa.ragged import DONE
from moe_atlas.moa.settings import Task
from moe_atlas.moa.translation import exact, measured


def scores(answers: list[str], references: list[str]) -> dict[str, float]:
    """bleu (sacreBLEU's own tokenisation 13a, cased, 0 to 100) and exact (share of equal sentences) of plain text."""
    return {"bleu": BLEU().corpus_score(answers, [references]).score, "exact": exact(answers, references)}


def signature() -> str:
    """How sacreBLEU was computed by `scores`."""
    bleu = BLEU()
    bleu.corpus_score(["a"], [["a"]])
    return str(bleu.get_signature())


def measures(task: Task, folder: Path) -> pl.DataFrame:
    """The table moa_tasks of prepared data: how large each set is, and of tests what copying sources scores."""
    record, rows = read_json(folder / DONE), []
    for split, counts in record["counts"].items():
        sides = [key for key in counts if key not in ("sequences", "left out")]
        rows += [(split, "sentences" if len(sides) > 1 else "texts", None, counts["sequences"], "")]
        rows += [(split, f"{side} tokens", None, counts[side] / counts["sequences"], "") for side in sides]
        if len(sides) > 1 and split not in ("train", "validation"):
            texts = pl.read_parquet(folder / f"{split}.parquet")
            for metric, value in scores(texts["source"].to_list(), texts["target"].to_list()).items():
                rows.append((split, metric, "copy", value, signature() if metric == "bleu" else ""))
    return measured(task.objective, rows)
