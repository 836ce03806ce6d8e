"""idx files: what is written is read, and what is damaged is one clear error."""

import gzip

import numpy as np
import pytest
from made.classifying import write_idx, write_idx_folder

from gspn_dit.data.idx import is_idx_folder, read_idx, read_split
from gspn_dit.data.pictures import open_training
from gspn_dit.errors import InputError


@pytest.mark.parametrize("name", ["a-images-idx3-ubyte.gz", "a-images-idx3-ubyte"])
def test_what_is_written_is_read(tmp_path, name):
    values = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    write_idx(tmp_path / name, values)
    assert np.array_equal(read_idx(tmp_path / name, axes=3), values)


def test_the_bytes_are_those_of_the_format(tmp_path):
    """As MNIST's page describes it: magic number 0x00000801, the number of items, the labels."""
    (tmp_path / "labels").write_bytes(bytes.fromhex("00000801 00000003 07 00 09"))
    assert read_idx(tmp_path / "labels", axes=1).tolist() == [7, 0, 9]


def damaged(path, how):
    data = gzip.decompress(path.read_bytes())
    if how == "truncated gz":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "flipped gz":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        path.write_bytes(raw)
    else:
        changed = {
            "bad magic": b"\0\0\x0d\3" + data[4:],
            "labels": b"\0\0\x08\1" + data[4:],
            "fewer": data[:-7],
            "more": data + b"\0",
            "header alone": data[:9],
            "nothing": b"",
        }[how]
        path.write_bytes(gzip.compress(changed))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated gz", "cannot be read"),
        ("flipped gz", "cannot be read"),
        ("bad magic", r"begins with 00000d03, no idx file's magic number here \(wanted 00000803"),
        ("labels", r"begins with 00000801.*wanted 00000803"),
        ("fewer", r"holds 3,449 values and says 24 × 12 × 12 = 3,456"),
        ("more", r"holds 3,457 values"),
        ("header alone", "ends after 9 bytes"),
        ("nothing", "ends after 0 bytes"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, how, said):
    folder = write_idx_folder(tmp_path / "data")
    damaged(folder / "train-images-idx3-ubyte.gz", how)
    with pytest.raises(InputError, match=rf"train-images-idx3-ubyte\.gz: {said}") as error:
        open_training(str(folder), 12)
    assert "\n" not in str(error.value)


def test_files_that_do_not_fit_each_other(tmp_path):
    folder = write_idx_folder(tmp_path / "data")
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(23))
    with pytest.raises(InputError, match=r"24 images, train-labels-idx1-ubyte\.gz 23 labels"):
        read_split(folder, "train")
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"no train-labels-idx1-ubyte\.gz beside it"):
        read_split(folder, "train")


def test_a_folder_of_such_files_is_known(tmp_path):
    assert is_idx_folder(write_idx_folder(tmp_path / "data"))
    assert not is_idx_folder(tmp_path) and not is_idx_folder(tmp_path / "nowhere")
