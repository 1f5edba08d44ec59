"""What a classifier sees, said in words: names of its classes as sentence vectors, weighted by their probabilities.

ConSE: Norouzi et al., Zero-Shot Learning by Convex Combination of Semantic Embeddings, ICLR 2014. There the words are
of word2vec and the most probable classes take part; here they are MiniLM sentences and every class does.
"""

import functools
from collections.abc import Mapping

import torch
import torchvision.models
from torch import Tensor, nn

from featurize.encoder import JSON
from featurize.texts import open_text_encoder

_TEMPLATE = "a photo of a {}"
_TEMPERATURES = (1.0, 2.0)


class ClassNames(nn.Module):
    """A classifier's answer as a mean of its classes' sentence vectors, once for each temperature, side by side.

    Args:
        classifier: from pooled features (B, D) to the logits of the 1,000 classes of ImageNet, in their usual order.

    Attributes:
        ingredients: what could change the answer, beside the classifier's weights; for the encoder's card.
    """

    ingredients: Mapping[str, JSON]
    vectors: Tensor

    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__()
        self.classifier = classifier
        vectors, text = _imagenet_names()
        self.register_buffer("vectors", vectors.clone(), persistent=False)
        self.ingredients = {"names": _TEMPLATE, "temperatures": list(_TEMPERATURES), "text": text}

    def forward(self, pooled: Tensor) -> Tensor:
        """From (B, D) to (B, 2 · 384) float32."""
        with torch.autocast(pooled.device.type, enabled=False):
            logits = pooled.float() @ self.classifier.weight.float().T
            if self.classifier.bias is not None:
                logits = logits + self.classifier.bias.float()
            means = [(logits / temperature).softmax(1) @ self.vectors for temperature in _TEMPERATURES]
        return torch.cat(means, 1)


@functools.cache
def _imagenet_names() -> tuple[Tensor, JSON]:
    """Vectors (1000, 384) of ImageNet's class names less their mean, and the card of what made them."""
    encoder = open_text_encoder("minilm", "float32")
    names = torchvision.models.EfficientNet_B0_Weights.DEFAULT.meta["categories"]
    rows = encoder.prepare([_TEMPLATE.format(name) for name in names])
    sentences = torch.cat([torch.as_tensor(encoder.encode(rows[i : i + 100])["sentence"]) for i in range(0, 1000, 100)])
    return sentences - sentences.mean(0), {"name": encoder.card.name, "weights": encoder.card.weights}
