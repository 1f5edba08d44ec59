"""What codes keep of the rSum: those of runs trained for them against FAISS PQ and OPQ and PCA-dealt PQ, fitted later.

    python benchmarks/codes.py RUN [RUN ...] --coded CODED_RUN [CODED_RUN ...] --split val

Each RUN was trained without codes: its own rSum and that of every quantizer fitted to its training embeddings at 16, 32
and 64 bytes. Each CODED_RUN was trained with `objective.quantization`: `fit_codebook` at its own bytes. Queries stay
float, items are codes, both directions. Shown are means over the runs, their share of the float score of those without
codes, and the lowest and highest. Fitted quantizers see what `fit_codebook` sees; k-means differs by some 2 rSum
between seeds, so each is fitted with `--seeds` of them. OPQ takes minutes on one core.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))

import faiss
import torch
from torch import Tensor

from evaluate.codes import evaluate_codes, fit_codebook, fitting_sample
from evaluate.embed import embed_split
from evaluate.protocols import evaluate_full
from pipeline.config import RunConfig, load_yaml, merge
from train.batches import FeatureReader
from train.models import open_model
from train.quantize import ProductCodebook, dealt_axes

BYTES = (16, 32, 64)
FLOAT = "float"
Rotation = Callable[[Tensor, int], Tensor]
"""(sample (N, E), sub-spaces) -> (E, E)."""


def no_rotation(sample: Tensor, _: int) -> Tensor:
    """FAISS PQ."""
    return torch.eye(sample.shape[1])


def opq_rotation(sample: Tensor, subspaces: int) -> Tensor:
    """FAISS OPQ: the rotation and the codes are improved in turn (Ge et al., CVPR 2013)."""
    learned = faiss.OPQMatrix(sample.shape[1], subspaces)
    learned.train(sample.numpy())
    return torch.from_numpy(faiss.vector_to_array(learned.A)).reshape(len(sample[0]), -1).T.contiguous()


FITTED: dict[str, Rotation] = {"FAISS PQ": no_rotation, "FAISS OPQ": opq_rotation, "PCA-dealt PQ": dealt_axes}


def fitted(sample: Tensor, rotation: Tensor, subspaces: int, seed: int) -> ProductCodebook:
    """A product quantizer that FAISS trains on the rotated sample (N, E)."""
    dim = sample.shape[1]
    quantizer = faiss.ProductQuantizer(dim, subspaces, 8)
    quantizer.cp.seed = seed
    quantizer.train((sample @ rotation).numpy())
    codebook = ProductCodebook(dim, subspaces, 256)
    with torch.no_grad():
        codebook.rotation.copy_(rotation)
        codebook.codewords.copy_(
            torch.from_numpy(faiss.vector_to_array(quantizer.centroids)).reshape(subspaces, 256, -1)
        )
    return codebook


def vectors(run: Path, split: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Index vectors of training images and captions, of those of `split`, and the captions' images."""
    model, inputs = open_model(run / "model")
    reader = FeatureReader(inputs)
    images, captions, _ = embed_split(model, reader, "train")
    asked, answers, owner = embed_split(model, reader, split)
    indexed = model.index_vectors
    return indexed(images), indexed(captions), indexed(asked), indexed(answers), owner


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs without codes, which differ by their seed")
    parser.add_argument("--coded", type=Path, nargs="*", default=[], help="folders of runs with codes")
    parser.add_argument("--split", default="val")
    parser.add_argument("--seeds", type=int, default=3, help="of k-means, for each run")
    arguments = parser.parse_args()

    found: dict[tuple[int, str], list[float]] = {}

    def note(size: int, name: str, rsum: float) -> None:
        found.setdefault((size, name), []).append(rsum)

    for run in arguments.runs:
        images, captions, asked, answers, owner = vectors(run, arguments.split)
        note(4 * images.shape[1], FLOAT, evaluate_full(asked, answers, owner, split=arguments.split).rsum)
        sample = fitting_sample(images, captions)
        for size in BYTES:
            for name, rotation in FITTED.items():
                axes = rotation(sample, size)
                for seed in range(arguments.seeds):
                    book = fitted(sample, axes, size, 1 + seed)
                    note(size, name, evaluate_codes(book, asked, answers, owner, split=arguments.split).rsum)
    for run in arguments.coded:
        config = merge(RunConfig(), load_yaml(run / "config.yaml"), str(run)).train.objective.quantization
        images, captions, asked, answers, owner = vectors(run, arguments.split)
        book = fit_codebook(config, images, captions)
        rsum = evaluate_codes(book, asked, answers, owner, split=arguments.split).rsum
        note(config.subspaces, "learned jointly", rsum)

    whole = next(mean(rsums) for (_, name), rsums in found.items() if name == FLOAT)
    for (size, name), rsums in sorted(found.items(), key=lambda item: item[0][0]):
        shares = f"{100 * mean(rsums) / whole:7.1f} %   ({min(rsums):.1f} to {max(rsums):.1f})"
        print(f"{size:5} bytes  {name:16}{mean(rsums):8.1f} rSum{shares}")


if __name__ == "__main__":
    main()
