"""The objective: which terms are built, that they add up, and that its state is whole."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from train.config import (
    BankConfig,
    CenterConfig,
    ErasingConfig,
    HingeConfig,
    InfoNCEConfig,
    LocalLossConfig,
    MarginConfig,
    ObjectiveConfig,
    QuantizationConfig,
    SigLIPConfig,
)
from train.embeddings import Embeddings, Erased, Pairs
from train.losses.center import CenterLoss
from train.losses.distances import both_directions, squared_distances
from train.losses.erasing import erasing
from train.losses.hinge import hinge
from train.losses.infonce import InfoNCELoss
from train.losses.objective import Objective
from train.memory import EmbeddingShape

RANKINGS = ["hinge", "infonce", "siglip"]
CODES = QuantizationConfig(weight=0.3, start=0.0, subspaces=2, codewords=4)
FULL = ObjectiveConfig(
    bank=BankConfig(size=10, share=0.4),
    erasing=ErasingConfig(weight=0.5, irrelevant=0.7),
    center=CenterConfig(weight=0.2),
    quantization=CODES,
    local=LocalLossConfig(weight=0.1),
)
SHAPE = EmbeddingShape(8, 4)


def distances(image, text):
    return squared_distances(image.vector, text.vector)


def random_unit(seed, dim=8):
    return F.normalize(torch.randn(7, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def erased_views(seed=20):
    views = (Embeddings.of(random_unit(seed + i)) for i in range(4))
    return Erased(*views, torch.ones(7, dtype=torch.bool), torch.tensor([1, 1, 0, 1, 0, 1, 1], dtype=torch.bool))


@pytest.fixture
def pairs(embeddings, image_ids):
    """A batch that has all that any term reads."""
    image, text = embeddings(kind="unit")
    return Pairs(
        Embeddings.of(image, random_unit(2, 4)),
        Embeddings.of(text, random_unit(3, 4)),
        image_ids,
        random_unit(4, 5),
        torch.tensor([3, 2, 3, 0, 2, 1, 3]),
        torch.tensor([[1, 0, 1]] * 3 + [[0, 1, 1]] * 4, dtype=torch.uint8),
        image_ids,
        (Embeddings.of(random_unit(5), random_unit(6, 4)), Embeddings.of(random_unit(7), random_unit(8, 4))),
        erased_views(),
    )


def plain_pairs(image, text, image_ids, semantic=None):
    none = torch.zeros(len(image), 0)
    semantic = none if semantic is None else semantic
    return Pairs(Embeddings.of(image), Embeddings.of(text), image_ids, semantic, image_ids, none.byte(), image_ids)


def build(config, shape=SHAPE, concepts=4, *, made=True):
    """The objective; its codebook, where there is one, as it was drawn, unless it is still to be made of embeddings."""
    torch.manual_seed(0)
    objective = Objective(config, shape, shape, concepts, 3)
    if objective.quantization is not None and made:
        objective.quantization.codebook.ready.fill_(1)
    return objective


def items(logs):
    return {name: value.item() for name, value in logs.items()}


def different(image_ids):
    return image_ids[:, None] != image_ids


def test_the_default_is_the_hinge_alone(pairs):
    config = ObjectiveConfig(hinge=HingeConfig(warmup=0.0, margin=MarginConfig(form="fixed", start=0.4)))
    objective = build(config)
    total, logs = objective(pairs, 0.0, [distances])
    d = distances(pairs.image, pairs.text)
    rank = partial(hinge, mining=config.hinge.mining)
    expected = both_directions(rank, d, different(pairs.image_ids), torch.tensor(0.4))
    torch.testing.assert_close(total, expected)
    assert set(logs) == {"loss/hinge", "margin", "gap", "distance/positive", "distance/negative"}
    assert items(logs)["margin"] == pytest.approx(0.4)
    assert objective.state_dict() == {}
    assert list(objective.parameters()) == []


def test_the_hinge_waits_for_its_warm_up(pairs):
    config = ObjectiveConfig(hinge=HingeConfig(warmup=0.3, margin=MarginConfig(form="fixed", start=2.0)))
    d, negatives = distances(pairs.image, pairs.text), different(pairs.image_ids)
    for progress, mining in ((0.29, "mean"), (0.3, "hardest")):
        expected = both_directions(partial(hinge, mining=mining), d, negatives, torch.tensor(2.0))
        torch.testing.assert_close(build(config)(pairs, progress, [distances])[0], expected)


def test_logged_distances_by_hand():
    """Two pairs on a line: images at 0 and 4, captions at 1 and 5; a third row repeats the first image."""
    line = torch.tensor([[0.0], [4.0], [0.0]])
    batch = plain_pairs(line, line + 1, torch.tensor([0, 1, 0]))
    _, logs = build(ObjectiveConfig(), EmbeddingShape(1))(batch, 1.0, [distances])
    found = items(logs)
    negative = (25 + 25 + 9 + 9) / 4  # (0, 5) twice, (4, 1) twice
    assert found["distance/positive"] == 1.0
    assert found["distance/negative"] == pytest.approx(negative)
    assert found["gap"] == pytest.approx(negative - 1)


def test_mixed_pairs_are_masked_by_both_their_images():
    """Images at 0, 4 and 10, captions one further; pair 2 is mixed with image 0 as pair 0 is with itself."""
    line = torch.tensor([[0.0], [4.0], [10.0]])
    batch = replace(plain_pairs(line, line + 1, torch.arange(3)), mixed_ids=torch.tensor([0, 1, 0]))
    _, logs = build(ObjectiveConfig(), EmbeddingShape(1))(batch, 1.0, [distances])
    assert items(logs)["distance/negative"] == pytest.approx((25 + 9 + 49 + 25) / 4)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_terms_add_up_with_their_weights(pairs, ranking):
    objective = build(replace(FULL, ranking=ranking))
    for step in range(2):
        total, logs = objective(pairs, 0.5, [distances])
        found = items(logs)
        assert found["bank/filled"] == 7 * step
    assert found[f"loss/{ranking}"] == pytest.approx(
        0.6 * found[f"loss/{ranking}/batch"] + 0.4 * found[f"loss/{ranking}/bank"], rel=1e-6
    )
    assert found["loss/erasing"] == pytest.approx(found["loss/erasing/kept"] + 0.7 * found["loss/erasing/irrelevant"])
    weights = {ranking: 1.0, "erasing": 0.5, "center": 0.2, "quantization": 0.3, "local": 0.1}
    assert total.item() == pytest.approx(sum(w * found[f"loss/{name}"] for name, w in weights.items()), rel=1e-6)
    parts = {
        "quantization/distortion",
        "quantization/entropy",
        "quantization/agreement",
        "local/similarity",
        "local/words",
    }
    learned = {"hinge": set(), "infonce": {"temperature"}, "siglip": {"temperature", "bias"}}[ranking]
    assert set(logs) == {
        *(f"loss/{name}" for name in (*weights, *parts, f"{ranking}/batch", f"{ranking}/bank")),
        *("loss/erasing/kept", "loss/erasing/irrelevant", "distance/positive", "distance/negative", "gap", "margin"),
        *("codebook/perplexity", "bank/filled"),
        *learned,
    }


def test_logs_carry_no_gradient(pairs):
    for ranking in RANKINGS:
        for weighting in ("fixed", "uncertainty"):
            _, logs = build(replace(FULL, ranking=ranking, weighting=weighting))(pairs, 0.5, [distances])
            assert not any(value.requires_grad for value in logs.values())
            assert all(value.ndim == 0 for value in logs.values())


def test_learned_weights_start_as_the_fixed_ones(pairs):
    total, logs = build(replace(FULL, weighting="uncertainty"))(pairs, 0.5, [distances])
    fixed, _ = build(FULL)(pairs, 0.5, [distances])
    weights = {"hinge": 1.0, "erasing": 0.5, "center": 0.2, "quantization": 0.3, "local": 0.1}
    assert total.item() == pytest.approx(fixed.item() - sum(map(math.log, weights.values())), rel=1e-5)
    found = {name: value for name, value in items(logs).items() if name.startswith("weight/")}
    assert found == pytest.approx({f"weight/{name}": weight for name, weight in weights.items()})


@pytest.mark.parametrize("ranking", RANKINGS)
def test_all_that_learns_or_remembers_is_in_the_state(ranking):
    config = replace(
        FULL,
        ranking=ranking,
        weighting="uncertainty",
        infonce=InfoNCEConfig(margin=MarginConfig(form="A")),
        siglip=SigLIPConfig(margin=MarginConfig(form="A")),
    )
    keys = {f"bank.{side}.{name}" for side in ("image", "text") for name in ("vector", "local", "parts", "mask")}
    learned = {"hinge": set(), "infonce": {"log_scale"}, "siglip": {"log_scale", "bias"}}[ranking]
    assert set(build(config).state_dict()) == {
        *(f"uncertainty.log_variances.{name}" for name in (ranking, "erasing", "center", "quantization", "local")),
        "center.table.centres",
        "quantization.sample",
        *(f"quantization.codebook.{name}" for name in ("codewords", "counts", "rotation", "spread", "ready")),
        *("local.idf", "local.words.weight", "local.words.bias"),
        *(keys | {"bank.image_ids", "bank.mixed_ids", "bank.pointer"}),
        *(f"ranking.{name}" for name in learned | {"margin.average"}),
    }


def steps(objective, pairs, first, last):
    """Train: each step's pairs and keys differ."""
    for step in range(first, last):
        keys = tuple(side.map(partial(torch.roll, shifts=step, dims=0)) for side in pairs.keys)
        yield objective(replace(pairs, keys=keys, image_ids=pairs.image_ids + step), step / 10, [distances])


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_restored_objective_continues_exactly(pairs, ranking):
    config = replace(
        FULL, ranking=ranking, weighting="uncertainty", infonce=InfoNCEConfig(margin=MarginConfig(form="A"))
    )
    objective, other = build(config), Objective(config, SHAPE, SHAPE, 4, 3)
    list(steps(objective, pairs, 0, 3))
    other.load_state_dict(objective.state_dict())
    both = zip(steps(objective, pairs, 3, 6), steps(other, pairs, 3, 6), strict=True)
    for (expected, logs), (found, other_logs) in both:
        assert torch.equal(found, expected)
        assert items(logs) == items(other_logs)


def moved_by(objective, pairs):
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective(pairs, 0.5, [distances])
    return {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}


def test_evaluation_moves_nothing(pairs):
    assert moved_by(build(replace(FULL, weighting="uncertainty")).eval(), pairs) == set()


def test_training_moves_margin_centres_codewords_and_bank(pairs):
    remembered = {"image.vector", "image.local", "text.vector", "text.local", "image_ids", "mixed_ids", "pointer"}
    expected = {"ranking.margin.average", "center.table.centres"} | {f"bank.{name}" for name in remembered}
    expected |= {"quantization.codebook.codewords", "quantization.codebook.counts"}
    assert moved_by(build(FULL), pairs) == expected


def test_the_margin_moves_once_a_step_by_the_whole_views_alone(pairs):
    """One step of the closed form: neither keys nor erased views are seen by the average."""
    objective = build(replace(FULL, quantization=QuantizationConfig()))
    _, logs = objective(pairs, 0.5, [distances])
    config, gap = FULL.hinge.margin, items(logs)["gap"]
    expected = config.decay * config.start / config.weight + (1 - config.decay) * gap
    assert objective.ranking.margin.average.item() == pytest.approx(expected, rel=1e-5)


def test_the_margin_of_infonce_follows_the_gap(pairs):
    margin = MarginConfig(form="A", decay=0.0, weight=0.1, low=0.0)
    config = ObjectiveConfig(ranking="infonce", infonce=InfoNCEConfig(margin=margin))
    total, logs = build(config)(pairs, 0.5, [distances])
    found = items(logs)
    assert found["margin"] == pytest.approx(0.1 * found["gap"], rel=1e-5)
    without, _ = build(ObjectiveConfig(ranking="infonce"))(pairs, 0.5, [distances])
    assert total > without


def test_the_margin_is_that_of_the_chosen_ranking():
    margins = {name: MarginConfig(start=0.1 * i) for i, name in enumerate(RANKINGS)}
    config = ObjectiveConfig(
        hinge=HingeConfig(margin=margins["hinge"]),
        infonce=InfoNCEConfig(margin=margins["infonce"]),
        siglip=SigLIPConfig(margin=margins["siglip"]),
    )
    for name in RANKINGS:
        assert replace(config, ranking=name).margin is margins[name]


class Counted:
    """The host's distances, and the sizes they were asked for."""

    def __init__(self):
        self.sizes = []

    def __call__(self, image, text):
        self.sizes.append((len(image), len(text)))
        return distances(image, text)


def test_only_what_is_needed_is_compared(pairs):
    counted = Counted()
    build(replace(FULL, erasing=ErasingConfig(), bank=BankConfig()))(pairs, 0.5, [counted])
    assert counted.sizes == [(7, 7)]
    counted = Counted()
    objective = build(replace(FULL, erasing=ErasingConfig()))
    objective(pairs, 0.5, [counted])
    assert counted.sizes == [(7, 7)] * 3  # an empty bank is not compared with
    counted.sizes.clear()
    objective(pairs, 0.5, [counted])
    assert sorted(counted.sizes) == [(7, 7)] * 5


def bank_config(ranking="infonce", share=1.0):
    return ObjectiveConfig(
        ranking=ranking, infonce=InfoNCEConfig(temperature=0.3), bank=BankConfig(size=10, share=share)
    )


def test_the_banks_part_equals_a_loop_over_anchors(pairs):
    """Anchors against keys only: the own key is the positive, keys of other images, also of last time, negatives."""
    objective = build(bank_config())
    first = replace(pairs, image_ids=pairs.image_ids + 1)  # shares some images with the second batch
    keys = tuple(Embeddings.of(random_unit(seed), random_unit(seed + 1, 4)) for seed in (50, 60))
    objective(replace(first, keys=keys, mixed_ids=first.image_ids), 0.0, [distances])
    found, _ = objective(pairs, 0.0, [distances])
    expected, ids, old_ids = 0.0, pairs.image_ids.tolist(), first.image_ids.tolist()
    for anchors, own, old in (
        (pairs.image.vector, pairs.keys[1].vector, keys[1].vector),
        (pairs.text.vector, pairs.keys[0].vector, keys[0].vector),
    ):
        for i in range(7):
            score = [math.exp((anchors[i] @ key).item() / 0.3) for key in (*own, *old)]
            negatives = [s for s, other in zip(score, ids + old_ids, strict=True) if other != ids[i]]
            expected -= math.log(score[i] / (score[i] + sum(negatives))) / 14
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_positives_and_negatives_of_the_bank_come_from_the_key_encoder(pairs):
    """An image's gradient does not depend on the trained network's captions."""
    gradients = []
    for text in (pairs.text, Embeddings.of(random_unit(30), random_unit(31, 4))):
        total, _ = build(bank_config())(replace(pairs, text=text), 0.0, [distances])
        gradients.extend(torch.autograd.grad(total, pairs.image.vector))
    assert gradients[0].count_nonzero() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_the_share_mixes_batch_and_bank(pairs, ranking):
    found = {}
    for share in (0.25, 1.0):
        objective = build(bank_config(ranking, share))
        list(steps(objective, pairs, 0, 2))
        found[share] = items(objective(pairs, 0.5, [distances])[1])
    alone = items(
        build(ObjectiveConfig(ranking=ranking, infonce=InfoNCEConfig(temperature=0.3)))(pairs, 0.5, [distances])[1]
    )
    if ranking != "hinge":  # its margin has moved
        assert found[0.25][f"loss/{ranking}/batch"] == pytest.approx(alone[f"loss/{ranking}"], rel=1e-6)
    expected = 0.75 * found[0.25][f"loss/{ranking}/batch"] + 0.25 * found[1.0][f"loss/{ranking}"]
    assert found[0.25][f"loss/{ranking}"] == pytest.approx(expected, rel=1e-5)


def test_the_batchs_keys_are_remembered_after_the_loss_once_a_step(pairs):
    objective = build(bank_config())
    _, logs = objective(pairs, 0.0, [distances])
    assert items(logs)["bank/filled"] == 0
    assert objective.bank.filled == 7
    assert torch.equal(objective.bank.image_ids[:7], pairs.image_ids)
    assert torch.equal(objective.bank.image.vector[:7], pairs.keys[0].vector)
    assert torch.equal(objective.bank.text.local[:7], pairs.keys[1].local)


def test_erasing_ranks_the_erased_views_with_the_same_loss(pairs):
    config = ObjectiveConfig(
        ranking="infonce",
        infonce=InfoNCEConfig(temperature=0.3, hardness=0.5),
        erasing=ErasingConfig(weight=0.5, irrelevant=0.7),
    )
    total, logs = build(config)(pairs, 0.5, [distances])
    loss = InfoNCELoss(config.infonce)

    def rank(squared):
        return both_directions(loss, squared, different(pairs.image_ids), torch.tensor(0.0))

    squared = distances(pairs.image, pairs.text)
    expected, _ = erasing(pairs.image, pairs.text, pairs.erased, distances, rank, squared.diagonal(), 0.7)
    assert items(logs)["loss/erasing"] == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(total, rank(squared) + 0.5 * expected)


def test_the_center_loss_reads_concepts_and_not_images(pairs):
    config = ObjectiveConfig(center=CenterConfig(weight=1.0))
    objective = build(config)
    objective(pairs, 0.5, [distances])
    reference = CenterLoss(config.center, 8, 4)
    reference(pairs.image.vector, pairs.text.vector, pairs.concepts)
    torch.testing.assert_close(objective.center.table.centres, reference.table.centres)


def test_ranking_on_codes_compares_embeddings_with_codes_as_a_search_does(pairs):
    """Images against decoded captions, captions against decoded images, mixed with the plain ranking."""
    fixed = HingeConfig(warmup=0.0, margin=MarginConfig(form="fixed", start=0.4))
    objective = build(ObjectiveConfig(hinge=fixed, quantization=replace(CODES, rank_codes=0.25))).eval()
    _, logs = objective(pairs, 1.0, [distances])
    codebook = objective.quantization.codebook
    image, text = (
        Embeddings.of(codebook.decode(codebook.encode(z.vector)).detach()) for z in (pairs.image, pairs.text)
    )
    negatives, margin = different(pairs.image_ids), torch.tensor(0.4)

    def one_way(d, mask):
        return hinge(d.diagonal(), d, mask, margin, "hardest")

    coded = one_way(distances(pairs.image, text), negatives) + one_way(distances(image, pairs.text).T, negatives.T)
    d = distances(pairs.image, pairs.text)
    plain = one_way(d, negatives) + one_way(d.T, negatives.T)
    assert items(logs)["loss/hinge/codes"] == pytest.approx(coded.item(), abs=1e-5)
    assert items(logs)["loss/hinge"] == pytest.approx((0.75 * plain + 0.25 * coded).item(), abs=1e-5)
    assert items(logs)["distance/positive"] == pytest.approx(d.diagonal().mean().item(), abs=1e-5)


def test_codes_of_a_host_with_a_local_space_keep_its_local_half(pairs):
    seen = []

    def spy(image, text):
        seen.append((image, text))
        return distances(image, text)

    build(ObjectiveConfig(quantization=replace(CODES, rank_codes=0.5)))(pairs, 1.0, [spy])
    assert len(seen) == 3
    for image, text in seen:
        assert torch.equal(image.local, pairs.image.local)
        assert torch.equal(text.local, pairs.text.local)


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_before_the_codebook_is_made_there_is_no_quantization_term(pairs, weighting):
    """4 codewords want 128 embeddings, 14 of them in a batch: the tenth batch makes the codebook."""
    config = ObjectiveConfig(quantization=replace(CODES, rank_codes=0.5), weighting=weighting)
    objective = build(config, made=False)
    without = build(ObjectiveConfig(weighting=weighting))
    for _ in range(9):
        total, logs = objective(pairs, 0.4, [distances])
        expected, expected_logs = without(pairs, 0.4, [distances])
        assert total == expected
        assert set(logs) - {"weight/quantization"} == set(expected_logs)
    _, logs = objective(pairs, 0.4, [distances])
    assert {"loss/quantization", "loss/hinge/codes", "codebook/perplexity"} <= set(logs)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("kind", ["unit", "free", "collapsed"])
@pytest.mark.parametrize("bf16", [True, False])
def test_gradients_are_finite_and_reach_embeddings(embeddings, pairs, ranking, kind, bf16):
    image, text = embeddings(kind=kind)
    objective = build(replace(FULL, ranking=ranking, weighting="uncertainty"))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        sides = [
            replace(one, vector=x.bfloat16() if bf16 else x) for one, x in ((pairs.image, image), (pairs.text, text))
        ]
        total, logs = objective(replace(pairs, image=sides[0], text=sides[1]), 0.5, [distances])
    total.backward()
    assert total.dtype == torch.float32
    assert all(math.isfinite(value) for value in items(logs).values())
    for grad in (image.grad, text.grad, *(p.grad for p in objective.parameters())):
        assert torch.isfinite(grad).all()
    assert image.grad.count_nonzero() > 0
    assert text.grad.count_nonzero() > 0


@pytest.mark.parametrize("ranking", RANKINGS)
def test_autocast_changes_neither_value_nor_gradient(pairs, ranking):
    found = []
    for bf16 in (True, False):
        objective = build(replace(FULL, ranking=ranking))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            objective(pairs, 0.5, [distances])
            total, _ = objective(pairs, 0.5, [distances])
        found.append((total, *torch.autograd.grad(total, (pairs.image.vector, pairs.text.vector))))
    torch.testing.assert_close(found[0], found[1])


def test_embeddings_of_half_precision_are_compared_in_float32(pairs):
    def half(x):
        return x.bfloat16() if x.is_floating_point() else x

    def wide(image, text):
        assert image.vector.dtype == text.vector.dtype == torch.float32
        return distances(image, text)

    erased = pairs.erased
    views = {
        name: getattr(erased, name).map(half) for name in ("image_kept", "image_dropped", "text_kept", "text_dropped")
    }
    objective = build(FULL)
    halves = replace(
        pairs,
        image=pairs.image.map(half),
        text=pairs.text.map(half),
        keys=tuple(key.map(half) for key in pairs.keys),
        erased=replace(erased, **views),
    )
    for _ in range(2):
        objective(halves, 0.5, [wide])


@pytest.mark.parametrize("ranking", RANKINGS)
def test_permuting_pairs_changes_nothing(pairs, ranking):
    order = torch.tensor([3, 6, 0, 1, 5, 2, 4])

    def permuted(value):
        return value.map(permuted) if isinstance(value, Embeddings) else value[order]

    shuffled = Pairs(
        **{
            **{name: permuted(value) for name, value in vars(pairs).items() if name not in ("keys", "erased")},
            "keys": tuple(map(permuted, pairs.keys)),
            "erased": Erased(*map(permuted, vars(pairs.erased).values())),
        }
    )
    config = replace(FULL, ranking=ranking)
    torch.testing.assert_close(build(config)(shuffled, 0.5, [distances])[0], build(config)(pairs, 0.5, [distances])[0])


@pytest.mark.parametrize("form", ["fixed", "A", "B", "C"])
@pytest.mark.parametrize("ranking", ["hinge", "infonce"])
def test_a_batch_of_one_image_has_nothing_to_rank(embeddings, ranking, form):
    image, text = embeddings(3)
    margin = MarginConfig(form=form)
    config = ObjectiveConfig(
        ranking=ranking, hinge=HingeConfig(margin=margin), infonce=InfoNCEConfig(margin=margin, hardness=1.0)
    )
    batch = plain_pairs(image, text, torch.zeros(3, dtype=torch.int64), torch.ones(3, 1))
    total, logs = build(config)(batch, 0.5, [distances])
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-7)
    assert torch.isfinite(image.grad).all()
    assert all(math.isfinite(value) for value in items(logs).values())


@pytest.mark.parametrize(
    "config",
    [
        ObjectiveConfig(),
        ObjectiveConfig(ranking="infonce"),
        ObjectiveConfig(ranking="infonce", infonce=InfoNCEConfig(hardness=2.0, margin=MarginConfig(form="A"))),
        ObjectiveConfig(ranking="siglip"),
        ObjectiveConfig(center=CenterConfig(weight=0.2), quantization=CODES),
        ObjectiveConfig(ranking="infonce", bank=BankConfig(size=20)),
    ],
    ids=["hinge", "infonce", "weighted", "siglip", "less", "bank"],
)
def test_learning_separates_pairs(config):
    """Free embeddings under each ranking term: after some steps every pair is its own nearest neighbour."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(12, 8, generator=generator).requires_grad_() for _ in range(2))
    objective = build(config, EmbeddingShape(8), concepts=12)
    optimiser = torch.optim.Adam([image, text, *objective.parameters()], lr=0.1)
    for step in range(60):
        z, t = F.normalize(image), F.normalize(text)
        batch = plain_pairs(z, t, torch.arange(12))
        if config.bank.size:
            batch = replace(batch, keys=(Embeddings.of(z.detach()), Embeddings.of(t.detach())))
        optimiser.zero_grad()
        objective(batch, step / 60, [distances])[0].backward()
        optimiser.step()
    assert squared_distances(z, t).argmin(1).tolist() == list(range(12))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("center", ObjectiveConfig(center=CenterConfig(weight=-1.0))),
        ("quantization", ObjectiveConfig(quantization=replace(CODES, weight=-1))),
        ("erasing", ObjectiveConfig(erasing=ErasingConfig(weight=-1.0))),
        ("local", ObjectiveConfig(local=LocalLossConfig(weight=-1.0))),
    ],
)
def test_a_negative_weight_is_refused(name, config):
    with pytest.raises(ValueError, match=rf"found weight -1.* of the {name} loss; expected 0"):
        build(config)


@pytest.mark.parametrize("name", ["center", "quantization"])
def test_losses_on_vectors_are_refused_on_a_host_without(name):
    config = replace(ObjectiveConfig(), **{name: getattr(FULL, name)})
    with pytest.raises(ValueError, match=f"the {name} loss works on embedding vectors, and this host compares parts"):
        build(config, EmbeddingShape(0, 0, 5, 8))


def test_a_host_without_vectors_is_ranked_by_its_own_distances():
    """Images and captions of parts alone, compared by their best parts; bank and erasing with them."""

    def best_parts(image, text):
        return (image.parts[:, None, :, None] - text.parts[None, :, None]).square().sum(-1).amin((2, 3))

    shape = EmbeddingShape(0, 0, 2, 3)

    def parts(seed):
        values = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        return Embeddings(torch.zeros(4, 0), torch.zeros(4, 0), values, torch.ones(4, 2, dtype=torch.bool))

    image, text, keys = parts(0), parts(1), (parts(2), parts(3))
    erased = Erased(*(parts(seed) for seed in range(4, 8)), *(torch.ones(4, dtype=torch.bool) for _ in range(2)))
    ids, none = torch.arange(4), torch.zeros(4, 0)
    batch = Pairs(image, text, ids, none, ids, none.byte(), ids, keys, erased)
    config = ObjectiveConfig(ranking="infonce", bank=BankConfig(size=6), erasing=ErasingConfig(weight=1.0))
    objective = build(config, shape)
    for _ in range(2):
        total, _ = objective(batch, 0.5, [best_parts])
    total.backward()
    assert image.parts.grad.count_nonzero() > 0
    assert objective.bank.filled == 6


def test_ranking_on_codes_needs_the_codebook():
    with pytest.raises(ValueError, match="rank_codes needs the codebook"):
        build(ObjectiveConfig(quantization=QuantizationConfig(weight=0.0, rank_codes=0.5)))


@pytest.mark.parametrize("wrong", [{"keep": -0.1}, {"irrelevant": -1.0}])
def test_erasing_thresholds_below_zero_are_refused(wrong):
    with pytest.raises(ValueError, match=r"found erasing keep .* and irrelevant .*; expected 0 or more"):
        build(ObjectiveConfig(erasing=ErasingConfig(weight=1.0, **wrong)))


@pytest.mark.parametrize("wrong", [{"size": -1}, {"momentum": 1.0}, {"momentum": -0.1}, {"share": 0.0}, {"share": 1.1}])
def test_settings_that_no_bank_can_use_are_refused(wrong):
    with pytest.raises(ValueError, match=r"found a memory bank of size .* share .*; expected a size of 0"):
        build(ObjectiveConfig(bank=replace(BankConfig(size=4), **wrong)))


@pytest.mark.parametrize("form", ["B", "C"])
def test_margins_that_compare_captions_do_not_go_with_a_bank(form):
    config = ObjectiveConfig(hinge=HingeConfig(margin=MarginConfig(form=form)), bank=BankConfig(size=4))
    with pytest.raises(
        ValueError, match=f"margin form {form} compares captions, and the memory bank does not keep them"
    ):
        build(config)
    build(replace(config, ranking="infonce"))


def test_a_bank_asks_for_keys(pairs):
    with pytest.raises(ValueError, match="found pairs without keys; the memory bank expects them"):
        build(ObjectiveConfig(bank=BankConfig(size=4)))(replace(pairs, keys=None), 0.5, [distances])


def test_erasing_asks_for_erased_views(pairs):
    with pytest.raises(ValueError, match="found pairs without erased views; the erasing loss expects them"):
        build(ObjectiveConfig(erasing=ErasingConfig(weight=1.0)))(replace(pairs, erased=None), 0.5, [distances])


def test_the_fixed_temperature_is_kept(pairs):
    objective = build(ObjectiveConfig(ranking="infonce", infonce=InfoNCEConfig(temperature=0.3, learn=False)))
    _, logs = objective(pairs, 0.0, [distances])
    assert items(logs)["temperature"] == pytest.approx(0.3)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_ranking_and_erasing_are_means_over_spaces(pairs, ranking):
    def within(start):
        return lambda one, other: squared_distances(
            one.vector[:, start : start + 4], other.vector[:, start : start + 4]
        )

    config = replace(FULL, ranking=ranking, hinge=HingeConfig(margin=MarginConfig(form="fixed")))
    halves = [within(0), within(4)]
    _, logs = build(config)(pairs, 0.5, halves)
    alone = [build(config)(pairs, 0.5, [half])[1] for half in halves]
    for name in (f"loss/{ranking}", f"loss/{ranking}/bank", "loss/erasing", "loss/erasing/kept"):
        assert float(logs[name]) == pytest.approx(float(alone[0][name] + alone[1][name]) / 2, rel=1e-5)
    assert logs["loss/center"] == alone[0]["loss/center"]
    assert float(logs["gap"]) == pytest.approx(float(alone[0]["gap"] + alone[1]["gap"]) / 2, rel=1e-5)
