"""Pages: they parse, need nothing from outside, escape whatever they are given, and show the numbers."""

import base64
import io
import math
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from evaluate.metrics import Metrics, Report
from evaluate.report import CURVE_POINTS, Answer, Curve, Hit, run_page, search_page

HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=http://evil.example/x>"
VOID = {"meta", "img", "line", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Parses a page strictly: every tag is closed in order, and all attributes and text are kept."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag, **wanted):
        return [a for name, a in self.tags if name == tag and all(a.get(k) == v for k, v in wanted.items())]

    def pictures(self):
        for attributes in self.all("img"):
            kind, data = attributes["src"].split(",")
            assert kind == "data:image/jpeg;base64"
            yield Image.open(io.BytesIO(base64.b64decode(data)))

    def check_self_contained(self):
        assert {name for name, _ in self.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "a"})
        for _, attributes in self.tags:
            assert not any(name.startswith("on") for name in attributes)
            assert attributes.get("src", "data:").startswith("data:")
            assert "href" not in attributes
        assert "url(" not in self.source
        assert "@import" not in self.source
        (policy,) = self.all("meta", **{"http-equiv": "Content-Security-Policy"})
        assert policy["content"].startswith("default-src 'none'")


def picture(width=64, height=48, mode="RGB", kind="PNG", **options):
    out = io.BytesIO()
    Image.new(mode, (width, height), 128 if mode in "LP" else None).save(out, kind, **options)
    return out.getvalue()


def metrics(base):
    return Metrics(base, base + 1, base + 2, base + 3, base + 4, base + 5, base + 6)


TRAINED = Report("test", "full", metrics(40), metrics(30))
UNTRAINED = Report("test", "full", metrics(1), metrics(2))


@pytest.fixture
def searched(tmp_path):
    """Writes answers and parses the page."""

    def write(*answers, **options):
        search_page(tmp_path / "found" / "search.html", "Search", answers, **options)
        assert [path.name for path in (tmp_path / "found").iterdir()] == ["search.html"]
        return Page(tmp_path / "found" / "search.html")

    return write


@pytest.fixture
def drawn(tmp_path):
    """Writes a run's page and parses it."""

    def write(**options):
        path = tmp_path / "run.html"
        run_page(path, "A run", **({"reports": {"trained": TRAINED, "untrained": UNTRAINED}} | options))
        return Page(path)

    return write


def test_a_search_page_shows_queries_and_hits(searched):
    page = searched(
        Answer("two dogs", [Hit(1, "a.jpg", 0.1234, ("dogs run", "two pets"), picture())]),
        Answer(picture(), [Hit(1, "b.jpg", 0.5, (), picture()), Hit(2, "c.jpg", 0.75)], name="mine.png"),
        Answer("nothing", []),
        note="over 3 images",
    )
    page.check_self_contained()
    assert page.all("html", lang="en")
    for shown in ("Search", "over 3 images", "two dogs", "0.123", "dogs run", "two pets", "mine.png", "b.jpg"):
        assert shown in page.text
    assert "0.750" in page.text
    assert "no picture" in page.text
    assert "Nothing was found." in page.text
    assert "right" not in page.text
    assert len(list(page.pictures())) == 3
    assert [attributes["alt"] for attributes in page.all("img")] == ["dogs run", "mine.png", "b.jpg"]


def test_the_right_hits_are_marked(searched):
    hits = [Hit(1, "a", 0.1, ("one",), right=False), Hit(2, "b", 0.2, ("two",), right=True)]
    page = searched(Answer("q", hits))
    assert "right at rank 2" in page.text
    assert len(page.all("li", **{"class": "right"})) == 1
    page = searched(Answer("q", [*hits, Hit(3, "c", 0.3, ("three",), right=True)]))
    assert "right at rank 2, 3" in page.text
    page = searched(Answer("q", hits[:1]))
    assert "right: none of these 1" in page.text
    assert not page.all("li", **{"class": "right"})


def test_pictures_make_cards_and_texts_make_lines(searched):
    page = searched(Answer("q", [Hit(1, "a", 0.1, image=picture())]))
    assert page.all("ol", **{"class": "cards"})
    page = searched(Answer(picture(), [Hit(1, "a", 0.1, ("text",))]))
    assert page.all("ol", **{"class": "lines"})


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (picture(640, 480), (213, 160)),
        (picture(480, 640), (120, 160)),
        (picture(64, 48), (64, 48)),  # small ones are not blown up
        (picture(3000, 200), (480, 32)),  # panoramas are three times as wide as high, at most
        (picture(640, 480, kind="JPEG"), (213, 160)),
        (picture(640, 480, mode="RGBA"), (213, 160)),
        (picture(640, 480, mode="P"), (213, 160)),
        (picture(640, 480, mode="CMYK", kind="JPEG"), (213, 160)),
        (picture(640, 480, mode="I;16"), (213, 160)),
    ],
)
def test_thumbnails_are_small_jpegs(searched, data, size):
    (thumbnail,) = searched(Answer(data, [])).pictures()
    assert thumbnail.format == "JPEG"
    assert thumbnail.size == size


def test_thumbnails_stand_upright(searched):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (thumbnail,) = searched(Answer(picture(640, 480, kind="JPEG", exif=exif), [])).pictures()
    assert thumbnail.size == (120, 160)


def test_thumbnails_are_what_the_encoders_saw(searched):
    """Transparency is white; a tag of another type than PIL would write does not cost the page."""
    (thumbnail,) = searched(Answer(picture(64, 64, mode="RGBA"), [])).pictures()
    assert thumbnail.getpixel((32, 32)) == (255, 255, 255)
    turned = struct.pack("<HHII", 0x0112, 3, 1, 6)  # orientation, SHORT
    odd = struct.pack("<HHI4s", 0x0128, 2, 2, b"2\0")  # unit of the resolution, as text
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turned + odd + struct.pack("<I", 0)
    (thumbnail,) = searched(Answer(picture(640, 480, kind="JPEG", exif=exif), [])).pictures()
    assert thumbnail.size == (120, 160)


@pytest.mark.parametrize("data", [b"", b"not a picture", picture(640, 480, kind="JPEG")[:400]])
def test_pictures_that_cannot_be_read_leave_a_box(searched, data):
    page = searched(Answer(data, []))
    assert "picture cannot be read" in page.text
    assert not page.all("img")


def test_hostile_text_stays_text(searched, drawn):
    hit = Hit(1, HOSTILE, 0.1, (HOSTILE, HOSTILE), picture(), right=True)
    page = searched(Answer(HOSTILE, [hit]), Answer(picture(), [Hit(1, HOSTILE, 0.1)], HOSTILE), note=HOSTILE)
    page.check_self_contained()
    assert page.text.count("<script>alert('x')</script>") == 6  # note, query, two captions, name, item
    page = drawn(
        note=HOSTILE,
        reports={HOSTILE: Report(HOSTILE, "full", metrics(1), metrics(2)), HOSTILE + "2": UNTRAINED},
        curves=[Curve(HOSTILE, HOSTILE, [1, 2], [1, 2], "highest"), Curve(HOSTILE, "x", [], [], "lowest")],
        settings={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
    )
    page.check_self_contained()
    assert page.text.count("<script>alert('x')</script>") > 10


def test_a_hostile_title(tmp_path):
    search_page(tmp_path / "x.html", HOSTILE, [])
    page = Page(tmp_path / "x.html")
    page.check_self_contained()
    assert page.text.count("<script>") == 2  # title and heading


def test_a_run_page_sets_trained_beside_untrained(drawn):
    page = drawn(
        note="a note",
        text_to_image=[Answer("a caption", [Hit(1, "a", 0.1, ("c",), picture(), right=True)])],
        image_to_text=[Answer(picture(), [Hit(1, "a#0", 0.1, ("words",), right=False)])],
        settings={"train": {"lr": 0.001, "vectors": ("a", "b"), "parts": ()}, "seed": 0},
    )
    page.check_self_contained()
    assert "rSum of 600 216.0 untrained 15.0" in page.text  # 3·40 + 3 + 3·30 + 3, and 3·1 + 3 + 3·2 + 3
    assert "R@1, image to text 40.0 untrained 1.0" in page.text
    assert "R@1, text to image 30.0 untrained 2.0" in page.text
    assert "Metrics on test" in page.text
    assert "Image to text R@1 R@5 R@10 medR meanR mAP@R R-P trained 40.0 41.0 42.0" in page.text
    assert "untrained 2.0 3.0 4.0 5.0 6.0 7.0 8.0" in page.text
    assert "right at rank 1" in page.text
    assert "right: none of these 1" in page.text
    assert "train.lr 0.001 train.vectors a, b train.parts none seed 0" in page.text
    assert page.text.index("Text to image a caption") < page.text.index("words") < page.text.index("Settings")


def test_a_run_page_shows_only_what_it_is_given(drawn):
    page = drawn(reports={"trained": TRAINED})
    page.check_self_contained()
    assert "untrained" not in page.text
    for heading in ("Training", "Settings"):
        assert heading not in page.text
    assert not page.all("article")


def test_folds_have_their_own_rows(drawn):
    folded = Report("test", "coco_5k", metrics(20), metrics(10), Report("test", "coco_1k", metrics(60), metrics(50)))
    page = drawn(reports={"trained": folded})
    assert "trained, all 5K 20.0" in page.text
    assert "trained, mean of five 1K folds 60.0" in page.text


def test_a_run_page_needs_a_report(tmp_path):
    with pytest.raises(ValueError, match=r"run.html: a run's page needs at least one report, found none"):
        run_page(tmp_path / "run.html", "x", reports={})
    assert not list(tmp_path.iterdir())


def line_of(page):
    (line,) = page.all("polyline")
    return [tuple(map(float, point.split(","))) for point in line["points"].split()]


def test_a_curve_goes_through_its_points(drawn):
    page = drawn(curves=[Curve("val rSum", "epoch", [1, 2, 3], [100, 300, 200], "highest")])
    page.check_self_contained()
    # The drawing is 400 by 210; the plot spans x from 44 to 382 and y from 180 (at 100) up to 10 (at 300).
    assert line_of(page) == [(44, 180), (213, 10), (382, 95)]
    (best,) = page.all("circle")
    assert (float(best["cx"]), float(best["cy"])) == (213, 10)
    assert "val rSum by epoch: highest 300 at epoch 2." in page.text
    assert "100 150 200 250 300" in page.text
    assert not page.all("polygon")


def test_the_lowest_point_of_a_loss_is_marked(drawn):
    page = drawn(curves=[Curve("loss", "step", [10, 20, 30], [3, 0.5, 1], "lowest")])
    assert "loss by step: lowest 0.5 at step 20." in page.text


def test_long_curves_are_drawn_as_means_within_a_band(drawn):
    steps = np.arange(CURVE_POINTS * 4)
    page = drawn(curves=[Curve("loss", "step", steps, 5 + (-1.0) ** steps, "lowest")])
    assert len(line_of(page)) == CURVE_POINTS
    assert {y for _, y in line_of(page)} == {95.0}  # the mean, 5, halfway between 4 and 6
    (band,) = page.all("polygon")
    heights = {float(point.split(",")[1]) for point in band["points"].split()}
    assert heights == {10.0, 180.0}
    assert "lowest 5 at step 2 (means of 4)." in page.text


def test_values_that_are_not_finite_are_counted(drawn):
    page = drawn(curves=[Curve("loss", "step", [1, 2, 3, 4], [2, math.nan, math.inf, 1], "lowest")])
    assert "lowest 1 at step 4. Left out, not finite: 2." in page.text
    assert len(line_of(page)) == 2
    page = drawn(curves=[Curve("loss", "step", [1], [math.nan], "lowest")])
    assert "loss has no values. Left out, not finite: 1." in page.text
    assert not page.all("svg")


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0, 5.0], [0.0], [-1e-9, 1e-9], [1e12, 3e12], [-3.0, -7.5]])
def test_curves_stay_inside_the_drawing(drawn, values):
    page = drawn(curves=[Curve("y", "step", list(range(len(values))), values, "highest")])
    for x, y in line_of(page):
        assert 44 <= x <= 382
        assert 10 <= y <= 180
    numbers = re.findall(r'="(-?\d+\.\d)"', page.source)
    assert numbers
    assert all(-1 <= float(number) <= 400 for number in numbers)


def test_a_curve_needs_as_many_values_as_places():
    with pytest.raises(ValueError, match=r"curve 'loss': 3 x values, but 2 y values"):
        Curve("loss", "step", [1, 2, 3], [1, 2], "lowest")
