"""What a reference of regions means, and what its encoder says, with a detector that sees what it is told."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torchvision.ops import roi_align
from transformers import ViTImageProcessor

from featurize.checkpoints import quiet
from featurize.encoder import EncoderError, Output
from featurize.images import open_image_encoder
from featurize.images.detector import Boxes, Seen
from featurize.images.regions import RegionEncoder, _Grid, _Reference

SMALL = "regions:fasterrcnn_mobilenet_v3_large_320_fpn@random"


class Told:
    """A detector that finds the same boxes everywhere; a box's features are its corners and the picture's mean."""

    name = "told"
    weights = "0" * 64
    width = 5
    record = {"precision": "float32"}  # noqa: RUF012 - a protocol's attribute

    def __init__(self, *rows):
        table = torch.tensor(rows).reshape(-1, 6)
        self.found = Boxes(table[:, :4], table[:, 4], table[:, 5].int())

    def look(self, pictures):
        means = pictures.float().mean((1, 2, 3))

        def describe(boxes):
            return [torch.cat([box, mean.expand(len(box), 1)], 1) for box, mean in zip(boxes, means, strict=True)]

        return Seen([self.found] * len(pictures), describe)


TWO = ((0.25, 0.5, 0.5, 1.0, 0.3, 18), (0.0, 0.0, 0.5, 0.25, 0.9, 1), (0.0, 0.0, 1.0, 1.0, 0.1, 3))


def picture(width=90, height=60, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_outputs_are_ragged_and_labels_are_whole_numbers():
    assert RegionEncoder(Told(*TWO), None, 2, 0.2).card.outputs == (
        Output("regions", (5,), ragged=True),
        Output("boxes", (4,), ragged=True),
        Output("scores", (), ragged=True),
        Output("labels", (), ragged=True, dtype="int32"),
        Output("placed", (10,), ragged=True),
    )


def test_regions_of_a_picture():
    encoder = RegionEncoder(Told(*TWO), None, 10, 0.2)
    images = [picture(), Image.new("RGB", (90, 60), (7, 7, 7))]
    answer = encoder.encode(torch.stack([encoder.prepare(image) for image in images]))
    assert list(answer) == [output.name for output in encoder.card.outputs]
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.25], [0.25, 0.5, 0.5, 1.0]])
    for number in range(2):
        assert torch.equal(answer["boxes"][number], boxes)
        assert torch.equal(answer["scores"][number], torch.tensor([0.9, 0.3]))
        assert answer["labels"][number].tolist() == [1, 18]
        assert answer["labels"][number].dtype == torch.int32
        assert torch.equal(answer["regions"][number][:, :4], boxes)
    assert answer["regions"][1][:, 4].tolist() == [7, 7]
    # The features, then x1, y1, x2, y2 and the area: 0.5 * 0.25 of both.
    placed = torch.tensor([0.0, 0.0, 0.5, 0.25, 7.0, 0.0, 0.0, 0.5, 0.25, 0.125])
    assert torch.equal(answer["placed"][1][0], placed)
    assert answer["placed"][1][1, 9] == 0.125


def test_k_and_score_limit_the_regions():
    def labels(k, score):
        encoder = RegionEncoder(Told(*TWO), None, k, score)
        return encoder.encode(encoder.prepare(picture())[None])["labels"][0].tolist()

    assert labels(36, 0.0) == [1, 18, 3]
    assert labels(36, 0.2) == [1, 18]
    assert labels(1, 0.0) == [1]


def test_a_picture_without_detections_is_one_region_of_score_0():
    encoder = RegionEncoder(Told(*TWO), None, 3, 0.95)
    answer = encoder.encode(encoder.prepare(Image.new("RGB", (9, 6), (4, 4, 4)))[None])
    assert answer["boxes"][0].tolist() == [[0, 0, 1, 1]]
    assert (answer["scores"][0].tolist(), answer["labels"][0].tolist()) == ([0], [0])
    assert answer["placed"][0].tolist() == [[0, 0, 1, 1, 4, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((500, 375), (375, 500)),
        ((2666, 1000), (500, 1333)),
        ((1000, 2666), (1333, 500)),
        ((1, 1), (1, 1)),
        ((3, 2666), (1333, 13)),  # a hundredth
        ((400, 1), (4, 400)),
    ],
)
def test_pictures_keep_their_proportions_and_are_not_enlarged(size, shape):
    prepared = RegionEncoder(Told(), None, 1, 0.0).prepare(Image.new("RGB", size))
    assert (prepared.dtype, tuple(prepared.shape)) == (torch.uint8, (3, *shape))


@pytest.mark.parametrize("size", [(1, 1), (1, 1200), (1200, 1)])
def test_pictures_of_odd_sizes(size):
    encoder = open_image_encoder(f"{SMALL}+efficientnet-lite0+score=0.01+k=2", "float32")
    answer = encoder.encode(encoder.prepare(Image.new("RGB", size))[None])
    assert 1 <= len(answer["boxes"][0]) <= 2
    assert answer["regions"][0].isfinite().all()


def test_grey_pictures_are_taken_too():
    prepared = RegionEncoder(Told(), None, 1, 0.0).prepare(picture().convert("L"))
    assert prepared.shape == (3, 60, 90)


@pytest.mark.parametrize("batch", [torch.zeros(1, 3, 64, 64), torch.zeros(3, 64, 64, dtype=torch.uint8)])
def test_a_batch_that_was_not_prepared(batch):
    with pytest.raises(EncoderError, match=r"expected a uint8 batch \(B, 3, H, W\) of prepared images, found torch"):
        RegionEncoder(Told(), None, 1, 0.0).encode(batch)


def test_features_of_another_encoder_see_the_whole_picture():
    # resnet18 would cut the picture to its centre square; its grid must be that of the squeezed whole.
    backbone = open_image_encoder("torchvision:resnet18@random", "float32")
    encoder = RegionEncoder(Told(*TWO), _Grid("torchvision:resnet18@random", "float32", "cpu"), 2, 0.2)
    images = [picture(300, 100), picture(300, 100, seed=1)]
    answer = encoder.encode(torch.stack([encoder.prepare(image) for image in images]))
    for number, image in enumerate(images):
        squeezed = np.array(image.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        grid = backbone.encode(torch.from_numpy(squeezed)[None])["grid"][0]  # (49, 512)
        maps = grid.T.reshape(1, 512, 7, 7)
        boxes = torch.tensor([[0.0, 0.0, 3.5, 1.75], [1.75, 3.5, 3.5, 7.0]])
        expected = roi_align(maps, [boxes], output_size=3, aligned=True).mean((2, 3))
        torch.testing.assert_close(answer["regions"][number], expected, atol=1e-5, rtol=1e-4)
    assert encoder.card.outputs[0] == Output("regions", (512,), ragged=True)
    assert encoder.card.name == "regions:told+torchvision:resnet18"


def test_whatever_changes_the_answer_stands_in_the_card():
    grid = _Grid("torchvision:squeezenet1_1@random", "float32", "cpu")
    other = _Grid("torchvision:squeezenet1_1@random:1", "float32", "cpu")
    cards = [
        RegionEncoder(Told(), None, 36, 0.2).card,
        RegionEncoder(Told(), None, 10, 0.2).card,
        RegionEncoder(Told(), None, 36, 0.3).card,
        RegionEncoder(Told(), grid, 36, 0.2).card,
        RegionEncoder(Told(), other, 36, 0.2).card,
    ]
    told = [(card.name, card.weights, tuple(card.preprocessing.items())) for card in cards]
    assert all(one != another for place, one in enumerate(told) for another in told[:place])
    assert cards[3].weights != cards[4].weights
    assert cards[3].preprocessing["features"]["squeezed"] == 224
    assert cards[3].preprocessing["features"]["mean"] == grid.card.preprocessing["mean"]


@pytest.mark.parametrize(
    ("reference", "parsed"),
    [
        ("regions:ssd-mobilenet", ("ssd-mobilenet", "", 36, 0.2)),
        ("regions:ssd-mobilenet+k=10+score=.5", ("ssd-mobilenet", "", 10, 0.5)),
        ("regions:a@/x=1/b.pth+transformers:/y=2/z+k=1", ("a@/x=1/b.pth", "transformers:/y=2/z", 1, 0.2)),
        ("regions:a@random:3+score=0+torchvision:c@random:4", ("a@random:3", "torchvision:c@random:4", 36, 0.0)),
        ("regions:a+score=1.0", ("a", "", 36, 1.0)),
    ],
)
def test_what_a_reference_means(reference, parsed):
    assert _Reference.parse(reference) == _Reference(*parsed)


def test_a_reference_opens_all_of_it():
    encoder = open_image_encoder(f"{SMALL}+efficientnet-lite0+k=3+score=0.01", "float32")
    assert encoder.card.name == "regions:fasterrcnn_mobilenet_v3_large_320_fpn+efficientnet-lite0"
    assert encoder.card.outputs[0] == Output("regions", (1280,), ragged=True)
    assert (encoder.card.preprocessing["k"], encoder.card.preprocessing["score"]) == (3, 0.01)
    again = open_image_encoder(f"{SMALL}+efficientnet-lite0+k=3+score=0.01", "float32")
    assert again.card == encoder.card
    batch = encoder.prepare(picture())[None]
    one, other = encoder.encode(batch), again.encode(batch)
    assert all(torch.equal(one[name][0], other[name][0]) for name in one)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "regions:ssd-mobilnet",
            r"unknown detector 'ssd-mobilnet', the nearest is 'ssd-mobilenet'; expected ssd-mobile",
        ),
        ("regions:", r"unknown detector '', the nearest is "),
        ("regions:fasterrcnn_resnet51_fpn@random", r"the nearest is 'fasterrcnn_resnet50_fpn"),
        ("regions:ssd-mobilenet+k=0", r"found k=0, expected a whole number of at least 1, e.g. k=36"),
        ("regions:ssd-mobilenet+k=-3", r"found k=-3, expected a whole number"),
        ("regions:ssd-mobilenet+k=few", r"found k=few, expected a whole number"),
        ("regions:ssd-mobilenet+score=1.5", r"found score=1.5, expected a number from 0 to 1, e.g. score=0.2"),
        ("regions:ssd-mobilenet+score=-0.1", r"found score=-0.1, expected a number"),
        ("regions:ssd-mobilenet+score=nan", r"found score=nan, expected a number"),
        ("regions:ssd-mobilenet+top=3", r"found the setting 'top', expected k or score: \+k=36\+score=0.2"),
        ("regions:ssd-mobilenet+a+b", r"found the encoders 'a' and 'b'; expected one at most"),
        (f"{SMALL}+efficientnet-lite9", r"unknown image encoder 'efficientnet-lite9'"),
        (f"{SMALL}+{SMALL}", r"need the features of a square grid: regions:fasterrcnn.* gives 0 cells"),
    ],
)
def test_references_that_mean_nothing(reference, message):
    with pytest.raises(EncoderError, match=message):
        open_image_encoder(reference)


def test_an_encoder_of_oblong_pictures(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=37,
        image_size=(32, 64),
        patch_size=8,
    )
    with quiet():
        transformers.ViTModel(config).save_pretrained(tmp_path)
        ViTImageProcessor(size={"height": 32, "width": 64}).save_pretrained(tmp_path)
    with pytest.raises(
        EncoderError, match=r"a square grid: transformers:.* gives 32 cells of a picture of 32 by 64 pix"
    ):
        _Grid(f"transformers:{tmp_path}", "float32", "cpu")
