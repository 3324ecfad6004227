"""The analysis `predict-layers`: scores are what they promise to first order, and few groups give wide intervals."""

import json

import numpy as np
import pytest
import torch

from mft_core.analysis.layer_prediction import examine, measured_gains
from mft_core.analysis.layer_prediction_page import section
from mft_core.analysis.layer_scores import score_group, score_sites
from mft_core.analysis.rank_correlation import correlate, interval
from mft_core.data.batching import micro_batches
from mft_core.errors import ConfigError, StageError
from mft_core.masks.selection import masked_count, remove_least, select
from mft_core.masks.sites import choose_sites, find_sites
from mft_core.recipes import PredictLayers
from mft_core.stages.predict_layers import run
from mft_core.training.loss import LossHead
from tests.support.small_training import make_context, make_data, save_data
from tests.support.tiny import make_model, save_checkpoint

CPU = torch.device("cpu")
SPARSITY = 0.3
GROUPS = ("0", "1", "2", "3", "4", "5")
RECIPE = PredictLayers(groups=GROUPS, sparsity=SPARSITY, calibration_rows=12)


def one_each(count=8):
    return micro_batches(make_data().train, np.arange(count), 1, packing=False)


def loss_and_gradients(model, sites, batches):
    """Return the mean loss and, by parameter, its gradient, by a plain backward pass over all sequences."""
    parameters = dict(model.named_parameters())
    trained = {site.parameter: parameters[site.parameter].requires_grad_(True) for site in sites}
    with LossHead(model) as head:
        loss = sum(head.summed_loss(batch, CPU) for batch in batches.batches) / batches.loss_tokens
    gradients = torch.autograd.grad(loss, list(trained.values()))
    for parameter in trained.values():
        parameter.requires_grad_(False)
    return float(loss.detach()), dict(zip(trained, gradients, strict=True))


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def scored(request):
    model = make_model(request.param).requires_grad_(False)
    sites = choose_sites(find_sites(model), (1, 2), "both")
    return model, sites, score_sites(model, sites, one_each(), SPARSITY)


def test_norms_and_saliencies_are_those_of_a_plain_backward_pass(scored):
    model, sites, scores = scored
    _, gradients = loss_and_gradients(model, sites, one_each())
    parameters = dict(model.named_parameters())
    for site in sites:
        weight, gradient = site.of(parameters), site.of(gradients)
        assert scores[site.name]["gradient"] == pytest.approx(float(gradient.square().sum()), rel=1e-3, abs=1e-12)
        assert scores[site.name]["saliency"] == pytest.approx(float((weight * gradient).abs().sum()), rel=1e-3)
    group = score_group(sites, scores)
    assert group["gradient"] == pytest.approx(sum(score["gradient"] for score in scores.values()) ** 0.5)
    assert group["depth"] == 1.5


def test_the_first_order_gain_is_the_slope_of_the_loss_when_the_best_weights_shrink(scored):
    model, sites, scores = scored
    _, gradients = loss_and_gradients(model, sites, one_each())
    parameters = dict(model.named_parameters())
    before = {name: value.detach().clone() for name, value in parameters.items()}
    losses = {}
    step = 0.02
    for direction in (1, -1):
        with torch.no_grad():
            for site in sites:
                weight = site.of(before)
                least = remove_least(-weight * site.of(gradients), masked_count(SPARSITY, weight.numel()))
                site.of(parameters).copy_(weight * (1 - direction * step * ~least))
        losses[direction] = loss_and_gradients(model, sites, one_each())[0]
    with torch.no_grad():
        for name, value in before.items():
            parameters[name].copy_(value)
    slope = (losses[-1] - losses[1]) / (2 * step)
    assert score_group(sites, scores)["first-order"] == pytest.approx(slope, rel=0.02)


def test_the_cost_of_the_magnitude_mask_has_a_fisher_term_of_single_sequences(scored):
    model, sites, scores = scored
    parameters = dict(model.named_parameters())
    batches = one_each()
    count = len(batches.batches)
    expected = dict.fromkeys((site.name for site in sites), 0.0)
    for batch in batches.batches:
        alone = type(batches)([batch], batches.loss_tokens / count, 0, 0)  # L is the mean of these
        _, gradients = loss_and_gradients(model, sites, alone)
        for site in sites:
            removed = ~select(site.of(parameters), SPARSITY)
            change = (site.of(parameters) * site.of(gradients))[removed].double()
            expected[site.name] += float(change.square().sum() / 2 - change.sum()) / count
    for site in sites:
        assert scores[site.name]["magnitude"] == pytest.approx(expected[site.name], rel=1e-3, abs=1e-7)


def test_scoring_leaves_the_model_as_it_was(scored):
    model, _, _ = scored
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    fresh = make_model(model.config.model_type)
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


def test_rank_correlations_are_scipys_and_exact_in_their_p_value():
    found = correlate([1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 9.0])
    assert found["spearman"] == pytest.approx(1)
    assert found["kendall"] == pytest.approx(1)
    assert found["p_value"] == pytest.approx(2 / 120)
    swapped = correlate([1, 2, 3, 4], [1, 2, 4, 3])
    assert (swapped["spearman"], swapped["kendall"]) == pytest.approx((0.8, 2 / 3))
    assert swapped["p_value"] == pytest.approx(8 / 24)  # the identity and three swaps of neighbours, two-sided
    with pytest.raises(ValueError, match="two different values"):
        correlate([1, 2, 3], [4, 4, 4])


def test_few_pairs_give_wide_intervals_even_where_they_agree():
    few, many = interval(1.0, 4, 0.95), interval(1.0, 10, 0.95)
    assert few[1] == many[1] == 1
    assert few[0] < 0 < 0.9 < many[0] < 1
    assert interval(-0.6, 6, 0.95) == tuple(-end for end in reversed(interval(0.6, 6, 0.95)))


@pytest.mark.parametrize(("pairs", "r"), [(4, 0.0), (5, 0.7), (8, -0.5)])
def test_the_interval_covers_the_population_at_least_as_often_as_it_says(pairs, r):
    rng = np.random.default_rng(pairs)
    truth = 6 / np.pi * np.arcsin(r / 2)
    samples = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], size=(600, pairs))
    ranks = samples.argsort(1).argsort(1)
    seen = [float(np.corrcoef(one.T)[0, 1]) for one in ranks]
    ends = {one: interval(one, pairs, 0.95) for one in set(seen)}
    covered = np.mean([ends[one][0] <= truth <= ends[one][1] for one in seen])
    assert covered >= 0.94


def sweep_row(layers, benchmark, gain, **changes):
    row = {"variant": f"mft layers={layers}", "method": "mft", "domain": "mixed", "layers": layers, "modules": "both",
           "sparsity": SPARSITY, "seed": "all", "benchmark": benchmark, "gain": gain, "gain_low": gain - 0.02,
           "gain_high": gain + 0.02}  # fmt: skip
    return row | changes


def test_gains_are_the_pooled_ones_of_the_sweeps_masks():
    layers = {"0-1": (0, 1), "2": (2,), "last:1": (3,)}
    recipe = PredictLayers(groups=tuple(layers), sparsity=SPARSITY)
    sweep = [sweep_row(group, "sums", 0.01 * index) for index, group in enumerate(("0-1", "2", "3"))]
    noise = [
        sweep_row("2", "sums", 0.5, seed=0),  # one of the pooled seeds
        sweep_row("2", "sums", 0.5, sparsity=0.5),
        sweep_row("2", "sums", 0.5, modules="mlp"),
        sweep_row("2", "sums", 0.5, method="random"),
        sweep_row(None, "sums", 0.5, method="fft", modules=None, sparsity=None) | {"gain": None},
    ]
    found = measured_gains([*noise, *sweep], recipe, layers, 4)
    assert {group: gain["gain"] for group, gain in found["sums"].items()} == {"0-1": 0.0, "2": 0.01, "last:1": 0.02}
    with pytest.raises(StageError, match=r"layers 'last:1' on 'sums': the comparison has 0 gains"):
        measured_gains(sweep[:2], recipe, layers, 4)
    other = [sweep_row(group, "sums", 0.3, domain="arithmetic") for group in ("0-1", "2", "3")]
    with pytest.raises(StageError, match="'domain' where it has several"):
        measured_gains(sweep + other, recipe, layers, 4)
    one_domain = recipe.model_copy(update={"domain": "mixed"})
    assert measured_gains(sweep + other, one_domain, layers, 4) == found
    with pytest.raises(StageError, match=r"no gain of a learned mask .* in domain symbols"):
        measured_gains(sweep, recipe.model_copy(update={"domain": "symbols"}), layers, 4)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("predict")
    model = save_checkpoint(directory / "model", num_hidden_layers=6)
    return {"model": model, "data": save_data(directory / "data")}


def test_a_ranking_that_holds_is_found_and_equal_gains_are_no_ranking(paths, tmp_path):
    sweep = [sweep_row(group, "sums", 0.01 * index) for index, group in enumerate(GROUPS)]
    scores = examine(RECIPE, sweep, paths, make_context(tmp_path)).scores
    by_promise = sorted(GROUPS, key=lambda group: scores[group]["first-order"])
    sweep = [sweep_row(group, "sums", 0.01 * rank) for rank, group in enumerate(by_promise)]
    found = examine(RECIPE, sweep, paths, make_context(tmp_path))
    match = next(one for one in found.matches if one["candidate"] == "first-order")
    assert (match["spearman"], match["verdict"]) == (pytest.approx(1), "ranks them alike")
    assert (match["pick"], match["best"], match["regret"]) == (by_promise[-1], by_promise[-1], 0)
    assert "first-order gain" in section(found).split("**")[1]
    flat = examine(RECIPE, [row | {"gain": 0.01} for row in sweep], paths, make_context(tmp_path))
    assert not flat.matches
    assert "there is no ranking to predict" in section(flat)
    assert len(flat.rows()) == 6 * 5 + 6


def test_the_payload_is_the_same_again_and_says_when_nothing_is_shown(paths, tmp_path):
    comparison = tmp_path / "comparison"
    comparison.mkdir()
    gains = [0.01, -0.02, 0.03, 0.0, 0.02, -0.01]
    sweep = [sweep_row(group, name, gain * sign) for group, gain in zip(GROUPS, gains, strict=True)
             for name, sign in (("sums", 1), ("words", -0.5), ("mean", 0.25))]  # fmt: skip
    (comparison / "rows.json").write_text(json.dumps(sweep))
    payloads = []
    for name in ("one", "two"):
        out = tmp_path / name
        out.mkdir()
        summary = run(RECIPE, {**paths, "comparison": comparison}, out, make_context(tmp_path / "work"))
        payloads.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert payloads[0] == payloads[1]
    matches = [row for row in json.loads(payloads[0]["rows.json"]) if row["part"] == "correlation"]
    families = {row["benchmark"]: row["family"] for row in matches}
    assert families == {"sums": "benchmark", "words": "benchmark", "mean": "mean"}, "the comparison's own mean"
    assert set(payloads[0]) == {"section.md", "rows.json", "scores.png", "correlations.png"}
    assert summary["groups"] == 6
    text = payloads[0]["section.md"].decode()
    assert "No candidate's ranking is distinguishable from no correlation" in text
    written = json.loads(payloads[0]["rows.json"])
    assert len([row for row in written if row["part"] == "score"]) == 6 * 5
    assert len([row for row in written if row["part"] == "gain"]) == 6 * 3
    correlations = [row for row in written if row["part"] == "correlation"]
    assert len(correlations) == 5 * 3
    assert all(row["n"] == 6 and row["p_value"] <= row["p_holm"] for row in correlations)


def test_groups_that_are_the_same_or_outside_the_model_are_refused(paths, tmp_path):
    same = PredictLayers(groups=("0", "1", "0-0"), sparsity=SPARSITY)
    with pytest.raises(ConfigError, match="two of them are the same layers"):
        examine(same, [], paths, make_context(tmp_path))
    outside = PredictLayers(groups=("0", "1", "7"), sparsity=SPARSITY)
    with pytest.raises(ConfigError, match="outside the model"):
        examine(outside, [], paths, make_context(tmp_path))
