"""Decoding in a process of its own: the same pixels, and what an image does to that process costs no other."""

import gc
import io
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from featurize.images import decoder as module
from featurize.images.decode import MAX_PIXELS, DecodeError, decode
from featurize.images.decoder import Decoder, DecoderError, ends_after
from featurize.images.decoder_child import WINDOW_BYTES, boxes

ROOT = Path(__file__).parents[3]


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(width, height, channels=3):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def turned():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


@pytest.fixture(scope="module")
def decoder():
    return Decoder(60.0)


@pytest.fixture
def script(tmp_path):
    """Makes a decoder whose child knows one more image format, which does `body` when it is opened."""

    def make(body, timeout=60.0, before=""):
        path = tmp_path / "child.py"
        path.write_text(
            "import ctypes, os, re, signal, time\n"
            "from PIL import Image, ImageFile\n"
            "from featurize.images import decoder_child\n"
            "class Bad(ImageFile.ImageFile):\n"
            "    format = 'BAD'\n"
            f"    def _open(self):\n        {body}\n"
            "Image.register_open('BAD', Bad, lambda start: start.startswith(b'BAD'))\n"
            f"{before}\n"
            "decoder_child.main()\n"
        )
        return Decoder(timeout, (sys.executable, str(path)))

    return make


def the_child(decoder):
    (child,) = decoder._idle
    return child._process


GOOD = encoded(noise(8, 6))

KINDS = {
    "jpeg": lambda: encoded(noise(333, 201), "JPEG"),
    "progressive, turned": lambda: encoded(noise(64, 48), "JPEG", progressive=True, exif=turned()),
    "cmyk": lambda: encoded(noise(20, 30, 4).convert("RGB").convert("CMYK"), "JPEG"),
    "grey": lambda: encoded(noise(20, 30, 1)),
    "one bit": lambda: encoded(noise(20, 30, 1).convert("1")),
    "16 bits": lambda: encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 109)),
    "floats": lambda: encoded(Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)), "TIFF"),
    "alpha": lambda: encoded(noise(20, 30, 4)),
    "grey and alpha": lambda: encoded(noise(20, 30, 4).convert("LA")),
    "palette with transparency": lambda: encoded(noise(20, 30).quantize(16), transparency=3),
    "animation": lambda: encoded(noise(9, 9), "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "webp": lambda: encoded(noise(20, 30, 4), "WEBP"),
    "one pixel": lambda: encoded(noise(2, 1).crop((0, 0, 1, 1))),
    "as large as the window": lambda: encoded(noise(1024, 1024), compress_level=1),
    "larger than the window": lambda: encoded(noise(1025, 1026), compress_level=1),
    "wider than the window": lambda: encoded(noise(2**20 + 5, 2), compress_level=1),
    "higher than the window": lambda: encoded(noise(1, 2**20 + 5), compress_level=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_decode(decoder, kind):
    data = KINDS[kind]()
    ours, theirs = decoder.decode(data), decode(data)
    assert (ours.mode, ours.size) == ("RGB", theirs.size)
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("data", [b"", b"<!doctype html>\n", GOOD[:50], KINDS["jpeg"]()[:3000]])
def test_errors_are_those_of_decode(decoder, data):
    with pytest.raises(DecodeError) as theirs:
        decode(data)
    with pytest.raises(DecodeError) as ours:
        decoder.decode(data)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("size", [(1, 1), (500, 375), (1024, 1024), (1025, 1024), (1 << 21, 3), (3, 1 << 21)])
def test_boxes_cover_an_image_once_and_fit_the_window(size):
    covered = np.zeros(size, int)
    for left, top, right, bottom in boxes(*size):
        assert 0 < (right - left) * (bottom - top) * 4 <= WINDOW_BYTES
        covered[left:right, top:bottom] += 1
    assert (covered == 1).all()


def test_one_child_serves_all_images_and_outlives_bad_ones(decoder):
    decoder.decode(GOOD)
    before = the_child(decoder).pid
    with pytest.raises(DecodeError):
        decoder.decode(b"no image")
    decoder.decode(GOOD)
    assert the_child(decoder).pid == before


def test_a_decoder_that_hangs_is_ended(script):
    # backtracking in C without an end, which no signal handler of Python's interrupts
    decoder = script("re.match(r'(a|a)+$', 'a' * 100 + 'b')", timeout=2)
    decoder.decode(GOOD)
    child = the_child(decoder)
    with pytest.raises(DecodeError, match=r"^the decoder did not answer within 2 s$"):
        decoder.decode(b"BAD")
    assert child.returncode == -signal.SIGKILL
    assert decoder.decode(GOOD).size == (8, 6)
    assert the_child(decoder).pid != child.pid


def test_a_child_that_is_stopped_does_not_stop_us(script):
    decoder = script("pass", timeout=2)
    decoder.decode(GOOD)
    the_child(decoder).send_signal(signal.SIGSTOP)
    with pytest.raises(DecodeError, match="did not answer within"):
        decoder.decode(b"x" * 2**22)  # more than the socket takes up
    assert decoder.decode(GOOD).size == (8, 6)


@pytest.mark.parametrize(
    ("body", "end"),
    [
        ("ctypes.string_at(0)", rf"signal {signal.SIGSEGV:d}"),
        ("os.abort()", rf"signal {signal.SIGABRT:d}"),
        ("os._exit(3)", "exit status 3"),
    ],
)
def test_a_decoder_that_crashes_is_noticed_at_once(script, body, end):
    decoder = script(body)
    for _ in range(2):  # in a new child, and in one that has decoded before
        with pytest.raises(DecodeError, match=rf"^the decoder died \({end}\)$"):
            decoder.decode(b"BAD")
        assert decoder.decode(GOOD).size == (8, 6)


def test_a_child_that_died_between_two_images_costs_neither(decoder):
    decoder.decode(GOOD)
    child = the_child(decoder)
    child.kill()
    child.wait()
    assert decoder.decode(GOOD).size == (8, 6)


def test_harm_done_by_an_earlier_image_is_not_blamed_on_the_next(script):
    decoder = script("decoder_child._show = lambda *_: os._exit(9); raise OSError('poisoned')")
    with pytest.raises(DecodeError, match="poisoned"):
        decoder.decode(b"BAD")
    assert decoder.decode(GOOD).tobytes() == decode(GOOD).tobytes()


def test_memory_is_limited(script):
    decoder = script("bytearray(1 << 33)")
    with pytest.raises(DecodeError, match=r"^too little memory to decode it; shrink the image first$"):
        decoder.decode(b"BAD")
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != resource.prlimit(the_child(decoder).pid, resource.RLIMIT_AS)[0]
    assert resource.prlimit(the_child(decoder).pid, resource.RLIMIT_AS)[0] == 4 << 30
    assert resource.prlimit(the_child(decoder).pid, resource.RLIMIT_CORE) == (0, 0)


def test_a_lower_limit_of_the_machine_stays(script):
    decoder = script("pass", before="import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 2 << 30))")
    decoder.decode(GOOD)
    assert resource.prlimit(the_child(decoder).pid, resource.RLIMIT_AS) == (2 << 30, 2 << 30)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((sys.executable, "-c", "raise SystemExit(7)"), r"ended before it was ready \(exit status 7\)"),
        (("/nowhere/python",), "cannot be started: .*No such file"),
    ],
)
def test_a_child_that_does_not_start_is_no_image_s_fault(command, message):
    decoder = Decoder(1.0, command)
    with pytest.raises(DecoderError, match=message):
        decoder.decode(GOOD)


def test_a_child_that_is_never_ready(monkeypatch):
    monkeypatch.setattr(module, "_START_SECONDS", 0.2)
    with pytest.raises(
        DecoderError, match=r"ended before it was ready \(signal 9\); expected it to be so within 0\.2 s"
    ):
        Decoder(60.0, (sys.executable, "-c", "input()")).decode(GOOD)


def test_an_interruption_ends_the_child_that_was_asked(decoder, monkeypatch):
    decoder.decode(GOOD)
    child = decoder._idle[0]

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(child, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.decode(GOOD)
    assert child._process.returncode == -signal.SIGKILL
    assert decoder.decode(GOOD).size == (8, 6)


def test_threads_have_a_child_each():
    decoder = Decoder(60.0)
    pictures = [encoded(noise(40 + number, 30)) for number in range(12)]
    expected = [decode(picture).tobytes() for picture in pictures]
    together = threading.Barrier(3)
    wrong = []

    def work():
        together.wait()
        for _ in range(3):
            wrong.extend(1 for p, e in zip(pictures, expected, strict=True) if decoder.decode(p).tobytes() != e)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= len(decoder._idle) <= 3


def test_children_end_with_their_decoder():
    decoder = Decoder(60.0)
    decoder.decode(GOOD)
    child = the_child(decoder)
    del decoder
    gc.collect()
    assert child.returncode == -signal.SIGKILL


PARENT = """
import sys
sys.path.insert(0, {root!r})
from featurize.images.decoder import Decoder
decoder = Decoder(0.5, (sys.executable, {child!r}))
decoder.decode({good!r})
print(decoder._idle[0]._process.pid, flush=True)
if {hang}:
    decoder._idle[0]._deadline += 600
    decoder._idle[0]._timeout = 600
    decoder.decode(b"BAD")
input()
"""


@pytest.mark.parametrize("hang", [False, True])
def test_children_end_with_their_parent_even_if_it_is_killed(script, tmp_path, hang):
    script("print('asked', flush=True); re.match(r'(a|a)+$', 'a' * 100 + 'b')", before="decoder_child._GRACE = 0")
    source = PARENT.format(root=str(ROOT), child=str(tmp_path / "child.py"), good=GOOD, hang=hang)
    parent = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with parent:
        child = int(parent.stdout.readline())
        assert not hang or parent.stdout.readline() == b"asked\n"
        os.kill(child, 0)  # it lives
        parent.kill()
        assert parent.stdout.read() == b""  # which ends when nobody holds the pipe's other end: parent and child


def test_the_child_starts_fast_and_without_torch():
    code = "import sys, featurize.images.decoder_child; print({'torch', 'numpy'} & set(sys.modules))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout == "set()\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_without_shared_memory_of_the_system_a_file_serves(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    assert Decoder(60.0).decode(GOOD).tobytes() == decode(GOOD).tobytes()


def png(width, height, bits, colour, rows):
    """A PNG made by hand: header, compressed rows."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zeros(count):
    """`count` zero bytes, compressed."""
    packer, block = zlib.compressobj(1), bytes(1 << 20)
    return (
        b"".join(packer.compress(block[: min(1 << 20, count - at)]) for at in range(0, count, 1 << 20)) + packer.flush()
    )


def jpeg_that_claims(width, height):
    """A small JPEG whose frame header names another size."""
    data = bytearray(encoded(noise(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def text_bomb():
    """A PNG whose comment unpacks to 256 MB."""
    body = b"Comment\0\0" + zeros(1 << 28)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return GOOD[:33] + chunk + GOOD[33:]


BOMBS = {
    "a PNG of 900 megapixels in 0.5 MB": (lambda: png(30_000, 30_000, 1, 0, zeros(30_000 * 3_751)), "more than 89,478"),
    "a PNG that claims them": (lambda: png(30_000, 30_000, 8, 2, zeros(100)), "more than 89,478,485 pixels"),
    "a JPEG that claims them": (lambda: jpeg_that_claims(30_000, 30_000), "more than 89,478,485 pixels"),
    "a small PNG with 256 MB behind it": (lambda: png(10, 10, 8, 2, zeros(1 << 28)), None),
    "a text of 256 MB": (text_bomb, "Decompressed data too large"),
}


def clock(pid):
    return time.clock_gettime(~pid << 3 | 2)  # the CPU clock of a process, as clock_getcpuclockid(3) makes it


def peak(pid):
    """MB that a process has ever held."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little_time_and_memory(name):
    make, message = BOMBS[name]
    data, decoder = make(), Decoder(60.0)
    decoder.decode(GOOD)
    child = the_child(decoder).pid
    held, ours, seconds = peak(child), peak(os.getpid()), clock(child)
    if message is None:
        assert decoder.decode(data).getcolors() == [(100, (0, 0, 0))]
    else:
        with pytest.raises(DecodeError, match=message):
            decoder.decode(data)
    assert clock(child) - seconds < 1
    assert peak(child) - held < 100
    assert peak(os.getpid()) - ours < 100
    assert the_child(decoder).pid == child


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_the_largest_image_that_is_allowed(mode):
    side = 9_459
    assert MAX_PIXELS - side**2 < 2 * side
    colour = {"RGB": (255, 0, 0), "RGBA": (255, 0, 0, 255), "I;16": 65535}[mode]
    data = encoded(Image.new(mode, (side, side), colour), compress_level=1, exif=turned())
    decoder = Decoder(300.0)
    image = decoder.decode(data)
    assert image.size == (side, side)
    assert image.getpixel((side - 1, side - 1)) == ((255,) * 3 if mode == "I;16" else (255, 0, 0))
    child = the_child(decoder).pid
    assert peak(child) < 2_300
    decoder.decode(GOOD)
    status = Path(f"/proc/{child}/status").read_text()
    assert int(status.split("VmRSS:")[1].split()[0]) / 1024 < 450  # it keeps one image at most


def test_a_claim_within_the_limit_that_is_not_kept(decoder):
    with pytest.raises(DecodeError, match="truncated or corrupt"):
        decoder.decode(png(9_000, 9_000, 8, 2, zeros(100)))


def test_another_alarm_rings_nonetheless():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    outer = signal.setitimer(signal.ITIMER_REAL, 0.2)
    start = time.monotonic()
    try:
        with ends_after(60), ends_after(30):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
        while not rung and time.monotonic() < start + 5:
            pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *outer)
    assert rung[0] - start == pytest.approx(0.2, abs=1)


def test_a_block_that_is_left_in_time_sets_no_alarm():
    outer = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        with ends_after(60):
            assert 59 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
            with ends_after(10):
                assert 9 < signal.getitimer(signal.ITIMER_REAL)[0] <= 10
            assert 59 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
