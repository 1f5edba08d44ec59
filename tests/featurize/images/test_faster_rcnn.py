"""Torchvision's detectors: boxes as torchvision gives them, features of its box head, weights from files."""

import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from featurize.encoder import EncoderError, usable_precision
from featurize.images import open_image_encoder
from featurize.images.detector import COCO_CLASSES
from featurize.images.faster_rcnn import NAMES, FasterRCNN, _build

SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"


def picture(width=90, height=60):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def seeded(seed, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torchvision.models.get_model(SMALL, weights=None, weights_backbone=None, **options)
    return model.eval()


@pytest.fixture(scope="module")
def theirs(detector_file):
    model = seeded(0)
    model.load_state_dict(torch.load(detector_file, weights_only=True)["model"])
    return model


@pytest.fixture(scope="module")
def ours(detector_file):
    return open_image_encoder(f"regions:{SMALL}@{detector_file}+score=0.02+k=5", "float32")


def test_all_of_the_family_are_known():
    assert SMALL in NAMES
    assert "fasterrcnn_resnet50_fpn_v2" in NAMES
    assert all(name.startswith("fasterrcnn_") for name in NAMES)


def test_boxes_scores_and_labels_are_torchvisions(ours, theirs):
    image = picture()
    answer = ours.encode(ours.prepare(image)[None])
    theirs.roi_heads.score_thresh, theirs.roi_heads.detections_per_img = 0.02, 5
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    with torch.no_grad():
        expected = theirs([pixels])[0]
    assert len(answer["boxes"][0]) == 5
    assert expected["scores"].diff().max() < -1e-4  # no ties
    torch.testing.assert_close(answer["scores"][0], expected["scores"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(
        answer["boxes"][0] * torch.tensor([90, 60, 90, 60]), expected["boxes"], atol=0.01, rtol=0
    )
    assert answer["labels"][0].tolist() == expected["labels"].tolist()


def test_features_are_the_box_heads_of_those_boxes(ours, theirs):
    image = picture()
    answer = ours.encode(ours.prepare(image)[None])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    pool = MultiScaleRoIAlign(featmap_names=["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    with torch.no_grad():
        resized, _ = theirs.transform([pixels])
        height, width = resized.image_sizes[0]
        boxes = answer["boxes"][0] * torch.tensor([width, height, width, height])
        maps = theirs.backbone(resized.tensors)
        expected = theirs.roi_heads.box_head(pool(maps, [boxes], resized.image_sizes))
    assert expected.shape == (5, 1024)
    torch.testing.assert_close(answer["regions"][0], expected, atol=1e-4, rtol=1e-3)


def test_bfloat16_says_nearly_the_same_of_the_same_boxes(detector_file):
    exact, fast = (
        FasterRCNN(f"regions:{SMALL}@{detector_file}", 0.5, precision, "cpu") for precision in ("float32", "bfloat16")
    )
    assert fast.record["precision"] == usable_precision("bfloat16", torch.device("cpu"))
    pictures = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None].contiguous()
    places = [torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 0.3, 0.4]])]
    one, other = (detector.look(pictures).describe(places)[0] for detector in (exact, fast))
    assert one.dtype == other.dtype == torch.float32
    assert torch.cosine_similarity(one, other).min() > 0.99
    assert torch.cosine_similarity(one[0], one[1], dim=0) < 0.95


def test_the_card_says_what_decides_the_answer(ours):
    assert ours.card.name == f"regions:{SMALL}"
    assert ours.card.preprocessing == {
        "shorter": 320,
        "longer": 640,
        "suppression": 0.5,
        "classes": list(COCO_CLASSES),
        "precision": "float32",
        "longest": 1333,
        "k": 5,
        "score": 0.02,
    }


def test_a_moved_file_is_the_same_encoder(detector_file, tmp_path, ours):
    moved = shutil.copy(detector_file, tmp_path / "elsewhere.pth")
    assert open_image_encoder(f"regions:{SMALL}@{moved}+k=5+score=0.02", "float32").card == ours.card


def test_a_file_with_other_classes(tmp_path):
    torch.save(seeded(0, num_classes=4).state_dict(), tmp_path / "four.pth")
    detector = FasterRCNN(f"regions:{SMALL}@{tmp_path / 'four.pth'}", 0.2, "float32", "cpu")
    assert (detector.record["classes"], detector.width) == (4, 1024)


def test_weights_of_another_network(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(EncoderError, match=rf"linear.pth does not fit torchvision's {SMALL}: .*missing.*2 are unexp"):
        open_image_encoder(f"regions:{SMALL}@{tmp_path / 'linear.pth'}")


def test_no_such_file():
    with pytest.raises(EncoderError, match=rf"regions:{SMALL}@gone.pth: there is no file .*gone.pth; after @ comes"):
        open_image_encoder(f"regions:{SMALL}@gone.pth+k=3")


def test_default_weights_without_a_network(tmp_path, monkeypatch):
    def fetch(*_arguments, **_options):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(EncoderError) as caught:
        open_image_encoder("regions:fasterrcnn_resnet50_fpn+k=3")
    message = str(caught.value)
    assert FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url in message
    assert "regions:fasterrcnn_resnet50_fpn@FILE" in message


def test_torchvisions_own_weights_meet_the_norms_they_were_trained_with():
    # torchvision itself: frozen norms, whose epsilon it sets to 0 for COCO_V1 (`overwrite_eps`).
    trunk = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    for module in trunk.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var.uniform_(1e-5, 1e-4)  # as small as epsilon, so that it would be seen
            module.weight.fill_(0.01)
            module.eps = 0.0
    ours = _build("fasterrcnn_resnet50_fpn", 91).backbone.body
    state = {name: value for name, value in trunk.state_dict().items() if not name.startswith("fc.")}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        last = list(ours.eval()(images).values())[-1]
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))
        expected = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(x))))
    assert expected.std() > 0
    torch.testing.assert_close(last, expected, atol=1e-3 * expected.abs().max().item(), rtol=1e-3)


def test_newer_networks_keep_their_epsilon():
    norms = [one for one in _build("fasterrcnn_resnet50_fpn_v2", 2).modules() if isinstance(one, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-5}
