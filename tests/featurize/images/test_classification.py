import pickle
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision.models
from PIL import Image
from torch import nn

from featurize.encoder import EncoderError, Output
from featurize.images import open_image_encoder


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def at(path):
    """Reads a layer's output."""
    return lambda model: (model.get_submodule(path), lambda _inputs, output: output)


def before(path):
    """Reads a layer's input."""
    return lambda model: (model.get_submodule(path), lambda inputs, _output: inputs[0])


# Where each family's last features are, read in torchvision's source; grids as (cells, channels).
SMALL = [
    ("resnet18", before("avgpool"), (49, 512)),
    ("mobilenet_v3_small", before("avgpool"), (49, 576)),
    ("squeezenet1_1", at("features"), (169, 512)),
    ("shufflenet_v2_x0_5", at("conv5"), (49, 1024)),
    ("mnasnet0_5", at("layers"), (49, 1280)),
    ("efficientnet_b0", before("avgpool"), (49, 1280)),
    ("regnet_x_400mf", before("avgpool"), (49, 400)),
]
LARGE = [
    ("vit_b_16", at("encoder"), (196, 768)),
    ("convnext_tiny", before("avgpool"), (49, 768)),
    ("swin_t", before("avgpool"), (49, 768)),
    ("swin_v2_t", before("avgpool"), (64, 768)),
    ("maxvit_t", before("classifier"), (49, 512)),
    ("densenet121", at("features"), (49, 1024)),
    ("googlenet", before("avgpool"), (49, 1024)),
    ("inception_v3", before("avgpool"), (64, 2048)),
    ("alexnet", before("classifier"), (36, 256)),
    ("vgg11_bn", at("avgpool"), (49, 512)),
]


def check(name, where, shape):
    encoder = open_image_encoder(f"torchvision:{name}@random:3", "float32")
    assert encoder.card.name == f"torchvision:{name}"
    assert encoder.card.outputs[:2] == (Output("grid", shape), Output("pooled", shape[1:]))

    arguments = {"init_weights": True, "transform_input": True} if name in {"googlenet", "inception_v3"} else {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = torchvision.models.get_model(name, weights=None, **arguments).eval()
    seen = []
    layer, read = where(model)
    layer.register_forward_hook(lambda _layer, inputs, output: seen.append(read(inputs, output)))
    image = noise(400, 300)
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    with torch.no_grad():
        model(preset(image)[None])
    answer = encoder.encode(encoder.prepare(image)[None])
    features = seen[0]
    if name == "densenet121":
        features = features.relu()
    if name == "alexnet":
        features = features.view(1, 256, 6, 6)
    if name == "vit_b_16":
        grid, pooled = features[:, 1:], features[:, 0]
    else:
        grid = features.flatten(2).transpose(1, 2)
        pooled = grid.mean(1)
    scale = grid.abs().max().item()
    torch.testing.assert_close(answer["grid"], grid, atol=2e-3 * scale, rtol=1e-3)
    torch.testing.assert_close(answer["pooled"], pooled, atol=2e-3 * scale, rtol=1e-3)
    assert grid.std() > 0


@pytest.mark.parametrize(("name", "where", "shape"), SMALL)
def test_the_grid_is_the_last_features(name, where, shape):
    check(name, where, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where", "shape"), LARGE)
def test_the_grid_is_the_last_features_of_large_networks(name, where, shape):
    check(name, where, shape)


def test_random_weights_follow_from_the_seed():
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    first = open_image_encoder("torchvision:squeezenet1_1@random").card.weights
    assert open_image_encoder("torchvision:squeezenet1_1@random:0").card.weights == first
    assert open_image_encoder("torchvision:squeezenet1_1@random:1").card.weights != first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_card_holds_the_default_weights_preprocessing():
    record = open_image_encoder("torchvision:resnet18@random", "float32").card.preprocessing
    assert record == {
        "resize": 256,
        "crop": 224,
        "filter": "bilinear",
        "mean": pytest.approx([123.675, 116.28, 103.53]),
        "std": pytest.approx([58.395, 57.12, 57.375]),
        "precision": "float32",
    }


@pytest.fixture(scope="module")
def squeezenet():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return torchvision.models.squeezenet1_1(weights=None)


@pytest.fixture(scope="module")
def expected():
    return open_image_encoder("torchvision:squeezenet1_1@random:5").card


def test_bfloat16_is_close_to_float32(expected):
    image = noise(240, 240)
    answers = []
    for precision in ("float32", "bfloat16"):
        encoder = open_image_encoder("torchvision:squeezenet1_1@random:5", precision)
        answers.append(encoder.encode(encoder.prepare(image)[None])["pooled"])
    assert torch.cosine_similarity(*answers).item() > 0.995


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_file_of_weights(tmp_path, squeezenet, expected, wrapper):
    state = squeezenet.state_dict()
    file = tmp_path / "weights.pth"
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, file)
    card = open_image_encoder(f"torchvision:squeezenet1_1@{file}").card
    assert card == expected  # no path in it: a moved file is the same encoder


def test_a_safetensors_file_and_a_data_parallel_prefix(tmp_path, squeezenet, expected):
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({f"module.{k}": v for k, v in squeezenet.state_dict().items()}, file)
    assert open_image_encoder(f"torchvision:squeezenet1_1@{file}").card == expected


def test_a_file_with_another_number_of_classes(tmp_path):
    model = torchvision.models.mobilenet_v3_small(weights=None, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    encoder = open_image_encoder(f"torchvision:mobilenet_v3_small@{tmp_path / 'seven.pth'}")
    assert encoder.card.outputs[1] == Output("pooled", (576,))


def test_a_file_from_before_batch_counters(tmp_path):
    state = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "old.pth")
    torch.save(state, tmp_path / "new.pth")
    old, new = (open_image_encoder(f"torchvision:mobilenet_v3_small@{tmp_path / f}.pth").card for f in ("old", "new"))
    assert old == new


@pytest.mark.slow
def test_old_names_of_densenet(tmp_path):
    state = torchvision.models.densenet121(weights=None).state_dict()
    old = {k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for k, v in state.items()}
    assert set(old) != set(state)
    torch.save(state, tmp_path / "new.pth")
    torch.save(old, tmp_path / "old.pth")
    old, new = (open_image_encoder(f"torchvision:densenet121@{tmp_path / f}.pth").card for f in ("old", "new"))
    assert old == new


def test_weights_of_another_network(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(
        ValueError, match=r"linear.pth does not fit torchvision's resnet18: .*missing.*2 are unexpected"
    ):
        open_image_encoder(f"torchvision:resnet18@{tmp_path / 'linear.pth'}")


def test_weights_of_another_shape(tmp_path, squeezenet):
    state = dict(squeezenet.state_dict())
    state["features.0.weight"] = torch.zeros(64, 3, 7, 7)
    torch.save(state, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"1 have another shape \['features.0.weight'\]"):
        open_image_encoder(f"torchvision:squeezenet1_1@{tmp_path / 'wide.pth'}")


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_nothing_is_unpickled(tmp_path):
    target = tmp_path / "sprung"
    torch.save({"weight": Trap(target)}, tmp_path / "trap.pth")
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap(target)))
    for file in ("trap.pth", "trap.pkl"):
        with pytest.raises(ValueError, match=r"cannot be read as weights .* objects are never unpickled"):
            open_image_encoder(f"torchvision:squeezenet1_1@{tmp_path / file}")
    assert not target.exists()


@pytest.mark.parametrize("file", ["broken.pth", "broken.safetensors"])
def test_a_damaged_file(tmp_path, file):
    (tmp_path / file).write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match=rf"{file} cannot be read as weights"):
        open_image_encoder(f"torchvision:squeezenet1_1@{tmp_path / file}")


@pytest.mark.parametrize("content", [torch.zeros(2), {"weight": 3}, [torch.zeros(2)]])
def test_a_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth holds a \w+ that is no state dict"):
        open_image_encoder(f"torchvision:squeezenet1_1@{tmp_path / 'other.pth'}")


@pytest.mark.parametrize("source", ["missing.pth", "Default", "random:x"])
def test_no_such_file(source):
    with pytest.raises(EncoderError, match=rf"there is no file .*{source}; after @ comes default, random"):
        open_image_encoder(f"torchvision:squeezenet1_1@{source}")


def test_an_unknown_network():
    with pytest.raises(ValueError, match=r"no classification network 'resnet51'; the nearest name is 'resnet"):
        open_image_encoder("torchvision:resnet51@random")


def test_default_weights_come_from_the_hubs_folder(tmp_path, monkeypatch, squeezenet, expected):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(squeezenet.state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    assert open_image_encoder("torchvision:squeezenet1_1").card == expected
    assert open_image_encoder("torchvision:squeezenet1_1@default").card == expected


def test_default_weights_are_fetched_and_their_hash_is_checked(tmp_path, monkeypatch, squeezenet, expected):
    def fetch(url, file, hash_prefix, progress):
        assert url == "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"
        assert (hash_prefix, progress) == ("b8a52dc0", False)
        torch.save(squeezenet.state_dict(), file)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert open_image_encoder("torchvision:squeezenet1_1").card == expected


def test_default_weights_without_a_network(tmp_path, monkeypatch):
    def fetch(*_arguments, **_options):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(EncoderError) as caught:
        open_image_encoder("torchvision:squeezenet1_1")
    message = str(caught.value)
    assert str(tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth") in message
    assert "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth cannot be reached" in message
    assert "torchvision:squeezenet1_1@FILE" in message
