"""Several trained models as one: their vectors stand side by side in one index."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from train.batches import Features
from train.config import SettingsError
from train.embeddings import Embeddings
from train.hosts.host import Embedder, Host
from train.losses.distances import squared_distances


class Ensemble(Embedder):
    """Members that read the same columns; the squared distance is the mean of theirs.

    Of members with unit vectors the joined vector is a unit vector too. The members' embeddings stand side by side in
    `Embeddings.vector` and `Embeddings.local` until `index_vectors` makes the joined vector of them.

    Args:
        members: trained hosts with vectors.

    Raises:
        SettingsError: there is no member, or one compares parts.
    """

    indexable = True

    def __init__(self, members: Sequence[Host]) -> None:
        super().__init__()
        if not members:
            raise SettingsError("an ensemble needs at least one model, found none")
        for member in members:
            member.require_index()
        self.members = nn.ModuleList(members)

    def _hosts(self) -> Iterator[Host]:
        for member in self.members:
            assert isinstance(member, Host)
            yield member

    def embed_images(self, features: Features) -> Embeddings:
        """See `Embedder.embed_images`."""
        return _side_by_side([host.embed_images(features) for host in self._hosts()])

    def embed_texts(self, features: Features) -> Embeddings:
        """See `Embedder.embed_texts`."""
        return _side_by_side([host.embed_texts(features) for host in self._hosts()])

    def _of_members(self, embeddings: Embeddings) -> Iterator[tuple[Host, Embeddings]]:
        vector = local = 0  # where the next member's begin
        for host in self._hosts():
            vector_end, local_end = vector + host.config.dim, local + host.config.local.dim
            yield host, Embeddings.of(embeddings.vector[:, vector:vector_end], embeddings.local[:, local:local_end])
            vector, local = vector_end, local_end

    def mean_of_views(self, views: Sequence[Embeddings]) -> Embeddings:
        """Each member's own mean; see `Embedder.mean_of_views`."""
        by_member = zip(*(self._of_members(view) for view in views), strict=True)
        return _side_by_side([seen[0][0].mean_of_views([own for _, own in seen]) for seen in by_member])

    def index_vectors(self, embeddings: Embeddings) -> Tensor:
        """The members' index vectors side by side, divided by the root of their number: (N, sum of E')."""
        vectors = [host.index_vectors(own) for host, own in self._of_members(embeddings)]
        return torch.cat(vectors, 1) / math.sqrt(len(vectors))

    def distances(self, image: Embeddings, text: Embeddings) -> Tensor:
        """Squared distances (N, M) of the joined vectors."""
        return squared_distances(self.index_vectors(image), self.index_vectors(text))


def _side_by_side(embeddings: Sequence[Embeddings]) -> Embeddings:
    return Embeddings.of(torch.cat([e.vector for e in embeddings], 1), torch.cat([e.local for e in embeddings], 1))
