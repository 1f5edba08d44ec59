import json

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import constants
from transformers.utils import logging

from featurize.checkpoints import digest_config, digest_files, find_checkpoint, load_network, quiet
from featurize.encoder import EncoderError

CONFIG = transformers.BertConfig(
    vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
)


@pytest.fixture
def folder(tmp_path):
    with quiet():
        transformers.BertModel(CONFIG).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_folder_is_itself(folder, monkeypatch):
    assert find_checkpoint(f"transformers:{folder}", "x") == folder
    monkeypatch.chdir(folder.parent)
    assert find_checkpoint("transformers:bert", "x").absolute() == folder


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent", "a/b/c", ""])
def test_no_such_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: pytest.fail("asked the hub"))
    if name:
        with pytest.raises(EncoderError, match=rf"transformers:{name}: there is no folder /.*tokenizer.json"):
            find_checkpoint(f"transformers:{name}", "tokenizer.json")
    else:
        with pytest.raises(EncoderError, match=r"no config.json"):
            find_checkpoint("transformers:", "tokenizer.json")


def test_a_hub_name_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EncoderError) as caught:
        find_checkpoint("transformers:nobody/no-such-model", "tokenizer.json")
    message = str(caught.value)
    assert message.startswith(f"transformers:nobody/no-such-model: there is no folder {tmp_path}/nobody/no-such-model")
    assert "the hub gives no model 'nobody/no-such-model' (" in message
    assert "local folder of a checkpoint that holds config.json, model.safetensors and tokenizer.json" in message
    assert "`hf download NAME --local-dir FOLDER`" in message


def test_a_name_that_no_hub_model_can_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EncoderError, match=r"hub gives no model 'two words' \(Repo id must"):
        find_checkpoint("transformers:two words", "x")


def test_a_hub_model_is_fetched_without_pickles(folder, tmp_path, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.chdir(tmp_path / "bert")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_checkpoint("transformers:some/model", "x") == folder
    ((name, patterns),) = asked
    assert name == "some/model"
    files = ["config.json", "1_Pooling/config.json", "vocab.txt", "spiece.model", "model-00001-of-00002.safetensors"]
    pickles = ["pytorch_model.bin", "model.pt", "training_args.bin", "tf_model.h5"]
    kept = huggingface_hub.utils.filter_repo_objects(files + pickles, allow_patterns=patterns)
    assert list(kept) == files


def test_pickled_weights_are_named_and_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"holds no model\*.safetensors, only: config.json, pytorch_model.bin"):
        find_checkpoint(f"transformers:{folder}", "tokenizer.json")


def test_pickled_weights_are_not_loaded_beside_other_files(folder):
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "model_of_another_kind.safetensors")
    with pytest.raises(ValueError, match=r"transformers cannot load this checkpoint \(.*model.safetensors"):
        load_network(find_checkpoint(f"transformers:{folder}", "tokenizer.json"))


def test_an_empty_folder(tmp_path):
    with pytest.raises(EncoderError, match=r"holds no config.json, only: nothing. Expected config.json"):
        find_checkpoint(f"transformers:{tmp_path}", "tokenizer.json")


def test_weights_are_loaded_in_float32(folder):
    with quiet():
        transformers.BertModel(CONFIG).half().save_pretrained(folder)
    network = load_network(folder)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_missing_tensors_are_not_made_up(folder):
    file = folder / "model.safetensors"
    state = safetensors.torch.load_file(file)
    del state["encoder.layer.0.output.dense.weight"]
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lack 1 tensors of BertModel, e.g. \['encoder.layer.0.output.dense.weight'\]"
    ):
        load_network(folder)


def test_a_pooling_layer_without_weights_is_taken_off(folder):
    file = folder / "model.safetensors"
    state = {k: v for k, v in safetensors.torch.load_file(file).items() if not k.startswith("pooler.")}
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    assert load_network(folder).pooler is None


@pytest.mark.parametrize("damage", ["type", "code", "weights", "shape"])
def test_a_checkpoint_that_cannot_be_loaded(folder, damage):
    config = json.loads((folder / "config.json").read_text())
    if damage == "type":
        config["model_type"] = "no_such_type"
    elif damage == "code":
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
        (folder / "own.py").write_text("raise SystemExit('code of a checkpoint was run')")
    elif damage == "shape":
        config["hidden_size"] = 4
    else:
        (folder / "model.safetensors").write_bytes(b"\x00" * 64)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{folder}: transformers cannot load this checkpoint \(.+\)$"):
        load_network(folder)


def test_the_configurations_digest_leaves_out_what_changes_no_answer(tmp_path):
    def digest(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return digest_config(tmp_path)

    plain = digest(hidden_size=8, num_attention_heads=2)
    assert digest(num_attention_heads=2, hidden_size=8, transformers_version="5", dtype="float16") == plain
    assert digest(num_attention_heads=4, hidden_size=8) != plain


def test_the_files_digest_sees_names_and_bytes(tmp_path):
    def digest(**files):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        return digest_files(tmp_path, ("vocab*", "v*", "merges"))

    plain = digest(vocab="ab", merges="c")
    assert digest(merges="c", vocab="ab", README="other") == plain
    assert len({plain, digest(vocab="a", merges="bc"), digest(vocab="ab"), digest(vocab2="ab", merges="c")}) == 4


def test_quiet_restores_what_was_set():
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    with quiet():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with quiet():
        pass
    assert not logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
