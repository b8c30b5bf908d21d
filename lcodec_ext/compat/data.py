"""What scripts import from ``data_utils`` of the published code."""

import gzip
import importlib
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

_ROOT = "./data"
_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # mean and deviation by channel
_MNIST = (0.1307,), (0.3081,)


class SubsetDataWrapper(Dataset):
    """Some samples of a dataset, or all but some.

    Parameters
    ----------
    dataset : Dataset
    exclude_indices, include_indices : sequence of int, optional
        One of the two. `include_indices` keeps its order and takes precedence.
    """

    def __init__(
        self,
        dataset: Any,
        exclude_indices: Iterable[int] | None = None,
        include_indices: Sequence[int] | None = None,
    ) -> None:
        if include_indices is None:
            if exclude_indices is None:
                raise ValueError("exclude_indices or include_indices must be given; both are None")
            left_out = {int(i) for i in exclude_indices}
            include_indices = [i for i in range(len(dataset)) if i not in left_out]
        self.dataset, self.include_indices = dataset, include_indices
        if hasattr(dataset, "statistics"):
            self.statistics = dataset.statistics
        _LAST[:] = [self]

    def __len__(self) -> int:
        return len(self.include_indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.include_indices[index]]


_LAST: list[SubsetDataWrapper] = []  # that was made


def residual_set(request: Any) -> SubsetDataWrapper | None:
    """The last SubsetDataWrapper, if it is of the request's dataset and leaves the request out.

    Scripts make it before each removal, and pass it to nothing but their evaluation. A training set
    that `getDatasets` reads again is the same dataset.
    """
    indices = getattr(request, "indices", getattr(request, "include_indices", None))
    if not _LAST or indices is None:
        return None
    residual, whole = _LAST[0], request.dataset
    origin = getattr(whole, "_origin", None)
    same = residual.dataset is whole or (
        origin is not None and getattr(residual.dataset, "_origin", None) == origin
    )
    if not same:
        return None
    stay, leave = ({int(i) % len(whole) for i in s} for s in (residual.include_indices, indices))
    if not stay or stay & leave:
        return None
    return residual


class LabelSubsetWrapper(Dataset):
    """The samples of some classes, which are numbered in the order of `which_labels`."""

    def __init__(self, dataset: Any, which_labels: Sequence[int] = (0, 1)) -> None:
        self.dataset, self.which_labels = dataset, tuple(which_labels)
        if hasattr(dataset, "statistics"):
            self.statistics = dataset.statistics
        self.valid_indices = [
            k for k in range(len(dataset)) if int(dataset[k][1]) in self.which_labels
        ]

    def __len__(self) -> int:
        return len(self.valid_indices)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        x, y = self.dataset[self.valid_indices[index]]
        return x, torch.tensor(self.which_labels.index(int(y)))


BinaryDatasetWrapper = LabelSubsetWrapper


class Images(Dataset):
    """Images of bytes as normalised tensors, with their classes as int."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        targets: NDArray[np.int64],
        statistics: tuple[Sequence[float], Sequence[float]],
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._images, self.targets, self._augment = images, targets.tolist(), augment
        self._mean, self._std = (torch.tensor(each)[:, None, None] for each in statistics)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self._images[index].copy())
        if self._augment is not None:
            image = self._augment(image)
        return (image.float() / 255 - self._mean) / self._std, self.targets[index]


def _crop_and_flip(image: Tensor) -> Tensor:
    """A crop of an image padded by 4, mirrored with probability 1/2; from torch's generator."""
    height, width = image.shape[1:]
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    top, left, flip = (int(torch.randint(n, ())) for n in (9, 9, 2))
    image = padded[:, top : top + height, left : left + width]
    return image.flip(2) if flip else image


def _idx(name: str) -> NDArray[np.uint8]:
    """An array from a file of MNIST, which may be packed."""
    for path in (Path(_ROOT, "MNIST/raw", name), Path(_ROOT, "MNIST/raw", f"{name}.gz")):
        if path.exists():
            data = gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes()
            shape = np.frombuffer(data, ">i4", data[3], 4)
            return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    raise FileNotFoundError(
        f"dataset 'mnist' is read from {_ROOT}/MNIST/raw, as torchvision stores it; there is no "
        f"{name} or {name}.gz"
    )


def _mnist(part: str) -> Images:
    images = _idx(f"{part}-images-idx3-ubyte")[:, None]
    return Images(images, _idx(f"{part}-labels-idx1-ubyte").astype(np.int64), _MNIST)


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes as protocols before 3 write them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes are written in latin1, and here in {encoding!r}")
    return text.encode(encoding)


class _Arrays(pickle.Unpickler):
    """Reads pickles of arrays, of all protocols, and nothing that runs.

    The published files are of protocol 2, written by Python 2.
    """

    _KNOWN = frozenset(
        [("numpy", "ndarray"), ("numpy", "dtype")]
        + [
            (f"numpy.{core}.{module}", name)
            for core in ("core", "_core")
            for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
        ]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) in self._KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"a file of CIFAR-10 has arrays alone, and this one {module}.{name}"
        )


def _cifar10(names: Iterable[str], augment: Callable[[Tensor], Tensor] | None) -> Images:
    images, targets = [], []
    for name in names:
        path = Path(_ROOT, "cifar-10-batches-py", name)
        if not path.exists():
            raise FileNotFoundError(
                f"dataset 'cifar10' is read from {path.parent}, the published archive unpacked; "
                f"there is no {name}"
            )
        with path.open("rb") as file:
            batch = _Arrays(file, encoding="bytes").load()
        images.append(np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32))
        targets += batch[b"labels"]
    return Images(np.concatenate(images), np.array(targets, np.int64), _CIFAR, augment)


def _of_script(module: str, name: str, *args: Any, **options: Any) -> Any:
    """A dataset of a class that the published folder has, beside the script."""
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this dataset needs {name} of {module}.py, which belongs beside the script",
            name=module,
        ) from error
    return found(*args, **options)


def getDatasets(
    name: str = "mnist",
    val_also: bool = True,
    include_indices: Sequence[int] | None = None,
    exclude_indices: Iterable[int] | None = None,
    data_augment: bool = False,
) -> tuple[Any, Any]:
    """Training and validation set of a name: "mnist", "binary-mnist", "cifar10", "vggface", ....

    Files are read below ``./data``, as torchvision stores them; nothing is downloaded. "vggface"
    and "celeba_ID" are the classes of ``VGGFaceDataset.py`` and ``dataset.py`` beside the script.

    Parameters
    ----------
    name : str
    val_also : object
        Ignored, as there.
    include_indices, exclude_indices : sequence of int, optional
        A part of the training set, as in `SubsetDataWrapper`.
    data_augment : bool
        Random crops and reflections of CIFAR-10's training images.
    """
    train: Any
    val: Any
    if name in ("mnist", "binary-mnist"):
        train, val = (_mnist(part) for part in ("train", "t10k"))
        if name == "binary-mnist":
            train, val = (LabelSubsetWrapper(each) for each in (train, val))
    elif name == "cifar10":
        batches = [f"data_batch_{k}" for k in range(1, 6)]
        train = _cifar10(batches, _crop_and_flip if data_augment else None)
        val = _cifar10(["test_batch"], None)
    elif name == "vggface":
        options = {"attr_data_file": "dled_vggface.csv", "person": "", "exclude": True}
        train, val = (_of_script("VGGFaceDataset", name="VGGFaceDataset", **options) for _ in "tv")
    elif name == "celeba_ID":
        train, val = (_of_script("dataset", "OurCelebA", "./data", n_classes=100) for _ in "tv")
    else:
        raise ValueError(
            "name must be 'mnist', 'binary-mnist', 'cifar10', 'vggface' or 'celeba_ID'; got "
            f"{name!r}. Keep a data_utils.py of your own with install(keep=['data_utils'])"
        )
    train._origin = name, data_augment  # the same samples when they are read again
    if include_indices is not None or exclude_indices is not None:
        train = SubsetDataWrapper(train, exclude_indices, include_indices)
    return train, val
