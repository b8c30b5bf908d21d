"""The same calls over several processes, on one machine or on several.

    torchrun --nproc-per-node 2 examples/several_processes.py foci test

runs the named parts in two processes, and prints what the first one has: all have the same. Without
torchrun one process does the work, and prints the same. The parts:

    foci      a selection of columns, which the processes share out
    test      a permutation test, whose permutations the processes share out
    graph     which columns FOCI selects for which, the responses shared out
    solve     a step with the Gauss-Newton matrix of samples that the processes share out
    unlearn   a deletion, whose retained samples the processes share out
    evaluate  methods of deletion next to retrained models, which are trained side by side

With GPUs of NVIDIA pass --backend nccl, and as many processes as there are GPUs.
"""

import argparse
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from lcodec_ext import codec_test, dependence_graph, foci
from lcodec_ext.curvature import GaussNewtonOperator, UnitSelection
from lcodec_ext.evaluation import evaluate
from lcodec_ext.unlearning import unlearn


def select(group, seed):
    """Which of 600 columns y depends on: every rank has all rows, and its columns."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(500, 600))
    y = X[:, 3] + X[:, 400] ** 2
    if group is not None:  # from files, a rank would read its own columns alone
        X = np.array_split(X, dist.get_world_size(group), axis=1)[dist.get_rank(group)]
    return foci(X, y, stop="permutation", n_permutations=199, seed=seed, group=group)


def test(group, seed):
    """Whether y depends on two columns together: every rank has all rows, and its permutations."""
    rng = np.random.default_rng(seed)
    z = rng.random((3000, 2))
    y = (z.sum(axis=1) + 0.2 * rng.normal(size=len(z))) % 1
    return codec_test(y, z, n_permutations=2000, seed=seed, group=group)


def graph(group, seed):
    """Which of 12 columns are made of which: every rank has all columns, and its responses."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(500, 12))
    for k in range(2, 12, 3):
        X[:, k] = X[:, k - 1] + X[:, k - 2] + 0.3 * X[:, k]
    return dependence_graph(X, stop="permutation", alpha=0.01, seed=seed, group=group)


def own(samples, group):
    """The samples of this rank: a stretch of them, so that they have the order of one process."""
    if group is None:
        return samples
    return tuple(t.tensor_split(dist.get_world_size(group))[dist.get_rank(group)] for t in samples)


def solve(group, seed):
    """A damped Gauss-Newton step on ten units: every rank multiplies by its own samples."""
    forget, retain, _, train = task(seed)
    model, units = train(seed, forget), UnitSelection({"0": range(10)})
    matrix = GaussNewtonOperator(
        model, cross_entropy, own(retain, group), units, damping=0.1, group=group
    )
    step = matrix.solve(torch.ones(matrix.shape[0]))
    return f"{step.method} on {matrix.shape[0]} parameters, the step's length {step.x.norm():.3f}"


def delete(group, seed):
    """A calibrated deletion: every rank has the samples to delete, and its own retained ones."""
    forget, retain, unseen, train = task(seed)
    kept = own(retain, group)
    result = unlearn(
        train(seed, forget), forget, kept, cross_entropy, validation=unseen, seed=seed,
        group=group,
    )  # fmt: skip
    loss, found = result.loss_forget, result.calibration
    return (
        f"{result.n_forget} of {result.n_forget + result.n_retain} samples deleted: they lose "
        f"{loss.after:.2f} instead of {loss.before:.2f}, and samples never seen {found.unseen:.2f}"
    )


def evaluate_methods(group, seed):
    """What two methods leave: every rank has all samples, and its models and methods."""
    forget, retain, unseen, train = task(seed)
    return evaluate(
        train(seed, forget), forget, retain, unseen, cross_entropy,
        retrained=train, methods=["L-BFGS", "fine-tune SGD"], seed=seed, group=group,
    )  # fmt: skip


def task(seed):
    """Samples to remove, to retain and never seen; how a network is trained, without the former."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(600, 8, generator=generator)
    y = (x @ torch.randn(8, 3, generator=generator)).argmax(1)
    y[:20] = (y[:20] + 1) % 3  # wrong labels, which are removed
    forget, retain, unseen = (x[:20], y[:20]), (x[20:400], y[20:400]), (x[400:], y[400:])

    def train(seed, more=None):
        x, y = retain if more is None else map(torch.cat, zip(more, retain, strict=True))
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        return model

    return forget, retain, unseen, train


PARTS = {
    "foci": select,
    "test": test,
    "graph": graph,
    "solve": solve,
    "unlearn": delete,
    "evaluate": evaluate_methods,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    group = None
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun
        if options.backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(options.backend)
        group = dist.group.WORLD
    for name in options.parts:
        begin = time.perf_counter()
        found = PARTS[name](group, options.seed)
        if group is None or dist.get_rank() == 0:
            processes = 1 if group is None else dist.get_world_size()
            print(f"{name} took {time.perf_counter() - begin:.1f} s, with {processes=}")
            print(found, flush=True)
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
