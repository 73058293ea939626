"""The run folder, here and at an address: every file is whole or not there."""

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from sd_guard.screening.storage import Store


@pytest.fixture(params=["path", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    addresses = {"path": tmp_path / "run", "file": f"file://{tmp_path}/run", "memory": f"memory://{uuid.uuid4()}/run"}
    return Store.at(addresses[request.param])


def test_files_are_written_listed_read_and_removed(store: Store) -> None:
    assert store.names() == []
    assert not store.exists("a")
    store.write("a", b"1")
    store.write("deep/er/b", b"22")
    store.write("deep/c", b"3")
    assert store.names() == ["a", "deep"]
    assert store.names("deep") == ["c", "er"]
    assert store.read("deep/er/b") == b"22"
    store.write("a", b"4")
    with store.open("a") as file:
        assert file.read() == b"4"
    store.remove("deep")
    store.remove("never there")
    assert store.names() == ["a"]


def test_a_file_that_could_not_be_finished_is_not_there(store: Store) -> None:
    store.write("a", b"old")
    for name in ("a", "b"):
        with pytest.raises(RuntimeError), store.create(name) as file:
            file.write(b"half")
            file.flush()
            assert not store.exists("b")
            raise RuntimeError
    assert store.read("a") == b"old"
    assert store.names() == ["a"]


def test_only_a_folder_on_this_machine_has_a_path(tmp_path: Path) -> None:
    assert Store.at(tmp_path).local == tmp_path
    assert Store.at(f"file://{tmp_path}").local == tmp_path
    assert Store.at("memory://x").local is None
    store = Store.at("memory://x")
    assert Store.at(store) is store


@pytest.mark.parametrize("address", ["nowhere://x", "s3://bucket/run"])
def test_an_address_that_cannot_be_used_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"cannot be used as a folder .*; name another") as caught:
        Store.at(address)
    assert "\n" not in str(caught.value)


def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    with store.create("a") as first:
        first.write(b"first")
        store.write("a", b"second")
    assert store.read("a") == b"first"
    assert store.names() == ["a"]


def test_one_process_at_a_time_has_the_lock(tmp_path: Path) -> None:
    """Until it is closed, or the process ends; the file is no part of the folder, and gone at the end."""
    store = Store.at(tmp_path / "run")
    taking = f"from sd_guard.screening.storage import Store; Store.at({str(tmp_path / 'run')!r}).lock()"

    def take(more: str = "") -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-c", f"{taking}{more}"], capture_output=True, text=True)

    lock = store.lock()
    assert lock is not None and store.lock() is lock
    assert store.names() == []
    assert "ValueError: " in take().stderr
    assert f"{store.address}: another run is at work there; wait for its end, or name another" in take().stderr
    lock.close()
    assert list((tmp_path / "run").iterdir()) == []
    assert take().returncode == 0
    killed = take("; import os; os.kill(os.getpid(), 9)")
    assert killed.returncode == -9
    again = store.lock()
    assert again is not None and again is not lock
    assert Store.at("memory://run").lock() is None


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file/run: cannot be written \(Not a directory\); name another folder"):
        Store.at(tmp_path / "file" / "run").lock()


def test_what_a_killed_process_left_half_written_is_not_listed_and_swept(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    half = store.create("a")
    half.__enter__().write(b"half")  # and never ends
    (left,) = tmp_path.iterdir()
    (tmp_path / ".hidden").touch()
    assert store.names() == [".hidden"]
    store.sweep()
    store.sweep("not there")
    assert not left.exists()
    assert store.names() == [".hidden"]
