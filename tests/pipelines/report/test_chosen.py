"""What validation rows choose among a method's variants, and what has no choice."""

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mft_core.errors import StageError
from pipelines.config.setup import MaskSpec
from pipelines.config.study import Study, VariantSpec
from pipelines.report.chosen import chosen, for_profile, refuse_edges


def row(variant: str, loss: float | None, accuracy: float = 0.5, **columns: Any) -> dict[str, Any]:
    """Return a row as a report has it, for the method that the variant's name begins with."""
    empty = dict.fromkeys(("layers", "modules", "sparsity", "gain", "gain_low", "gain_high", "verdict"))
    described = {"variant": variant, "method": variant.split(" ")[0], "domain": "maths", "benchmark": "sums"}
    numbers = {"seed": 0, "n": 100, "seeds": 1, "accuracy": accuracy, "validation_loss": loss}
    return {**empty, **described, **numbers, **columns}


def test_the_least_validation_loss_chooses_and_not_the_accuracy() -> None:
    (found,) = chosen([row("mft a", 0.3, accuracy=0.4), row("mft b", 0.5, accuracy=0.9), row("fft", 0.1)])
    assert (found["variant"], found["accuracy"], found["variants"]) == ("mft a", 0.4, 2)


def test_seeds_are_chosen_together_by_their_mean_and_reported_together() -> None:
    lucky = [
        row("mft a seed=0", 0.1, seed=0),
        row("mft a seed=1", 0.9, seed=1),
        row("mft a", None, seed="all", seeds=2),
    ]
    steady = [row("mft b seed=0", 0.3, seed=0), row("mft b seed=1", 0.3, seed=1), row("mft b", None, 0.7, seed="all")]
    (found,) = chosen([*lucky, *steady])
    assert (found["variant"], found["accuracy"], found["validation_loss"]) == ("mft b", 0.7, 0.3)


def test_every_benchmark_of_the_chosen_variant_is_there_and_domains_choose_for_themselves() -> None:
    rows = [row(f"mft {name}", loss, benchmark=bench, domain=domain) for bench in ("sums", "gcd")
            for domain, losses in {"maths": (0.2, 0.3), "words": (0.3, 0.2)}.items()
            for name, loss in zip("ab", losses, strict=True)]  # fmt: skip
    found = {(one["domain"], one["benchmark"]): one["variant"] for one in chosen(rows)}
    assert found == {(domain, bench): variant for domain, variant in (("maths", "mft a"), ("words", "mft b"))
                     for bench in ("sums", "gcd")}  # fmt: skip


def test_without_a_choice_or_a_common_measure_nothing_is_chosen() -> None:
    assert chosen([row("mft a", 0.3), row("random a", None), row("random b", None)]) == []
    masks = [row(f"mft {domain}", 0.3, **{"mask.domain": domain}) for domain in ("maths", "words")]
    assert chosen(masks) == []  # each loss is on rows of its own domain


def test_what_is_learned_on_another_domains_data_is_chosen_among_its_like() -> None:
    rows = [row(f"continued-fft {domain} {rate}", loss, **{"continued.domain": domain, "continued.learning_rate": rate})
            for domain, losses in {"maths": (0.2, 0.3), "words": (0.7, 0.6)}.items()
            for rate, loss in zip((0.1, 0.2), losses, strict=True)]  # fmt: skip
    assert [one["variant"] for one in chosen(rows)] == ["continued-fft maths 0.1", "continued-fft words 0.2"]


def test_accuracy_on_validation_items_chooses_where_the_study_says_so() -> None:
    rows = [row("mft a", 0.1, validation_accuracy=0.5), row("mft b", 0.9, validation_accuracy=0.6), row("fft", 0.1)]
    (found,) = chosen(rows, "accuracy")
    assert (found["variant"], found["validation_accuracy"]) == ("mft b", 0.6)
    assert "validation_loss" not in found


def tuned(*losses: float) -> list[dict[str, Any]]:
    rates = [0.1, 0.3, 1.0, 3.0][: len(losses)]
    return [
        row(f"mft learning_rate={rate}", loss, **{"mask.training.learning_rate": rate})
        for rate, loss in zip(rates, losses, strict=True)
    ]


@pytest.mark.parametrize(
    ("losses", "edge"),
    [
        ((0.1, 0.3, 0.4), "mask.training.learning_rate = 0.1 (tried: 0.1, 0.3, 1)"),
        ((0.4, 0.3, 0.2), "mask.training.learning_rate = 1 (tried: 0.1, 0.3, 1)"),
        ((0.4, 0.2, 0.3), None),
    ],
)
def test_a_choice_on_an_edge_of_its_grid_is_told_and_refused(losses: tuple[float, ...], edge: str | None) -> None:
    found = chosen(tuned(*losses))
    assert {one["edge"] for one in found} == {edge}
    if edge is None:
        refuse_edges("rates", found)
        return
    with pytest.raises(StageError, match=r"study rates: .*on the edge of its grid.*MFT, maths: mask.training") as told:
        refuse_edges("rates", found)
    assert edge in str(told.value)


def test_a_bound_is_an_edge_that_may_be_chosen_at_its_upper_end_alone() -> None:
    bounded = ["mask.training.learning_rate"]
    (greatest,), (least,) = (chosen(tuned(*losses), bounded=bounded) for losses in ((0.4, 0.2), (0.2, 0.4)))
    assert greatest["edge"] is None
    assert greatest["bound"] == "mask.training.learning_rate = 0.3 (tried: 0.1, 0.3)", "and its page says so"
    assert least["edge"] == "mask.training.learning_rate = 0.1 (tried: 0.1, 0.3)"


def test_a_setting_with_one_value_or_with_words_has_no_edge() -> None:
    words = [
        row(f"mft {name}", loss, **{"mask.score_init": name}) for name, loss in (("normal", 0.1), ("kaiming", 0.2))
    ]
    assert {one["edge"] for one in chosen(words)} == {None}
    seeds = [row(f"fft {seed}", loss, **{"fine_tune.seed": seed}) for seed, loss in ((1, 0.1), (2, 0.2))]
    assert {one["edge"] for one in chosen(seeds)} == {None}
    sparsities = [row(f"mft {share}", loss, sparsity=share) for share, loss in ((0.1, 0.3), (0.2, 0.1), (0.4, 0.2))]
    assert {one["edge"] for one in chosen(sparsities)} == {None}
    assert {one["edge"] for one in chosen(sparsities[:2])} == {"mask.sparsity = 0.2 (tried: 0.1, 0.2)"}


def test_what_was_chosen_is_told_as_a_profile_has_it() -> None:
    masks = [
        row("mft a", 0.3, sparsity=0.1, **{"mask.training.learning_rate": 0.001, "mask.training.epochs": 2.0}),
        row("mft b", 0.4, sparsity=0.1, **{"mask.score_init": "magnitude"}),
    ]
    rates = [row(f"fft {rate}", loss, **{"fine_tune.learning_rate": rate}) for rate, loss in ((0.1, 0.2), (0.2, 0.1))]
    found = for_profile(chosen([*rates, *masks]))
    assert [line for line in found.splitlines() if line[0] == "#"] == ["# FFT, maths", "# MFT, maths"]
    told = yaml.safe_load(found)
    assert told["fine_tune"] == {"learning_rate": 0.2}
    assert told["mask"] == {"training": {"learning_rate": 0.001, "epochs": 2.0}, "sparsity": 0.1}
    assert MaskSpec.model_validate(
        {"layers": "1", **told["mask"], "training": {**told["mask"]["training"], "batch_size": 1}}
    )


def test_a_bound_of_what_no_grid_varies_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"bounded: mask\.epochs: no grid varies that; they vary: mask\.sparsity"):
        Study(name="s", question="?", bounded=("mask.epochs",),
              variants=(VariantSpec(method="mft", grid={"mask.sparsity": [0.1, 0.2]}),))  # fmt: skip
