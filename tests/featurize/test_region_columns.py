"""Region columns from extraction to a batch: rows of different length, an undecodable picture, several views."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from featurize.columns import open_column
from featurize.config import FeaturizeConfig, ScenesConfig
from featurize.datasets.scenes import read_scenes
from featurize.describe import describe_images, image_encoder
from featurize.encoder import usable_precision
from featurize.fill import fill
from featurize.images.decode import decode
from featurize.images.views import view
from featurize.index import index
from featurize.manifest import read_manifest
from featurize.plan import encoder_card, plan
from featurize.verify import drift, verify
from train.batches import FeatureReader, Inputs
from train.config import ModelConfig, SettingsError, TowerConfig, TrainConfig

OUTPUTS = ("regions", "boxes", "scores", "labels", "placed")
BROKEN = (0, 5)
CONFIG = FeaturizeConfig(rows_per_shard=4, precision="float32", views=("plain", "flip"), max_quarantined=0.5)


@pytest.fixture(scope="module")
def config(detector_file):
    return replace(CONFIG, images=(f"regions:fasterrcnn_mobilenet_v3_large_320_fpn@{detector_file}+score=0.3+k=6",))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Nine rendered pictures."""
    return list(read_scenes(tmp_path_factory.mktemp("scenes"), ScenesConfig(train=5, val=2, test=2)))


@pytest.fixture(scope="module")
def extracted(pictures, config, tmp_path_factory, ray_local):
    """All columns of a region encoder in two views; two pictures, one of them a shard's first, are cut in half."""
    folder = tmp_path_factory.mktemp("cache")
    samples = list(pictures)
    for row in BROKEN:
        cut = folder / f"cut{row}.jpg"
        cut.write_bytes(pictures[row].read()[:700])
        samples[row] = replace(pictures[row], image=str(cut))
    dataset = index(samples, "scenes", folder, max_quarantined=0.5)
    columns = plan(dataset, config, OUTPUTS, ("sentence",))
    fill(dataset, config, columns)
    return dataset, columns


def opened(extracted, output, which="plain"):
    dataset, columns = extracted
    column = next(c for c in columns if (c.output.name, c.view) == (output, which))
    return open_column(dataset, column.name, column.id)


def described(config, picture, which):
    encoder = image_encoder(config.images[0], "float32")
    return describe_images(encoder, [encoder.prepare(view(decode(picture.read()), which, picture.image_id))], 1)


def test_rows_are_what_the_detector_says_of_their_image(extracted, config, pictures):
    lengths = set()
    for which in ("plain", "flip"):
        for row in (1, 2, 7, 8):
            alone = described(config, pictures[row], which)
            for output in OUTPUTS:
                values, mask = opened(extracted, output, which).gather_padded(np.array([row]))
                assert mask.all()
                np.testing.assert_allclose(values[0], alone[output][0], atol=2e-3, rtol=2e-3, err_msg=output)
            lengths.add(len(alone["boxes"][0]))
    assert len(lengths) > 1
    assert max(lengths) <= 6
    assert min(lengths) >= 1


def test_types_are_as_planned(extracted):
    dtypes = {output: opened(extracted, output).dtype for output in OUTPUTS}
    assert dtypes == {**dict.fromkeys(OUTPUTS, np.float16), "labels": np.int32}
    boxes, mask = opened(extracted, "boxes").gather_padded(np.arange(9))
    assert (boxes[mask] >= 0).all()
    assert (boxes[mask] <= 1).all()


def test_an_image_that_cannot_be_decoded_has_an_empty_row(extracted):
    dataset, columns = extracted
    for column in columns:
        if column.modality == "image":
            manifest = read_manifest(column.folder)
            assert manifest.missing.tolist() == list(BROKEN)
            assert manifest.ragged
            _, mask = open_column(dataset, column.name, column.id).gather_padded(np.arange(9))
            assert np.flatnonzero(~mask.any(1)).tolist() == list(BROKEN), column.name
    assert '"stage": "decode", "reason": "DecodeError' in (dataset.folder / "quarantine.jsonl").read_text()


def test_the_cache_is_sound(extracted):
    assert list(verify(extracted[0].folder)) == []


def test_regions_that_are_described_again_are_the_same(extracted):
    dataset, columns = extracted
    for column in columns[:9:2]:
        again = drift(dataset, column.folder, read_manifest(column.folder), 3)
        assert again.rows == 3
        assert again.largest < 0.01, column.name


@pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="the extra `regions` is not installed")
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_detector_and_an_encoder_of_other_precisions_are_opened_again(pictures, tmp_path, precision):
    """The packaged detector computes in float32 whatever the encoder beside it does."""
    dataset = index(pictures[:1], "one", tmp_path, max_quarantined=0)
    config = replace(CONFIG, images=("regions:ssd-mobilenet+efficientnet-lite0",), precision=precision)
    (column, *_) = plan(dataset, config, ("regions",), ())
    assert column.precision == usable_precision(precision, torch.device("cpu"))
    assert encoder_card(column).weights == column.ingredients["weights"]


def test_int8_is_for_features_only(extracted, config, tmp_path, ray_local):
    dataset = index(extracted[0].samples[:3], "few", tmp_path, max_quarantined=0.5)
    small = replace(config, storage="int8", views=("plain",))
    columns = plan(dataset, small, OUTPUTS, ())
    assert [column.output.dtype for column in columns] == ["int8", "float16", "float16", "int32", "float16"]
    fill(dataset, small, columns)
    assert list(verify(dataset.folder)) == []
    for column in columns:
        rows, real = open_column(dataset, column.name, column.id).gather_padded(np.arange(3))
        exact, mask = opened(extracted, column.output.name).gather_padded(np.arange(3))
        assert np.array_equal(real, mask)
        assert np.abs(rows - exact).max() <= np.abs(exact).max() / 120


def test_a_second_time_nothing_is_extracted(extracted, config, capsys):
    fill(extracted[0], config, extracted[1])
    assert "11 columns found, 0 rows to extract" in capsys.readouterr().out


def test_the_manifest_names_the_classes(extracted):
    manifest = read_manifest(opened(extracted, "labels").folder)
    assert manifest.ingredients["preprocessing"]["classes"][18] == "dog"


def reader(extracted, parts=("regions",), vectors=()):
    dataset, columns = extracted
    model = ModelConfig(image=TowerConfig(vectors=vectors, parts=parts), text=TowerConfig(vectors=("sentence",)))
    return FeatureReader(Inputs.of(dataset.folder, columns, TrainConfig(model=model), "float32"))


def test_a_batch_has_regions_with_masks(extracted):
    read = reader(extracted, ("regions", "placed"))
    assert read.image_dims == (0, (1024, 1029))
    assert read.missing.tolist() == list(BROKEN)
    longest = max(
        opened(extracted, "regions", which).gather_padded(np.arange(9))[1].sum(1).max() for which in ("plain", "flip")
    )
    rows = np.array([7, 2, 1])
    for views in (np.array([0, 0, 0]), np.array([0, 1, 0]), np.array([1, 1, 1])):
        features = read.images(rows, views)
        assert features.parts[0].shape == (3, longest, 1024)
        assert features.parts[1].shape == (3, longest, 1029)
        for place, (row, which) in enumerate(zip(rows, views, strict=True)):
            column = opened(extracted, "regions", ("plain", "flip")[which])
            values, real = column.gather_padded(np.array([row]))
            assert features.masks[0][place].sum() == real.sum()
            np.testing.assert_array_equal(features.parts[0][place][features.masks[0][place]], values[0])
            assert not features.parts[0][place][~features.masks[0][place]].any()
        assert torch.equal(features.masks[0], features.masks[1])
        assert torch.equal(features.parts[1][..., :1024], features.parts[0])


def test_single_rows_are_padded_alike(extracted):
    # A host that compares parts keeps them in banks and indexes of one shape.
    read = reader(extracted)
    shapes = {read.images(np.array([row]), np.array([0])).parts[0].shape for row in (1, 2, 3, 4, 6, 7, 8)}
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("parts", "vectors", "message"),
    [
        (("labels",), (), r"labels holds class ids: a tower reads lemmas by its `bags`"),
        (("scores",), (), r"scores has rows of shape \(L\): a tower reads one vector a row, \(D,\), by its `vectors`"),
        ((), ("regions",), r"regions has rows of shape \(L, 1024\): a tower reads one vector"),
    ],
)
def test_towers_read_what_they_can(extracted, parts, vectors, message):
    with pytest.raises(SettingsError, match=message):
        reader(extracted, parts, vectors)


def test_pictures_of_different_sizes_keep_their_places(config):
    encoder = image_encoder(config.images[0], "float32")
    rng = np.random.default_rng(0)
    sizes = [(40, 60, 3), (60, 40, 3), (40, 60, 3), (50, 50, 3), (60, 40, 3)]
    prepared = [encoder.prepare(Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))) for size in sizes]
    together = describe_images(encoder, prepared, 4)
    for place, picture in enumerate(prepared):
        alone = describe_images(encoder, [picture], 1)
        for output in OUTPUTS:
            assert len(together[output]) == len(sizes)
            np.testing.assert_allclose(together[output][place], alone[output][0], atol=1e-3, rtol=1e-3)
