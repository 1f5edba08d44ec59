"""The memory bank: what it holds, masks, saves, and that what it is compared with does not collapse."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train.config import BankConfig, InfoNCEConfig, ObjectiveConfig
from train.embeddings import Embeddings, Pairs
from train.losses.distances import negative_pairs, squared_distances
from train.losses.objective import Objective
from train.memory import EmbeddingShape, MemoryBank

NUMBER = EmbeddingShape(1)


def distances(image, text):
    return squared_distances(image.vector, text.vector)


def numbers(*values):
    return Embeddings.of(torch.tensor(values, dtype=torch.float32)[:, None])


def enqueue(bank, *ids):
    """Pairs whose image key is their id and whose caption key is its negative."""
    ids = torch.tensor(ids)
    bank.enqueue(numbers(*ids), numbers(*(-ids)), ids, ids + 100)


def held(bank):
    """(image key, caption key, image id, id it is mixed with) of every place that is filled."""
    count = bank.filled
    rows = (bank.image.vector[:count, 0], bank.text.vector[:count, 0], bank.image_ids[:count], bank.mixed_ids[:count])
    return list(zip(*(row.tolist() for row in rows), strict=True))


def test_places_fill_in_order_and_the_oldest_go_first():
    """Three places, batches of two: the queue's end lies inside a batch."""
    bank = MemoryBank(3, NUMBER, NUMBER)
    expected = ([], [1, 2], [4, 2, 3], [4, 5, 6], [7, 8, 6])
    for step, ids in enumerate(expected):
        assert held(bank) == [(i, -i, i, i + 100) for i in ids]
        enqueue(bank, 2 * step + 1, 2 * step + 2)


@pytest.mark.parametrize("size", [1, 3, 4, 8])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 20])
def test_it_holds_the_last_keys_whatever_the_sizes(size, batch):
    bank, seen = MemoryBank(size, NUMBER, NUMBER), []
    for step in range(5):
        ids = list(range(step * batch, (step + 1) * batch))
        enqueue(bank, *ids)
        seen += ids
        assert sorted(held(bank)) == [(i, -i, i, i + 100) for i in seen[-size:]]
        assert bank.filled == min(size, len(seen))


def test_image_zero_is_a_key_and_an_empty_place_is_not():
    bank = MemoryBank(4, NUMBER, NUMBER)
    assert bank.negatives(torch.tensor([5]), torch.tensor([5])).shape == (1, 0)
    enqueue(bank, 0)
    assert bank.filled == 1
    assert bank.negatives(torch.tensor([5, 0]), torch.tensor([5, 0])).tolist() == [[True], [False]]


def test_keys_of_the_same_image_or_mixed_with_the_same_are_no_negatives():
    bank = MemoryBank(4, NUMBER, NUMBER)
    enqueue(bank, 1, 2, 3)  # mixed with 101, 102, 103
    found = bank.negatives(torch.tensor([1, 9, 2, 9]), torch.tensor([50, 103, 101, 50]))
    assert found.tolist() == [[False, True, True], [True, True, False], [False, False, True], [True, True, True]]
    crossed = bank.negatives(torch.tensor([101, 9]), torch.tensor([9, 2]))
    assert crossed.tolist() == [[False, True, True], [True, False, True]]


def test_distances_are_to_the_batchs_keys_and_then_to_the_remembered():
    bank = MemoryBank(4, NUMBER, NUMBER)
    enqueue(bank, 1, 2, 3)
    to_texts, to_images = bank.compare(numbers(10, 20), numbers(5, 6), numbers(11, 21), numbers(4, 7), distances)
    assert to_texts.tolist() == [[36, 9, 121, 144, 169], [256, 169, 441, 484, 529]]  # (10, 20) - (4, 7, -1, -2, -3)
    assert to_images.tolist() == [[36, 256, 16, 9, 4], [25, 225, 25, 16, 9]]  # (5, 6) - (11, 21, 1, 2, 3)


def test_an_empty_bank_compares_with_the_batchs_keys_alone():
    def distances_of_something(image, text):
        assert len(image) == len(text) == 2
        return distances(image, text)

    bank = MemoryBank(4, NUMBER, NUMBER)
    pair = (numbers(1, 2), numbers(3, 4))
    to_texts, to_images = bank.compare(*pair, *pair, distances_of_something)
    assert to_texts.tolist() == [[4, 9], [1, 4]]
    assert to_images.tolist() == [[4, 1], [9, 4]]


def random_embeddings(rows, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, shape.vector), (rows, shape.local), (rows, shape.parts, shape.part))
    return Embeddings(
        *(torch.randn(size, generator=generator) for size in sizes),
        torch.rand(rows, shape.parts, generator=generator) < 0.5,
    )


def test_all_of_an_embedding_is_kept_and_restored():
    image, text = EmbeddingShape(5, 3, 4, 2), EmbeddingShape(0, 3, 7, 2)
    bank, other = (MemoryBank(6, image, text) for _ in range(2))
    for step in range(3):
        keys = random_embeddings(4, image, step), random_embeddings(4, text, 10 + step)
        bank.enqueue(*keys, torch.arange(4), torch.arange(4))
    assert set(bank.state_dict()) == {
        *(f"{side}.{name}" for side in ("image", "text") for name in ("vector", "local", "parts", "mask")),
        "image_ids",
        "mixed_ids",
        "pointer",
    }
    other.load_state_dict(bank.state_dict())
    for side, last in (("image", keys[0]), ("text", keys[1])):
        places = torch.tensor([2, 3, 4, 5])  # 12 keys into 6 places: the last four are at the end
        for name in ("vector", "local", "parts", "mask"):
            assert torch.equal(getattr(getattr(other, side), name)[places], getattr(last, name))
    new = random_embeddings(4, image, 50), random_embeddings(4, text, 51)
    for one in (bank, other):
        one.enqueue(*new, torch.arange(4), torch.arange(4))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in bank.state_dict().items())


def test_enqueueing_before_the_backward_pass_leaves_its_gradient():
    bank = MemoryBank(3, NUMBER, NUMBER)
    enqueue(bank, 1, 2, 3)
    anchor = torch.tensor([[10.0]], requires_grad=True)
    to_texts, _ = bank.compare(Embeddings.of(anchor), numbers(0), numbers(0), numbers(0), distances)
    enqueue(bank, 7, 8, 9)
    to_texts.sum().backward()
    assert anchor.grad.item() == pytest.approx(2 * (10 + 11 + 12 + 13))  # the keys 0, -1, -2, -3 of then


def test_keys_are_remembered_without_gradient():
    bank = MemoryBank(2, NUMBER, NUMBER)
    key = torch.ones(1, 1, requires_grad=True)
    bank.enqueue(Embeddings.of(key), Embeddings.of(key), torch.tensor([0]), torch.tensor([0]))
    assert not bank.image.vector.requires_grad


def test_keys_of_another_shape_are_refused():
    bank = MemoryBank(4, EmbeddingShape(5), EmbeddingShape(5))
    with pytest.raises(ValueError, match=r"found keys whose vector has shape \(1,\) a row; expected \(5,\)"):
        enqueue(bank, 1)


def test_a_bank_without_places_is_refused():
    with pytest.raises(ValueError, match="found a memory bank of 0 keys; expected at least 1"):
        MemoryBank(0, NUMBER, NUMBER)


def mean_negative_cosine(*, positives_from_keys):
    """Train two small towers against a bank alone; mean cosine of images to other images' captions afterwards."""
    torch.manual_seed(0)
    meaning = torch.randn(256, 12)
    seen = [meaning @ torch.randn(12, dim) + 0.3 * torch.randn(256, dim) for dim in (20, 16)]
    towers = nn.ModuleList(nn.Sequential(nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, 16)) for dim in (20, 16))
    momentum_towers = copy.deepcopy(towers)
    config = ObjectiveConfig(
        ranking="infonce", infonce=InfoNCEConfig(learn=False), bank=BankConfig(size=128, share=1.0)
    )
    objective = Objective(config, EmbeddingShape(16), EmbeddingShape(16), 1)
    optimiser = torch.optim.Adam(towers.parameters(), lr=1e-2)

    def embed(networks, rows):
        return tuple(Embeddings.of(F.normalize(n(x[rows]), dim=1)) for n, x in zip(networks, seen, strict=True))

    for _ in range(60):
        rows = torch.randperm(256)[:32]
        image, text = embed(towers, rows)
        with torch.no_grad():
            keys = embed(momentum_towers, rows)
        if positives_from_keys:
            none = torch.zeros(32, 0)
            loss, _ = objective(Pairs(image, text, rows, none, rows, none, rows, keys), 0.0, [distances])
        else:  # what must not be built
            negatives = torch.cat((negative_pairs(rows, rows), objective.bank.negatives(rows, rows)), 1)
            positive = distances(image, text).diagonal()
            loss = torch.zeros(())
            for to_keys in objective.bank.compare(image, text, *keys, distances):
                loss = loss + objective.ranking(positive, to_keys, negatives, torch.tensor(0.0))
            objective.bank.enqueue(*keys, rows, rows)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(momentum_towers.parameters(), towers.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
    with torch.no_grad():
        image, text = embed(towers, torch.arange(256))
        cosines = image.vector @ text.vector.T
    return cosines[~torch.eye(256, dtype=torch.bool)].mean().item()


def test_embeddings_ranked_against_a_bank_do_not_collapse_into_a_cone():
    """They do when positives come from the trained network and negatives from the momentum network."""
    assert abs(mean_negative_cosine(positives_from_keys=True)) < 0.15
    assert mean_negative_cosine(positives_from_keys=False) > 0.7
