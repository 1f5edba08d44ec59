"""Product codes as they are searched: queries stay float, items are codes of S bytes (LESS 2, form B).

The distance of a query to an item is that to the embedding which the item's code stands for, "asymmetric" in Jégou et
al., Product Quantization for Nearest Neighbor Search, TPAMI 2011, section III-A: a sum over sub-spaces of numbers that
are looked up in a table made once for each query.

    codebook = open_codebook(run / "model")  # fitted to index vectors of the training split when training had ended
    codes = encode(codebook, images)
    distances, rows = search_codes(codebook, captions, codes, k=10)
    faiss.write_index(to_faiss(codebook, codes), "images.faiss")

Legend: Q queries, N items, E dimensions, S sub-spaces, M codewords in each.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from evaluate.metrics import Report
from evaluate.protocols import evaluate_full, rank_against
from evaluate.ranks import EvaluationError, Ranks, check_embeddings
from featurize.places import publish
from train.config import QuantizationConfig, SettingsError
from train.quantize import ProductCodebook

if TYPE_CHECKING:
    import faiss

BYTE = 256
TILE = 4096
SAMPLE = 16384
"""Embeddings of each modality that a codebook is fitted to, at most."""
CODEBOOK_FILE = "codebook.safetensors"
"""In a run's `model/`: the codebook, where the run learned codes."""


def check_codes(config: QuantizationConfig, dim: int, count: int) -> None:
    """Refuse, before anything is learned, what cannot be fitted or stored afterwards.

    Args:
        config: of the run; its sub-spaces and codewords.
        dim: E, dimensions of the vectors that are indexed.
        count: embeddings that there are to fit a codebook to, of both modalities.

    Raises:
        SettingsError: E cannot be cut into sub-spaces, a byte cannot name every codeword, or there are fewer embeddings
            than codewords.
    """
    if config.subspaces < 1 or dim % config.subspaces:
        raise SettingsError(
            f"found {config.subspaces} sub-spaces for index vectors of {dim} dimensions (model.dim and, with a local "
            "space, model.local.dim); expected a divisor: change --train.objective.quantization.subspaces or the "
            "dimensions"
        )
    if config.codewords > BYTE:
        raise SettingsError(
            f"found {config.codewords} codewords in a sub-space; expected at most {BYTE}, which one byte can name: "
            "lower --train.objective.quantization.codewords"
        )
    if count < config.codewords:
        raise SettingsError(
            f"found {count} embeddings of the training split for {config.codewords} codewords in a sub-space; lower "
            "--train.objective.quantization.codewords, set --train.objective.quantization.weight 0 (no codes), or "
            "train on more data"
        )


def fit_codebook(config: QuantizationConfig, images: Tensor, captions: Tensor) -> ProductCodebook:
    """The codebook of a trained model: the procedure that began training on codes, on the kept model's embeddings.

    The model that is kept is an average over training, of its best epoch, and sees features without dropout; the
    codebook of the loss belongs to the last epoch's weights. See docs/decisions/0006.

    Args:
        config: of the run; its sub-spaces and codewords.
        images: (N, E) embeddings of training images.
        captions: (M, E) embeddings of training captions.

    Raises:
        SettingsError: what `check_codes` refuses.
    """
    check_codes(config, images.shape[1], len(images) + len(captions))
    codebook = ProductCodebook(images.shape[1], config.subspaces, config.codewords)
    codebook.initialise(fitting_sample(images, captions))
    return codebook


def fitting_sample(images: Tensor, captions: Tensor) -> Tensor:
    """What a codebook is fitted to: at most SAMPLE rows (n, E) of each modality, evenly spread."""
    return torch.cat([_spread(images), _spread(captions)])


def _spread(embeddings: Tensor) -> Tensor:
    count = min(len(embeddings), SAMPLE)
    return embeddings[torch.arange(count, device=embeddings.device) * len(embeddings) // count]


def save_codebook(codebook: ProductCodebook, folder: Path) -> None:
    """Write the codebook beside a model's weights, as `codebook.safetensors`, whole or not at all."""
    publish(folder / CODEBOOK_FILE, save({name: value.contiguous() for name, value in codebook.state_dict().items()}))


def open_codebook(folder: Path) -> ProductCodebook:
    """The codebook that was saved beside a model.

    Raises:
        EvaluationError: there is none that can be read.
    """
    try:
        state = load_file(folder / CODEBOOK_FILE)
        subspaces, codewords, width = state["codewords"].shape
        codebook = ProductCodebook(subspaces * width, subspaces, codewords)
        codebook.load_state_dict(state)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise EvaluationError(
            f"{folder / CODEBOOK_FILE}: no codebook ({error}); train with objective.quantization.weight above 0, or "
            "fit one"
        ) from error
    return codebook


def encode(codebook: ProductCodebook, embeddings: Tensor) -> Tensor:
    """The codes (N, S) uint8 of embeddings (N, E): in each sub-space, the number of the nearest codeword.

    Args:
        codebook: with at most 256 codewords in each sub-space.
        embeddings: (N, E).

    Raises:
        EvaluationError: the codebook has more codewords than a byte can name, or the shape does not fit.
    """
    subspaces, codewords, width = codebook.codewords.shape
    if codewords > BYTE:
        raise EvaluationError(f"found {codewords} codewords in a sub-space; expected at most {BYTE}, one byte's worth")
    if embeddings.ndim != 2 or embeddings.shape[1] != subspaces * width:
        raise EvaluationError(
            f"found embeddings of shape {tuple(embeddings.shape)}; the codebook expects (N, {subspaces * width})"
        )
    return codebook.encode(embeddings).to(torch.uint8)


def lookup_tables(codebook: ProductCodebook, queries: Tensor) -> Tensor:
    """Squared distances (S, Q, M) of each query's pieces to the codewords.

    Args:
        codebook: the items'.
        queries: (Q, E).
    """
    pieces = codebook.pieces(queries)  # (S, Q, E/S)
    return torch.cdist(pieces, codebook.codewords, compute_mode="donot_use_mm_for_euclid_dist").square()


def search_codes(
    codebook: ProductCodebook, queries: Tensor, codes: Tensor, k: int, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """Finds each query's k nearest coded items, nearest first; of equally near items the lower row comes first.

    Args:
        codebook: the items'.
        queries: (Q, E).
        codes: (N, S) uint8, from `encode`.
        k: items wanted for each query; all of them where there are fewer.
        tile: items that are scored at once; memory grows with Q · (S · M + tile).

    Returns:
        Squared distances (Q, k) to the decoded items, and rows (Q, k) int64.

    Raises:
        EvaluationError: k or tile is below 1, or the codes have another number of sub-spaces.
    """
    subspaces = len(codebook.codewords)
    if k < 1 or tile < 1 or codes.ndim != 2 or codes.shape[1] != subspaces:
        raise EvaluationError(
            f"found k = {k}, tile = {tile} and codes of shape {tuple(codes.shape)}; expected k and tile of at least 1 "
            f"and codes of shape (N, {subspaces})"
        )
    tables = lookup_tables(codebook, queries)  # (S, Q, M)
    best = tables.new_empty(len(queries), 0)
    rows = codes.new_empty(len(queries), 0, dtype=torch.int64)
    for first in range(0, len(codes), tile):
        some = codes[first : first + tile].long()  # (n, S)
        scores = tables.new_zeros(len(queries), len(some))
        for subspace, table in enumerate(tables):
            scores += table[:, some[:, subspace]]
        numbers = torch.arange(first, first + len(some), device=rows.device).expand(len(queries), -1)
        best, order = torch.cat((best, scores), 1).sort(dim=1, stable=True)
        rows = torch.cat((rows, numbers), 1).gather(1, order)[:, :k]
        best = best[:, :k]
    return best, rows


def evaluate_codes(
    codebook: ProductCodebook, images: Tensor, captions: Tensor, caption_image: Tensor, *, split: str, tile: int = 1024
) -> Report:
    """Measures both directions with coded items: images look for codes of captions, captions for codes of images.

    Args:
        codebook: of both modalities.
        images: (N, E) embeddings.
        captions: (M, E) embeddings.
        caption_image: (M,) int64, row of the image that each caption belongs to; each image has at least one.
        split: its name, for the report.
        tile: rows that are scored at once; memory grows with its square.

    Returns:
        The report of the full split; R@k and rSum are those of a search in codes.

    Raises:
        EvaluationError: what `encode` and `evaluate.ranks.rank_relevant` refuse.
    """
    return evaluate_full(
        images, captions, caption_image, split=split, tile=tile, rank=partial(rank_codes, codebook=codebook)
    )


def rank_codes(
    images: Tensor, captions: Tensor, caption_image: Tensor, tile: int, *, codebook: ProductCodebook
) -> tuple[Ranks, Ranks]:
    """Ranks by the squared distance of float queries to decoded items, see `evaluate.protocols.Rank`.

    Raises:
        EvaluationError: what `encode` and `evaluate.ranks.rank_relevant` refuse.
    """
    check_embeddings("images", images)
    check_embeddings("captions", captions)
    decoded = codebook.decode(encode(codebook, images)), codebook.decode(encode(codebook, captions))
    return rank_against((images, captions), decoded, caption_image, tile)


def to_faiss(codebook: ProductCodebook, codes: Tensor) -> "faiss.IndexPreTransform":
    """The same search by FAISS: the rotation as a linear transform, the codewords as a product quantizer, L2.

    What is added to the index later is coded with the same codewords. Save it with `faiss.write_index`.

    Args:
        codebook: of 256 codewords in each sub-space.
        codes: (N, S) uint8 of the items, in the order of their numbers; N may be 0.

    Raises:
        EvaluationError: faiss is not installed, or a piece of a code is not a whole byte.
    """
    try:
        import faiss
    except ImportError as error:
        raise EvaluationError(
            "codes are exported through faiss, which is not installed: pip install faiss-cpu"
        ) from error
    subspaces, codewords, width = codebook.codewords.shape
    if codewords != BYTE:
        raise EvaluationError(
            f"found {codewords} codewords in a sub-space; expected {BYTE} to export codes of whole bytes"
        )
    dim = subspaces * width
    rotation = faiss.LinearTransform(dim, dim, False)
    faiss.copy_array_to_vector(codebook.rotation.T.contiguous().cpu().numpy().ravel(), rotation.A)
    rotation.is_trained = True
    coded = faiss.IndexPQ(dim, subspaces, 8)
    faiss.copy_array_to_vector(codebook.codewords.cpu().numpy().ravel(), coded.pq.centroids)
    coded.is_trained = True
    faiss.copy_array_to_vector(codes.cpu().numpy().ravel(), coded.codes)
    coded.ntotal = len(codes)
    return faiss.IndexPreTransform(rotation, coded)
