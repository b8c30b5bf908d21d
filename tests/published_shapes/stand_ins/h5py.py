"""As much of h5py as a script reads with, over files of NumPy."""

import numpy as np


class File:
    def __init__(self, name, mode):
        assert mode == "r"
        self._arrays = np.load(name)

    def __enter__(self):
        return self._arrays

    def __exit__(self, *_):
        self._arrays.close()
