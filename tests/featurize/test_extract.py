"""Extraction with the real packaged networks: one task a shard, nothing twice, nothing lost."""

import errno
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset

from featurize import extract
from featurize.columns import open_column
from featurize.config import FeaturizeConfig, ScenesConfig
from featurize.datasets.sample import Sample
from featurize.datasets.scenes import read_scenes
from featurize.describe import describe_images, describe_texts, image_encoder, text_encoder
from featurize.encoder import Card
from featurize.extract import extract_shard
from featurize.fill import fill, tasks_for, variables
from featurize.images.decode import decode
from featurize.index import index
from featurize.manifest import CacheError, read_manifest
from featurize.plan import plan
from featurize.quarantine import read_quarantine
from featurize.shards import row_key
from featurize.verify import verify

CONFIG = FeaturizeConfig(rows_per_shard=4, precision="float32", views=("plain", "flip"), max_quarantined=0.5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Nine rendered pictures with captions."""
    folder = tmp_path_factory.mktemp("scenes")
    return list(read_scenes(folder, ScenesConfig(train=5, val=2, test=2)))


@pytest.fixture(scope="module")
def extracted(pictures, tmp_path_factory, ray_local):
    """A cache of every kind of column, made by Ray tasks; the sixth picture is cut in half."""
    folder = tmp_path_factory.mktemp("cache")
    cut = folder / "cut.jpg"
    cut.write_bytes(pictures[5].read()[:700])
    samples = [*pictures[:5], replace(pictures[5], image=str(cut)), *pictures[6:]]
    dataset = index(samples, "scenes", folder, max_quarantined=0.5)
    columns = plan(dataset, CONFIG, ("pooled", "grid"), ("sentence", "tokens"))
    fill(dataset, CONFIG, columns)
    return dataset, {column.name: column for column in columns}


def opened(extracted, name):
    dataset, columns = extracted
    return open_column(dataset, name, columns[name].id)


def test_columns_are_named_by_encoder_output_and_view(extracted):
    assert list(extracted[1]) == [
        "efficientnet-lite0.pooled",
        "efficientnet-lite0.pooled.flip",
        "efficientnet-lite0.grid",
        "efficientnet-lite0.grid.flip",
        "minilm.sentence",
        "minilm.tokens",
    ]


def test_rows_are_what_the_network_says_of_their_image(extracted, pictures):
    encoder = image_encoder("efficientnet-lite0", "float32")
    alone = describe_images(encoder, [encoder.prepare(decode(pictures[7].read()))], 1)
    np.testing.assert_allclose(
        opened(extracted, "efficientnet-lite0.pooled").gather(np.array([7])), alone["pooled"], atol=2e-3, rtol=2e-3
    )
    grid = opened(extracted, "efficientnet-lite0.grid")
    assert grid.shape == (49, 1280)
    np.testing.assert_allclose(
        grid.gather(np.array([7]))[0].mean(0, dtype=np.float32), alone["pooled"][0], atol=5e-3, rtol=5e-3
    )


def test_the_flipped_view_differs(extracted):
    rows = np.arange(5)
    plain = opened(extracted, "efficientnet-lite0.pooled").gather(rows)
    assert (plain != opened(extracted, "efficientnet-lite0.pooled.flip").gather(rows)).any()


def test_caption_rows_follow_the_images(extracted, pictures):
    captions = [caption for sample in pictures for caption in sample.captions]
    encoder = text_encoder("minilm", "float32")
    alone = describe_texts(encoder, [captions[33]], 1)
    np.testing.assert_allclose(
        opened(extracted, "minilm.sentence").gather(np.array([33]))[0], alone["sentence"][0], atol=2e-3
    )
    tokens, mask = opened(extracted, "minilm.tokens").gather_padded(np.array([33]))
    assert tokens[mask].shape == alone["tokens"][0].shape
    np.testing.assert_allclose(tokens[mask], alone["tokens"][0], atol=1e-2)


def test_an_image_that_cannot_be_decoded_keeps_its_row(extracted):
    dataset, columns = extracted
    for name in ("efficientnet-lite0.pooled", "efficientnet-lite0.grid.flip"):
        manifest = read_manifest(columns[name].folder)
        assert manifest.missing.tolist() == [5]
        row = opened(extracted, name).gather(np.array([5]))
        assert np.isnan(row).all()
    assert '"stage": "decode", "reason": "DecodeError' in (dataset.folder / "quarantine.jsonl").read_text()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its last file open
def test_plain_webdataset_reads_every_shard(extracted, pictures):
    for name, column in extracted[1].items():
        shards = [str(path) for path in sorted(column.folder.glob("*.tar"))]
        assert len(shards) == 3
        keys = [sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False).decode()]
        if column.modality == "image":
            assert keys == [row_key(sample.image_id) for sample in pictures], name
        else:
            assert keys == [row_key(s.image_id, k) for s in pictures for k in range(len(s.captions))], name


def test_a_second_time_nothing_is_extracted(extracted, capsys):
    dataset, columns = extracted
    fill(dataset, CONFIG, list(columns.values()))
    assert "6 columns found, 0 rows to extract" in capsys.readouterr().out


def test_finished_shards_of_an_unfinished_column_stay(extracted):
    dataset, columns = extracted
    before = {}
    for column in columns.values():
        before[column.name] = read_manifest(column.folder)
        before[column.name].reopen(column.folder, sound=(0, 2))
    tasks, known = tasks_for(dataset, CONFIG, list(columns.values()))
    assert [(task.modality, task.view, task.number, len(task.targets)) for task in tasks] == [
        ("image", "plain", 1, 2),
        ("image", "flip", 1, 2),
        ("text", "plain", 1, 2),
    ]
    assert known == 0
    fill(dataset, CONFIG, list(columns.values()))
    for column in columns.values():
        after = read_manifest(column.folder)
        assert after == before[column.name]
        assert not [*column.folder.glob("0*.json"), *column.folder.glob("column.json")]


def test_a_column_keeps_the_boundaries_that_it_was_begun_with(pictures, tmp_path):
    dataset = index(pictures, "scenes", tmp_path, max_quarantined=0)
    columns = plan(dataset, CONFIG, ("pooled",), ())
    first, *others = tasks_for(dataset, CONFIG, columns)[0]
    assert len(others) == 5
    extract_shard(first)
    again, _ = tasks_for(dataset, replace(CONFIG, rows_per_shard=5), columns)
    assert again == others


def test_an_image_that_changed_after_it_was_indexed_is_quarantined(pictures, tmp_path):
    changed = tmp_path / "changed.jpg"
    changed.write_bytes(pictures[1].read())
    dataset = index([pictures[0], replace(pictures[1], image=str(changed))], "scenes", tmp_path, max_quarantined=0)
    changed.write_bytes(pictures[2].read())
    (task,), _ = tasks_for(dataset, replace(CONFIG, views=("plain",)), plan(dataset, CONFIG, ("pooled",), ())[:1])
    (record,) = extract_shard(task).values()
    assert record.quarantined == (1,)
    assert record.reasons == (
        f"OSError: {changed} changed after it was indexed; run `featurize` again for another version",
    )


def test_too_many_broken_images_end_the_job(pictures, tmp_path, ray_local):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    samples = [*pictures[:3], Sample("broken", str(broken), ("nothing",), "train")]
    dataset = index(samples, "scenes", tmp_path, max_quarantined=0)
    config = replace(CONFIG, max_quarantined=0.1)
    columns = plan(dataset, config, ("pooled",), ())
    with pytest.raises(CacheError, match="1 of 4 images cannot be used"):
        fill(dataset, config, columns)
    assert all(read_manifest(column.folder) for column in columns)


def test_another_network_under_the_same_name_is_refused(pictures, tmp_path):
    dataset = index(pictures, "scenes", tmp_path, max_quarantined=0)
    columns = plan(dataset, CONFIG, ("pooled",), ())
    task = tasks_for(dataset, CONFIG, columns)[0][0]
    with pytest.raises(CacheError, match="every machine must hold the same weights"):
        extract_shard(replace(task, card=Card("other", "0", {}, ())))


def test_no_room_where_a_shard_is_written_before_it_is_uploaded(pictures, bucket, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    dataset = index(pictures, "scenes", bucket, max_quarantined=0)
    task = tasks_for(dataset, CONFIG, plan(dataset, CONFIG, ("pooled",), ()))[0][0]
    monkeypatch.setattr(extract, "write_shard", full)
    message = f"no room for shard 0 .*: free some space in {tempfile.gettempdir()}, where a shard is written first, or"
    with pytest.raises(CacheError, match=message):
        extract_shard(task)


def changed_answers(monkeypatch, change):
    """The network's answers for images and captions, changed."""

    def changed(describe):
        def described(*args):
            answers = describe(*args)
            return {name: change(name, [row.copy() for row in rows]) for name, rows in answers.items()}

        return described

    monkeypatch.setattr(extract, "describe_images", changed(describe_images))
    monkeypatch.setattr(extract, "describe_texts", changed(describe_texts))


@pytest.mark.parametrize(("value", "held"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_an_image_of_which_the_network_says_nothing_is_quarantined(pictures, tmp_path, monkeypatch, value, held):
    def change(name, rows):
        if name == "grid":
            rows[2][7, 3] = value
        return rows

    changed_answers(monkeypatch, change)
    dataset = index(pictures[:4], "scenes", tmp_path, max_quarantined=0)
    config = replace(CONFIG, views=("plain",))
    columns = plan(dataset, config, ("pooled", "grid"), ())
    (task,), _ = tasks_for(dataset, config, columns)
    whole, lacking = (extract_shard(task)[str(column.folder)] for column in columns)
    assert whole.quarantined == ()
    assert (lacking.quarantined, lacking.reasons) == (
        (2,),
        (f"EncoderError: efficientnet-lite0 says {held} in 'grid'",),
    )
    with pytest.raises(CacheError, match="1 of 4 images cannot be used"):
        fill(dataset, replace(config, max_quarantined=0.0), columns)
    (problem,) = read_quarantine(dataset.folder)
    assert (problem.image_id, problem.stage) == (pictures[2].image_id, "describe")
    row = open_column(dataset, columns[1].name, columns[1].id).gather(np.array([2]))
    assert np.isnan(row).all()


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        (
            "float16",
            "says 70000 in 'pooled' of .*, beyond the 65504 that can be stored as float16; store its features ",
        ),
        ("int8", "says 70000 in 'pooled' of .*, beyond the 65504 that can be stored as int8; store its features with "),
        ("float32", None),
    ],
)
def test_numbers_beyond_the_type_are_refused(pictures, tmp_path, monkeypatch, storage, message):
    def change(_, rows):
        rows[1][5] = -70000
        return rows

    changed_answers(monkeypatch, change)
    dataset = index(pictures[:4], "scenes", tmp_path, max_quarantined=0)
    config = replace(CONFIG, views=("plain",), storage=storage)
    columns = plan(dataset, config, ("pooled",), ())
    (task,), _ = tasks_for(dataset, config, columns)
    with pytest.raises(CacheError, match=message) if message else nullcontext():
        extract_shard(task)


def test_every_caption_has_values(pictures, tmp_path, monkeypatch):
    def change(_, rows):
        rows[3][0] = np.nan
        return rows

    changed_answers(monkeypatch, change)
    dataset = index(pictures[:4], "scenes", tmp_path, max_quarantined=0)
    (task,), _ = tasks_for(dataset, CONFIG, plan(dataset, CONFIG, (), ("sentence",)))
    with pytest.raises(
        CacheError, match=r"minilm says NaN in 'sentence' of the caption .*; try --featurize.precision f"
    ):
        extract_shard(task)


def test_no_more_is_prepared_than_is_asked_for_soon():
    begun = []
    with ThreadPoolExecutor(1) as pool:
        made = extract._ahead(pool, lambda row: begun.append(row) or row, range(20), 4)
        assert [next(made), next(made)] == [0, 1]
        pool.submit(lambda: None).result()
        assert len(begun) <= 6
        assert [*made] == list(range(2, 20))
    assert begun == list(range(20))


@pytest.mark.parametrize(("cores", "threads"), [(0.5, "1"), (1, "1"), (3, "3")])
def test_a_task_has_a_thread_for_each_core(cores, threads):
    assert variables(replace(CONFIG, cpus_per_task=cores))["OMP_NUM_THREADS"] == threads


def test_a_batch_that_the_gpu_cannot_hold(pictures, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    dataset = index(pictures, "scenes", tmp_path, max_quarantined=0)
    task = tasks_for(dataset, CONFIG, plan(dataset, CONFIG, ("pooled",), ()))[0][0]
    monkeypatch.setattr(extract, "describe_images", full)
    message = r"efficientnet-lite0: .*CUDA out of memory.*; lower --featurize.image_batch, which is \d+, and run"
    with pytest.raises(CacheError, match=message):
        extract_shard(task)
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (("regions",), (), r"no image encoder gives 'regions'; the run has efficientnet-lite0 \(grid, pooled"),
        ((), ("words",), r"no text encoder gives 'words'; the run has minilm \(tokens, sentence\)"),
        (("efficientnet-lite0.regions",), (), "encoder 'efficientnet-lite0' has no output 'regions'; it has grid, poo"),
        (("vit.pooled",), (), "no image encoder gives 'vit.pooled'; the run has efficientnet-lite0"),
    ],
)
def test_outputs_that_nobody_has_are_refused(pictures, tmp_path, images, texts, message):
    dataset = index(pictures, "scenes", tmp_path, max_quarantined=0)
    with pytest.raises(CacheError, match=message):
        plan(dataset, CONFIG, images, texts)


def test_an_output_of_one_encoder_alone(pictures, tmp_path):
    dataset = index(pictures, "scenes", tmp_path, max_quarantined=0)
    config = replace(CONFIG, images=("efficientnet-lite0", "efficientnet-lite1"), views=("plain",))
    columns = plan(dataset, config, ("pooled", "efficientnet-lite1.grid"), ())
    assert [column.name for column in columns] == [
        "efficientnet-lite0.pooled",
        "efficientnet-lite1.pooled",
        "efficientnet-lite1.grid",
    ]


def test_two_encoders_of_one_name_are_refused(pictures, tmp_path):
    dataset = index(pictures, "scenes", tmp_path, max_quarantined=0)
    twice = tuple(f"torchvision:resnet18@random:{seed}" for seed in (1, 2))
    with pytest.raises(CacheError, match=r"two encoders give a column 'torchvision-resnet18.pooled'"):
        plan(dataset, replace(CONFIG, images=twice), ("pooled",), ())


def test_an_output_that_is_named_twice_is_one_column(pictures, tmp_path):
    dataset = index(pictures, "scenes", tmp_path, max_quarantined=0)
    assert len(plan(dataset, CONFIG, (), ("minilm.sentence", "sentence"))) == 1


def test_each_encoder_gives_what_it_has_and_words_are_whole_numbers(pictures, tmp_path, ray_local):
    wordless = replace(pictures[4], captions=("?!", "A dog's dogs"))  # the first row of the second shard
    dataset = index([*pictures[:4], wordless], "scenes", tmp_path, max_quarantined=0)
    config = replace(CONFIG, texts=("minilm", "lexicon"))
    columns = plan(dataset, config, (), ("sentence", "lemmas"))
    assert [column.name for column in columns] == ["minilm.sentence", "lexicon-en.lemmas"]
    assert [column.ingredients["dtype"] for column in columns] == ["float16", "int32"]
    fill(dataset, config, columns)
    lemmas = open_column(dataset, "lexicon-en.lemmas", columns[1].id)
    assert (lemmas.dtype, lemmas.shape, lemmas.rows) == (np.int32, (), len(dataset.captions))
    assert read_manifest(columns[1].folder).dtype == "int32"
    ids, mask = lemmas.gather_padded(np.arange(lemmas.rows))
    assert [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)] == text_encoder(
        "lexicon", "float32"
    ).prepare(dataset.captions)
    assert mask.sum(1).tolist()[-2:] == [0, 3]
    assert not list(verify(dataset.folder))


def test_identity_follows_what_changes_the_features(pictures, tmp_path):
    dataset = index(pictures, "scenes", tmp_path, max_quarantined=0)

    def ids(**changes):
        return {column.id for column in plan(dataset, replace(CONFIG, **changes), ("pooled",), ())}

    assert ids() == ids(image_batch=2, rows_per_shard=3, max_quarantined=0)
    assert ids(images=("efficientnet-lite1",)).isdisjoint(ids())
    assert ids(views=("crop",)).isdisjoint(ids())
