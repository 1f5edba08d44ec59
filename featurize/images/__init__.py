"""Frozen networks that describe images, opened by a reference such as "efficientnet-lite0"."""

import difflib

from featurize.encoder import EncoderError, ImageEncoder, Precision

_PACKAGED = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")


def open_image_encoder(reference: str, precision: Precision = "bfloat16", device: str = "cpu") -> ImageEncoder:
    """Opens a frozen image encoder.

    Args:
        reference: "efficientnet-lite0", "efficientnet-lite1" or "efficientnet-lite2" (installed with the
            project); "torchvision:NAME[@default|@random[:SEED]|@FILE]" (`featurize.images.classification`);
            "transformers:FOLDER-OR-HUB-NAME" (`featurize.images.backbone`);
            "regions:DETECTOR[@WEIGHTS][+ENCODER][+k=36][+score=0.2]" (`featurize.images.regions`).
        precision: of the forward pass. Where the device has no bfloat16 it is float32; the card tells.
        device: where the network runs, e.g. "cpu", "cuda".

    Raises:
        EncoderError: unknown reference, or a checkpoint that cannot be used.
        EncoderError: weights that are neither stored nor reachable; the message says where to put them.
    """
    # Each family's libraries take seconds to import.
    if reference in _PACKAGED:
        from featurize.images.packaged import open_packaged

        return open_packaged(reference, precision, device)
    if reference.startswith("torchvision:"):
        from featurize.images.classification import open_classification

        return open_classification(reference, precision, device)
    if reference.startswith("transformers:"):
        from featurize.images.backbone import open_backbone

        return open_backbone(reference, precision, device)
    if reference.startswith("regions:"):
        from featurize.images.regions import open_regions

        return open_regions(reference, precision, device)
    families = ("torchvision:", "transformers:", "regions:")
    nearest = difflib.get_close_matches(reference, (*_PACKAGED, *families), n=1, cutoff=0)[0]
    raise EncoderError(
        f"unknown image encoder {reference!r}, the nearest is {nearest!r}; expected {', '.join(_PACKAGED)}, "
        "torchvision:NAME[@default|@random[:SEED]|@FILE], transformers:FOLDER-OR-HUB-NAME or regions:DETECTOR"
    )
