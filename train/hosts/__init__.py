"""Hosts: how two towers meet. `vse` compares one vector each and can be indexed; `scan` compares parts with words.

VSRN (Li et al., ICCV 2019) is `vse` whose image tower reasons over parts: `context: graph`, `aggregator: memory`.
"""

from train.config import ModelConfig, SettingsError
from train.hosts.ensemble import Ensemble
from train.hosts.host import Embedder, Host
from train.hosts.scan import CrossAttentionHost
from train.hosts.vse import DualEncoder
from train.towers import Dims

__all__ = ["CrossAttentionHost", "DualEncoder", "Embedder", "Ensemble", "Host", "build_host"]


def build_host(config: ModelConfig, image: Dims, text: Dims) -> Host:
    """The host that the settings name.

    Args:
        config: of the model.
        image: widths of the image features.
        text: widths of the caption features.

    Raises:
        SettingsError: on an unknown host, or settings that it cannot use.
    """
    match config.host:
        case "vse":
            return DualEncoder(config, image, text)
        case "scan":
            return CrossAttentionHost(config, image, text)
        case _:
            raise SettingsError(f"found host {config.host!r}; expected vse or scan")
