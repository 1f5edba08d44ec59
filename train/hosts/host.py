"""What all hosts share: two towers, embeddings of both modalities, and a squared distance between them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from train.batches import Features
from train.config import ModelConfig, SettingsError
from train.embeddings import Distances, Embeddings, Erased
from train.losses.erasing import attended
from train.noise import Noise
from train.towers import Encoded, Tower


class Embedder(nn.Module):
    """What embeds images and captions, as evaluation and search see it.

    Attributes:
        indexable: whether an image is one vector whose distance to a caption's vector ranks it.
    """

    indexable: bool

    def embed_images(self, features: Features) -> Embeddings:
        """Embeddings of N images, float32."""
        raise NotImplementedError

    def embed_texts(self, features: Features) -> Embeddings:
        """Embeddings of N captions, float32."""
        raise NotImplementedError

    def mean_of_views(self, views: Sequence[Embeddings]) -> Embeddings:
        """One embedding of images from those of their views."""
        raise NotImplementedError

    def distances(self, image: Embeddings, text: Embeddings) -> Tensor:
        """Squared distances (N, M) of N images to M captions; -d² is the score."""
        raise NotImplementedError

    def index_vectors(self, embeddings: Embeddings) -> Tensor:
        """The vectors (N, E') that are indexed and measured, of an indexable host; squared distances rank."""
        raise NotImplementedError

    def require_index(self) -> None:
        """Refuse a host without vectors.

        Raises:
            SettingsError: the host compares parts.
        """
        if not self.indexable:
            raise SettingsError(
                "this model compares every query with the parts of every image (model.host scan), so there is no "
                "vector to index or to search; take a run whose model.host is vse"
            )


class Host(Embedder):
    """Two towers that meet, as training sees them.

    Attributes:
        config: of the model.
        image: tower of images.
        text: tower of captions.
    """

    image: Tower
    text: Tower

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def finish_images(self, encoded: Encoded, mask: Tensor | None = None) -> Embeddings:
        """Embeddings from what the image tower encoded; of the parts in `mask` (N, K) only, if one is given."""
        raise NotImplementedError

    def finish_texts(self, encoded: Encoded, mask: Tensor | None = None) -> Embeddings:
        """Embeddings from what `encode_texts` gave; of the parts in `mask` (N, K) only, if one is given."""
        raise NotImplementedError

    def spaces(self) -> list[Distances]:
        """Distances that the ranking loss is a mean over; `distances` is their mean."""
        return [self.distances]

    def require_guidance(self) -> None:
        """Refuse, before a step is taken, erasing that nothing here can guide.

        Raises:
            SettingsError: a modality has no parts that `guidance` could attend to.
        """

    def guidance(self, image: Encoded, text: Encoded, embedded: tuple[Embeddings, Embeddings]) -> tuple[Tensor, Tensor]:
        """Attention of each pair's caption over the image's parts (B, K), and of its image over the words (B, L).

        Args:
            image: B encoded images.
            text: their B encoded captions.
            embedded: the embeddings of both.
        """
        raise NotImplementedError

    def encode_texts(self, features: Features, noise: Noise | None = None) -> Encoded:
        """N captions before they are pooled or compared; `noise` only while training."""
        return self.text.encode(features, noise)

    def embed_images(self, features: Features, noise: Noise | None = None) -> Embeddings:
        """See `Embedder.embed_images`; `noise` only while training."""
        return self.finish_images(self.image.encode(features, noise))

    def embed_texts(self, features: Features, noise: Noise | None = None) -> Embeddings:
        """See `Embedder.embed_texts`; `noise` only while training."""
        return self.finish_texts(self.encode_texts(features, noise))

    def forward(
        self,
        image: Features,
        text: Features,
        owner: Tensor,
        noise: tuple[Noise, Noise] | None = None,
        keep: float | None = None,
    ) -> tuple[Embeddings, Embeddings, Erased | None]:
        """Embeddings of a batch, and erased views of its pairs.

        Args:
            image: G images.
            text: B captions.
            owner: (B,) which of the images each caption belongs to.
            noise: for images, for captions; only while training.
            keep: threshold γ of erasing; None: nothing is erased.

        Returns:
            G images, B captions, and the erased views of B pairs or None.
        """
        image_noise, text_noise = noise or (None, None)
        images, texts = self.image.encode(image, image_noise), self.encode_texts(text, text_noise)
        embedded = self.finish_images(images), self.finish_texts(texts)
        if keep is None:
            return *embedded, None
        images = images[owner]
        with torch.no_grad():
            over_parts, over_words = self.guidance(images, texts, (embedded[0][owner], embedded[1]))
            parts, words = attended(over_parts, images.mask, keep), attended(over_words, texts.mask, keep)
            other_parts, other_words = images.mask & ~parts, texts.mask & ~words
        erased = Erased(
            self.finish_images(images, parts),
            self.finish_images(images, other_parts),
            self.finish_texts(texts, words),
            self.finish_texts(texts, other_words),
            other_parts.any(1),
            other_words.any(1),
        )
        return *embedded, erased

    def fit_inputs(self, image: Features, text: Features) -> None:
        """Take statistics of training rows of both modalities."""
        self.image.fit_inputs(image)
        self.text.fit_inputs(text)
