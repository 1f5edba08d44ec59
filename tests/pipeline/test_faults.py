"""Extraction under faults, with real processes: after a restart the cache is what an undisturbed job makes.

Nothing is lost, nothing is there twice, finished shards are left alone, and every file has the same bytes.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
IMAGES, SHARD = 160, 8
CAPTIONS = 5 * IMAGES
ROWS = IMAGES + 2 * CAPTIONS  # one image encoder, two text encoders
SETTINGS = [
    *("--data.scenes.train", "140", "--data.scenes.val", "10", "--data.scenes.test", "10"),
    *("--featurize.images", "efficientnet-lite0", "--featurize.views", "plain"),
    *("--featurize.rows_per_shard", str(SHARD), "--ray.cpus", "2", "--ray.object_store_mb", "100"),
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Rendered pictures, and the files of a cache that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    out, code = finish(featurize(folder / "cache", folder / "pictures"))
    assert code == 0, out
    assert rows_in(out) == ROWS
    return folder / "pictures", files(folder / "cache")


def arguments(cache, pictures):
    return ["featurize", "less", "--cache", str(cache), "--root", str(pictures), *SETTINGS]


def start(command, **environment):
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def featurize(cache, pictures, **environment):
    return start([sys.executable, "-m", "pipeline", *arguments(cache, pictures)], **environment)


def finish(process):
    out, _ = process.communicate()
    return out, process.returncode


def files(cache):
    """Content of all that a cache holds, by path; hidden files are locks and what a killed writer left."""
    found = (path for path in cache.rglob("[!.]*") if path.is_file() and path.name != "samples.parquet")
    return {str(path.relative_to(cache)): path.read_bytes() for path in found}


def rows_in(out):
    """How many rows a job said that it had to extract."""
    return int(re.search(r"(\d+) rows to extract", out)[1])


def records(cache):
    """The finished shards of unfinished columns: record -> (inode, change time) of the tar."""
    return {
        path: (status.st_ino, status.st_mtime_ns)
        for path in cache.glob("*@*/*@*/0*.json")
        for status in [path.with_suffix(".tar").stat()]
    }


def wait_for(condition, process):
    """Until something is true; what it is."""
    end = time.monotonic() + 120
    while not (found := condition()):
        assert process.poll() is None, finish(process)[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def kill_driver(process, cache):
    """Kill a job when some shards are finished and others are being made; the finished ones."""
    wait_for(lambda: len(records(cache)) >= 5, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    psutil.wait_procs(family, timeout=60)  # Ray's processes end with their driver
    finish(process)
    done = records(cache)
    assert 5 <= len(done) < ROWS // SHARD
    return done


BEGUN = """
import os, sys
def hook(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(".begun.tmp"):
        with open(os.environ["BEGUN"], "a") as file:
            file.write(f"{arguments[1]}\\n")
sys.addaudithook(hook)
"""


def watched(folder):
    """Environment in which every process notes the shards that it begins, in the file `begun` of the folder."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BEGUN)
    return {"BEGUN": str(folder / "begun"), "PYTHONPATH": str(folder)}


def check_recomputed(folder):
    """Rows that were described more than once are those of one shard at most, of all rows."""
    begun = Counter((folder / "begun").read_text().splitlines())
    rows = {path: SHARD * (1 if "efficientnet" in path else CAPTIONS // IMAGES) for path in begun}
    assert sum(rows.values()) == ROWS
    recomputed = sum(rows[path] * (times - 1) for path, times in begun.items())
    print(f"recomputed rows / all rows: {recomputed / ROWS:.2%}")
    assert recomputed <= max(rows.values())


def rows_of(record):
    return int(re.search(r'"rows": (\d+)', record.read_text())[1])


def check_restart(cache, pictures, done, expected, **environment):
    """The same command again recomputes no finished row and ends in the same bytes."""
    finished = sum(map(rows_of, done))
    out, code = finish(featurize(cache, pictures, **environment))
    assert code == 0, out
    assert rows_in(out) / ROWS == 1 - finished / ROWS
    for record, (inode, changed) in done.items():
        status = record.with_suffix(".tar").stat()
        assert (status.st_ino, status.st_mtime_ns) == (inode, changed)
    assert files(cache) == expected
    assert not list(cache.rglob(".*.tmp"))


def test_a_killed_worker(undisturbed, tmp_path):
    pictures, expected = undisturbed
    cache = tmp_path / "cache"
    process = featurize(cache, pictures, **watched(tmp_path / "watched"))
    wait_for(lambda: len(records(cache)) >= 3, process)
    before = records(cache)

    def busy():
        ours = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        every = psutil.process_iter(["cmdline"])
        return [one for one in every if one.pid in ours and "ray::extract_shard" in "".join(one.info["cmdline"] or [])]

    wait_for(busy, process)[0].send_signal(signal.SIGKILL)
    out, code = finish(process)
    assert code == 0, out
    check_recomputed(tmp_path / "watched")
    assert files(cache) == expected
    tars = {record: record.with_suffix(".tar").stat() for record in before}
    assert {record: (status.st_ino, status.st_mtime_ns) for record, status in tars.items()} == before


def test_a_killed_driver(undisturbed, tmp_path):
    pictures, expected = undisturbed
    done = kill_driver(featurize(tmp_path, pictures), tmp_path)
    (next(tmp_path.glob("*@*/efficientnet*")) / ".000019.tar.killed.tmp").write_bytes(b"half")
    check_restart(tmp_path, pictures, done, expected)


def test_a_node_that_is_lost(undisturbed, tmp_path):
    pictures, expected = undisturbed
    environment = {**watched(tmp_path / "watched"), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    script = tmp_path / "lose_a_node.py"
    script.write_text(
        f"""
import json, sys, threading, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import ray
from ray.cluster_utils import Cluster
from pipeline.__main__ import main

small = {{"object_store_memory": 100 * 2**20}}
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 0, **small}})
lost, _ = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
ray.init(cluster.address, runtime_env={{"env_vars": {{"PYTHONPATH": {f"{ROOT}:{tmp_path / 'watched'}"!r}}}}})

def lose():
    while len(records := list(Path({str(tmp_path)!r}).glob("cache/*@*/*@*/0*.json"))) < 5:
        time.sleep(0.01)
    tars = [record.with_suffix(".tar") for record in records]
    finished = {{str(tar): [tar.stat().st_ino, tar.stat().st_mtime_ns] for tar in tars}}
    Path({str(tmp_path / "finished.json")!r}).write_text(json.dumps(finished))
    cluster.remove_node(lost, allow_graceful=False)
    print("LOST", flush=True)

threading.Thread(target=lose, daemon=True).start()
sys.exit(main({arguments(tmp_path / "cache", pictures)!r}))
"""
    )
    out, code = finish(start([sys.executable, str(script)], **environment))
    assert code == 0, out
    assert "LOST" in out
    check_recomputed(tmp_path / "watched")
    assert files(tmp_path / "cache") == expected
    finished = json.loads((tmp_path / "finished.json").read_text())
    assert len(finished) >= 5
    for path, before in finished.items():
        assert [Path(path).stat().st_ino, Path(path).stat().st_mtime_ns] == before


def test_an_interrupted_driver(undisturbed, tmp_path):
    """Ctrl-C: the workers finish what they have begun before their driver ends."""
    pictures, expected = undisturbed
    job = featurize(tmp_path, pictures)
    wait_for(lambda: len(records(tmp_path)) >= 5, job)
    job.send_signal(signal.SIGINT)
    out, code = finish(job)
    assert code == 130, out
    assert "the same command goes on: finished shards are kept" in out
    done = records(tmp_path)
    assert 5 <= len(done) < ROWS // SHARD
    assert list(tmp_path.rglob(".*.tmp")) == []
    check_restart(tmp_path, pictures, done, expected)


def mounting(folder):
    """What runs a shell script that may mount a file system on the folder."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*mount, f"mount -t tmpfs -o size=1m tmpfs {folder}"], check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    return mount


def test_a_full_disk(undisturbed, tmp_path):
    """The cache lies on a file system of its own that is too small at first."""
    pictures, expected = undisturbed
    mount = mounting(tmp_path)
    command = " ".join([sys.executable, "-m", "pipeline", *arguments(tmp_path, pictures)])
    kept = tmp_path.with_name("kept")
    script = f"""
        mount -t tmpfs -o size=1500k tmpfs {tmp_path}
        {command}; echo "CODE $?"
        find {tmp_path} -name '0*.json' | wc -l | sed 's/^/RECORDS /'
        find {tmp_path} -name '.*.tmp' | wc -l | sed 's/^/LEFT /'
        mount -o remount,size=20m {tmp_path}
        {command}; echo "CODE $?"
        cp -a {tmp_path} {kept}
    """
    out, code = finish(start([*mount, script]))
    assert code == 0, out
    assert re.findall(r"CODE (\d)", out) == ["2", "0"], out
    assert re.search(r"error: .*: no room for shard \d+ \(No space left on device\); what is finished stays", out)
    assert "LEFT 0" in out
    finished = int(re.search(r"RECORDS (\d+)", out)[1])
    assert finished
    again = [int(rows) for rows in re.findall(r"(\d+) rows to extract", out)]
    assert again[0] == ROWS
    assert again[1] <= ROWS - SHARD * finished
    assert files(kept) == expected


def test_a_disk_without_any_room(undisturbed, tmp_path):
    """Not even the index fits."""
    pictures, _ = undisturbed
    mount = mounting(tmp_path)
    command = " ".join([sys.executable, "-m", "pipeline", *arguments(tmp_path, pictures)])
    out, code = finish(start([*mount, f"mount -t tmpfs -o size=8k tmpfs {tmp_path}; {command}"]))
    assert code == 2, out
    assert re.search(r"error: no room on the disk \(.*No space left on device.*\); what is finished stays", out)
    assert "Traceback" not in out


def test_two_jobs_at_once(undisturbed, tmp_path):
    pictures, expected = undisturbed
    jobs = [featurize(tmp_path, pictures) for _ in range(2)]
    done = [finish(job) for job in jobs]
    assert [code for _, code in done] == [0, 0], done
    assert sorted(rows_in(out) for out, _ in done) == [0, ROWS]
    assert sum("waiting for another job that makes " in out for out, _ in done) == 1
    assert files(tmp_path) == expected


CLOCK = """
import os, time
_time, _time_ns = time.time, time.time_ns
def _shift():
    try:
        with open(os.environ["SHIFT"]) as file:
            return int(file.read() or 0)
    except FileNotFoundError:
        return 0
time.time = lambda: _time() + _shift()
time.time_ns = lambda: _time_ns() + _shift() * 10**9
"""


@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_jumps(undisturbed, tmp_path, days):
    """While a job runs, and again before it is restarted; what is finished bears times of the future, or the past."""
    pictures, expected = undisturbed
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    shift = tmp_path / "shift"
    clock = {"SHIFT": str(shift), "PYTHONPATH": str(tmp_path)}
    cache = tmp_path / "cache"
    process = featurize(cache, pictures, **clock)
    wait_for(lambda: records(cache), process)
    shift.write_text(str(days * 86400))
    kill_driver(process, cache)
    moment = time.time() - days * 86400
    for path in cache.rglob("*"):
        os.utime(path, (moment, moment))
    shift.unlink()
    check_restart(cache, pictures, records(cache), expected, **clock)


BAD_FORMAT = """
import ctypes, time
from PIL import Image, ImageFile


class Bad(ImageFile.ImageFile):
    format = "BAD"

    def _open(self):
        ctypes.string_at(0) if self.fp.read(9) == b"BAD crash" else time.sleep(600)


Image.register_open("BAD", Bad, lambda start: start.startswith(b"BAD"))
"""


def test_images_that_end_the_worker(undisturbed, tmp_path):
    """Every Python process knows a format whose decoder hangs or crashes; two images of a shard are of it."""
    pictures, _ = undisturbed
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "sitecustomize.py").write_text(BAD_FORMAT)
    good = sorted(pictures.rglob("*.jpg"))[:14]
    for number, path in enumerate(good):
        (folder / f"{number:02}.jpg").write_bytes(path.read_bytes())
    (folder / "03.jpg").write_bytes(b"BAD crash")
    (folder / "05.jpg").write_bytes(b"BAD hang")
    for path in folder.glob("*.jpg"):
        path.with_suffix(".txt").write_text(f"a picture called {path.stem}\n")
    table = [*("--dataset", "folder", "--root", str(folder), "--data.holdout", "0.3"), *SETTINGS[6:]]
    limits = ["--featurize.decode_timeout", "3", "--featurize.max_quarantined", "0.2"]
    command = [sys.executable, "-m", "pipeline", "featurize", "less", "--cache", str(tmp_path / "cache")]
    out, code = finish(start([*command, *table, *limits], PYTHONPATH=str(tmp_path)))
    assert code == 0, out
    assert "quarantined: 2 of 14 images" in out
    assert "     1  decode: the decoder died\n" in out
    assert "     1  decode: the decoder did not answer within 3 s\n" in out
    (path,) = (tmp_path / "cache").glob("*@*/quarantine.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["image_id"], row["stage"], row["reason"], row["sha256"]) for row in rows] == [
        ("03", "decode", "DecodeError: the decoder died (signal 11)", hashlib.sha256(b"BAD crash").hexdigest()),
        ("05", "decode", "DecodeError: the decoder did not answer within 3 s", hashlib.sha256(b"BAD hang").hexdigest()),
    ]
    out, code = finish(start([sys.executable, "-m", "pipeline", "cache", "verify", str(tmp_path / "cache")]))
    assert (code, out) == (0, "every shard is as its manifest says\n")


LATER = """
from PIL import Image, ImageFile


class Later(ImageFile.ImageFile):
    format = "LATER"

    def _open(self):
        self._size, self._mode, self.tile = (32, 24), "RGB", []
        self.fp.read()

    def load(self):
        self.im = Image.new("RGB", self._size, "red").im
        return Image.Image.load(self)


Image.register_open("LATER", Later, lambda start: start.startswith(b"LATER"))
"""


def test_what_could_not_be_described_is_tried_again_on_demand(undisturbed, tmp_path):
    """A format that Python's imaging library learns to read between two jobs."""
    pictures, _ = undisturbed
    folder, plugins = tmp_path / "pictures", tmp_path / "plugins"
    for path in (folder, plugins):
        path.mkdir()
    for number, path in enumerate(sorted(pictures.rglob("*.jpg"))[:20]):
        (folder / f"{number:02}.jpg").write_bytes(path.read_bytes() if number != 3 else b"LATER")
        (folder / f"{number:02}.txt").write_text(f"picture {number}\n")
    table = ["--dataset", "folder", "--root", str(folder), "--data.holdout", "0.3", *SETTINGS[6:]]
    command = [sys.executable, "-m", "pipeline", "featurize", "less", "--cache", str(tmp_path / "cache"), *table]
    out, code = finish(start([*command, "--max-quarantined", "0.04"]))
    assert code == 2, out
    assert "error: 1 of 20 images cannot be used, more than the 4%" in out
    (path,) = (tmp_path / "cache").glob("*@*/quarantine.jsonl")
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (row["image_id"], row["stage"], row["columns"]) == ("03", "decode", ["efficientnet-lite0.pooled"])
    assert row["sha256"] == hashlib.sha256(b"LATER").hexdigest()
    tars = sorted(path.parent.glob("efficientnet*/*.tar"))
    before = [(tar.stat().st_ino, tar.read_bytes()) for tar in tars]
    (plugins / "sitecustomize.py").write_text(LATER)
    out, code = finish(start([*command, "--retry-quarantined"], PYTHONPATH=str(plugins)))
    assert code == 0, out
    assert "2 columns found, 1 rows to extract, 7 rows are known already" in out
    assert "quarantined" not in out
    assert path.read_text() == ""
    after = [(tar.stat().st_ino, tar.read_bytes()) for tar in tars]
    assert after[1:] == before[1:]
    stride = 3584  # header, npy header and 1280 numbers, up to a multiple of 512
    old, new = before[0][1], after[0][1]
    assert (new[: 3 * stride], new[4 * stride :]) == (old[: 3 * stride], old[4 * stride :])
    assert new[3 * stride : 4 * stride] != old[3 * stride : 4 * stride]
