"""The settings of this package: towers, objective, optimisation."""

from dataclasses import dataclass, field
from typing import Literal

from featurize.config import require

Mining = Literal["hardest", "sum", "mean", "weighted"]
AggregatorName = Literal["mean", "max", "attention", "gpo", "netvlad", "memory", "none"]
ContextName = Literal["none", "bigru", "transformer", "graph"]


class SettingsError(ValueError):
    """Settings that do not fit each other or the data: what was found, what was expected."""


@dataclass(frozen=True)
class TowerConfig:
    """One modality's head: what it reads from the cache and how it becomes one vector."""

    vectors: tuple[str, ...] = field(
        default=("pooled",), metadata={"help": "encoder outputs with one vector a row, joined side by side"}
    )
    parts: tuple[str, ...] = field(
        default=(),
        metadata={"help": "encoder outputs with parts (grid, coarse, regions, tokens) of a row; empty: none"},
    )
    bags: tuple[str, ...] = field(
        default=(), metadata={"help": "outputs with the words of a caption (lemmas; text only); empty: none"}
    )
    bag_dropout: float = field(default=0.5, metadata={"help": "dropout on the words"})
    vocabulary: int = field(default=4096, metadata={"help": "bags: the most frequent lemmas that are kept"})
    min_frequency: int = field(default=3, metadata={"help": "bags: captions that a kept lemma is in, at least"})
    part_width: int = field(
        default=0, metadata={"help": "hidden width of the residual MLP on parts; 0: one linear layer"}
    )
    context: ContextName = field(
        default="none",
        metadata={"help": "how parts see each other: none, bigru, transformer, graph (VSRN's region reasoning)"},
    )
    layers: int = field(default=1, metadata={"help": "layers of the context"})
    aggregator: AggregatorName = field(
        default="attention",
        metadata={
            "help": "how parts become one vector: mean, max, attention, gpo, netvlad, memory (VSRN's GRU); none: not "
            "at all, the local space alone reads them"
        },
    )
    heads: int = field(default=4, metadata={"help": "heads of the attention aggregator and of the transformer"})
    clusters: int = field(default=16, metadata={"help": "centres of the netvlad aggregator (quantization form A)"})
    width: int = field(default=1024, metadata={"help": "hidden width of the residual MLP"})
    input_dropout: float = field(default=0.3, metadata={"help": "dropout on the frozen features"})
    dropout: float = field(default=0.2, metadata={"help": "dropout on the hidden layer"})
    signed_sqrt: bool = field(default=False, metadata={"help": "signed square root before standardising"})

    def __post_init__(self) -> None:
        """Refuse numbers that no tower can be made with."""
        require(self, lambda n: n >= 1, "1 or more", "vocabulary", "min_frequency", "heads")
        require(self, lambda n: n >= 0, "0 (one linear layer) or more", "width", "part_width")
        require(self, lambda n: 0 <= n < 1, "0 (none) or more, below 1", "bag_dropout", "input_dropout", "dropout")


@dataclass(frozen=True)
class LocalConfig:
    """A second, local space of the words' meaning beside the global one (docs/methods.md, HIER)."""

    dim: int = field(default=0, metadata={"help": "L, dimensions of the local space; 0: there is none"})
    queries: int = field(default=8, metadata={"help": "P, learned concept queries over the parts of each modality"})
    share: float = field(
        default=0.3, metadata={"help": "w, the local half's share of the similarity, 0 to 1, until it is tuned"}
    )


@dataclass(frozen=True)
class ScanConfig:
    """Stacked cross attention (SCAN, Lee et al., ECCV 2018)."""

    direction: Literal["t2i", "i2t", "both"] = field(
        default="both", metadata={"help": "words attend to parts (t2i), parts to words (i2t), or the mean of both"}
    )
    attention: float = field(default=9.0, metadata={"help": "lambda_1, sharpness of the attention"})
    pooling: Literal["mean", "lse"] = field(
        default="mean", metadata={"help": "over words or parts: their mean, or a soft maximum (log-mean-exp)"}
    )
    sharpness: float = field(default=6.0, metadata={"help": "lambda_2 of the soft maximum"})
    words: int = field(default=32, metadata={"help": "tokens of a caption that are compared; longer ones are cut"})


@dataclass(frozen=True)
class ModelConfig:
    """Two towers that meet in one space."""

    host: Literal["vse", "scan"] = field(
        default="vse",
        metadata={"help": "one vector each, which can be indexed (vse), or parts compared with words (scan)"},
    )
    scan: ScanConfig = field(default_factory=ScanConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    dim: int = field(default=512, metadata={"help": "dimensions of the joint space"})
    blocks: int = field(
        default=1,
        metadata={"help": "heads side by side: each has its share of dim and width and is ranked by itself (vse)"},
    )
    normalise: bool = field(
        default=True, metadata={"help": "embeddings (every block) on the unit sphere; otherwise free Euclidean"}
    )
    shared_codebook: bool = field(default=False, metadata={"help": "one set of netvlad centres for both towers (LESS)"})
    image: TowerConfig = field(default_factory=lambda: TowerConfig(signed_sqrt=True))
    text: TowerConfig = field(default_factory=lambda: TowerConfig(vectors=("sentence",)))

    def __post_init__(self) -> None:
        """Refuse a space without dimensions."""
        require(self, lambda n: n >= 1, "1 or more", "dim")


@dataclass(frozen=True)
class MarginConfig:
    """The ranking term's margin, in squared distance (docs/methods.md, LESS 4)."""

    form: Literal["fixed", "A", "B", "C"] = field(
        default="A",
        metadata={"help": "fixed; A follows the gap; B per pair from caption similarity; C = A times B"},
    )
    start: float = field(default=0.2, metadata={"help": "the fixed margin, m0 of form B, first value of form A"})
    weight: float = field(default=0.5, metadata={"help": "form A: share of the running gap d2_neg - d2_pos"})
    low: float = field(default=0.05, metadata={"help": "form A: the margin is at least this"})
    high: float = field(default=1.0, metadata={"help": "form A: the margin is at most this"})
    decay: float = field(default=0.99, metadata={"help": "form A: decay of the gap's moving average"})


@dataclass(frozen=True)
class HingeConfig:
    """Hinge over squared distances."""

    mining: Mining = field(
        default="hardest",
        metadata={
            "help": "an anchor's violations become: the largest (hardest), their sum (sum), their mean (mean), "
            "their mean weighted by their squares (weighted)"
        },
    )
    warmup: float = field(
        default=0.1, metadata={"help": "share of training on the mean before hardest or weighted begins"}
    )
    margin: MarginConfig = field(default_factory=MarginConfig)


def _no_margin() -> MarginConfig:
    return MarginConfig(form="fixed", start=0.0)


@dataclass(frozen=True)
class InfoNCEConfig:
    """Softmax over the batch (CLIP), negatives weighted by hardness if asked (docs/methods.md, SEDE 3)."""

    temperature: float = field(default=0.05, metadata={"help": "first value"})
    learn: bool = field(default=True, metadata={"help": "whether the temperature is learned"})
    hardness: float = field(
        default=0.0, metadata={"help": "beta, how much more near negatives weigh than far ones; 0: all weigh the same"}
    )
    margin: MarginConfig = field(default_factory=_no_margin)


@dataclass(frozen=True)
class SigLIPConfig:
    """A sigmoid for every pair of the batch (Zhai et al., ICCV 2023)."""

    temperature: float = field(default=0.1, metadata={"help": "first value"})
    bias: float = field(default=-10.0, metadata={"help": "first value of the logits' bias"})
    learn: bool = field(default=True, metadata={"help": "whether temperature and bias are learned"})
    margin: MarginConfig = field(default_factory=_no_margin)


@dataclass(frozen=True)
class BankConfig:
    """Momentum memory banks (docs/methods.md, SEDE 2)."""

    size: int = field(default=0, metadata={"help": "Q, keys kept of each modality; 0: no bank, no momentum network"})
    momentum: float = field(default=0.999, metadata={"help": "mu, how slowly the momentum network follows"})
    share: float = field(default=0.5, metadata={"help": "the bank's share of the ranking term, the batch has the rest"})


@dataclass(frozen=True)
class ErasingConfig:
    """Attention-guided erasing (docs/methods.md, SEDE 1)."""

    weight: float = field(default=0.0, metadata={"help": "lambda of the term; 0: it is not built"})
    keep: float = field(
        default=1.0, metadata={"help": "gamma, a part stays if its attention is this many times the mean or more"}
    )
    irrelevant: float = field(
        default=0.5, metadata={"help": "eta, weight of dropped parts matching no better than the whole"}
    )


@dataclass(frozen=True)
class CenterConfig:
    """Center loss (docs/methods.md, LESS 3)."""

    weight: float = field(default=0.0, metadata={"help": "lambda_c; 0: the term is not built"})
    concept: Literal["image", "cluster", "lexical"] = field(
        default="image",
        metadata={
            "help": "what has a centre: an image with its captions; a cluster of images whose captions are alike; "
            "the images that share their most telling word"
        },
    )
    concepts: int = field(default=256, metadata={"help": "cluster: how many"})
    form: Literal["table", "batch"] = field(
        default="table",
        metadata={"help": "centres are kept and follow (table), or are the means of each batch (batch)"},
    )
    rate: float = field(default=0.5, metadata={"help": "table: eta, how fast centres follow"})
    slack: float = field(default=0.0, metadata={"help": "batch: distance to the mean that costs nothing"})
    delta: float = field(
        default=0.5, metadata={"help": "batch: means closer than 2 delta push apart (distance, not squared)"}
    )
    push: float = field(default=1.0, metadata={"help": "batch: weight of that push"})


@dataclass(frozen=True)
class LocalLossConfig:
    """What the local space learns from the captions' words (docs/methods.md, HIER)."""

    weight: float = field(default=0.0, metadata={"help": "weight of the term; 0: it is not built"})
    tau: float = field(default=0.1, metadata={"help": "temperature of the similarity of local embeddings"})
    tau_labels: float = field(default=0.15, metadata={"help": "temperature of the similarity of words, their target"})
    labels_weight: float = field(
        default=1.0, metadata={"help": "weight of telling the words from a local embedding; 0: not built"}
    )
    vocabulary: int = field(default=512, metadata={"help": "V, most frequent content lemmas of the training captions"})


@dataclass(frozen=True)
class QuantizationConfig:
    """Differentiable product codes on the embedding (docs/methods.md, LESS 2, form B)."""

    weight: float = field(default=0.0, metadata={"help": "lambda_q; 0: the term is not built"})
    start: float = field(default=0.15, metadata={"help": "share of training after which the codebook is made"})
    subspaces: int = field(default=16, metadata={"help": "S, also the bytes of a code when codewords = 256"})
    codewords: int = field(default=256, metadata={"help": "M, codewords in each sub-space"})
    commitment: float = field(default=0.25, metadata={"help": "beta, pull of an embedding to its codeword"})
    decay: float = field(default=0.99, metadata={"help": "decay of codewords, the moving averages of what chose them"})
    entropy: float = field(default=0.1, metadata={"help": "gamma, reward for using every codeword"})
    agreement: float = field(default=0.1, metadata={"help": "weight of assignment agreement between modalities"})
    tau_start: float = field(
        default=2.0, metadata={"help": "temperature of soft codes at first, in units of a piece's error at that time"}
    )
    tau_end: float = field(default=0.5, metadata={"help": "temperature of soft codes at the end, in the same units"})
    rank_codes: float = field(
        default=0.0,
        metadata={
            "help": "share of the ranking term that compares embeddings with decoded codes of the other modality, as a "
            "search does; 0: none"
        },
    )


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised; every term is named, logged and switchable."""

    ranking: Literal["hinge", "infonce", "siglip"] = field(default="hinge", metadata={"help": "the ranking term"})
    hinge: HingeConfig = field(default_factory=HingeConfig)
    infonce: InfoNCEConfig = field(default_factory=InfoNCEConfig)
    siglip: SigLIPConfig = field(default_factory=SigLIPConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    erasing: ErasingConfig = field(default_factory=ErasingConfig)
    center: CenterConfig = field(default_factory=CenterConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    local: LocalLossConfig = field(default_factory=LocalLossConfig)
    weighting: Literal["fixed", "uncertainty"] = field(
        default="fixed", metadata={"help": "lambdas as given, or learned by homoscedastic uncertainty"}
    )

    @property
    def margin(self) -> MarginConfig:
        """The margin of the chosen ranking term."""
        margins = {"hinge": self.hinge.margin, "infonce": self.infonce.margin, "siglip": self.siglip.margin}
        return margins[self.ranking]


@dataclass(frozen=True)
class TrainConfig:
    """How heads are fitted on the cache."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    epochs: int = field(default=30, metadata={"help": "passes over the captions; each is used once an epoch"})
    batch: int = field(default=256, metadata={"help": "captions in the global batch, whatever the number of workers"})
    captions_per_image: int = field(
        default=1, metadata={"help": "captions of an image that a step takes together, so that it is embedded once"}
    )
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay"})
    warmup: float = field(default=0.05, metadata={"help": "share of the steps in which the rate rises"})
    mixup: float = field(
        default=0.0, metadata={"help": "alpha of the Beta distribution that mixes pairs of vectors (FuseMix); 0: none"}
    )
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm; 0: no clipping"})
    ema: float = field(
        default=0.998, metadata={"help": "decay of the weights' moving average, which begins shorter; 0: none"}
    )
    bf16: bool = field(
        default=False, metadata={"help": "bfloat16 autocast in the towers, on devices that compute in it"}
    )
    patience: int = field(default=0, metadata={"help": "epochs without a better val rSum before stopping; 0: never"})
    checkpoint_steps: int = field(
        default=0, metadata={"help": "also checkpoint every so many steps; 0: after each epoch only"}
    )
    window: int = field(
        default=0,
        metadata={"help": "shards that an epoch mixes before it goes on, for a cache larger than the disk; 0: all"},
    )
    seed: int = field(default=0, metadata={"help": "initial weights, order of the epochs, dropout"})
    workers: int = field(
        default=1, metadata={"help": "Ray Train workers; 0: plain, in this process, with the same numbers"}
    )
    cpus_per_worker: int = field(
        default=2, metadata={"help": "CPU cores of each Ray Train worker, if there are as many"}
    )
    gpu: bool = field(default=False, metadata={"help": "one GPU for each worker"})
    max_failures: int = field(default=3, metadata={"help": "how often Ray Train restarts killed workers"})

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be trained with, or that would quietly mean something else."""
        require(self, lambda n: n >= 1, "1 or more", "epochs", "cpus_per_worker")
        require(self, lambda n: n > 0, "more than 0", "lr")
        require(self, lambda n: n >= 0, "0 or more", "weight_decay", "seed", "workers", "max_failures")
        require(self, lambda n: n >= 0, "0 (no clipping) or more", "clip")
        require(self, lambda n: n >= 0, "0 (never) or more", "patience")
        require(self, lambda n: n >= 0, "0 (after each epoch only) or more", "checkpoint_steps")
        require(self, lambda n: n >= 0, "0 (all shards) or more", "window")
        require(self, lambda n: 0 <= n <= 1, "a share, 0 to 1", "warmup")
        require(self, lambda n: 0 <= n < 1, "0 (no average) or more, below 1", "ema")


PLACEMENT = ("workers", "cpus_per_worker", "gpu", "max_failures", "checkpoint_steps")
"""The settings of `TrainConfig` that say where and how safely it computes: a run may go on with others."""
