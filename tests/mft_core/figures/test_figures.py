"""Which figure a study gets, where each variant stands in it, and that the same rows give the same bytes."""

from typing import Any, get_args

import pytest

from mft_core import figures
from mft_core.figures import forest, gain_curves, matrix, style
from mft_core.figures.quantities import axis_of, quantities
from mft_core.statistics.verdicts import Verdict

MASK_RATE, CONTINUED_RATE = "mask.training.learning_rate", "continued.learning_rate"


def row(method: str, gain: float | None, benchmark: str = "sums", half: float = 0.01, **columns: Any) -> dict[str, Any]:
    """Return a row of the stage `compare`; masks are of layers 2-5 at 10%."""
    masked = method in ("mft", "random")
    setting = {"layers": "2-5", "modules": "both", "sparsity": 0.1} if masked else {}
    numbers = dict.fromkeys(("gain", "gain_low", "gain_high", "verdict"))
    if gain is not None:
        numbers = {"gain": gain, "gain_low": gain - half, "gain_high": gain + half}
        numbers["verdict"] = "better" if gain > half else "worse" if gain < -half else "undecided"
    empty = dict.fromkeys(("layers", "modules", "sparsity", "seed"))
    name = " ".join([method, *(f"{key}={value}" for key, value in columns.items())])
    described = {"variant": name, "method": method, "domain": "maths", "benchmark": benchmark, "seeds": 1}
    described |= {"n": 600, "replicate": 0, "replicates": 1}
    return {**empty, **described, **numbers, **setting, **columns}


def texts(figure: Any) -> list[str]:
    """Return every text of a figure that is not empty."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_numbers_stand_where_their_logarithm_says_and_words_one_step_apart():
    (rate,) = quantities([row("mft", 0.0, **{MASK_RATE: value}) for value in (1e-3, 1e-4, 1e-2)])
    places = axis_of(rate).places
    assert list(places) == [1e-4, 1e-3, 1e-2]
    assert places[1e-3] - places[1e-4] == pytest.approx(places[1e-2] - places[1e-3])
    assert [rate.text(value) for value in rate.values] == ["1e-4", "1e-3", "1e-2"]
    (share,) = quantities([row("mft", 0.0, **{"mask.fraction": value}) for value in (0.25, 0.5, 1.0)])
    assert axis_of(share).places == {0.25: 0.25, 0.5: 0.5, 1.0: 1.0}
    assert (share.label, share.text(0.25)) == ("Training data used for the mask (%)", "25")
    (layers,) = quantities([row("mft", 0.0, layers=text) for text in ("4-7", "0-3")])
    assert axis_of(layers).places == {"4-7": 0.0, "0-3": 1.0}


def test_one_thing_varied_under_two_settings_is_one_axis_but_two_settings_of_one_method_are_two():
    both = [row("mft", 0.0, **{MASK_RATE: rate}) for rate in (1e-4, 1e-3)]
    both += [row("continued-fft", 0.0, **{CONTINUED_RATE: rate}) for rate in (1e-4, 2e-3)]
    assert [quantity.values for quantity in quantities(both)] == [(1e-4, 1e-3, 2e-3)]
    apart = [
        row("mft", 0.0, **{MASK_RATE: a, "fine_tune.learning_rate": b}) for a in (1e-4, 1e-3) for b in (1e-4, 1e-3)
    ]
    assert len(quantities(apart)) == 2


def test_layers_that_differ_between_domains_alone_are_not_varied():
    rows = [row("mft", 0.0, domain=domain, layers=layers) for domain, layers in (("maths", "0-3"), ("code", "4-7"))]
    assert quantities(rows) == []


def test_the_kind_of_figure_follows_what_varies():
    methods = [row("fft", None), row("continued-fft", 0.0), row("mft", 0.0), row("random", -0.1)]
    assert figures.choose(methods) == "methods"
    assert figures.choose([*methods, row("mft", 0.0, sparsity=0.2)]) == "gains"
    crossed = [row("mft", 0.0, name, domain=domain) for domain in ("maths", "code") for name in ("sums", "loops")]
    assert figures.choose(crossed) == "matrix"
    of_one_model = [
        row("mft", 0.0, name, **{"mask.domain": d}) for d in ("maths", "code") for name in ("sums", "loops")
    ]
    assert figures.choose(of_one_model) == "matrix"
    control = [row("continued-fft", 0.0, name, **{"continued.domain": d}) for d in ("maths", "code")
               for name in ("sums", "loops")]  # fmt: skip
    assert figures.choose([*of_one_model, *control]) == "matrix"
    assert figures.choose([row("mft", 0.0, "sums"), row("mft", 0.0, "loops", domain="code")]) == "methods"
    turned = [row(method, 0.0, sparsity=share, **{MASK_RATE: rate, "mask.training.epochs": epochs})
              for method in ("mft", "mft-soft") for share in (0.1, 0.2, 0.3) for rate in (1e-4, 1e-3, 1e-2)
              for epochs in range(1, 5)]  # fmt: skip
    assert figures.choose(turned[:12]) == "gains"
    assert figures.choose(turned) == "methods", "nine lines of panels would be higher than any screen"


def test_two_settings_of_one_method_are_axis_and_series_and_of_several_methods_axis_and_panels():
    grid = [
        row("mft", 0.0, modules=m, **{"mask.scope": s})
        for m in ("attention", "mlp", "both")
        for s in ("local", "global")
    ]
    one = gain_curves.draw(grid, "?", 0.95, {})
    assert len(one.axes) == 1
    assert {"scope local", "scope global"} <= set(texts(one))
    several = gain_curves.draw([*grid, row("random", 0.0, modules="mlp"), row("random", 0.0)], "?", 0.95, {})
    assert [axes.get_title() for axes in several.axes if axes.get_visible()] == [
        "sums, scope local",
        "sums, scope global",
    ]


def test_values_of_a_setting_have_colours_that_no_method_beside_them_has():
    own = [row("mft", 0.0, **{"mask.fraction": share}) for share in (0.1, 0.5, 1.0)]
    longer = [row("mft", 0.0, **{"mask.fraction": 0.1, "mask.training.epochs": epochs}) for epochs in (8, 16)]
    figure = gain_curves.draw([*own, *longer, row("magnitude", 0.0)], "?", 0.95, {})
    (legend,) = figure.legends
    looks = {text.get_text(): line.get_color() for text, line in zip(legend.texts, legend.legend_handles, strict=True)}
    series = [looks[name] for name in ("epochs 8", "epochs 16", "MFT", "magnitude mask")]
    assert len(set(series)) == len(series)


def test_variants_with_a_further_setting_are_not_joined_with_those_that_have_none():
    own = [row("mft", 0.0, sparsity=s) for s in (0.02, 0.1, 0.4)]
    other = [row("mft", 0.1, sparsity=0.1, **{"mask.domain": domain}) for domain in ("sums", "words")]
    controls = [row("random", 0.0), row("magnitude", 0.0)]
    axes = [one for one in gain_curves.draw([*own, *other, *controls], "?", 0.95, {}).axes if one.get_visible()]
    assert [one.get_title() for one in axes] == ["sums", "sums, domain sums", "sums, domain words"]
    points = [[len(line.get_xdata()) for line in one.lines if line.get_linewidth() == 1.0 and line.get_alpha() == 0.45]
              for one in axes]  # fmt: skip
    assert [max(lengths) for lengths in points] == [3, 1, 1]


def test_what_has_no_place_on_the_axis_stands_beside_it_with_the_papers_gain():
    rows = [row("mft", 0.01, sparsity=s) for s in (0.1, 0.2)] + [row("continued-fft", 0.0)]
    (axes,) = gain_curves.draw(rows, "?", 0.95, {("maths", "sums"): 0.052, ("maths", "elsewhere"): 0.5}).axes
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert [line.get_ydata()[0] for line in stars] == [pytest.approx(5.2)]
    triangle = next(line for line in axes.lines if line.get_marker() == style.of_method("continued-fft").marker)
    assert triangle.get_xdata()[0] > 0.2
    assert axes.get_ylim()[1] < 20, "what is published of another benchmark is not drawn"


def test_every_interval_is_within_the_panel_and_a_control_far_below_stands_at_its_edge_with_its_value():
    rows = [row("mft", 0.01, half=0.05, sparsity=s) for s in (0.1, 0.2)] + [row("random", -0.4)]
    (axes,) = gain_curves.draw(rows, "?", 0.95, {}).axes
    floor, top = axes.get_ylim()
    assert floor < -4
    assert top > 6
    assert floor > -20
    assert "−40\n↓" in [text.get_text() for text in axes.texts]


def test_the_methods_are_lines_with_the_papers_below():
    rows = [row("fft", None), row("continued-fft", 0.0), row("mft", 0.01), row("mft", 0.02, sparsity=0.2)]
    (axes,) = forest.draw(rows, "?", 0.95, {("maths", "sums"): 0.01}).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["continued FFT", "MFT, sparsity 10%", "MFT, sparsity 20%", "MFT, published"]


def test_the_matrix_writes_gain_and_interval_into_each_cell_and_stars_what_is_real():
    rows = [row("mft", 0.03 if d == b else -0.004, b, domain=d) for d in ("maths", "code") for b in ("maths", "code")]
    written = texts(matrix.draw(rows, "?", 0.95, {}))
    assert written.count("+3.0 *") == 2
    assert written.count("−0.4") == 2
    assert "[+2.0, +4.0]" in written


@pytest.mark.parametrize("kind", ["gains", "methods", "matrix"])
def test_the_same_rows_give_the_same_bytes_and_a_study_without_comparison_still_has_a_figure(tmp_path, kind):
    rows = [row("fft", None), row("mft", 0.01), row("mft", 0.02, "loops"), row("random", -0.3)]
    for name in ("a", "b"):
        figures.gains(rows, "Does it help?", tmp_path / f"{name}.png", kind=kind)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    figures.gains([row("fft", None)], "Does it help?", tmp_path / "none.png", kind=kind)


@pytest.mark.parametrize("draw", [gain_curves.draw, forest.draw])
def test_how_a_mark_is_filled_says_its_verdict_and_the_legend_has_the_words_of_the_tables(draw):
    words = get_args(Verdict)
    rows = [row("mft", 0.0, sparsity=0.1 * at, verdict=word) for at, word in enumerate(words, start=1)]
    figure = draw(rows, "?", 0.95, {})
    look = style.of_method("mft")
    marks = [line for line in figure.axes[0].lines if (line.get_marker(), line.get_linewidth()) == (look.marker, 1.5)]
    fills = [(mark.get_fillstyle(), mark.get_markerfacecolor()) for mark in marks]
    assert dict(zip(words, fills, strict=True)) == {
        "better": ("full", look.color), "worse": ("full", look.color),
        "equivalent": ("left", look.color), "undecided": ("full", "white"),
    }  # fmt: skip
    legend = figure.legends[0]
    fill_of = dict(zip([text.get_text() for text in legend.get_texts()], legend.legend_handles, strict=True))
    assert set(" ".join(fill_of).replace(" or ", " ").split()) >= set(words)
    assert fill_of["equivalent"].get_fillstyle() == "left"


def test_the_matrix_marks_what_is_equivalent_apart_from_what_is_undecided():
    rows = [row("mft", 0.001 * at, b, domain=d, verdict=word) for at, (d, b, word) in enumerate(
        [("maths", "maths", "equivalent"), ("maths", "code", "undecided"),
         ("code", "maths", "worse"), ("code", "code", "better")], start=1)]  # fmt: skip
    assert {"+0.1 ≈", "+0.2", "+0.3 *", "+0.4 *"} <= set(texts(matrix.draw(rows, "?", 0.95, {})))


@pytest.mark.parametrize("draw", [gain_curves.draw, forest.draw, matrix.draw])
def test_a_figure_says_how_many_items_fine_tunings_and_seeds_stand_behind_it(draw):
    def written(rows: list[dict[str, Any]]) -> str:
        return " ".join(texts(draw(rows, "?", 0.95, {})))

    one = [row("mft", 0.01), row("mft", 0.01, "loops", n=1319, seeds=2, seed="all")]
    assert "n = 600 to 1,319 items a benchmark; one fine-tuned checkpoint, 2 seeds" in written(one)
    recipe = [{**row("mft", 0.01), "replicate": "all", "replicates": 5, "seed": "all", "why": None}]
    assert "n = 600 items a benchmark; the recipe, over 5 fine-tunings, 1 seed" in written([*one[:1], *recipe])
