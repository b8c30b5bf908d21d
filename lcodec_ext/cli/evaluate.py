"""``lcodec-ext evaluate``: compare deletions with retraining."""

import argparse
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lcodec_ext._files import write_atomically
from lcodec_ext.cli.console import (
    FAILED,
    OK,
    Console,
    InputError,
    add_common,
    dump,
    integer,
    number,
    output_file,
    seed,
)
from lcodec_ext.cli.problem import (
    FORGET,
    IMPORT_PATHS,
    Problem,
    add_problem,
    as_groups,
    check_ids,
    known_groups,
    n_samples,
    need_torch,
    note_weights,
    parse_groups,
    parse_ids,
)

if TYPE_CHECKING:
    from lcodec_ext.unlearning.groups import Groups

EVALUATE = """\
Compare a model after deletion with models that were retrained without the samples.

The data's "retrain" trains the retrained models, or --retrained names files with their weights.
Give at least 3: how far they are from each other is the measure for all other distances. With
fewer, or none (--n-retrain 0), the table has what can be said without them. The command runs
--methods and compares the results with the retrained models; --candidate adds weights that exist
already. No method sees the test samples.

In the table, "closed" is the share of the gap to retraining that a method closes: 0% for the
model as it was, 100% for one more retrained model, negative where the method moves away, - where
the model as it was is about as near as retrained models are to each other. "MIA AUC"
is how well an attack tells removed samples from unseen ones: .5 is chance. It should be near that
of the retrained models.
"""

EVALUATE_EXAMPLES = """\
examples:
  lcodec-ext evaluate --model net.py:build --weights net.pt --data data.py:load --forget 3,17 \\
      --weight-decay 1e-3 --output evaluation.json
  lcodec-ext evaluate --model net.py:build --weights net.pt --data data.py:load --forget 3,17 \\
      --methods recommended,L-BFGS --candidate mine=new.pt --retrained r1.pt r2.pt r3.pt
"""


def add_evaluate(commands: Any) -> None:
    """Add ``evaluate``."""
    parser = commands.add_parser(
        "evaluate",
        help="compare deletions with retraining",
        description=EVALUATE,
        epilog="\n".join([IMPORT_PATHS, FORGET, EVALUATE_EXAMPLES]),
    )
    add_problem(parser)
    add = parser.add_argument
    add("--forget", metavar="IDS", help="numbers of the samples to delete")
    add("--forget-group", metavar="IDS", help="or ids of the groups to delete")
    add(
        "--methods",
        metavar="NAMES",
        help="presets, baselines and methods of the literature, separated by commas; 'none' for "
        "none (default: all presets and baselines)",
    )
    add(
        "--candidate",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="weights to measure too, made by unlearn or anything else; may be repeated",
    )
    add(
        "--retrained",
        nargs="+",
        metavar="FILE",
        help="weights of retrained models (default: the data's retrain makes them)",
    )
    add(
        "--n-retrain",
        type=integer(0),
        default=3,
        metavar="N",
        help="how many models to retrain (default: 3)",
    )
    add(
        "--weight-decay",
        type=number(),
        default=0.0,
        metavar="LAMBDA",
        help="of the training, whose objective is the mean loss plus (LAMBDA / 2) |w|^2 "
        "(default: 0)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of all random draws (default: 0)")
    add("--no-relearn", action="store_true", help="do not measure the time to learn again")
    add("--output", type=output_file(".json"), metavar="FILE", help="for report, a .json file")
    add_common(parser)
    parser.set_defaults(run=run_evaluate)


def run_evaluate(options: argparse.Namespace, console: Console) -> int:
    """Compare methods and given weights with retraining."""
    if not options.model:
        raise InputError("--model is needed")
    if (options.forget is None) == (options.forget_group is None):
        raise InputError("one of --forget and --forget-group is needed")
    candidates = _candidates(options)
    need_torch()
    from lcodec_ext.evaluation import evaluate

    methods = _methods(options)
    problem = Problem(options.model, options.weights, options.data)
    train = problem["train"]
    note_weights(options, console)
    n = n_samples(train, problem.model)
    ids, groups = _asked_for(options, problem, n)
    forget, retain = split(train, ids, n)
    for name, file in candidates.items():
        if name in methods:
            raise InputError(f"--candidate {name!r} has the name of a method of --methods")
        methods[name] = problem.with_weights(file, f"--candidate {name}")
    if not methods:
        raise InputError("--methods none leaves nothing to evaluate; give a --candidate")
    retrained: Any = None
    if options.retrained:
        retrained = [problem.with_weights(file, "--retrained") for file in options.retrained]
    elif options.n_retrain and problem.get("retrain"):
        retrained = partial(problem["retrain"], retain)
    elif options.n_retrain:
        console.warn(
            f"{problem.source} gives no 'retrain', and there is no --retrained: nothing is "
            "compared with retraining (--n-retrain 0 says that this is meant)"
        )
    evaluation = evaluate(
        problem.model,
        forget,
        retain,
        problem["test"],
        problem["loss_fn"],
        retrained=retrained,
        methods=methods,
        n_retrain=max(1, options.n_retrain),
        weight_decay=options.weight_decay,
        seed=options.seed,
        relearn=not options.no_relearn,
        validation=problem.get("validation"),
        groups=groups,
        progress=console.progress,
    )
    document = evaluation.to_dict()
    if options.output:
        write_atomically(options.output, dump(document) + "\n")
        console.note(f"wrote {options.output}")
    console.emit(document, repr(evaluation))
    return FAILED if any(method.error for method in evaluation.methods) else OK


def _asked_for(
    options: argparse.Namespace, problem: Problem, n: int
) -> tuple[list[int], "Groups | None"]:
    """The samples to delete; where groups are, whom the others belong to."""
    if options.forget is not None:
        ids = parse_ids(options.forget)
        check_ids(ids, n)
        return ids, None
    groups = as_groups(problem.get("groups"), n, problem.source)
    named = known_groups(groups, parse_groups(options.forget_group))
    ids = sorted(i for one in named for i in groups.samples(one))
    check_ids(ids, n, "--forget-group")
    return ids, groups.subset([i for i in range(n) if i not in set(ids)])


def _candidates(options: argparse.Namespace) -> dict[str, str]:
    """Files by the names that --candidate gives them."""
    found: dict[str, str] = {}
    for text in options.candidate:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise InputError(f"--candidate must be NAME=FILE; got {text!r}")
        if name in found:
            raise InputError(f"--candidate names {name!r} twice")
        found[name] = file
    return found


def _methods(options: argparse.Namespace) -> dict[str, Any]:
    """The methods that --methods names."""
    from lcodec_ext.evaluation import BASELINES, LITERATURE

    if options.methods == "none":
        return {}
    if options.methods is None:
        return dict(BASELINES)
    names = [name.strip() for name in options.methods.split(",")]
    known = {**BASELINES, **LITERATURE}
    for name in names:
        if name not in known:
            raise InputError(f"--methods names {name!r}; expected some of {', '.join(known)}")
    return {name: known[name] for name in names}


def split(train: Any, ids: list[int], n: int) -> tuple[Any, Any]:
    """The removed and the retained ones of n samples, in the form of train."""
    import numpy as np
    from torch.utils.data import DataLoader, Dataset, IterableDataset

    from lcodec_ext.evaluation.training import take

    if isinstance(train, DataLoader | IterableDataset) or not isinstance(
        train, tuple | list | Mapping | Dataset
    ):
        raise InputError(
            "to evaluate, train must be tensors, a dict of tensors or a Dataset; got an object of "
            f"type {type(train).__name__}"
        )

    return take(train, ids), take(train, np.delete(np.arange(n), ids).tolist())
