"""The hash of files: equal to its naive twin, new when a file changes, and read only then."""

import hashlib
import os
from random import Random

import pytest

from dft_lora.runs.files_hash import BLOCK, BLOCKS, files_hash

LARGE = BLOCK * BLOCKS + 12_345


@pytest.fixture
def files(tmp_path):
    sizes = {"config.json": 40, "empty.bin": 0, "model.safetensors": LARGE}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(Random(size).randbytes(size))
    return [tmp_path / name for name in sizes]


def write_at(path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def test_it_is_the_sha256_over_names_sizes_and_contents(files):
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    assert files_hash(files) == sha.hexdigest()


@pytest.mark.parametrize("sampled", [False, True])
def test_a_changed_name_or_content_changes_it(files, sampled):
    seen = {files_hash(files, sampled), files_hash(files[:2], sampled), files_hash(files[::-1], sampled)}
    write_at(files[2], 0, b"another beginning")
    seen.add(files_hash(files, sampled))
    moved = files[2].rename(files[2].with_name("other.safetensors"))
    seen.add(files_hash([*files[:2], moved], sampled))
    assert len(seen) == 5


def test_a_sample_reads_64_blocks_of_a_large_file_and_all_of_a_small_one(files):
    gap = LARGE // BLOCKS - BLOCK  # bytes between two blocks
    whole, sample = files_hash(files), files_hash(files, sampled=True)
    write_at(files[2], BLOCK, b"?" * gap)
    assert files_hash(files) != whole and files_hash(files, sampled=True) == sample
    assert files_hash(files[:2]) == files_hash(files[:2], sampled=True)


def test_an_unchanged_file_is_not_read_again(files):
    """The content is replaced behind its size and date; a new date makes it read."""
    before, stat = files_hash(files), files[0].stat()
    write_at(files[0], 0, b"other")
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files_hash(files) == before
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    assert files_hash(files) != before
