"""Files that are whole or not there."""

import errno
import os
import socket
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gspn_dit.errors import InputError, machine_fault
from gspn_dit.options import command
from gspn_dit.storage.files import alone_in, check_place, new_folder, replacing, save_tensors


def test_a_file_is_whole_or_not_there(tmp_path):
    def interrupted():
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_as_readable_as_other_files(tmp_path):
    (tmp_path / "text").write_text("")
    save_tensors({"one": torch.ones(1)}, tmp_path / "tensors")
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "text").stat().st_mode
    assert load_file(tmp_path / "tensors")["one"] == 1


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_ino, path.read_text())))
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert synced == [(path.stat().st_ino, "old")]
    assert path.read_text() == "new"


def write(path, text="new"):
    with replacing(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, there):
    (tmp_path / "target").write_text("old") if there else None
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "second").symlink_to("link")
    write(tmp_path / "second")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "second", "target"]


def test_a_pipe_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    write(tmp_path / "pipe")
    reader.join(10)
    assert read == ["new"]
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_device_is_written_into_and_a_full_one_is_named(tmp_path, devices_stay):
    for name in ("null", "full"):
        (tmp_path / name).symlink_to(f"/dev/{name}")
    write(tmp_path / "null")
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "full")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "full"))
    assert all((tmp_path / name).is_char_device() and (tmp_path / name).is_symlink() for name in ("null", "full"))


def test_an_open_file_is_written_at_its_place(tmp_path):
    with open(tmp_path / "file", "w+") as file:
        file.write("before, ")
        file.flush()
        write(f"/dev/fd/{file.fileno()}")
        file.seek(0)
        assert file.read() == "before, new"


def test_each_process_has_a_temporary_file_of_its_own_and_a_dead_ones_goes(tmp_path):
    dead = forked(lambda: None)
    os.waitpid(dead, 0)
    host = socket.gethostname()
    kept = [f".file.{os.getppid()}@{host}.tmp", f".file.{dead}@other-{host}.tmp", ".file.mine.tmp"]
    for name in (*kept, f".file.{dead}@{host}.tmp"):
        (tmp_path / name).write_text("half")
    check_place(tmp_path / "file")
    with replacing(tmp_path / "file") as temporary:
        assert temporary.name not in kept
        temporary.write_text("new")
    assert sorted(os.listdir(tmp_path)) == sorted(["file", *kept])


def test_a_folder_is_one_process_at_a_time(tmp_path):
    """While one has it others wait, whoever comes, and are told who has it; nothing of it is left."""
    folder, told = tmp_path / "new" / "folder", tmp_path / "told"

    def note(holder):
        with open(told, "a") as file:
            file.write(holder + "\n")

    def work():
        for _ in range(5):
            with alone_in(folder, note):
                (folder / "one").touch(exist_ok=False)
                time.sleep(0.01)
                (folder / "one").unlink()

    with alone_in(folder, note):
        others = [forked(work) for _ in range(4)]
        late = time.monotonic() + 30
        while not told.exists() or len(told.read_text().splitlines()) < 4:
            assert time.monotonic() < late
            time.sleep(0.01)
    assert [os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) for other in others] == [0, 0, 0, 0]
    holders = told.read_text().splitlines()
    assert holders[:4] == [f"process {os.getpid()} on {socket.gethostname()}"] * 4
    assert set(holders[4:]) <= {f"process {other} on {socket.gethostname()}" for other in others} | {"another process"}
    assert list((tmp_path / "new").iterdir()) == []


def forked(work):
    """A child process that does it; its id."""
    if child := os.fork():
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def test_places_are_looked_at_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere/file")
    for path, options, words in [
        (tmp_path, {}, "is a folder; wanted a file name"),
        (tmp_path / "file", {"folder": True}, "is a file; wanted a folder"),
        (tmp_path / "file" / "below" / "it", {}, "file' is no folder that can be written to"),
        (tmp_path / "link", {}, "nowhere', which is not there"),
        (tmp_path / "new" / "one", {"size": 10**18}, r"at least 1000\.0 PB are to be written, and '.*' has room for"),
    ]:
        with pytest.raises(InputError, match=words) as error:
            check_place(path, "npz", **options)
        assert str(error.value).startswith(f"npz={str(path)!r}: ")
    for path in (tmp_path / "new" / "one", tmp_path / "file", "/dev/null", "/dev/stdout"):
        check_place(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_new_folder_is_made_where_its_link_leads(tmp_path):
    (tmp_path / "link").symlink_to("target")
    with new_folder(tmp_path / "link") as folder:
        folder.mkdir()
        (folder / "file").write_text("")
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "target") == ["file"]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_memory(path):
    np.empty(2**60, dtype=np.uint8)


def no_memory_of_torch(path):
    torch.empty(2**55)


def into_a_file(path):
    (path.parent / "file").write_text("")
    write(path.parent / "file" / "below")


def tensors_into_nowhere(path):
    (path.parent / "file").write_text("")
    save_file({"one": torch.ones(1)}, path.parent / "file" / "below")


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda path: write(path) if os.fsync is full else None, "{}: No space left on device; make room there"),
        (no_memory, "not enough memory (for 1.00 EiB more); fewer images"),
        (no_memory_of_torch, "not enough memory (for 144115188075855872 bytes more); fewer images"),
        (into_a_file, "Not a directory; name another place"),
        (tensors_into_nowhere, "{}: Not a directory; name another place"),
        (lambda path: write(path.parent / "none" / "file"), "file: there is no such folder; make it"),
    ],
)
def test_what_the_machine_cannot_give_is_said_in_one_line(tmp_path, monkeypatch, capsys, work, words):
    @dataclass
    class Options:
        out: str

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stopped:
        command(lambda options: work(tmp_path / "out"), Options, prog="it", argv=["--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1
    assert line.startswith("it: error: ") and words.format(tmp_path / "out") in line
    assert set(os.listdir(tmp_path)) <= {"file"}


def test_faults_of_the_program_keep_their_traceback_and_ctrl_c_has_none(capsys):
    @dataclass
    class Options:
        pass

    for error in (RuntimeError("shapes do not fit"), FileNotFoundError(2, "No such file", "name"), KeyError("x")):
        assert machine_fault(error) is None
        with pytest.raises(type(error)):
            command(lambda options, error=error: (_ for _ in ()).throw(error), Options, prog="it", argv=[])
    for continues, line in ((False, "it: interrupted\n"), (True, "it: interrupted; the same command goes on here\n")):
        with pytest.raises(SystemExit) as stopped:
            command(
                lambda options: (_ for _ in ()).throw(KeyboardInterrupt()),
                Options,
                prog="it",
                argv=[],
                continues=continues,
            )
        assert stopped.value.code == 130
        assert capsys.readouterr().err == line
