"""The record that every source yields, and the way to its image's bytes."""

from dataclasses import dataclass

import fsspec


@dataclass(frozen=True)
class Sample:
    """One image with its captions, as a source names it. Nothing is decoded yet.

    Attributes:
        image_id: unique within the data set; any text, never used as a path.
        image: path or URI of the file that holds the image.
        captions: one or more; their number may differ from image to image.
        split: "train", "val", "test", or whatever the source says; "" where it names none.
        span: (offset, length) in bytes of the image inside that file (a tar member); None: the whole file.
    """

    image_id: str
    image: str
    captions: tuple[str, ...]
    split: str
    span: tuple[int, int] | None = None

    def read(self) -> bytes:
        """The encoded image (JPEG, PNG, ...).

        Raises:
            OSError: the file is missing or shorter than its span says.
        """
        with fsspec.open(self.image, "rb") as file:
            if self.span is None:
                return bytes(file.read())
            offset, length = self.span
            file.seek(offset)
            data = bytes(file.read(length))
        if len(data) != length:
            raise OSError(
                f"{self.image}: expected {length} bytes at offset {offset}, found {len(data)}; "
                "the file changed after it was indexed"
            )
        return data
