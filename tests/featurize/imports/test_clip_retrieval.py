"""The folder that clip-retrieval's inference writes."""

import numpy as np
import pandas as pd
import pytest

from featurize.datasets.sample import DataError
from featurize.encoder import Output


@pytest.fixture
def folder(tmp_path, samples, values):
    """A row for each image with its first two captions, in parts of 10 and 4 numbered 2 and 10."""
    made = tmp_path / "clip"
    images = np.repeat(values(7, 8), 2, 0)
    texts = values(14, 8)[::-1]
    rows = [(sample, caption) for sample in samples for caption in sample.captions[:2]]
    for part, inside in ((2, slice(0, 10)), (10, slice(10, 14))):
        for name, array in (("img_emb", images), ("text_emb", texts)):
            (made / name).mkdir(parents=True, exist_ok=True)
            np.save(made / name / f"{name}_{part}.npy", array[inside].astype(np.float16))
        (made / "metadata").mkdir(exist_ok=True)
        table = {
            "image_path": [sample.image for sample, _ in rows[inside]],
            "caption": [caption for _, caption in rows[inside]],
        }
        pd.DataFrame(table).to_parquet(made / "metadata" / f"metadata_{part}.parquet")
    return made, images, texts


def test_images(folder, opened, imported):
    path, images, _ = folder
    assert opened(path).card.outputs == (Output("pooled", (8,)),)
    found, failed = imported(path, "pooled")
    assert failed == {}
    np.testing.assert_array_equal(found, images[::2])


def test_captions_are_told_by_image_and_text(folder, opened, imported, samples):
    from dataclasses import replace

    path, _, texts = folder
    assert opened(path, "text").card.outputs == (Output("sentence", (8,)),)
    swapped = [replace(sample, captions=sample.captions[1::-1]) for sample in samples]
    found, _ = imported(path, "sentence", "text", of=swapped)
    np.testing.assert_array_equal(found, texts.reshape(7, 2, 8)[:, ::-1].reshape(14, 8))


def test_a_caption_without_a_row_is_refused(folder, imported):
    with pytest.raises(
        DataError, match=r"21 of 35 captions have no row: 'picture-0#2', 'picture-0#3', 'picture-0#4', \.\."
    ):
        imported(folder[0], "sentence", "text")


def test_webdataset_s_keys(folder, imported):
    path, images, _ = folder
    for part in (2, 10):
        file = path / "metadata" / f"metadata_{part}.parquet"
        table = pd.read_parquet(file)
        keys = [name.rpartition("/")[2].removesuffix(".jpg") for name in table.pop("image_path")]
        table.assign(key=keys).to_parquet(file)
    np.testing.assert_array_equal(imported(path, "pooled")[0], images[::2])


def test_copies_that_differ_are_refused(folder, imported):
    path, images, _ = folder
    images[3] += 1
    np.save(path / "img_emb" / "img_emb_2.npy", images[:10])
    with pytest.raises(
        DataError, match=r"row 2 \('.*picture-1.jpg'\) and row 3 .* are of one image, but their 'pooled'"
    ):
        imported(path, "pooled")


def cut(path):
    np.save(path / "img_emb" / "img_emb_10.npy", np.ones((3, 8), np.float16))


def widen(path):
    np.save(path / "img_emb" / "img_emb_10.npy", np.ones((4, 9), np.float16))


def drop_part(path):
    (path / "metadata" / "metadata_10.parquet").unlink()


def drop_ids(path):
    file = path / "metadata" / "metadata_2.parquet"
    pd.read_parquet(file).drop(columns="image_path").to_parquet(file)


def damage(path):
    (path / "metadata" / "metadata_2.parquet").write_bytes(b"no parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "img_emb_10.npy: 3 rows, but metadata_10.parquet has 4"),
        (widen, r"img_emb_10.npy: found the shape \(4, 9\), expected \(N, D\), D as in img_emb_2.npy"),
        (drop_part, r"found the parts \[2, 10\] of img_emb and \[2\] of metadata, expected the same"),
        (drop_ids, "found the columns caption, expected one of image_id, image_path, key"),
        (damage, "metadata_2.parquet: not a Parquet file"),
    ],
)
def test_parts_that_do_not_fit(folder, opened, change, message):
    change(folder[0])
    with pytest.raises(DataError, match=message):
        opened(folder[0])


def test_captions_without_texts(folder, opened):
    for file in (folder[0] / "metadata").iterdir():
        pd.read_parquet(file).drop(columns="caption").to_parquet(file)
    with pytest.raises(DataError, match="no column 'caption' in metadata"):
        opened(folder[0], "text")
