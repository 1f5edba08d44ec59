import pytest

from featurize.datasets.flickr8k import read_flickr8k
from featurize.datasets.sample import DataError, Sample

TOKENS = (
    b"\xef\xbb\xbf1_a.jpg#0\tA child , climbing .\r\n"
    b"1_a.jpg#1\tA # girl\tgoing in .\r\n"
    b"2_b.jpg#0\t  A dog .  \n"
    b"\n"
    b"3_c.jpg.1#0\tOf no split .\n"
    b"4_d.jpg#0\t\n"
    b"4_d.jpg#1\tcaf\xe9\n"
)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "Flickr8k.token.txt").write_bytes(TOKENS)
    (tmp_path / "Flickr_8k.trainImages.txt").write_bytes(b"4_d.jpg\r\n1_a.jpg\r\n\r\n5_e.jpg\r\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_bytes(b"2_b.jpg\n")
    (tmp_path / "Flicker8k_Dataset").mkdir()
    (tmp_path / "Flicker8k_Dataset" / "1_a.jpg").touch()
    return tmp_path


def test_samples_in_the_order_of_the_token_file(root):
    images = f"{root}/Flicker8k_Dataset"
    assert list(read_flickr8k(root)) == [
        Sample("1_a", f"{images}/1_a.jpg", ("A child , climbing .", "A # girl\tgoing in ."), "train"),
        Sample("2_b", f"{images}/2_b.jpg", ("A dog .",), "val"),
        Sample("4_d", f"{images}/4_d.jpg", ("", "caf\udce9"), "train"),
        Sample("5_e", f"{images}/5_e.jpg", (), "train"),
    ]


def test_the_test_split_and_an_absent_split(root):
    (root / "Flickr_8k.testImages.txt").write_text("3_c.jpg.1\n")
    (root / "Flickr_8k.devImages.txt").unlink()
    found = [(sample.image_id, sample.split) for sample in read_flickr8k(root)]
    assert found == [("1_a", "train"), ("3_c.jpg", "test"), ("4_d", "train"), ("5_e", "train")]


@pytest.mark.parametrize("place", ["Flickr8k_Dataset", "images", "."])
def test_customary_places_of_images(root, place):
    (root / "Flicker8k_Dataset" / "1_a.jpg").unlink()
    (root / place).mkdir(exist_ok=True)
    (root / place / "1_a.jpg").touch()
    assert next(read_flickr8k(root)).read() == b""


def test_no_image_in_any_place(root):
    (root / "Flicker8k_Dataset" / "1_a.jpg").unlink()
    with pytest.raises(DataError, match=r"no image found; looked for 'Flicker8k_Dataset/1_a\.jpg'"):
        list(read_flickr8k(root))


def test_no_split_file(root):
    (root / "Flickr_8k.trainImages.txt").unlink()
    (root / "Flickr_8k.devImages.txt").unlink()
    with pytest.raises(DataError, match=r"expected a split file or more \(Flickr_8k\.trainImages\.txt, .*found none"):
        list(read_flickr8k(root))


def test_no_captions_file(root):
    (root / "Flickr8k.token.txt").unlink()
    with pytest.raises(DataError, match=r"expected the captions in Flickr8k\.token\.txt, which is not there"):
        list(read_flickr8k(root))


@pytest.mark.parametrize("line", ["1_a.jpg#2 no tab", "1_a.jpg\tno number"])
def test_a_line_of_another_form(root, line):
    with (root / "Flickr8k.token.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"Flickr8k\.token\.txt, line 8: expected name#k<TAB>caption, found '1_a"):
        list(read_flickr8k(root))


def test_an_image_in_two_splits(root):
    (root / "Flickr_8k.devImages.txt").write_text("2_b.jpg\n1_a.jpg\n")
    with pytest.raises(
        DataError, match=r"devImages\.txt, line 2: '1_a\.jpg' also stands in Flickr_8k\.trainImages\.txt"
    ):
        list(read_flickr8k(root))
