"""The objective: which terms are built, that they add up, and that its state is whole."""

import math
from dataclasses import replace

import pytest
import torch

from train.batches import Pairs
from train.config import (
    CenterConfig,
    HingeConfig,
    InfoNCEConfig,
    MarginConfig,
    ObjectiveConfig,
    QuantizationConfig,
)
from train.losses import objective as objective_file
from train.losses.distances import negative_pairs, squared_distances
from train.losses.hinge import hinge
from train.losses.objective import Objective

CODES = QuantizationConfig(weight=0.3, subspaces=2, codewords=4)
FULL = ObjectiveConfig(center=CenterConfig(weight=0.2), quantization=CODES)


@pytest.fixture
def pairs(embeddings, image_ids):
    image, text = embeddings(kind="unit")
    semantic = torch.nn.functional.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(2)))
    return Pairs(image, text, image_ids, semantic)


def build(config):
    torch.manual_seed(0)
    return Objective(config, 8, 6)


def items(logs):
    return {name: value.item() for name, value in logs.items()}


def test_the_default_is_the_hinge_alone(pairs):
    config = ObjectiveConfig(hinge=HingeConfig(warmup=0.0, margin=MarginConfig(form="fixed", start=0.4)))
    objective = build(config)
    total, logs = objective(pairs, 0.0)
    d = squared_distances(pairs.image, pairs.text)
    expected = hinge(d, negative_pairs(pairs.image_ids), torch.tensor(0.4), config.hinge.mining)
    torch.testing.assert_close(total, expected)
    assert set(logs) == {"loss/hinge", "margin", "gap", "distance/positive", "distance/negative"}
    assert items(logs)["margin"] == pytest.approx(0.4)
    assert objective.state_dict() == {}
    assert list(objective.parameters()) == []


def test_logged_distances_by_hand():
    """Two pairs on a line: images at 0 and 4, captions at 1 and 5; a third row repeats the first image."""
    line = torch.tensor([[0.0], [4.0], [0.0]])
    batch = Pairs(line, line + 1, torch.tensor([0, 1, 0]), torch.zeros(3, 0))
    _, logs = Objective(ObjectiveConfig(), 1, 2)(batch, 1.0)
    found = items(logs)
    negative = (25 + 25 + 9 + 9) / 4  # (0, 5) twice, (4, 1) twice
    assert found["distance/positive"] == 1.0
    assert found["distance/negative"] == pytest.approx(negative)
    assert found["gap"] == pytest.approx(negative - 1)


@pytest.mark.parametrize("ranking", ["hinge", "infonce"])
def test_terms_add_up_with_their_weights(pairs, ranking):
    total, logs = build(replace(FULL, ranking=ranking))(pairs, 0.5)
    found = items(logs)
    expected = found[f"loss/{ranking}"] + 0.2 * found["loss/center"] + 0.3 * found["loss/quantization"]
    assert total.item() == pytest.approx(expected, rel=1e-6)
    parts = {"distortion", "entropy", "agreement"}
    assert {f"loss/quantization/{part}" for part in parts} | {"codebook/perplexity"} < set(logs)
    assert ("margin" in logs) == (ranking == "hinge")
    assert ("temperature" in logs) == (ranking == "infonce")


def test_logs_carry_no_gradient(pairs):
    for config in (FULL, replace(FULL, weighting="uncertainty", ranking="infonce")):
        _, logs = build(config)(pairs, 0.5)
        assert not any(value.requires_grad for value in logs.values())
        assert all(value.ndim == 0 for value in logs.values())


def test_learned_weights_start_as_the_fixed_ones(pairs):
    total, logs = build(replace(FULL, weighting="uncertainty"))(pairs, 0.5)
    fixed, _ = build(FULL)(pairs, 0.5)
    assert total.item() == pytest.approx(fixed.item() - math.log(0.2) - math.log(0.3), rel=1e-5)
    found = {name: value for name, value in items(logs).items() if name.startswith("weight/")}
    assert found == pytest.approx({"weight/hinge": 1.0, "weight/center": 0.2, "weight/quantization": 0.3})


def test_all_that_learns_is_in_the_state():
    config = replace(FULL, weighting="uncertainty")
    hinged = set(build(config).state_dict())
    named = {f"uncertainty.log_variances.{name}" for name in ("center", "quantization")}
    shared = named | {"center.table.centres", "quantization.codebook.codewords"}
    assert hinged == shared | {"ranking.margin.average", "uncertainty.log_variances.hinge"}
    softmaxed = set(build(replace(config, ranking="infonce")).state_dict())
    assert softmaxed == shared | {"ranking.log_scale", "uncertainty.log_variances.infonce"}


@pytest.mark.parametrize("ranking", ["hinge", "infonce"])
def test_a_restored_objective_continues_exactly(pairs, ranking):
    config = replace(FULL, ranking=ranking, weighting="uncertainty")
    objective, other = build(config), Objective(config, 8, 6)
    for step in range(3):
        objective(pairs, step / 10)
    other.load_state_dict(objective.state_dict())
    for step in range(3, 6):
        expected, logs = objective(pairs, step / 10)
        found, other_logs = other(pairs, step / 10)
        assert torch.equal(found, expected)
        assert items(logs) == items(other_logs)


def test_evaluation_moves_nothing(pairs):
    objective = build(replace(FULL, weighting="uncertainty")).eval()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective(pairs, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


def test_training_moves_margin_and_centres(pairs):
    objective = build(FULL)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective(pairs, 0.5)
    moved = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"ranking.margin.average", "center.table.centres"}


def test_distances_are_computed_once(pairs, monkeypatch):
    calls = []

    def counted(u, v):
        calls.append(1)
        return squared_distances(u, v)

    monkeypatch.setattr(objective_file, "squared_distances", counted)
    build(FULL)(pairs, 0.5)
    assert len(calls) == 1


def test_ranking_on_codes_sees_the_decoded_embeddings(pairs):
    objective = build(replace(FULL, quantization=replace(CODES, rank_codes=True)))
    _, logs = objective(pairs, 1.0)
    codebook = objective.quantization.codebook
    image, text = (codebook.decode(codebook.encode(z)).detach() for z in (pairs.image, pairs.text))
    expected = (image - text).square().sum(1).mean()
    assert items(logs)["distance/positive"] == pytest.approx(expected.item(), abs=1e-5)
    plain = items(build(FULL)(pairs, 1.0)[1])
    assert items(logs)["distance/positive"] != pytest.approx(plain["distance/positive"], abs=1e-3)


def test_initialise_starts_the_codebook_from_data_and_is_harmless_without_one():
    z = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)) + 50
    objective = build(FULL)
    objective.initialise(z)
    torch.testing.assert_close(objective.quantization.codebook.codewords.mean(), torch.tensor(50.0), rtol=0, atol=1.0)
    build(ObjectiveConfig()).initialise(z)


@pytest.mark.parametrize("ranking", ["hinge", "infonce"])
@pytest.mark.parametrize("kind", ["unit", "free", "collapsed"])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_are_finite_and_reach_embeddings(embeddings, image_ids, ranking, kind, bf16):
    image, text = embeddings(kind=kind)
    objective = build(replace(FULL, ranking=ranking, weighting="uncertainty"))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        half = (x.bfloat16() if bf16 else x for x in (image, text))
        total, logs = objective(Pairs(*half, image_ids, torch.zeros(7, 0)), 0.5)
    total.backward()
    assert total.dtype == torch.float32
    assert all(math.isfinite(value) for value in items(logs).values())
    for grad in (image.grad, text.grad, *(p.grad for p in objective.parameters())):
        assert torch.isfinite(grad).all()
    assert image.grad.count_nonzero() > 0
    assert text.grad.count_nonzero() > 0


@pytest.mark.parametrize("rank_codes", [True, False])
def test_autocast_changes_neither_value_nor_gradient(pairs, rank_codes):
    config = replace(FULL, quantization=replace(CODES, rank_codes=rank_codes))
    found = []
    for bf16 in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            total, _ = build(config)(pairs, 0.5)
        found.append((total, *torch.autograd.grad(total, (pairs.image, pairs.text))))
    torch.testing.assert_close(found[0], found[1])


def test_permuting_pairs_changes_nothing(pairs):
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])
    shuffled = Pairs(*(getattr(pairs, name)[order] for name in ("image", "text", "image_ids", "semantic")))
    for config in (FULL, replace(FULL, ranking="infonce")):
        torch.testing.assert_close(build(config)(shuffled, 0.5)[0], build(config)(pairs, 0.5)[0])


@pytest.mark.parametrize("form", ["fixed", "A", "B", "C"])
def test_a_batch_of_one_image_has_nothing_to_rank(embeddings, form):
    image, text = embeddings(3)
    config = ObjectiveConfig(hinge=HingeConfig(margin=MarginConfig(form=form)))
    total, logs = build(config)(Pairs(image, text, torch.zeros(3, dtype=torch.int64), torch.ones(3, 1)), 0.5)
    assert total.item() == 0
    assert all(math.isfinite(value) for value in items(logs).values())


def test_learning_separates_pairs():
    """Free embeddings under each ranking term: after some steps every pair is its own nearest neighbour."""
    for config in (ObjectiveConfig(), ObjectiveConfig(ranking="infonce"), FULL):
        generator = torch.Generator().manual_seed(0)
        image, text = (torch.randn(12, 8, generator=generator).requires_grad_() for _ in range(2))
        objective = Objective(config, 8, 12)
        optimiser = torch.optim.Adam([image, text, *objective.parameters()], lr=0.1)
        for step in range(60):
            z, t = torch.nn.functional.normalize(image), torch.nn.functional.normalize(text)
            optimiser.zero_grad()
            objective(Pairs(z, t, torch.arange(12), torch.zeros(12, 0)), step / 60)[0].backward()
            optimiser.step()
        assert squared_distances(z, t).argmin(1).tolist() == list(range(12))


@pytest.mark.parametrize(
    "config",
    [
        ObjectiveConfig(center=CenterConfig(weight=-1.0)),
        ObjectiveConfig(quantization=replace(CODES, weight=-1)),
    ],
)
def test_a_negative_weight_is_refused(config):
    with pytest.raises(ValueError, match=r"found weight -1.* of the (center|quantization) loss; expected 0"):
        build(config)


def test_ranking_on_codes_needs_the_codebook():
    with pytest.raises(ValueError, match="rank_codes needs the codebook"):
        build(ObjectiveConfig(quantization=QuantizationConfig(weight=0.0, rank_codes=True)))


def test_the_fixed_temperature_is_kept(pairs):
    objective = build(ObjectiveConfig(ranking="infonce", infonce=InfoNCEConfig(temperature=0.3, learn=False)))
    _, logs = objective(pairs, 0.0)
    assert items(logs)["temperature"] == pytest.approx(0.3)
