"""The settings of this package: towers, objective, optimisation."""

from dataclasses import dataclass, field
from typing import Literal

Mining = Literal["hardest", "all", "weighted"]
AggregatorName = Literal["mean", "max", "attention", "gpo", "netvlad"]


class SettingsError(ValueError):
    """Settings that do not fit each other or the data: what was found, what was expected."""


@dataclass(frozen=True)
class TowerConfig:
    """One modality's head: what it reads from the cache and how it becomes one vector."""

    vectors: tuple[str, ...] = field(
        default=("pooled",), metadata={"help": "encoder outputs with one vector a row, joined side by side"}
    )
    parts: tuple[str, ...] = field(
        default=(), metadata={"help": "encoder outputs with many parts a row (grid, tokens); empty: none"}
    )
    aggregator: AggregatorName = field(
        default="attention",
        metadata={"help": "how parts become one vector: mean, max, attention, gpo, netvlad"},
    )
    heads: int = field(default=4, metadata={"help": "heads of the attention aggregator"})
    clusters: int = field(default=16, metadata={"help": "centres of the netvlad aggregator (quantization form A)"})
    width: int = field(default=1024, metadata={"help": "hidden width of the residual MLP"})
    input_dropout: float = field(default=0.3, metadata={"help": "dropout on the frozen features"})
    dropout: float = field(default=0.2, metadata={"help": "dropout on the hidden layer"})
    signed_sqrt: bool = field(default=False, metadata={"help": "signed square root before standardising"})


@dataclass(frozen=True)
class ModelConfig:
    """Two towers that meet in one space."""

    dim: int = field(default=512, metadata={"help": "dimensions of the joint space"})
    normalise: bool = field(default=True, metadata={"help": "embeddings on the unit sphere; otherwise free Euclidean"})
    shared_codebook: bool = field(default=False, metadata={"help": "one set of netvlad centres for both towers (LESS)"})
    image: TowerConfig = field(default_factory=lambda: TowerConfig(signed_sqrt=True))
    text: TowerConfig = field(default_factory=lambda: TowerConfig(vectors=("sentence",)))


@dataclass(frozen=True)
class MarginConfig:
    """The hinge's margin, in squared distance (METHODS: LESS 4)."""

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
            "help": "an anchor's violations become: the largest (hardest), their mean (all), "
            "their mean weighted by their squares (weighted)"
        },
    )
    warmup: float = field(default=0.1, metadata={"help": "share of training on all negatives before mining starts"})
    margin: MarginConfig = field(default_factory=MarginConfig)


@dataclass(frozen=True)
class InfoNCEConfig:
    """Softmax over the batch (CLIP)."""

    temperature: float = field(default=0.05, metadata={"help": "first value"})
    learn: bool = field(default=True, metadata={"help": "whether the temperature is learned"})


@dataclass(frozen=True)
class CenterConfig:
    """Center loss (METHODS: LESS 3)."""

    weight: float = field(default=0.0, metadata={"help": "lambda_c; 0: the term is not built"})
    rate: float = field(default=0.5, metadata={"help": "eta, how fast centres follow"})


@dataclass(frozen=True)
class QuantizationConfig:
    """Differentiable product codes on the embedding (METHODS: LESS 2, form B)."""

    weight: float = field(default=0.0, metadata={"help": "lambda_q; 0: the term is not built"})
    subspaces: int = field(default=16, metadata={"help": "S, also the bytes of a code when codewords = 256"})
    codewords: int = field(default=256, metadata={"help": "M, codewords in each sub-space"})
    commitment: float = field(default=0.25, metadata={"help": "beta, pull of an embedding to its codeword"})
    entropy: float = field(default=0.1, metadata={"help": "gamma, reward for using every codeword"})
    agreement: float = field(default=0.1, metadata={"help": "weight of assignment agreement between modalities"})
    tau_start: float = field(
        default=0.05, metadata={"help": "temperature of soft codes at the start, in d2 within one sub-space"}
    )
    tau_end: float = field(default=0.005, metadata={"help": "temperature of soft codes at the end"})
    rank_codes: bool = field(
        default=False,
        metadata={"help": "the ranking term sees decoded codes (straight-through), not embeddings"},
    )


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised; every term is named, logged and switchable."""

    ranking: Literal["hinge", "infonce"] = field(default="hinge", metadata={"help": "the ranking term"})
    hinge: HingeConfig = field(default_factory=HingeConfig)
    infonce: InfoNCEConfig = field(default_factory=InfoNCEConfig)
    center: CenterConfig = field(default_factory=CenterConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    weighting: Literal["fixed", "uncertainty"] = field(
        default="fixed", metadata={"help": "lambdas as given, or learned by homoscedastic uncertainty"}
    )


@dataclass(frozen=True)
class TrainConfig:
    """How heads are fitted on the cache."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    epochs: int = field(default=30, metadata={"help": "passes over the captions; each is used once an epoch"})
    batch: int = field(default=256, metadata={"help": "pairs in the global batch, whatever the number of workers"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay"})
    warmup: float = field(default=0.05, metadata={"help": "share of the steps in which the rate rises"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm; 0: no clipping"})
    ema: float = field(default=0.998, metadata={"help": "decay of the weights' moving average; 0: none"})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast in towers and losses"})
    patience: int = field(default=0, metadata={"help": "epochs without a better val rSum before stopping; 0: never"})
    checkpoint_steps: int = field(
        default=0, metadata={"help": "also checkpoint every so many steps; 0: after each epoch only"}
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
