"""Blankets of attributes, with noise and without, and the time of each."""

import argparse
import os
import time

import numpy as np
import pandas as pd
from codec import codec2, codec3, foci  # noqa: F401

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="list_attr_celeba.csv")
parser.add_argument("--n_samples", type=int, default=400)
parser.add_argument("--outfile", default="attributes.csv")
args = parser.parse_args()

np.random.seed(0)
table = pd.read_csv(args.data).drop(columns="image_id")
table = table.sample(frac=1, random_state=0)[: args.n_samples]
values = (table.to_numpy() > 0).astype(float)
for noise in (0, 0.00001, 0.001, 0.1):
    for k, attribute in enumerate(table.columns):
        columns = values + noise * np.random.randn(*values.shape)
        start = time.time()
        ordering, found = foci(np.delete(columns, k, 1), columns[:, k], earlyStop=True)
        others = table.columns.delete(k)
        row = {
            "noise": noise,
            "attribute": attribute,
            "time": time.time() - start,
            "blanket": " ".join(others[ordering]),
            "first": found[0],
        }
        new = not os.path.isfile(args.outfile)
        pd.DataFrame([row]).to_csv(args.outfile, mode="a", header=new, index=False)
