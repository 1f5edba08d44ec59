"""A summary that fits a screen and adds up."""

from pathlib import Path

import pytest

from featurize.datasets.sample import Sample
from featurize.index import Dataset
from featurize.quarantine import Quarantined
from featurize.summary import kind, lost_images, summary

LAST = (
    "each is listed with its reason in /cache/set/quarantine.jsonl: repair or replace the files and captions named "
    "there, and run again"
)


def dataset(*problems, kept=10):
    samples = tuple(Sample(f"kept{number}", "x.jpg", ("a",), "train") for number in range(kept))
    return Dataset("set", "0" * 64, Path("/cache/set"), samples, ("0" * 64,) * kept, problems)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (
            "DecodeError: truncated or corrupt image: OSError: image file is truncated (3 bytes)",
            "truncated or corrupt image",
        ),
        ("DecodeError: no image format that PIL knows: 2 bytes that start b'ab'", "no image format that PIL knows"),
        ("DecodeError: more than 89,478,485 pixels; shrink the image first (9 by 9)", "more than 89,478,485 pixels"),
        ("DecodeError: the decoder died (signal 11)", "the decoder died"),
        ("DecodeError: the decoder did not answer within 30 s", "the decoder did not answer within 30 s"),
        ("DecodeError: float pixels from -1.0 to 1.0: expected [0, 1]", "float pixels"),
        ("FileNotFoundError: [Errno 2] No such file or directory: '/a/b'", "FileNotFoundError"),
        ("the file is empty: /a/b.jpg", "the file is empty"),
        ("caption 12 is empty", "a caption is empty"),
        ("no usable caption; the image is left out", "no usable caption"),
        ("the image id is not UTF-8", "the image id is not UTF-8"),
    ],
)
def test_kinds_of_reasons(reason, expected):
    assert kind(reason) == expected


def test_a_summary_counts_images_and_captions():
    left_out = [
        Quarantined("gone", "read", "FileNotFoundError: a"),
        Quarantined("away", "read", "FileNotFoundError: b"),
        Quarantined("mute", "caption", "caption 0 is empty"),
        Quarantined("mute", "caption", "no usable caption; the image is left out"),
        Quarantined("kept3", "caption", "caption 1 is empty"),
    ]
    found = dataset(*left_out)
    assert lost_images(found) == 3
    undecoded = Quarantined("kept4", "decode", "DecodeError: the decoder died (signal 11)")
    assert summary(found, [*left_out, undecoded], 0.05).splitlines() == [
        "quarantined: 4 of 13 images (--featurize.max_quarantined allows 5%), 2 captions",
        "     2  caption: a caption is empty",
        "     2  read: FileNotFoundError",
        "     1  caption: no usable caption",
        "     1  decode: the decoder died",
        LAST,
    ]


def test_a_second_image_of_an_id_is_an_image_of_its_own():
    left_out = [
        Quarantined("kept0", "source", "duplicate image id: a has it, b has it too"),
        Quarantined("kept0", "source", "duplicate image id: a has it, c has it too"),
        Quarantined("kept0", "caption", "caption 1 is empty"),
        Quarantined("bare", "source", "no image among its members (.txt); expected one"),
    ]
    found = dataset(*left_out)
    assert lost_images(found) == 3
    assert summary(found, left_out, 0.5).splitlines()[:3] == [
        "quarantined: 3 of 13 images (--featurize.max_quarantined allows 50%), 1 captions",
        "     2  source: duplicate image id",
        "     1  caption: a caption is empty",
    ]


def test_a_summary_has_eight_lines_at_most():
    problems = [Quarantined(f"kept{n}", "decode", f"DecodeError: {'abcdefgh'[n]}: x") for n in range(8)]
    lines = summary(dataset(), [*problems, problems[7]], 0.5).splitlines()
    assert len(lines) == 8
    assert lines[1] == "     2  decode: h"
    assert lines[6] == "     3  of 3 more kinds"
