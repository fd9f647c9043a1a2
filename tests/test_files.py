"""Files and folders that are whole or not there, whoever else writes them."""

import os

import pytest

from twdpo.files import make_directory, mend, write_atomic


def folder_of(text: str):
    def write(path):
        path.mkdir()
        (path / "file").write_text(text)
    return write


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "file", lambda path: path.write_text("old"))

    def fails(path):
        path.write_text("half")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "file", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_folder_is_replaced_or_stays(tmp_path):
    write_atomic(tmp_path / "folder", folder_of("first"))
    write_atomic(tmp_path / "folder", folder_of("second"))
    assert (tmp_path / "folder/file").read_text() == "second"

    def another_process_is_faster(path):
        folder_of("mine")(path)
        write_atomic(tmp_path / "race", folder_of("theirs"))
    write_atomic(tmp_path / "race", another_process_is_faster, replace=False)
    assert (tmp_path / "race/file").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "race"]


def test_files_have_the_permissions_of_new_files(tmp_path):
    """safetensors writes them for their owner alone."""
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", lambda path: (path.touch(), path.chmod(0o600)))
        write_atomic(tmp_path / "folder", lambda path: (folder_of("x")(path), (path / "file").chmod(0o600)))
    finally:
        assert os.umask(old) == 0o027
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "file", tmp_path / "folder/file")] == [0o640, 0o640]


def test_what_killed_processes_left_is_removed(tmp_path):
    folder_of("half")(tmp_path / ".final.0123abcd.tmp")
    (tmp_path / "kept").write_text("x")
    mend(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_that_can_be_made_is_empty(tmp_path):
    assert list(make_directory(tmp_path / "a/b", "--out").iterdir()) == []
