"""FuseMix: one share for both modalities, from seed and step alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from train.batches import Batch, Features
from train.config import CenterConfig, HingeConfig, MarginConfig, ObjectiveConfig, SettingsError, TowerConfig
from train.mixup import Mixup, check_mixup, mix


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    image, text = (Features(torch.randn(3, width, generator=generator)) for width in (4, 5))
    return Batch(image, text, torch.arange(3), torch.zeros(3, 0))


def test_both_modalities_are_mixed_by_one_share():
    one, other = batch(1), batch(2)
    mixed = mix(one, other, 0.25)
    torch.testing.assert_close(mixed.image.vectors, 0.25 * one.image.vectors + 0.75 * other.image.vectors)
    torch.testing.assert_close(mixed.text.vectors, 0.25 * one.text.vectors + 0.75 * other.text.vectors)
    assert mixed.owner.equal(one.owner)


def test_draws_follow_from_seed_and_step():
    partner, share = Mixup(0.5, 3).draw(7, 6)
    again, same = Mixup(0.5, 3).draw(7, 6)
    assert np.array_equal(partner, again)
    assert share == same
    assert sorted(partner) == list(range(6))
    assert Mixup(0.5, 3).draw(8, 6)[1] != share
    assert Mixup(0.5, 4).draw(7, 6)[1] != share


def test_shares_are_beta_distributed():
    shares = np.array([Mixup(2.0, 0).draw(step, 2)[1] for step in range(2000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / 20, abs=0.005)  # of Beta(2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": -1.0}, "found mixup -1.0; expected 0"),
        ({"captions_per_image": 2}, "found mixup of pairs and 2 captions per image"),
        ({"text": TowerConfig(bags=("lemmas",))}, "mixup mixes vectors: empty the towers' parts and bags"),
        ({"image": TowerConfig(parts=("grid",))}, "mixup mixes vectors"),
        ({"objective": ObjectiveConfig(center=CenterConfig(weight=0.1))}, "neither one concept nor one caption"),
        (
            {"objective": ObjectiveConfig(hinge=HingeConfig(margin=MarginConfig(form="B")))},
            "neither one concept nor one caption",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(tiny_config, changes, message):
    towers = {name: changes.pop(name) for name in ("image", "text") if name in changes}
    config = replace(tiny_config, **{"mixup": 0.5, "model": replace(tiny_config.model, **towers), **changes})
    with pytest.raises(SettingsError, match=message):
        check_mixup(config)
    if "mixup" not in changes:
        check_mixup(replace(config, mixup=0.0))
