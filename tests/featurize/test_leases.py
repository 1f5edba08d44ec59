"""One job at a time makes a column, also where no lock is: leases are renewed, waited for, taken over."""

import json
import threading
import time

import pytest

from featurize import leases
from featurize.leases import LOCK, clear_temporary, held, is_held
from featurize.places import files, make_folder, place, publish, read


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    """A column's folder here, in an object store, and in a store that is none."""
    if request.param == "local":
        yield tmp_path / "column@1"
    elif request.param == "s3":
        yield request.getfixturevalue("bucket") / "column@1"
    else:
        made = place(f"memory://{tmp_path.name}/column@1", ValueError)
        yield made
        made.fs.store.clear()


@pytest.fixture
def remote(bucket):
    return bucket / "column@1"


@pytest.fixture
def quick(monkeypatch):
    """Beats of a twentieth of a second; patience with a holder on a machine that is busy."""
    for name, seconds in {"BEAT": 0.05, "PATIENCE": 3.0, "_SETTLE": 0.1}.items():
        monkeypatch.setattr(leases, name, seconds)


def now(folder):
    return max(file.modified for file in files(folder))


def test_one_at_a_time(folder, quick, capsys):
    order = []
    inside, end = threading.Event(), threading.Event()

    def first():
        with held(folder):
            order.append("first begins")
            inside.set()
            end.wait()
            order.append("first ends")

    def second():
        with held(folder):
            order.append("second")

    one, two = (threading.Thread(target=target, daemon=True) for target in (first, second))
    one.start()
    assert inside.wait(10)
    assert is_held(folder, now(folder))
    two.start()
    two.join(1.3 * leases.PATIENCE)  # longer than a dead holder is waited for
    assert two.is_alive()
    end.set()
    one.join()
    two.join()
    assert order == ["first begins", "first ends", "second"]
    assert capsys.readouterr().out == "waiting for another job that makes column@1\n"
    assert not is_held(folder, 2e9)


def test_a_lease_names_its_holder_and_counts(remote, quick):
    with held(remote):
        before = json.loads(read(remote / LOCK))
        assert set(before) == {"holder", "beat", "machine", "process"}
        for _ in range(100):
            if (after := json.loads(read(remote / LOCK)))["beat"] > before["beat"]:
                break
            threading.Event().wait(0.05)
        assert after["holder"] == before["holder"]
        assert after["beat"] > before["beat"]
    assert not remote.exists()


def test_a_dead_holder_is_replaced(remote, quick):
    publish(remote / LOCK, b'{"holder": "dead", "beat": 7}')
    with held(remote):
        assert json.loads(read(remote / LOCK))["holder"] != "dead"
    assert not remote.exists()


def test_all_leases_of_a_dead_job_are_taken_over_at_once(bucket, quick, monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE", 5.0)
    folders = [bucket / f"column@{number}" for number in range(4)]
    for folder in folders:
        publish(folder / LOCK, b'{"holder": "dead", "beat": 7}')
    begun = time.monotonic()
    with held(*folders):
        assert time.monotonic() - begun < 3 * leases.PATIENCE  # not four times


def test_of_several_that_take_over_one_has_it(remote, quick, monkeypatch):
    monkeypatch.setattr(leases, "_SETTLE", 1.0)
    publish(remote / LOCK, b'{"holder": "dead", "beat": 7}')
    inside, most = [], []

    def work():
        with held(remote):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.2)
            inside.pop()

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1, 1, 1]


def test_a_holder_that_lost_its_lease_leaves_it_alone(remote, quick):
    with held(remote):
        publish(remote / LOCK, b'{"holder": "another", "beat": 1}')
    assert json.loads(read(remote / LOCK))["holder"] == "another"


def test_a_beat_that_fails_is_tried_again(remote, quick, monkeypatch):
    failures = []
    write = leases._Lease._write

    def failing(lease):
        if len(failures) < 2:
            failures.append(1)
            raise ConnectionResetError
        write(lease)

    with held(remote):
        monkeypatch.setattr(leases._Lease, "_write", failing)
        for _ in range(100):
            if len(failures) == 2 and json.loads(read(remote / LOCK))["beat"] > 1:
                break
            threading.Event().wait(0.05)
        assert json.loads(read(remote / LOCK))["beat"] > 1


def test_a_lease_that_was_forgotten_holds_nothing(remote):
    publish(remote / LOCK, b"{}")
    moment = now(remote)
    assert is_held(remote, moment + 3600)
    assert not is_held(remote, moment + 2 * 24 * 3600)


def test_what_killed_workers_left_is_cleared(folder):
    make_folder(folder)
    for name in (".000000.tar.1234.tmp", "000000.tar", "column.json"):
        publish(folder / name, b"x")
    clear_temporary(folder)
    assert sorted(file.name for file in files(folder)) == ["000000.tar", "column.json"]
