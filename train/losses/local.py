"""Local loss: local embeddings of images and captions are as similar as the words that describe them (HIER).

With r the idf-weighted Jaccard similarity of the images' words, and l the unit local embeddings,

    L = ½ Σ over both directions of mean_i KL(softmax_j(r_ij / τ') ‖ softmax_j(l_i·l_j / τ)) + labels_weight · L_words

Pairs of one image have the same words, so they count as what they are: r = 1, also where there is no word. L_words is
the binary cross-entropy of telling each word from l by one linear layer that both modalities share, averaged over
words.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import LocalLossConfig, SettingsError
from train.lexicon import jaccard

PRIOR = 0.01  # an image's chance to have a word, before anything is learned (Lin et al., ICCV 2017, section 4.1)


class LocalLoss(nn.Module):
    """Holds the words' weights and the layer that tells words from local embeddings.

    Args:
        config: temperatures and weights; the term's own weight belongs to the objective.
        local_dim: L.
        vocabulary: V, number of words.

    Raises:
        SettingsError: without a local space or words, on a temperature that is not above 0 or a negative weight.
    """

    idf: Tensor

    def __init__(self, config: LocalLossConfig, local_dim: int, vocabulary: int) -> None:
        super().__init__()
        if local_dim < 1:
            raise SettingsError("the local loss needs a local space: set --train.model.local.dim above 0")
        if vocabulary < 1:
            raise SettingsError(
                "the local loss found no content words in the training captions; check their language, or set "
                "--train.objective.local.weight 0"
            )
        if min(config.tau, config.tau_labels) <= 0:
            raise SettingsError(
                f"found tau {config.tau} and tau_labels {config.tau_labels} of the local loss; expected both above 0"
            )
        if config.labels_weight < 0:
            raise SettingsError(f"found labels_weight {config.labels_weight}; expected 0 (not built) or more")
        self.config = config
        self.register_buffer("idf", torch.ones(vocabulary))
        self.words: nn.Linear | None = None
        if config.labels_weight:
            self.words = nn.Linear(local_dim, vocabulary)
            # From chances of a half, training would long do little but learn that most words are absent.
            nn.init.constant_(self.words.bias, math.log(PRIOR / (1 - PRIOR)))

    def fit(self, idf: Tensor) -> None:
        """Take the words' weights; until then all weigh the same.

        Args:
            idf: (V,) inverse document frequency of each word.
        """
        self.idf.copy_(idf)

    def forward(
        self, image: Tensor, text: Tensor, labels: Tensor, image_ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; see the file's docstring.

        Args:
            image: (B, L) unit local embeddings.
            text: (B, L) the same of the captions.
            labels: (B, V) uint8, 1 where the captions of a pair's image use a word.
            image_ids: (B,) int64.

        Returns:
            A scalar, at least 0, and its parts before their weights: `similarity` and, where it is built, `words`;
            scalars without gradient.
        """
        with torch.autocast(image.device.type, enabled=False):
            image, text = image.float(), text.float()
            wordless = (image_ids[:, None] == image_ids) & (labels == 0).all(1)  # (B, B) of one image
            similar = jaccard(labels, self.idf).masked_fill(wordless, 1.0)
            target = (similar / self.config.tau_labels).log_softmax(1)  # (B, B)
            logits = image @ text.T / self.config.tau  # (B, B)
            similarity = 0.5 * (_divergence(target, logits) + _divergence(target, logits.T))
            if self.words is None:
                return similarity, {"similarity": similarity.detach()}
            told = self.words(torch.cat((image, text)))  # (2B, V)
            words = F.binary_cross_entropy_with_logits(told, torch.cat((labels, labels)).float())
            total = similarity + self.config.labels_weight * words
            return total, {"similarity": similarity.detach(), "words": words.detach()}


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean over rows of KL(target ‖ softmax(logits)); target (B, B) is given as logarithms."""
    return F.kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)
