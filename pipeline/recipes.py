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
    CenterConfig,
    HingeConfig,
    InfoNCEConfig,
    MarginConfig,
    ModelConfig,
    ObjectiveConfig,
    QuantizationConfig,
    TowerConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Recipe:
    """A method: what it is, in one paragraph with its source, and the settings that make it."""

    description: str
    config: RunConfig


# Tuned on the val part of Flickr8K (docs/results.md).
_FEATURES = FeaturizeConfig(
    images=("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"), views=("plain", "flip")
)
_MODEL = ModelConfig(
    dim=512,
    image=TowerConfig(signed_sqrt=True, width=1024, input_dropout=0.6, dropout=0.2),
    text=TowerConfig(vectors=("sentence",), width=1024, input_dropout=0.2, dropout=0.2),
)
_TRAINING = TrainConfig(model=_MODEL, epochs=12, batch=512, lr=1e-3, weight_decay=0.05, ema=0.998, bf16=True)

RECIPES: dict[str, Recipe] = {
    "less": Recipe(
        "Adaptive-margin hinge over squared distances (the margin follows the gap between negatives and "
        "positives), with center loss and product codes learned on the embedding. Implements the components "
        "described in Malali & Keller, Learning to Embed Semantic Similarity for Joint Image-Text Retrieval, "
        "TPAMI 44(12), 2022, arXiv 2210.03838.",
        RunConfig(
            method="less",
            featurize=_FEATURES,
            train=replace(
                _TRAINING,
                objective=ObjectiveConfig(
                    ranking="hinge",
                    hinge=HingeConfig(mining="weighted", warmup=0.0, margin=MarginConfig(form="A", weight=0.5)),
                    center=CenterConfig(weight=0.05),
                    quantization=QuantizationConfig(weight=0.01),
                ),
            ),
        ),
    ),
    "infonce": Recipe(
        "Softmax over the batch in both directions with a learned temperature, the strongest plain baseline "
        "here. Radford et al., Learning Transferable Visual Models From Natural Language Supervision (CLIP), "
        "ICML 2021, arXiv 2103.00020.",
        RunConfig(
            method="infonce",
            featurize=_FEATURES,
            train=replace(
                _TRAINING,
                objective=ObjectiveConfig(ranking="infonce", infonce=InfoNCEConfig(temperature=0.05, learn=True)),
            ),
        ),
    ),
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
