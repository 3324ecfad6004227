"""The analysis `landscape`: planes, line, sharpness and the bound are what their definitions say."""

import json
import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from mft_core.analysis.landscape import LINE, direction, filter_normalised, line, mean_loss, plane, steps
from mft_core.analysis.pac_bayes import bounds, complexity, gaussian_kl, squared_distances
from mft_core.analysis.parts import Parts
from mft_core.analysis.sequence_loss import SequenceLosses
from mft_core.analysis.sharpness import TOLERANCE, HessianOfLoss, _plain_attention, largest_eigenvalue
from mft_core.analysis.weight_pair import WeightPair, changed_sites
from mft_core.checkpoints.files import WeightFiles, load_model, skeleton
from mft_core.data.batching import micro_batches
from mft_core.errors import ConfigError, StageError
from mft_core.masks.sites import choose_sites, find_sites
from mft_core.recipes import Landscape
from mft_core.stages.landscape import run
from mft_core.training.loss import LossHead
from tests.support.small_training import make_context, make_data, save_data
from tests.support.tiny import make_model, save_checkpoint
from tests.support.told import untold

CPU = torch.device("cpu")
RECIPE = Landscape(
    variant="MFT 30%", rows=8, plane_rows=4, points=3, hessian_batches=2, hessian_rows=4, noise=(0.1, 1.0), draws=2
)


def save_pair(directory, family="llama"):
    """Write a model, and the same one without 30% of the weights of layers 1 and 2."""
    model = make_model(family)
    save_checkpoint(directory / "model", family)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for site in choose_sites(find_sites(model), (1, 2), "both"):
            weight = site.of(parameters)
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.3)
    model.save_pretrained(directory / "masked")
    return directory / "model", directory / "masked"


def the_loss(directory, tokens=None):
    model = load_model(directory, torch.float32, CPU).eval()
    tokens = tokens or make_data().validation
    batches = micro_batches(tokens, np.arange(len(tokens)), 8192, packing=False)
    with LossHead(model) as head, torch.no_grad():
        return sum(float(head.summed_loss(batch, CPU)) for batch in batches.batches) / batches.loss_tokens


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    paths = save_pair(tmp_path_factory.mktemp("pair"))
    return paths, WeightPair(*paths, CPU)


def losses_of(pair):
    validation = make_data().validation
    return SequenceLosses(pair.model, validation, np.arange(len(validation)), 8192)


def test_the_matrices_that_a_mask_touches_are_read_off_the_weights(pair):
    (model, masked), loaded = pair
    expected = [site.name for site in choose_sites(find_sites(skeleton(model)), (1, 2), "both")]
    assert [site.name for site in changed_sites(model, masked)] == expected == [site.name for site in loaded.sites]
    assert len(loaded.lower_layers) == 1


def test_models_that_are_equal_or_differ_elsewhere_are_refused(pair, tmp_path):
    (path, masked), _ = pair
    with pytest.raises(ConfigError, match="give another"):
        changed_sites(path, path)
    model = load_model(masked, torch.float32, CPU)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lm_head.weight differs .* not a maskable matrix"):
        changed_sites(path, tmp_path)


def test_each_plane_has_its_model_at_the_centre_and_the_same_directions(pair, tmp_path):
    paths, loaded = pair
    with losses_of(loaded) as losses:
        planes = plane(loaded, losses, steps(0.5, 3), seed=0, parts=Parts(make_context(tmp_path), 6))
        for name, path in zip(("fine-tuned", "masked"), paths, strict=True):
            assert planes[name][1, 1] == pytest.approx(the_loss(path), abs=1e-6)
            moved = [w + 0.5 * a - 0.5 * b for w, a, b in zip(
                loaded.values[name], direction(loaded, 0, 0), direction(loaded, 0, 1), strict=True)]  # fmt: skip
            loaded.put(moved)
            assert planes[name][0, 2] == pytest.approx(mean_loss(losses.measure(), losses.tokens), abs=1e-6)


@pytest.mark.parametrize(("family", "inputs"), [("llama", 1), ("gpt2", 0)])
def test_what_makes_one_output_is_as_long_in_a_direction_as_in_the_weights(family, inputs):
    model = make_model(family)
    for site in choose_sites(find_sites(model), (1,), "both"):
        weight = site.of(dict(model.named_parameters())).detach()
        step = filter_normalised(site, weight, torch.randn(weight.shape))
        torch.testing.assert_close(step.norm(dim=inputs), weight.norm(dim=inputs))


def test_the_line_ends_at_both_models(pair, tmp_path):
    paths, loaded = pair
    with losses_of(loaded) as losses:
        nats = line(loaded, "validation", losses, Parts(make_context(tmp_path), len(LINE)))
        ends = [mean_loss(nats[LINE.index(t)], losses.tokens) for t in (0, 1)]
        assert ends == pytest.approx([the_loss(path) for path in paths], abs=1e-6)
        loaded.put(loaded.values["masked"])
        np.testing.assert_array_equal(nats[LINE.index(1)], losses.measure())


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(StageError, match="not finite"):
        mean_loss(np.array([1.0, np.inf]), np.ones(2))


def test_the_largest_eigenvalue_is_found_beside_a_larger_negative_one():
    values = np.concatenate([[5.0, 4.0, -30.0], np.linspace(-1, 1, 57)])
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((60, 60)))[0]
    matrix = (basis * values @ basis.T).astype(np.float32)
    found = largest_eigenvalue(lambda vector: matrix @ vector, 60, seed=0)
    assert found.value == pytest.approx(5, rel=TOLERANCE)
    assert found.residual <= TOLERANCE
    with pytest.raises(StageError, match="did not converge"):
        largest_eigenvalue(lambda vector: -vector * np.arange(60, dtype=np.float32), 60, seed=0)


@pytest.mark.parametrize(("family", "modules", "chosen"), [("llama", "k_proj,v_proj", slice(2)),
                                                           ("mixtral", "mlp", slice(2, 3))])  # fmt: skip
def test_hessian_and_its_eigenvalue_are_those_of_the_dense_hessian(family, modules, chosen):
    small = {"hidden_size": 16, "intermediate_size": 8, "head_dim": 4, "num_key_value_heads": 1}
    model = make_model(family, **small).requires_grad_(False)
    model.set_attn_implementation("eager")  # the dense Hessian is computed without our choice of kernel
    sites = choose_sites(find_sites(model), (1,), modules)[chosen]
    batches = micro_batches(make_data().train, np.arange(6), 40, packing=False)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(*matrices):
        changed = {site.parameter: parameters[site.parameter].clone() for site in sites}
        for site, matrix in zip(sites, matrices, strict=True):
            site.of(changed).copy_(matrix)
        total = 0
        for batch in batches.batches:
            ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = functional_call(model, changed, kwargs={**ids, "use_cache": False}).logits[:, :-1]
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(),
                                                       reduction="sum")  # fmt: skip
        return total / batches.loss_tokens

    blocks = torch.autograd.functional.hessian(loss, tuple(site.of(parameters) for site in sites))
    sizes = [site.of(parameters).numel() for site in sites]
    dense = torch.cat([torch.cat([block.reshape(size, -1) for block in row], 1)
                       for row, size in zip(blocks, sizes, strict=True)])  # fmt: skip
    vector = np.random.default_rng(0).standard_normal(sum(sizes)).astype(np.float32)
    for keep in (False, True):
        with HessianOfLoss(model, sites, batches, keep=keep) as hessian:
            np.testing.assert_allclose(hessian.product(vector), dense.numpy() @ vector, atol=2e-5)
            found = largest_eigenvalue(hessian.product, hessian.size, seed=0)
        assert found.value == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=TOLERANCE)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_errors_of_sequences_are_their_wrong_greedy_guesses(pair):
    _, loaded = pair
    validation = make_data().validation
    loaded.put(loaded.values["fine-tuned"])
    with losses_of(loaded) as losses:
        nats, errors = losses.losses_and_errors()
        np.testing.assert_array_equal(nats, losses.measure())
    shares = []
    for index in range(len(validation)):
        ids, counted = validation.example(index)
        guesses = loaded.model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].argmax(-1).numpy()
        shares.append(float(np.mean(guesses[:-1][counted[1:]] != ids[1:][counted[1:]])))
    assert sorted(errors) == pytest.approx(sorted(shares))


def test_the_terms_of_the_bound_are_those_computed_by_hand():
    assert gaussian_kl(8.0, 0.5) == 16
    one, other = (torch.distributions.Normal(torch.tensor(mean), 0.3) for mean in ([0.1, -2.0], [0.0, 1.0]))
    assert gaussian_kl(0.1**2 + 3**2, 0.3) == pytest.approx(float(torch.distributions.kl_divergence(one, other).sum()))
    # n = 100, k = 5, delta = 0.05: ln(2 * 10 * 5 / 0.05) = ln 2000 = 7.6009; sqrt((10 + 7.6009) / 200) = 0.29665
    assert complexity(10.0, 100, 5) == pytest.approx(0.29665, abs=1e-5)
    shares, errors = (0.5, 1.0), np.array([[0.2, 0.4], [0.3, 0.6]])
    noisy = {name: np.stack([errors, errors], -1) for name in ("fine-tuned", "masked")}
    distances = {("own", "masked"): 0.0, ("zero", "masked"): 200.0}
    found = bounds(noisy, shares, distances, sequences=100)
    own, zero = ([row for row in found if row["prior"] == prior] for prior in ("own", "zero"))
    assert [row["noise"] for row in own if row["chosen"]] == [0.5]
    expected = (0.25, 0.05, 0.0, math.sqrt(math.log(2 * 10 * 2 / 0.05) / 200))
    assert [own[0][key] for key in ("empirical", "empirical_se", "kl", "complexity")] == pytest.approx(expected)
    assert own[0]["bound"] == own[0]["empirical"] + own[0]["complexity"]
    assert [row["kl"] for row in zero] == [400, 100]
    assert [row["vacuous"] for row in zero] == [True, True]


def test_distances_are_in_root_mean_squares_of_the_fine_tuned_matrices(pair):
    _, loaded = pair
    found = squared_distances(loaded)
    assert found["zero", "fine-tuned"] == pytest.approx(loaded.weights)
    assert found["own", "masked"] == found["fine-tuned", "fine-tuned"] == 0
    # a mask is orthogonal to what it removes
    assert found["zero", "masked"] + found["fine-tuned", "masked"] == pytest.approx(loaded.weights)


def test_the_payload_is_the_same_after_a_kill_and_names_every_figure(pair, tmp_path):
    (model, masked), _ = pair
    inputs = {"model": model, "masked": masked, "data": save_data(tmp_path / "data")}
    outs = [tmp_path / "whole", tmp_path / "resumed"]
    for out in outs:
        out.mkdir()
    seen = []
    context = make_context(tmp_path / "work")
    run(RECIPE, inputs, outs[0], type(context)(context.runtime, context.work, seen.append, context.log))
    assert [one.step for one in seen] == list(range(1, seen[-1].total + 1))

    def kill(progress):
        if progress.step == 20:
            raise KeyboardInterrupt

    again = make_context(tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        run(RECIPE, inputs, outs[1], type(again)(again.runtime, again.work, kill, again.log))
    run(RECIPE, inputs, outs[1], again)
    payloads = [{path.name: path.read_bytes() for path in out.iterdir()} for out in outs]
    assert payloads[0] == payloads[1]
    section = payloads[0]["section.md"].decode()
    assert section.startswith("## Loss surface: MFT 30%")
    for figure in ("plane.png", "line.png", "sharpness.png", "bound.png"):
        assert f"]({figure})" in section
        assert figure in payloads[0]
    rows = json.loads(payloads[0]["rows.json"])
    parts = {part: [row for row in rows if row["part"] == part] for part in dict.fromkeys(row["part"] for row in rows)}
    counts = {
        "plane": 2 * 9,
        "plane summary": 2,
        "line": 2 * len(LINE),
        "sharpness": 2 * 3,
        "noise": 2 * 3,
        "bound": 6 * 2,
    }
    assert {part: len(own) for part, own in parts.items()} == counts
    assert sum(row["chosen"] for row in parts["bound"]) == 6
    assert untold(section, rows) == []
    assert all(row["bound"] == pytest.approx(row["empirical"] + row["complexity"]) for row in parts["bound"])


def test_data_that_are_too_few_are_refused_before_any_model_is_loaded(tmp_path):
    inputs = {"model": tmp_path, "masked": tmp_path, "data": save_data(tmp_path / "data")}
    many = RECIPE.model_copy(update={"hessian_rows": 21})
    with pytest.raises(ConfigError, match="they need 42 training sequences, the data have 40"):
        run(many, inputs, tmp_path, make_context(tmp_path / "work"))


def test_a_bfloat16_checkpoint_is_looked_at_in_its_own_type_and_its_sharpness_in_float32(tmp_path):
    paths = save_pair(tmp_path)
    for path in paths:
        load_model(path, torch.bfloat16, CPU).save_pretrained(path)
    assert WeightFiles(paths[0]).tensor(changed_sites(*paths)[0].name).dtype == torch.bfloat16
    (tmp_path / "out").mkdir()
    inputs = {"model": paths[0], "masked": paths[1], "data": save_data(tmp_path / "data")}
    summary = run(RECIPE, inputs, tmp_path / "out", make_context(tmp_path / "work"))
    assert summary["sharpness_ratio"] > 0


def test_second_derivatives_change_no_switch_of_the_process() -> None:
    model = make_model()
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    implementation = model.config._attn_implementation
    with _plain_attention(model):
        assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()) == before
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == implementation
