"""What validation rows choose among a method's variants, and what has no choice."""

from typing import Any

from pipelines.report.chosen import chosen


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
