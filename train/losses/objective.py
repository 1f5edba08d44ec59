"""The objective: a ranking term and, each switchable, erasing, center, quantization and local losses (LESS 5).

It sees the global batch and knows nothing of workers. All that learns, averages or remembers by itself (margin, bank,
centres, codebook, temperature, log-variances) is a parameter or buffer here, so `state_dict()` is the whole of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from train.config import ObjectiveConfig, SettingsError
from train.embeddings import Distances, Embeddings, Pairs
from train.losses.center import CenterLoss
from train.losses.distances import Rank, both_directions, masked_mean, mean_distances, negative_pairs
from train.losses.erasing import erasing
from train.losses.hinge import HingeLoss
from train.losses.infonce import InfoNCELoss
from train.losses.local import LocalLoss
from train.losses.quantization import QuantizationLoss, Quantized
from train.losses.siglip import SigLIPLoss
from train.losses.uncertainty import UncertaintyWeights
from train.memory import EmbeddingShape, MemoryBank

RankingLoss = HingeLoss | InfoNCELoss | SigLIPLoss


class Objective(nn.Module):
    """What is minimised.

    With a memory bank the ranking term is (1 - share) · the batch's own loss + share · the loss against keys. With
    rank_codes it is (1 - rank_codes) · that + rank_codes · the loss of images against decoded codes of captions and of
    captions against those of images, as soon as there is a codebook. A term of weight 0 is not built: it has no
    parameters, no buffers and no logged values. In training mode each call moves the margin's average, the centres and
    the codewords and enqueues the batch's keys, once each; in evaluation mode none of them moves.

    Args:
        config: which terms, and their settings.
        image: shape of the images' embeddings.
        text: shape of the captions' embeddings.
        concepts: C, concepts of the training split; `Pairs.concepts` are 0 to C-1.
        vocabulary: V, words that `Pairs.labels` tell of; read by the local loss only.

    Raises:
        SettingsError: on settings without a meaning, and on terms that do not fit each other or the host.
    """

    def __init__(
        self, config: ObjectiveConfig, image: EmbeddingShape, text: EmbeddingShape, concepts: int, vocabulary: int = 0
    ) -> None:
        super().__init__()
        weights = {
            "erasing": config.erasing.weight,
            "center": config.center.weight,
            "quantization": config.quantization.weight,
            "local": config.local.weight,
        }
        _check(config, weights, image)
        self.config = config
        self.ranking = _ranking(config)
        self.bank = MemoryBank(config.bank.size, image, text) if config.bank.size else None
        self.center = CenterLoss(config.center, image.vector, concepts) if config.center.weight else None
        self.quantization = QuantizationLoss(config.quantization, image.vector) if config.quantization.weight else None
        self.local = LocalLoss(config.local, image.local, vocabulary) if config.local.weight else None
        self.lambdas = {config.ranking: 1.0} | {name: value for name, value in weights.items() if value}
        self.uncertainty = UncertaintyWeights(self.lambdas) if config.weighting == "uncertainty" else None

    def forward(self, pairs: Pairs, progress: float, spaces: Sequence[Distances]) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and its parts.

        Args:
            pairs: the global batch.
            progress: share of training done, 0 to 1.
            spaces: the host's; ranking and erasing are means over them.

        Returns:
            The scalar to minimise, and scalars without gradient to log: `loss/<term>` before weighting, `margin` (mean
            over negatives), `distance/positive`, `distance/negative`, their difference `gap`; with InfoNCE and SigLIP
            `temperature`, with SigLIP `bias`; with a bank `loss/<ranking>/batch`, `loss/<ranking>/bank` and
            `bank/filled` (keys that the batch was compared with, besides its own); of terms with parts
            `loss/<term>/<part>`; with a codebook, once it is made, `codebook/perplexity` and, where codes are ranked,
            `loss/<ranking>/codes`; with learned weights `weight/<term>`.

        Raises:
            ValueError: there is a bank and the pairs have no keys, or an erasing term and they have no erased views.
        """
        with torch.autocast(pairs.image.vector.device.type, enabled=False):
            return self._forward(_wide(pairs), progress, spaces)

    def _forward(self, pairs: Pairs, progress: float, spaces: Sequence[Distances]) -> tuple[Tensor, dict[str, Tensor]]:
        image, text = pairs.image, pairs.text
        terms: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        if self.center is not None:
            terms["center"] = self.center(image.vector, text.vector, pairs.concepts)
        if self.local is not None:
            terms["local"], parts = self.local(image.local, text.local, pairs.labels, pairs.image_ids)
            logs |= _named("local", parts)
        found: Quantized | None = None
        if self.quantization is not None:
            found = self.quantization(image.vector, text.vector, progress)
            if found is not None:
                terms["quantization"] = found.loss
                logs |= _named("quantization", found.terms) | {"codebook/perplexity": found.perplexity}

        squared = [distances(image, text) for distances in spaces]  # (B, B) each
        whole = torch.stack(squared).mean(0).detach() if len(spaces) > 1 else squared[0].detach()
        negatives = negative_pairs(pairs.image_ids, pairs.mixed_ids)  # (B, B)
        margin = self.ranking.margin(whole, negatives, pairs.semantic)  # the one time in this step: it moves
        ranked = [
            self._ranked(pairs, found, self._rank(progress), distances, own, negatives, margin)
            for distances, own in zip(spaces, squared, strict=True)
        ]
        means = {name: torch.stack([one[name] for one in ranked]).mean(0) for name in ranked[0]}
        terms |= {name: means.pop(name) for name in (self.config.ranking, "erasing") if name in means}
        logs |= {f"loss/{name}": value.detach() for name, value in means.items()}
        if self.bank is not None:
            logs["bank/filled"] = torch.tensor(float(self.bank.filled))
            if self.training:
                self.bank.enqueue(*_keys(pairs), pairs.image_ids, pairs.mixed_ids)

        positive, negative = mean_distances(whole, negatives)
        logs |= {"distance/positive": positive, "distance/negative": negative, "gap": negative - positive}
        logs["margin"] = masked_mean(margin.expand_as(whole), negatives)
        if not isinstance(self.ranking, HingeLoss):
            logs |= self.ranking.learned()
        logs |= {f"loss/{name}": value.detach() for name, value in terms.items()}
        return self._total(terms, logs), logs

    def _ranked(
        self,
        pairs: Pairs,
        found: Quantized | None,
        rank: Rank,
        distances: Distances,
        squared: Tensor,
        negatives: Tensor,
        margin: Tensor,
    ) -> dict[str, Tensor]:
        """Ranking and erasing in one space, and what they are made of.

        Args:
            pairs: the global batch.
            found: what quantization found, if it did.
            rank: the ranking loss.
            distances: of the space.
            squared: (B, B) those of the pairs.
            negatives: (B, B) bool.
            margin: a scalar or (B, B).
        """
        image, text, name = pairs.image, pairs.text, self.config.ranking
        ranking = both_directions(rank, squared, negatives, margin)
        parts: dict[str, Tensor] = {}
        if self.bank is not None:
            to_texts, to_images = self.bank.compare(image, text, *_keys(pairs), distances)  # (B, B + F) each
            others = torch.cat((negatives, self.bank.negatives(pairs.image_ids, pairs.mixed_ids)), 1)
            remembered = _pairs_first(rank, to_texts, others, margin) + _pairs_first(rank, to_images, others, margin)
            parts |= {f"{name}/batch": ranking, f"{name}/bank": remembered}
            share = self.config.bank.share
            ranking = (1 - share) * ranking + share * remembered
        if found is not None and found.image is not None and found.text is not None:
            to_texts = distances(image, replace(text, vector=found.text))  # (B, B)
            to_images = distances(replace(image, vector=found.image), text).T
            coded = rank(to_texts.diagonal(), to_texts, negatives, margin)
            coded = coded + rank(to_images.diagonal(), to_images, negatives.T, margin.t())
            parts[f"{name}/codes"] = coded
            share = self.config.quantization.rank_codes
            ranking = (1 - share) * ranking + share * coded
        parts[name] = ranking
        if self.config.erasing.weight:
            if pairs.erased is None:
                raise ValueError("found pairs without erased views; the erasing loss expects them from the host")
            parts["erasing"], kinds = erasing(
                image,
                text,
                pairs.erased,
                distances,
                lambda views: both_directions(rank, views, negatives, margin),
                squared.diagonal(),
                self.config.erasing.irrelevant,
            )
            parts |= {f"erasing/{kind}": value for kind, value in kinds.items()}
        return parts

    def _rank(self, progress: float) -> Rank:
        if isinstance(self.ranking, HingeLoss):
            return partial(self.ranking, progress=progress)
        return self.ranking

    def _total(self, terms: Mapping[str, Tensor], logs: dict[str, Tensor]) -> Tensor:
        if self.uncertainty is None:
            return torch.stack([self.lambdas[name] * value for name, value in terms.items()]).sum()
        logs |= {f"weight/{name}": value for name, value in self.uncertainty.weights().items()}
        total: Tensor = self.uncertainty(terms)
        return total


def _ranking(config: ObjectiveConfig) -> RankingLoss:
    match config.ranking:
        case "hinge":
            return HingeLoss(config.hinge)
        case "infonce":
            return InfoNCELoss(config.infonce)
        case "siglip":
            return SigLIPLoss(config.siglip)


def _check(config: ObjectiveConfig, weights: Mapping[str, float], image: EmbeddingShape) -> None:
    """Refuse what has no meaning.

    Raises:
        SettingsError: what was found, what was expected.
    """
    for name, value in weights.items():
        if value < 0:
            raise SettingsError(f"found weight {value} of the {name} loss; expected 0 (not built) or more")
        if value and name in ("center", "quantization") and not image.vector:
            raise SettingsError(
                f"the {name} loss works on embedding vectors, and this host compares parts and has none; set its "
                "weight to 0, or choose the host vse"
            )
    if config.quantization.rank_codes and not config.quantization.weight:
        raise SettingsError("rank_codes needs the codebook; give the quantization loss a weight above 0")
    erased, bank = config.erasing, config.bank
    if min(erased.keep, erased.irrelevant) < 0:
        raise SettingsError(f"found erasing keep {erased.keep} and irrelevant {erased.irrelevant}; expected 0 or more")
    if bank.size < 0 or not 0 <= bank.momentum < 1 or not 0 < bank.share <= 1:
        raise SettingsError(
            f"found a memory bank of size {bank.size}, momentum {bank.momentum} and share {bank.share}; expected "
            "a size of 0 (no bank) or more, 0 <= momentum < 1, 0 < share <= 1"
        )
    if bank.size and config.margin.form in ("B", "C"):
        raise SettingsError(
            f"margin form {config.margin.form} compares captions, and the memory bank does not keep them; choose form "
            "fixed or A, or bank size 0"
        )


def _keys(pairs: Pairs) -> tuple[Embeddings, Embeddings]:
    if pairs.keys is None:
        raise ValueError("found pairs without keys; the memory bank expects them from the momentum network")
    return pairs.keys


def _wide(pairs: Pairs) -> Pairs:
    """All embeddings in float32, masks as they are."""

    def widened(embeddings: Embeddings) -> Embeddings:
        return embeddings.map(lambda x: x.float() if x.is_floating_point() else x)

    erased = pairs.erased
    if erased is not None:
        erased = replace(
            erased,
            image_kept=widened(erased.image_kept),
            image_dropped=widened(erased.image_dropped),
            text_kept=widened(erased.text_kept),
            text_dropped=widened(erased.text_dropped),
        )
    keys = None if pairs.keys is None else (widened(pairs.keys[0]), widened(pairs.keys[1]))
    return replace(pairs, image=widened(pairs.image), text=widened(pairs.text), keys=keys, erased=erased)


def _pairs_first(rank: Rank, distances: Tensor, negatives: Tensor, margin: Tensor) -> Tensor:
    """Rank candidates (B, N) of which the first B are the anchors' partners, on the diagonal."""
    return rank(distances.diagonal(), distances, negatives, margin)


def _named(term: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"loss/{term}/{name}": value for name, value in parts.items()}
