import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from featurize.checkpoints import quiet
from featurize.encoder import Output
from featurize.images import open_image_encoder

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
VISION = {**TINY, "image_size": 32, "patch_size": 8}
TEXT = {**TINY, "vocab_size": 99, "max_position_embeddings": 16}


@pytest.fixture(autouse=True)
def _same_random_weights_every_time():
    torch.manual_seed(0)


def saved(folder, model, processor):
    with quiet():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def squeeze(side=32):
    return ViTImageProcessor(size={"height": side, "width": side})


def photograph():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def both(folder, tower, processor):
    """The encoder's answer, and the library's own on its own pixel values."""
    encoder = open_image_encoder(f"transformers:{folder}", "float32")
    image = photograph()
    with torch.no_grad():
        theirs = tower.eval()(pixel_values=processor(image, return_tensors="pt")["pixel_values"])
    return encoder, encoder.encode(encoder.prepare(image)[None]), theirs


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_dinov2_drops_the_class_token_and_pools_with_it(tmp_path):
    config = transformers.Dinov2Config(**VISION)
    model, processor = transformers.Dinov2Model(config), BitImageProcessor(size={"shortest_edge": 36}, crop_size=32)
    encoder, ours, theirs = both(saved(tmp_path, model, processor), model, processor)
    assert encoder.card.name == "transformers:dinov2"
    assert encoder.card.outputs[:2] == (Output("grid", (16, 32)), Output("pooled", (32,)))
    close(ours["grid"], theirs.last_hidden_state[:, 1:])
    close(ours["pooled"], theirs.last_hidden_state[:, 0])


def test_pixels_are_normalised_only_where_the_processor_does(tmp_path):
    """MobileViT's has a mean and a deviation, and uses neither."""
    config = transformers.MobileViTConfig(
        hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], image_size=32, num_attention_heads=2
    )
    model, processor = transformers.MobileViTModel(config), MobileViTImageProcessor(size={"shortest_edge": 32})
    _, ours, theirs = both(saved(tmp_path, model, processor), model, processor)
    close(ours["pooled"], theirs.pooler_output)


def test_registers_are_dropped_too(tmp_path):
    config = transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)
    model, processor = transformers.Dinov2WithRegistersModel(config), squeeze()
    _, ours, theirs = both(saved(tmp_path, model, processor), model, processor)
    close(ours["grid"], theirs.last_hidden_state[:, 4:])
    assert ours["grid"].shape == (1, 16, 32)


def test_the_distillation_token_is_dropped_too(tmp_path):
    model, processor = transformers.DeiTModel(transformers.DeiTConfig(**VISION)), squeeze()
    _, ours, theirs = both(saved(tmp_path, model, processor), model, processor)
    close(ours["grid"], theirs.last_hidden_state[:, 2:])
    close(ours["pooled"], theirs.pooler_output)


def test_a_vit_with_a_pooling_layer(tmp_path):
    model, processor = transformers.ViTModel(transformers.ViTConfig(**VISION)), squeeze()
    _, ours, theirs = both(saved(tmp_path, model, processor), model, processor)
    close(ours["grid"], theirs.last_hidden_state[:, 1:])
    close(ours["pooled"], theirs.pooler_output)


def test_a_pooling_layer_without_weights_is_not_made_up(tmp_path):
    model, processor = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)), squeeze()
    folder = saved(tmp_path, model, processor)
    encoder, ours, theirs = both(folder, model.vit, processor)
    close(ours["pooled"], theirs.last_hidden_state[:, 0])
    assert open_image_encoder(f"transformers:{folder}", "float32").card == encoder.card


def clip(vision=VISION):
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16)
    return transformers.CLIPModel(config), CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)


def test_clips_image_tower(tmp_path):
    model, processor = clip()
    encoder, ours, theirs = both(saved(tmp_path, model, processor), model.vision_model, processor)
    assert encoder.card.name == "transformers:clip_vision_model"
    close(ours["grid"], theirs.last_hidden_state[:, 1:])
    close(ours["pooled"], theirs.pooler_output)  # before the projection to 16 dimensions


def test_a_tower_saved_alone_has_the_same_weights(tmp_path):
    model, processor = clip()
    whole = open_image_encoder(f"transformers:{saved(tmp_path / 'whole', model, processor)}")
    alone = open_image_encoder(f"transformers:{saved(tmp_path / 'alone', model.vision_model, processor)}")
    assert alone.card.weights == whole.card.weights


def test_siglips_image_tower_has_no_class_token(tmp_path):
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    model, processor = transformers.SiglipModel(config), SiglipImageProcessor(size={"height": 32, "width": 32})
    encoder, ours, theirs = both(saved(tmp_path, model, processor), model.vision_model, processor)
    assert encoder.card.name == "transformers:siglip_vision_model"
    close(ours["grid"], theirs.last_hidden_state)
    close(ours["pooled"], theirs.pooler_output)


def test_without_class_token_and_pooling_layer_the_mean_is_pooled(tmp_path):
    config = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    model, processor = transformers.SiglipVisionModel(config), squeeze()
    _, ours, theirs = both(saved(tmp_path, model, processor), model, processor)
    close(ours["pooled"], theirs.last_hidden_state.mean(1))


def test_swin_merges_its_patches(tmp_path):
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    model, processor = transformers.SwinModel(config), squeeze()
    encoder, ours, theirs = both(saved(tmp_path, model, processor), model, processor)
    assert encoder.card.outputs[0] == Output("grid", (64, 32))
    close(ours["grid"], theirs.last_hidden_state)
    close(ours["pooled"], theirs.pooler_output)


def test_a_convolutional_backbone_gives_its_map_row_by_row(tmp_path):
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    model, processor = transformers.ConvNextModel(config), ConvNextImageProcessor(size={"shortest_edge": 32})
    encoder, ours, theirs = both(saved(tmp_path, model, processor), model, processor)
    assert encoder.card.outputs[:2] == (Output("grid", (16, 16)), Output("pooled", (16,)))
    close(ours["grid"][0, 6], theirs.last_hidden_state[0, :, 1, 2])  # the third cell of the second row of four
    close(ours["pooled"], theirs.pooler_output)


def test_pooled_maps_are_flattened(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model, processor = transformers.ResNetModel(config), ConvNextImageProcessor(size={"shortest_edge": 32})
    _, ours, theirs = both(saved(tmp_path, model, processor), model, processor)
    assert theirs.pooler_output.shape == (1, 16, 1, 1)
    close(ours["pooled"], theirs.pooler_output[:, :, 0, 0])


@pytest.mark.parametrize(
    "options",
    [
        {"do_rescale": False, "image_mean": [100, 110, 120], "image_std": [50, 60, 70]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ],
)
def test_other_normalisations(tmp_path, options):
    model = transformers.ViTModel(transformers.ViTConfig(**VISION))
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, **options)
    _, ours, theirs = both(saved(tmp_path, model, processor), model, processor)
    close(ours["grid"], theirs.last_hidden_state[:, 1:])


def test_bfloat16_is_close_to_float32(tmp_path):
    folder = saved(tmp_path, *clip())
    answers = []
    for precision in ("float32", "bfloat16"):
        encoder = open_image_encoder(f"transformers:{folder}", precision)
        answers.append(encoder.encode(encoder.prepare(photograph())[None]))
    exact, fast = answers
    assert torch.cosine_similarity(exact["pooled"], fast["pooled"]).item() > 0.9999
    assert torch.cosine_similarity(exact["grid"], fast["grid"], dim=-1).min().item() > 0.9999
    assert fast["grid"].dtype == fast["pooled"].dtype == torch.float32


def test_an_extremely_long_image_costs_no_memory(tmp_path, monkeypatch):
    encoder = open_image_encoder(f"transformers:{saved(tmp_path, *clip())}")
    processor, sizes = encoder._preprocessing._processor, []

    def spy(image, **options):
        sizes.append(image.size)
        return processor(image, **options)

    monkeypatch.setattr(encoder._preprocessing, "_processor", spy)
    assert encoder.prepare(Image.new("L", (5_000, 1), 7)).unique().tolist() == [7]
    assert sizes == [(8, 1)]


def test_threads_prepare_the_same_pixels(tmp_path):
    encoder = open_image_encoder(f"transformers:{saved(tmp_path, *clip())}")
    images = [photograph().rotate(angle) for angle in range(0, 180, 10)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(encoder.prepare, images))
    assert all(torch.equal(encoder.prepare(image), pixels) for image, pixels in zip(images, together, strict=True))


def test_the_card_holds_processor_and_configuration(tmp_path):
    folder = saved(tmp_path, *clip())
    card = open_image_encoder(f"transformers:{folder}", "float32").card
    record = card.preprocessing
    assert json.loads(json.dumps(record)) == record
    assert record["processor"]["size"] == {"shortest_edge": 32}
    assert record["processor"]["image_processor_type"] == "CLIPImageProcessor"
    assert str(tmp_path) not in json.dumps(record)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "0.0.0"}))
    assert open_image_encoder(f"transformers:{folder}", "float32").card == card
    config["vision_config"]["num_attention_heads"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    changed = open_image_encoder(f"transformers:{folder}", "float32").card
    assert changed.weights == card.weights
    assert changed.preprocessing["config"] != record["config"]


def test_tokens_that_cannot_be_told_apart(tmp_path):
    config = transformers.YolosConfig(**{**VISION, "image_size": [32, 32]}, num_detection_tokens=5)
    folder = saved(tmp_path, transformers.YolosModel(config), squeeze())
    with pytest.raises(ValueError, match=r"YolosModel gives 22 tokens for 16 patches and 1 class, register or"):
        open_image_encoder(f"transformers:{folder}")


def test_tokens_of_unknown_patches(tmp_path):
    config = transformers.PvtConfig(image_size=32, depths=[1] * 4, hidden_sizes=[16] * 4, num_attention_heads=[1] * 4)
    folder = saved(tmp_path, transformers.PvtModel(config), squeeze())
    with pytest.raises(ValueError, match=r"the configuration of PvtModel names no patch_size"):
        open_image_encoder(f"transformers:{folder}")


def test_a_patch_size_of_two_numbers(tmp_path):
    model = transformers.ViTModel(transformers.ViTConfig(**{**VISION, "patch_size": [8, 16]}))
    encoder = open_image_encoder(f"transformers:{saved(tmp_path, model, squeeze())}")
    assert encoder.card.outputs[0] == Output("grid", (8, 32))


def test_a_processor_that_makes_patches(tmp_path):
    folder = saved(tmp_path, transformers.ViTModel(transformers.ViTConfig(**VISION)), Siglip2ImageProcessor())
    with pytest.raises(ValueError, match=r"Siglip2ImageProcessor makes torch.uint8 \(256, 768\) of an image; expected"):
        open_image_encoder(f"transformers:{folder}")


def test_a_processor_that_normalises_twice(tmp_path):
    folder = saved(tmp_path, transformers.ViTModel(transformers.ViTConfig(**VISION)), EfficientNetImageProcessor())
    with pytest.raises(ValueError, match=r"no image processor that can be used \(Input tensor should be a float"):
        open_image_encoder(f"transformers:{folder}")


def test_no_processor(tmp_path):
    with quiet():
        transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no image processor that can be used .* expected a preprocessor_config.json"):
        open_image_encoder(f"transformers:{tmp_path}")


def test_nothing_is_printed(tmp_path, capfd):
    folder = saved(tmp_path, transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)), squeeze())
    capfd.readouterr()
    open_image_encoder(f"transformers:{folder}")
    assert capfd.readouterr() == ("", "")
