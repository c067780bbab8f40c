"""The figure claims by models: each verdict in its cell, told apart by shape and colour, with its numbers."""

import polars as pl
import synthetic
from test_plotting import check_text, texts

from moe_atlas.plotting.claims import VERDICTS
from moe_atlas.plotting.comparison import compare


def table(*names):
    return pl.concat([synthetic.claims(synthetic.TOYS[name]) for name in names])


def marks(figure):
    """(column, row) -> (marker, colour) of every cell."""
    (axes,) = figure.axes
    return {
        (int(line.get_xdata()[0]), int(line.get_ydata()[0])): (line.get_marker(), line.get_color())
        for line in axes.lines
    }


def test_every_verdict_is_in_the_cell_of_its_claim_text_and_model():
    figure = compare("claims", {"claims": table("toy-eight", "toy-sixteen", "toy-dense")})
    check_text(figure)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["toy-eight", "toy-sixteen"]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["o0 toy", "o1 toy\nprose", "o1 toy\ncode", "o2 toy\nprose", "o2 toy\ncode"]
    wanted = ["holds", "does not hold", "does not hold", "cannot be told", "cannot be told"]
    for (column, row), look in marks(figure).items():
        assert look == (VERDICTS[wanted[row]]["marker"], VERDICTS[wanted[row]]["color"]), (column, row)
    assert len(marks(figure)) == 2 * len(rows)
    assert texts(figure).count("0.40 (null 0.00)\n[0.30, 0.50]") == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(VERDICTS)
    looks = [(look["marker"], look["color"]) for look in VERDICTS.values()]
    assert len({marker for marker, _ in looks}) == len({colour for _, colour in looks}) == 3


def test_texts_are_chosen_and_a_claim_that_could_not_be_tried_says_so():
    given = table("toy-eight")
    first = pl.col("claim") == "o1-toy"
    given = given.with_columns(
        pl.when(first).then(None).otherwise(pl.col(name)).alias(name) for name in ("estimate", "low", "high", "null")
    )
    figure = compare("claims", {"claims": given}, corpora=["code"])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "o0 toy",
        "o1 toy\ncode",
        "o2 toy\ncode",
    ]
    assert "too few data" in texts(figure)


def test_a_model_that_has_not_read_the_text_of_a_claim_has_an_empty_cell():
    told, untold = table("toy-eight"), table("toy-sixteen")
    last = pl.col("claim") == "o2-toy"
    untold = pl.concat([untold.filter(~last), untold.filter(last).head(1).with_columns(corpus=pl.lit(None, pl.String))])
    figure = compare("claims", {"claims": pl.concat([told, untold])})
    assert set(marks(figure)) == {(0, row) for row in range(5)} | {(1, row) for row in range(3)}


def test_dense_models_alone_give_a_sentence():
    assert any("No claim could be tried" in text for text in texts(compare("claims", {"claims": table("toy-dense")})))
