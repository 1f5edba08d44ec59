"""The dual encoder: spaces, views, codebooks, the local half, erased views."""

from dataclasses import replace

import pytest
import torch

from train.batches import Features
from train.config import LocalConfig, ModelConfig, SettingsError, TowerConfig
from train.embeddings import Embeddings
from train.hosts import DualEncoder, build_host
from train.local import combine
from train.losses.erasing import attended
from train.quantize import kmeans
from train.towers import Dims

VECTORS = Dims(8)
PARTS = Dims(0, (6,))
TOWER = TowerConfig(vectors=(), parts=("grid",))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def grid(rows=5, parts=4):
    return Features(torch.empty(rows, 0), (torch.randn(rows, parts, 6),), (torch.ones(rows, parts, dtype=torch.bool),))


def test_unit_sphere_or_free():
    model = ModelConfig(dim=12, image=TowerConfig(width=16), text=TowerConfig(width=16))
    x = Features(torch.randn(5, 8))
    unit = DualEncoder(model, VECTORS, VECTORS)
    torch.testing.assert_close(unit.embed_images(x).vector.norm(dim=1), torch.ones(5))
    free = DualEncoder(replace(model, normalise=False), VECTORS, VECTORS)
    assert (free.embed_images(x).vector.norm(dim=1) - 1).abs().max() > 1e-2
    found = free.distances(free.embed_images(x), free.embed_texts(x))
    expected = torch.cdist(free.embed_images(x).vector, free.embed_texts(x).vector).square()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_one_codebook_serves_both_towers():
    tower = replace(TOWER, aggregator="netvlad", clusters=3)
    model = DualEncoder(ModelConfig(dim=12, shared_codebook=True, image=tower, text=tower), PARTS, PARTS)
    assert model.image.aggregator.codebook is model.text.aggregator.codebook
    images, texts = grid(20), grid(20)
    model.fit_inputs(images, texts)
    parts = [seen(model.image, images), seen(model.text, texts)]
    torch.testing.assert_close(model.image.aggregator.codebook.centres, kmeans(torch.cat(parts), 3))


@pytest.mark.parametrize("context", ["none", "bigru", "transformer", "graph"])
def test_a_codebook_each_placed_among_the_parts_that_it_will_see(context):
    tower = replace(TOWER, aggregator="netvlad", clusters=3, context=context)
    model = DualEncoder(ModelConfig(dim=12, image=tower, text=tower), PARTS, PARTS)
    assert model.image.aggregator.codebook is not model.text.aggregator.codebook
    images, texts = grid(20), grid(20)
    model.fit_inputs(images, texts)
    for one, features in ((model.image, images), (model.text, texts)):
        torch.testing.assert_close(one.aggregator.codebook.centres, kmeans(seen(one, features), 3))


@torch.no_grad()
def seen(tower, features):
    """Every real part that the tower's aggregator sees of these features."""
    encoded = tower.encode(features, None)
    return encoded.parts[encoded.mask]


@pytest.mark.parametrize(
    ("changes", "dims", "message"),
    [
        ({}, (VECTORS, VECTORS), r"model\.image has aggregator 'netvlad', 3 clusters and 0 part columns"),
        ({"text": replace(TOWER, aggregator="gpo")}, (PARTS, PARTS), r"model\.text has aggregator 'gpo'"),
        ({"text": replace(TOWER, aggregator="netvlad", clusters=5)}, (PARTS, PARTS), r"model\.text .* 5 clusters"),
    ],
)
def test_a_shared_codebook_needs_two_towers_that_have_centres(changes, dims, message):
    tower = replace(TOWER, aggregator="netvlad", clusters=3)
    config = ModelConfig(**{"dim": 12, "shared_codebook": True, "image": tower, "text": tower, **changes})
    with pytest.raises(SettingsError, match=message):
        DualEncoder(config, *dims)


def test_the_mean_of_views_is_a_unit_vector():
    model = DualEncoder(ModelConfig(dim=2, image=TowerConfig(width=4), text=TowerConfig(width=4)), VECTORS, VECTORS)
    views = [Embeddings.of(torch.tensor([[1.0, 0.0]])), Embeddings.of(torch.tensor([[0.0, 1.0]]))]
    torch.testing.assert_close(model.mean_of_views(views).vector, torch.full((1, 2), 0.5**0.5))


def local_model(share=0.25):
    return DualEncoder(ModelConfig(dim=12, image=TOWER, text=TOWER, local=LocalConfig(4, 2, share)), PARTS, PARTS)


def test_the_local_half_is_indexed_with_the_global_one():
    model = local_model()
    images, texts = model.embed_images(grid()), model.embed_texts(grid())
    torch.testing.assert_close(images.local.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(model.index_vectors(images), combine(images.vector, images.local, 0.25))
    score = model.index_vectors(images) @ model.index_vectors(texts).T
    expected = 0.75 * images.vector @ texts.vector.T + 0.25 * images.local @ texts.local.T
    torch.testing.assert_close(score, expected)
    torch.testing.assert_close(model.distances(images, texts), 2 - 2 * images.vector @ texts.vector.T)  # losses
    views = model.mean_of_views([images, texts])
    torch.testing.assert_close(views.local.norm(dim=1), torch.ones(5))


BOTH = Dims(8, (6,))
ASIDE = TowerConfig(width=16, parts=("grid",), aggregator="none")


def test_parts_may_be_left_to_the_local_space():
    config = ModelConfig(dim=12, blocks=2, image=ASIDE, text=ASIDE, local=LocalConfig(dim=5, queries=2))
    model = DualEncoder(config, BOTH, BOTH).eval()
    vectors = torch.randn(5, 8)
    one, other = (Features(vectors, features.parts, features.masks) for features in (grid(), grid()))
    for embed, tower in ((model.embed_images, model.image), (model.embed_texts, model.text)):
        assert tower.encode(one, None).parts.shape == (5, 4, 5)
        torch.testing.assert_close(embed(one).vector, embed(other).vector)
        assert (embed(one).local - embed(other).local).norm(dim=1).min() > 1e-2
    with pytest.raises(SettingsError, match=r"pooled: set .* an aggregator other than none for both"):
        model(one, other, torch.arange(5), None, 1.0)


@pytest.mark.parametrize(
    ("local", "dims", "found"),
    [
        (LocalConfig(), BOTH, "found model.local.dim 0, vectors of 8 numbers and 0 bags"),
        (LocalConfig(dim=4), PARTS, "found model.local.dim 4, vectors of 0 numbers and 0 bags"),
    ],
)
def test_parts_that_nothing_reads_and_vectors_of_nothing_are_refused(local, dims, found):
    with pytest.raises(SettingsError, match=f"aggregator none leaves the parts of model.text .*{found}; expected"):
        DualEncoder(ModelConfig(dim=12, image=TOWER, text=ASIDE, local=local), PARTS, dims)


def test_the_share_is_stored_with_the_model():
    model, other = local_model(0.25), local_model(0.5)
    other.load_state_dict(model.state_dict())
    assert float(other.share) == 0.25


@pytest.mark.parametrize(
    ("image", "changes"), [(VECTORS, {"image": TowerConfig()}), (PARTS, {"normalise": False})], ids=["vectors", "free"]
)
def test_a_local_space_needs_unit_vectors_and_parts(image, changes):
    config = ModelConfig(**{"dim": 12, "image": TOWER, "text": TOWER, "local": LocalConfig(dim=4), **changes})
    with pytest.raises(SettingsError, match="a local space attends over parts"):
        DualEncoder(config, image, PARTS)


@torch.no_grad()
def test_erased_views_keep_what_the_partner_attends_to():
    model = DualEncoder(ModelConfig(dim=12, image=TOWER, text=TOWER), PARTS, PARTS).eval()
    x, y = grid(), grid()
    image, text, erased = model(x, y, torch.arange(5), None, 1.0)
    parts = model.image.encode(x, None).parts
    for row in range(5):
        scores = [float(parts[row, k] @ text.vector[row]) / 12**0.5 for k in range(4)]
        weights = torch.tensor(scores).softmax(0)
        stay = [k for k in range(4) if weights[k] >= weights.mean()]
        go = [k for k in range(4) if k not in stay]
        assert 0 < len(stay) < 4
        for kept, view in ((stay, erased.image_kept), (go, erased.image_dropped)):
            alone = Features(
                x.vectors[row : row + 1], (x.parts[0][row : row + 1, kept],), (torch.ones(1, len(kept)).bool(),)
            )
            torch.testing.assert_close(view.vector[row], model.embed_images(alone).vector[0])
    assert erased.image_partial.all()
    assert model(x, y, torch.arange(5))[2] is None  # off at evaluation
    everything = model(x, y, torch.arange(5), None, 0.0)[2]
    torch.testing.assert_close(everything.image_kept.vector, image.vector)
    assert not everything.image_partial.any()
    assert not everything.text_partial.any()


@pytest.mark.parametrize(
    ("aggregator", "context"),
    [("mean", "none"), ("attention", "none"), ("gpo", "none"), ("netvlad", "none"), ("memory", "graph")],
)
def test_the_part_that_a_caption_tells_of_stays_whatever_pools(aggregator, context):
    """One part of four tells what the caption says, the others nothing; after training, erasing must know which."""
    image = TowerConfig(vectors=(), parts=("grid",), aggregator=aggregator, context=context, clusters=4)
    model = build_host(ModelConfig(dim=16, image=image, text=TOWER), Dims(0, (16,)), Dims(0, (4,)))
    shown, basis = torch.randn(4, 8), torch.linalg.qr(torch.randn(16, 16))[0]

    def batch(rows):
        told = torch.randn(rows, 4)
        parts = 3 * torch.randn(rows, 4, 8) @ basis[:8]
        place = torch.randint(4, (rows,))
        parts[torch.arange(rows), place] = told @ shown @ basis[8:]
        real = torch.ones(rows, 4, dtype=torch.bool)
        return (
            Features(torch.empty(rows, 0), (parts,), (real,)),
            Features(torch.empty(rows, 0), (told[:, None],), (real[:, :1],)),
            place,
        )

    x, y, _ = batch(256)
    model.fit_inputs(x, y)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        x, y, _ = batch(64)
        logits = model.embed_images(x).vector @ model.embed_texts(y).vector.T / 0.1
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.arange(64)).backward()
        optimizer.step()
    with torch.no_grad():
        x, y, place = batch(256)
        images, texts = model.image.encode(x, None), model.encode_texts(y)
        attention, _ = model.guidance(images, texts, (model.finish_images(images), model.finish_texts(texts)))
    assert (attention.argmax(1) == place).float().mean() > 0.9  # chance: .25
    kept = attended(attention, images.mask, 1.0)
    assert kept.gather(1, place[:, None]).float().mean() > 0.95


def test_erasing_needs_parts():
    model = DualEncoder(ModelConfig(dim=12, text=TOWER), VECTORS, PARTS)
    with pytest.raises(SettingsError, match="erasing needs parts of images and of captions"):
        model(Features(torch.randn(5, 8)), grid(), torch.arange(5), None, 1.0)
    with pytest.raises(SettingsError, match="erasing needs parts of images and of captions"):
        model.require_guidance()
    DualEncoder(ModelConfig(dim=12, image=TOWER, text=TOWER), PARTS, PARTS).require_guidance()


def test_unknown_hosts_are_refused():
    with pytest.raises(SettingsError, match="found host 'clip'; expected vse or scan"):
        build_host(ModelConfig(host="clip"), VECTORS, VECTORS)


def test_captions_of_one_image_share_its_embedding():
    """Erased views are those of the pairs, as if every caption had come with a copy of its image."""
    model = DualEncoder(ModelConfig(dim=12, image=TOWER, text=TOWER), PARTS, PARTS).eval()
    images, texts = grid(2), grid(3, 5)
    owner = torch.tensor([0, 0, 1])
    pairs = Features(images.vectors[owner], (images.parts[0][owner],), (images.masks[0][owner],))
    image, text, erased = model(images, texts, owner, None, 1.0)
    copied, same_text, expected = model(pairs, texts, torch.arange(3), None, 1.0)
    torch.testing.assert_close(image[owner].vector, copied.vector)
    torch.testing.assert_close(text.vector, same_text.vector)
    for part in ("image_kept", "image_dropped", "text_kept", "text_dropped"):
        torch.testing.assert_close(getattr(erased, part).vector, getattr(expected, part).vector)


BLOCKS = ModelConfig(dim=12, blocks=3, image=TowerConfig(width=9), text=TowerConfig(width=9))


def test_blocks_are_unit_vectors_whose_distances_make_the_whole():
    model = DualEncoder(BLOCKS, VECTORS, VECTORS)
    one, other = model.embed_images(Features(torch.randn(5, 8))), model.embed_texts(Features(torch.randn(7, 8)))
    torch.testing.assert_close(one.vector.view(5, 3, 4).norm(dim=2), torch.full((5, 3), 3**-0.5))
    spaces = [distances(one, other) for distances in model.spaces()]
    assert len(spaces) == 3
    alone = torch.cdist(3**0.5 * one.vector[:, 4:8], 3**0.5 * other.vector[:, 4:8]).square()
    torch.testing.assert_close(spaces[1], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(spaces).mean(0), model.distances(one, other), atol=1e-5, rtol=1e-5)


def test_blocks_share_no_weights():
    """A block's embedding has no gradient in the weights that make another one."""
    model = DualEncoder(BLOCKS, VECTORS, VECTORS)
    middle = model.embed_images(Features(torch.randn(5, 8))).vector[:, 4:8]
    middle.square().sin().sum().backward()
    tower = model.image.vectors
    for weights, rows in ((tower.skip.weight.grad, 4), (tower.hidden.weight.grad, 3)):
        blocks = weights.view(3, rows, -1).abs().sum((1, 2))
        assert blocks[1] > 0
        assert blocks[[0, 2]].sum() == 0
    assert tower.out.weight.grad.abs().sum((1, 2)).nonzero().tolist() == [[1]]


def test_the_mean_of_views_keeps_blocks_alike():
    model = DualEncoder(BLOCKS, VECTORS, VECTORS)
    mean = model.mean_of_views([model.embed_images(Features(torch.randn(5, 8))) for _ in range(2)])
    torch.testing.assert_close(mean.vector.view(5, 3, 4).norm(dim=2), torch.full((5, 3), 3**-0.5))


@pytest.mark.parametrize("changes", [{"blocks": 0}, {"blocks": 5}, {"image": TowerConfig(width=10)}])
def test_widths_that_cannot_be_cut_into_blocks(changes):
    with pytest.raises(SettingsError, match="widths that are multiples of their number"):
        DualEncoder(replace(BLOCKS, **changes), VECTORS, VECTORS)
