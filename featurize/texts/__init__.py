"""What describes captions, frozen networks and a lexicon, opened by a reference such as "minilm"."""

import difflib

from featurize.encoder import EncoderError, Precision, TextEncoder


def open_text_encoder(reference: str, precision: Precision = "bfloat16", device: str = "cpu") -> TextEncoder:
    """Opens a frozen text encoder.

    Args:
        reference: "minilm" (all-MiniLM-L6-v2, installed with the project), "mpnet" (all-mpnet-base-v2, ten times
            as slow, installed with the extra of its name),
            "transformers:FOLDER-OR-HUB-NAME", see `featurize.texts.tokens`, or
            "lexicon" (English) or "lexicon:LANGUAGE", see `featurize.texts.lexicon`.
        precision: of the forward pass. Where the device has no bfloat16 it is float32; the card tells.
        device: where the network runs, e.g. "cpu", "cuda".

    Raises:
        EncoderError: unknown reference or language, or a checkpoint that cannot be used.
        EncoderError: a checkpoint that is neither stored nor reachable; the message says what to do.
    """
    if reference == "lexicon" or reference.startswith("lexicon:"):
        from featurize.texts.lexicon import LexiconEncoder, language_of

        return LexiconEncoder(language_of(reference))
    if reference not in {"minilm", "mpnet"} and not reference.startswith("transformers:"):
        nearest = difflib.get_close_matches(reference, ("minilm", "mpnet", "transformers:", "lexicon"), n=1, cutoff=0)[
            0
        ]
        raise EncoderError(
            f"unknown text encoder {reference!r}, the nearest is {nearest!r}; expected minilm, mpnet, "
            "lexicon[:LANGUAGE] or transformers:FOLDER-OR-HUB-NAME"
        )
    from featurize.texts.tokens import open_tokens

    return open_tokens(reference, precision, device)
