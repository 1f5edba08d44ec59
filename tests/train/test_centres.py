"""The table of concept centres against a loop, repeats included."""

import pytest
import torch

from train.centres import ConceptCentres


def test_update_equals_a_loop_with_repeats():
    """Concept 4 comes three times, 0 twice, 2 once, the others not at all."""
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    concepts = [4, 0, 4, 2, 0, 4]
    table = ConceptCentres(6, 3, rate=0.5)
    table.centres.copy_(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)))
    expected = table.centres.tolist()
    for j in range(6):
        members = [i for i in range(6) if concepts[i] == j]
        for d in range(3):
            pull = sum(table.centres[j, d].item() - rows[i, d].item() for i in members)
            expected[j][d] -= 0.5 * pull / (1 + len(members))
    before = table.centres.clone()
    table.update(torch.tensor(concepts), rows)
    torch.testing.assert_close(table.centres, torch.tensor(expected))
    assert torch.equal(table.centres[[1, 3, 5]], before[[1, 3, 5]])


def test_one_embedding_by_hand():
    """c = 0, e = 3, eta = 1/2, n = 1: c moves by 1/2 * 3 / 2."""
    table = ConceptCentres(1, 1, rate=0.5)
    table.update(torch.tensor([0]), torch.tensor([[3.0]]))
    assert table.centres.tolist() == [[0.75]]


def test_a_centre_reaches_the_mean_of_what_it_sees():
    table = ConceptCentres(2, 1, rate=0.5)
    for _ in range(200):
        table.update(torch.tensor([1, 1]), torch.tensor([[2.0], [4.0]]))
    torch.testing.assert_close(table.centres, torch.tensor([[0.0], [3.0]]))


def test_the_order_of_rows_does_not_matter():
    rows, concepts = torch.randn(5, 2), torch.tensor([1, 0, 1, 1, 0])
    first, second = ConceptCentres(2, 2, 0.3), ConceptCentres(2, 2, 0.3)
    order = torch.tensor([3, 1, 4, 0, 2])
    first.update(concepts, rows)
    second.update(concepts[order], rows[order])
    torch.testing.assert_close(first.centres, second.centres)


def test_rows_are_copies_and_survive_the_update():
    table = ConceptCentres(3, 2, 1.0)
    rows = table(torch.tensor([2, 2, 0]))
    table.update(torch.tensor([2]), torch.ones(1, 2))
    assert rows.count_nonzero() == 0


def test_no_gradient_and_bf16_embeddings():
    table = ConceptCentres(3, 2, 0.5)
    table.update(torch.tensor([1]), torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True))
    assert table.centres.dtype == torch.float32
    assert not table.centres.requires_grad


def test_the_table_is_part_of_the_checkpoint():
    table = ConceptCentres(3, 2, 0.5)
    table.update(torch.tensor([1]), torch.ones(1, 2))
    other = ConceptCentres(3, 2, 0.5)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.centres, table.centres)


@pytest.mark.parametrize(("concept", "shown"), [(3, "3"), (-1, "-1")])
def test_a_concept_outside_the_table_is_refused(concept, shown):
    with pytest.raises(IndexError, match=f"found concept {shown}; expected 0 to 2"):
        ConceptCentres(3, 2, 0.5)(torch.tensor([0, concept]))


@pytest.mark.parametrize(("concepts", "rate"), [(0, 0.5), (3, 0.0), (3, 1.5)])
def test_sizes_and_rates_that_make_no_sense_are_refused(concepts, rate):
    with pytest.raises(ValueError, match=f"found {concepts} concepts and rate {rate}"):
        ConceptCentres(concepts, 2, rate)
