"""Faces by a table of persons, paths and numbers, as the script's own module reads them."""

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset


class VGGFaceDataset(Dataset):
    def __init__(self, attr_data_file, person, exclude):
        table = pd.read_csv(attr_data_file)
        table = table[table.MyCuration == 1]
        own = table.Person == person
        self._rows = (table[~own] if exclude else table[own]).reset_index(drop=True)

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, k):
        row = self._rows.iloc[k]
        return torch.tensor(np.load(row.FilePath)), int(row.Target)
