"""FOCI on the workers of a Dask cluster, each of which has some of the columns.

    python examples/on_dask.py [--scheduler tcp://ADDRESS:8786]

dask-pytorch-ddp runs a function on every worker at the same time, and joins the workers to a
process group of torch.distributed. Without --scheduler two processes on this machine are the
cluster. It needs the packages distributed and dask-pytorch-ddp.
"""

import argparse

import numpy as np
import torch.distributed as dist

from lcodec_ext import foci

ROWS, COLUMNS = 500, 40


def column(seed, k):
    """Column k of X. A worker makes, or reads, the columns that it has."""
    return np.random.default_rng([seed, k]).normal(size=ROWS)


def select(seed, group=None):
    """What every worker does, all at the same time; one process does it without a group."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    own = np.array_split(np.arange(COLUMNS), size)[rank]
    X = np.column_stack([column(seed, k) for k in own])
    y = column(seed, 7) * column(seed, 31)  # which all workers have
    return foci(X, y, max_features=4, group=group)


def on_worker(seed):
    """`select` in the group that dask-pytorch-ddp has made."""
    return select(seed, dist.group.WORLD)


def main():
    from dask.distributed import Client, LocalCluster
    from dask_pytorch_ddp import dispatch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scheduler", help="address of the cluster's scheduler")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cluster = options.scheduler or LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    )
    with Client(cluster) as client:
        # by name: dask-pytorch-ddp loses arguments without
        futures = dispatch.run(client, on_worker, seed=options.seed, backend="gloo")
        results = client.gather(futures)  # one of each worker, all the same
        print(f"{len(results)} workers")
        print(results[0])
    if not options.scheduler:
        cluster.close()


if __name__ == "__main__":
    main()
