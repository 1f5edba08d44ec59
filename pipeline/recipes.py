"""Methods by name: a recipe is a complete `RunConfig`, a typed Python value that a run starts from.

A new method is a new entry of `RECIPES`; a variation of one is a YAML file:

    recipe: less
    train:
      objective: {center: {weight: 0.1}}
"""

from dataclasses import dataclass, replace

from featurize.config import FeaturizeConfig
from pipeline.config import ConfigError, RunConfig, did_you_mean, load_yaml, merge
from train.config import (
    BankConfig,
    CenterConfig,
    ErasingConfig,
    HingeConfig,
    InfoNCEConfig,
    LocalConfig,
    LocalLossConfig,
    MarginConfig,
    Mining,
    ModelConfig,
    ObjectiveConfig,
    QuantizationConfig,
    ScanConfig,
    SigLIPConfig,
    TowerConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Recipe:
    """A method: what it is, in one paragraph with its source, and the settings that make it."""

    description: str
    config: RunConfig


# Tuned on the val part of Flickr8K, as docs/experiments.md tells; what reads parts takes the pooled settings over.
_FEATURES = FeaturizeConfig(
    images=("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"),
    texts=("minilm", "lexicon"),
    views=("plain", "flip"),
)
_IMAGE = TowerConfig(signed_sqrt=True, width=1024, input_dropout=0.6, dropout=0.5)
_TEXT = TowerConfig(vectors=("sentence",), bags=("lemmas",), width=1024, input_dropout=0.2, dropout=0.5)
_POOLED = TrainConfig(
    model=ModelConfig(dim=512, image=_IMAGE, text=_TEXT),
    epochs=12,
    batch=1024,
    captions_per_image=2,
    lr=1e-3,
    weight_decay=0.05,
    ema=0.998,
    bf16=True,
)
_LESS = ObjectiveConfig(
    ranking="hinge",
    hinge=HingeConfig(mining="weighted", warmup=0.0, margin=MarginConfig(form="A", weight=0.5)),
    center=CenterConfig(weight=0.05),
    quantization=QuantizationConfig(weight=0.01),
)
_INFONCE = ObjectiveConfig(ranking="infonce", infonce=InfoNCEConfig(temperature=0.05))

# Parts beside the pooled vectors: nine cells of one network, and the caption's tokens.
_CELLS = replace(_IMAGE, parts=("efficientnet-lite0.coarse",))
_TOKENS = replace(_TEXT, parts=("tokens",))
_PARTS = replace(_POOLED, model=replace(_POOLED.model, image=_CELLS, text=_TOKENS))
_SEDE = ObjectiveConfig(
    ranking="infonce",
    infonce=InfoNCEConfig(temperature=0.05, hardness=2.0),
    bank=BankConfig(size=2048, momentum=0.99, share=0.5),
    erasing=ErasingConfig(weight=0.2),
)
_REASONING = replace(_CELLS, context="graph", layers=2, aggregator="memory")
_COMPARED = replace(
    _POOLED.model,
    host="scan",
    scan=ScanConfig(direction="t2i"),
    dim=256,
    image=replace(_CELLS, vectors=(), input_dropout=0.3),
    text=replace(_TOKENS, vectors=(), bags=(), context="bigru"),
)

# A second text encoder, a random crop as a third view, two heads and longer training.
_RICH_FEATURES = replace(_FEATURES, texts=("minilm", "mpnet", "lexicon"), views=("plain", "flip", "crop"))
_ISTHMUS = replace(
    _POOLED,
    model=ModelConfig(
        dim=1024,
        blocks=2,
        image=replace(_IMAGE, width=2048),
        text=replace(_TEXT, width=2048),
    ),
    objective=replace(_INFONCE, infonce=replace(_INFONCE.infonce, margin=MarginConfig(form="A", weight=0.2))),
    epochs=20,
)

_LESS_SOURCE = (
    "Malali & Keller, Learning to Embed Semantic Similarity for Joint Image-Text Retrieval, TPAMI 44(12), 2022, arXiv "
    "2210.03838"
)
_HIER_SOURCE = (
    "Sun, Qin, Liu, Learning hierarchical embedding space for image-text matching, Intelligent Data Analysis 28, 2024"
)
_SEDE_SOURCE = (
    "Pan & Huang, Semantic-enhanced discriminative embedding learning for cross-modal retrieval, IJMIR 11, 2022"
)
_VSEPP_SOURCE = "Faghri et al., VSE++: Improving Visual-Semantic Embeddings with Hard Negatives, BMVC 2018"


def _recipe_of(name: str, description: str, train: TrainConfig) -> Recipe:
    return Recipe(description, RunConfig(method=name, featurize=_FEATURES, train=train))


def _hinge(mining: Mining) -> ObjectiveConfig:
    margin = MarginConfig(form="fixed", start=0.4)  # 0.2 in cosine, as in the paper
    return ObjectiveConfig(ranking="hinge", hinge=HingeConfig(mining=mining, margin=margin))


RECIPES: dict[str, Recipe] = {
    recipe.config.method: recipe
    for recipe in (
        _recipe_of(
            "less",
            "Adaptive-margin hinge over squared distances (the margin follows the gap between negatives and "
            "positives), with center loss and product codes learned on the embedding. Implements the components "
            f"described in {_LESS_SOURCE}.",
            replace(_POOLED, objective=_LESS),
        ),
        _recipe_of(
            "hier",
            "A local space beside the global one: learned concept queries over cells and tokens, which it alone reads, "
            "taught by the words that the captions of an image share. Both halves are one vector in one index. "
            f"Implements the components described in {_HIER_SOURCE}.",
            replace(
                _PARTS,
                model=replace(
                    _PARTS.model,
                    local=LocalConfig(dim=256, queries=4),
                    image=replace(_CELLS, aggregator="none"),
                    text=replace(_TOKENS, aggregator="none"),
                ),
                objective=replace(_INFONCE, local=LocalLossConfig(weight=0.5)),
            ),
        ),
        _recipe_of(
            "sede-vse",
            "Attention-guided erasing, momentum memory banks and weighted InfoNCE on a dual encoder. Implements the "
            f"components described in {_SEDE_SOURCE}.",
            replace(_PARTS, objective=_SEDE),
        ),
        _recipe_of(
            "sede-scan",
            "The same three modules on stacked cross attention (SCAN, Lee et al., ECCV 2018), which compares words "
            f"with parts and so has no index. {_SEDE_SOURCE}.",
            replace(
                _PARTS,
                model=_COMPARED,
                batch=128,
                captions_per_image=1,
                epochs=4,
                objective=replace(_SEDE, bank=replace(_SEDE.bank, size=128)),
            ),
        ),
        _recipe_of(
            "sede-vsrn",
            "The same three modules on region graph reasoning with a gated memory (VSRN, Li et al., ICCV 2019). "
            f"{_SEDE_SOURCE}.",
            replace(_PARTS, model=replace(_PARTS.model, image=_REASONING), objective=_SEDE, epochs=8),
        ),
        _recipe_of(
            "vse0", f"Sum of hinges over all negatives. {_VSEPP_SOURCE}.", replace(_POOLED, objective=_hinge("sum"))
        ),
        _recipe_of(
            "vse++", f"Hinge over the hardest negative. {_VSEPP_SOURCE}.", replace(_POOLED, objective=_hinge("hardest"))
        ),
        _recipe_of(
            "infonce",
            "Softmax over the batch in both directions with a learned temperature, the strongest plain baseline "
            "here. Radford et al., Learning Transferable Visual Models From Natural Language Supervision (CLIP), "
            "ICML 2021, arXiv 2103.00020.",
            replace(_POOLED, objective=_INFONCE),
        ),
        _recipe_of(
            "siglip",
            "A sigmoid for every pair of the batch. Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV "
            "2023, arXiv 2303.15343.",
            replace(_POOLED, objective=ObjectiveConfig(ranking="siglip", siglip=SigLIPConfig(temperature=0.05))),
        ),
        _recipe_of(
            "fusemix",
            "InfoNCE on mixed pairs of frozen vectors. Vouitsis et al., Data-Efficient Multimodal Fusion on a Single "
            "GPU, CVPR 2024, arXiv 2312.10144.",
            replace(
                _POOLED,
                model=replace(_POOLED.model, text=replace(_TEXT, bags=())),
                mixup=1.0,
                batch=512,
                captions_per_image=1,
                epochs=8,
                objective=_INFONCE,
            ),
        ),
        Recipe(
            "The best single vector that this project knows how to train (docs/experiments.md tells how it was found): "
            "InfoNCE (2021) with the adaptive margin of LESS (2022) added to its negatives, two heads side by side in "
            "one vector, each ranked by itself, random crops as a third view, captions by MPNet beside MiniLM and "
            "their lemmas.",
            RunConfig(method="isthmus", featurize=_RICH_FEATURES, train=_ISTHMUS),
        ),
    )
}


def resolve(method: str) -> RunConfig:
    """The settings that a method stands for.

    Args:
        method: a recipe's name, or a YAML file: changes to the recipe that its key `recipe` names (to the
            plain defaults without one), or the whole `config.yaml` of an earlier run.

    Raises:
        ConfigError: there is no such recipe or file, or the file holds what `merge` refuses.
    """
    if not method.endswith((".yaml", ".yml")):
        return _recipe(method, "")
    changes = load_yaml(method)
    name = changes.pop("recipe", None)
    start = RunConfig() if name is None else _recipe(str(name), f"{method}: ")
    return merge(start, changes, method)


def _recipe(name: str, where: str) -> RunConfig:
    if name in RECIPES:
        return RECIPES[name].config
    raise ConfigError(
        f"{where}found no method {name!r}, expected {', '.join(RECIPES)} or a .yaml file; "
        f"{did_you_mean(name, RECIPES)}".removesuffix("; ")
    )
