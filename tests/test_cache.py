import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from oder_fast import data
from oder_fast.data import Sample

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Counted(data.Samples):
    """Samples with all parts, that tell how often they were made."""

    def __init__(self, n=5, settings=0):
        self.names = [f"sample {k}" for k in range(n)]
        self.groups, self.shapes, self.settings = self.names, [(4, 5)] * n, settings
        self.made = []

    def __getitem__(self, index):
        number = self._check(index)
        self.made.append(number)
        kspace = torch.full((2, 4, 5), number + 1j)
        return Sample(
            self.names[number], torch.full((4, 5), float(number + self.settings)), kspace, kspace + 1
        )

    def fingerprint(self, index):
        return self._hash(self.settings, self._check(index))


SIZE = 4 * 5 * 4 + 2 * 2 * 4 * 5 * 8


def equal(one, other):
    return all(
        a is b if a is None or b is None else a == b if isinstance(a, str) else torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kept", [0, 2, 5])
def test_samples_are_made_once(tmp_path, on_disk, kept):
    dataset = Counted()
    cached = data.Cached(dataset, tmp_path / "new" / "folder" if on_disk else None, memory=kept * SIZE + 7)
    assert (cached.names, cached.groups, cached.shapes) == (dataset.names, dataset.groups, dataset.shapes)
    for _ in range(3):
        for k in (3, 0, 4, 2, -4):
            assert equal(cached[k], Counted()[k])
    # Those that came first are kept, the others made each time.
    made = {k: 1 if on_disk or position < kept else 3 for position, k in enumerate((3, 0, 4, 2, 1))}
    assert {k: dataset.made.count(k) for k in range(5)} == made
    assert len(cached) == 5
    assert cached.fingerprint(2) == dataset.fingerprint(2)
    with pytest.raises(IndexError):
        cached[5]


def test_what_is_kept_cannot_be_written_into(tmp_path):
    for folder in (None, tmp_path):
        cached = data.Cached(Counted(), folder)
        cached[1].image.zero_()
        cached[1].kspace.zero_()
        assert equal(cached[1], Counted()[1])


def test_other_runs_and_settings(tmp_path):
    data.Cached(Counted(), tmp_path).fill(progress=False)
    assert len(list(tmp_path.iterdir())) == 5
    later = Counted()
    assert equal(data.Cached(later, tmp_path, memory=0)[2], Counted()[2])
    assert later.made == []
    changed = Counted(settings=7)
    assert data.Cached(changed, tmp_path)[2].image[0, 0] == 9
    assert changed.made == [2]


def test_a_changed_file_is_read_anew(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(20.0).reshape(4, 5))
    cached = data.Cached(data.ImageFolder(tmp_path, scale="none"), tmp_path / "cache")
    assert cached[0].image[3, 4] == 19
    np.save(tmp_path / "a.npy", np.arange(40.0, 60.0).reshape(4, 5))
    assert cached[0].image[3, 4] == 59
    assert len(cached._kept) == 1
    # Its own files are none of the folder's images.
    assert data.ImageFolder(tmp_path).names == ["a.npy"]
    (tmp_path / "a.npy").unlink()
    with pytest.raises(FileNotFoundError):
        cached[0]


def test_settings_are_part_of_the_fingerprint(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 4, 5)), y=np.ones((2, 4, 5)))
    options = [
        {"array": "x"},
        {"array": "y"},
        {"array": "x", "scale": "none"},
        {"array": "x", "scale": (0, 1)},
    ]
    datasets = [data.ImageFolder(tmp_path, **one) for one in options]
    assert len({dataset.fingerprint(k) for dataset in datasets for k in range(2)}) == 8
    assert datasets[0].fingerprint(1) == data.ImageFolder(tmp_path, array="x").fingerprint(1)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "text", "other", "folder"])
def test_damaged_files_are_made_anew(tmp_path, damage):
    cached = data.Cached(Counted(1), tmp_path, memory=0)
    expected = cached[0]
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        middle = len(content) // 3
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "text":
        path.write_text("text")
    elif damage == "other":
        with path.open("wb") as file:
            np.savez(file, another=np.ones(3))
    else:
        path.unlink()
        path.mkdir()
    dataset = Counted(1)
    again = data.Cached(dataset, tmp_path, memory=0)
    if damage == "folder":
        with pytest.warns(UserWarning, match="cannot store samples, they are made anew"):
            assert equal(again[0], expected)
        # Once is enough.
        assert equal(again[0], expected)
        assert dataset.made == [0, 0]
    else:
        assert equal(again[0], expected)
        assert dataset.made == [0]
        assert path.read_bytes() == content or damage != "flipped"
        assert equal(again[0], expected)
        assert dataset.made == [0]
    assert len(list(tmp_path.iterdir())) == 1


def _fill(folder, barrier, results):
    cached = data.Cached(Counted(20), folder, memory=0)
    barrier.wait()
    results.put([float(cached[k].image[0, 0]) for k in range(20)])


def test_several_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_fill, args=(tmp_path, barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [[float(k) for k in range(20)]] * 3
    assert len(list(tmp_path.iterdir())) == 20
    dataset = Counted(20)
    assert all(equal(one, Counted(20)[k]) for k, one in enumerate(data.Cached(dataset, tmp_path)))
    assert dataset.made == []


def test_workers_of_a_loader_share_the_folder(tmp_path):
    cached = data.Cached(data.Phantoms("ellipses", 6, 16), tmp_path, memory=0)
    loader = DataLoader(cached, batch_size=2, num_workers=2, collate_fn=data.collate)
    first = torch.cat([batch.image for batch in loader])
    assert len(list(tmp_path.iterdir())) == 6
    assert torch.equal(first, torch.stack([cached[k].image for k in range(6)]))


def test_pickled_without_what_is_kept():
    cached = data.Cached(Counted())
    cached.fill(progress=False)
    assert len(cached._kept) == 5
    copy = pickle.loads(pickle.dumps(cached))
    assert copy._kept == {}
    assert equal(copy[2], cached[2])
    cached.fill(progress=False)
    assert cached.dataset.made == list(range(5))


def test_subsets_of_cached_samples(tmp_path):
    part = data.split(data.Cached(Counted(10), tmp_path), (0.5, 0.5), 0)[1]
    assert [one.name for one in part] == part.names
    assert equal(data.Cached(part, tmp_path)[0], part[0])
    with pytest.raises(ValueError, match="memory must be at least 0 bytes, got -1"):
        data.Cached(part, memory=-1)
