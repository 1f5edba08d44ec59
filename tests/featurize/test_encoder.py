import hashlib

import pytest
import torch
from torch import nn

from featurize.encoder import first_line, freeze, frozen_forward, hash_weights, usable_precision


def test_the_weights_hash_is_of_names_dtypes_shapes_and_bytes():
    layer = nn.Linear(2, 1)
    layer.load_state_dict({"weight": torch.tensor([[1.0, -2.0]]), "bias": torch.tensor([0.5])})
    by_hand = hashlib.sha256()
    by_hand.update(b"bias torch.float32 (1,)\n" + bytes.fromhex("0000003f"))  # 0.5, little-endian
    by_hand.update(b"weight torch.float32 (1, 2)\n" + bytes.fromhex("0000803f000000c0"))  # 1, -2
    assert hash_weights(layer) == by_hand.hexdigest()


def test_the_weights_hash_sees_value_dtype_and_shape():
    def network(**tensors):
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return module

    same = network(a=torch.zeros(2, 3), b=torch.zeros(()))
    others = [
        network(a=torch.zeros(3, 2), b=torch.zeros(())),
        network(a=torch.ones(2, 3), b=torch.zeros(())),
        network(a=torch.zeros(2, 3, dtype=torch.int32), b=torch.zeros(())),
        network(c=torch.zeros(2, 3), b=torch.zeros(())),
    ]
    assert hash_weights(network(b=torch.zeros(()), a=torch.zeros(2, 3))) == hash_weights(same)
    assert len({hash_weights(other) for other in [same, *others]}) == 5


def test_layout_in_memory_does_not_change_the_hash():
    layer = nn.Conv2d(3, 4, 3)
    before = hash_weights(layer)
    assert hash_weights(layer.to(memory_format=torch.channels_last)) == before


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bfloat16"), ({"bf16": True}, "bfloat16"), ({"avx2": True}, "float32"), ({}, "float32")],
)
def test_bfloat16_only_where_the_processor_has_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert usable_precision("bfloat16", torch.device("cpu")) == expected
    assert usable_precision("float32", torch.device("cpu")) == "float32"


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_on_a_gpu_only_in_hardware(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert usable_precision("bfloat16", torch.device("cuda")) == expected


def test_other_devices_compute_in_float32():
    assert usable_precision("bfloat16", torch.device("mps")) == "float32"


def test_freezing_rounds_only_the_weights_that_autocast_would_round():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    freeze(network, "bfloat16", torch.device("cpu"))
    assert [p.dtype for p in network.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16] * 2
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_frozen_weights_give_what_autocast_gives():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(images)
    freeze(network, "bfloat16", torch.device("cpu"))
    with frozen_forward("bfloat16", torch.device("cpu")):
        torch.testing.assert_close(network(images), expected, rtol=0, atol=0)


def test_float32_stays_float32():
    network = nn.Linear(3, 2)
    freeze(network, "float32", torch.device("cpu"))
    with frozen_forward("float32", torch.device("cpu")):
        answer = network(torch.ones(1, 3))
    assert answer.dtype == torch.float32
    assert answer.is_inference()


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError("a\nb"), "a"), (ValueError("\n a"), "a"), (KeyError(), "KeyError")]
)
def test_first_line(error, line):
    assert first_line(error) == line
