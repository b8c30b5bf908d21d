"""Deletions judged over a population of models: originals, what a method makes of them, retrained.

One model shows what a method did to one start. The scores of the field ask whether the
*distribution* of unlearned models is that of retrained ones: see scores.py. seeds.py makes the
models.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from lcodec_ext._build import __version__
from lcodec_ext._callers import warn
from lcodec_ext._checks import check_bool, check_integer, check_seed
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.decay import Decay, check_decay
from lcodec_ext._torch.group import AnyRanks, ranks_of
from lcodec_ext._torch.loss import LossFunction, check_loss_fn
from lcodec_ext.evaluation.methods import NO_OP, RETRAINED, Method, methods_of
from lcodec_ext.evaluation.metrics import Number, scikit_learn
from lcodec_ext.evaluation.population_result import PopulationEvaluation, PopulationMethod
from lcodec_ext.evaluation.scores import (
    Floats,
    forgetting_quality,
    klom,
    of_retraining,
    privacy_degrees,
    ulira,
)
from lcodec_ext.evaluation.seeds import (
    PARTS,
    STATISTICS,
    Found,
    Seeded,
    Store,
    Unlearn,
    Work,
    carried_out,
    described,
    method_described,
)
from lcodec_ext.evaluation.training import check_numbers, count
from lcodec_ext.unlearning.result import UnlearnResult


def evaluate_population(
    train: Callable[[Any, int], nn.Module],
    unlearn: Unlearn | Mapping[str, Method] | Sequence[str],
    data: Any,
    forget: Sequence[int],
    test: Any,
    loss_fn: LossFunction,
    *,
    n_models: int = 64,
    processes: int = 1,
    directory: str | Path | None = None,
    weight_decay: Decay = 0.0,
    max_samples: int = 1000,
    draws: int = 20,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    group: Any = None,
) -> PopulationEvaluation:
    """Compare many unlearned models with as many retrained ones, sample by sample.

    For each of n_models seeds, one model is trained on all data, the method deletes the samples
    from it, and another model is trained without them. Of every model, the margin of each measured
    sample is kept: the log-odds of the right class, or minus the loss where there are no classes.
    The scores are those of `lcodec_ext.evaluation.scores`:

    - ``ulira_auc`` (mean over the removed samples), ``ulira_tpr`` (at 1% false positives, all
      samples pooled), ``ulira_auc_pooled``: the attack U-LiRA. AUC 0.5 is perfect.
    - ``klom_forget``, ``klom_retain``, ``klom_test``: the divergence of the margins, mean over
      samples; ``klom_forget_95``, its 95th percentile.
    - ``epsilon`` (median), ``forgetting_quality`` and ``challenge_score``, the latter times the
      ratios of retained and of test accuracy to those of retrained models: the NeurIPS unlearning
      challenge.
    - accuracies and mean losses on removed, retained and test samples.

    Two populations of retrained models differ, too. What a second one would score stands under
    "retrained"; compare with that, and not with 0.

    Parameters
    ----------
    train : callable
        ``train(samples, seed)`` trains a model from scratch; samples are of the kind of data.
    unlearn : callable, mapping, or sequence of str
        ``unlearn(model, forget, retain, loss_fn)`` returns a model or an `UnlearnResult`; it is
        given a copy of the model, and ``seed=`` if it has such a parameter. Or several methods, as
        `evaluate` takes them, which share the trained models.
    data : tuple of tensors, dict of tensors, or Dataset
        All training samples.
    forget : sequence of int
        Numbers of those to remove.
    test : tuple of tensors, dict of tensors, Dataset or DataLoader
        Samples that no model is trained on.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the mean loss of a batch.
    n_models : int, default 64
        Of each population; at least 4. KLoM and epsilon need many.
    processes : int, default 1
        Processes that train, each on one thread. What is passed is sent to them.
    directory : path, optional
        Where the margins of each seed are kept, one small file each, as soon as they are there.
        Another call with the same arguments, or more models, goes on from there.
    weight_decay : float or mapping of str to float, default 0.0
        Of methods that are options of `unlearn` or baselines.
    max_samples : int, default 1000
        Most samples of each set that are measured; of larger ones so many are drawn.
    draws : int, default 20
        Pairs of populations that are drawn for the scores of "retrained".
    seed : int, default 0
        All seeds follow from it. Numbers do not depend on the processes.
    batch_size : int, default 256
        Most samples in one pass of the measurements.
    progress : bool, default False
        Show a bar; needs tqdm.
    group : torch.distributed.ProcessGroup, optional
        All its ranks call this function with equal arguments. Seeds are shared out over them, and
        every rank has the whole evaluation. `directory` may be one for all, or one of each machine:
        a seed that any rank has there is done. `processes` are those of each rank. Neither train
        nor a method may use the group. See ``docs/distributed.md``.

    Returns
    -------
    PopulationEvaluation

    Raises
    ------
    ValueError
        For arguments out of range; for a directory of another evaluation; for models whose outputs
        are not finite. With a group also for arguments that differ between ranks.
    TypeError
        For arguments of the wrong type.
    RuntimeError
        With a group, where another rank failed.
    ImportError
        Without scikit-learn, before anything is trained.

    Warns
    -----
    UserWarning
        If a method fails for a seed. Its error is in the evaluation, and the others go on. Of a
        group rank 0 warns.

    Notes
    -----
    The cost is 2 n_models trainings and n_models deletions. Interrupt it as any Python code
    (Ctrl-C); with a directory nothing that is done is lost. The code of train and of methods is not
    looked at: take a new directory when it changes.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import cross_entropy
    >>> x, y = torch.randn(60, 4, generator=torch.manual_seed(0)), torch.arange(60) % 3
    >>> def train(samples, seed):
    ...     torch.manual_seed(seed)
    ...     model = torch.nn.Linear(4, 3)
    ...     optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    ...     for _ in range(20):
    ...         optimizer.zero_grad()
    ...         cross_entropy(model(samples[0]), samples[1]).backward()
    ...         optimizer.step()
    ...     return model
    >>> sets = (x[:40], y[:40]), range(5), (x[40:], y[40:])
    >>> found = evaluate_population(train, ["L-BFGS"], *sets, cross_entropy, n_models=8)
    >>> [method.name for method in found.methods]
    ['no-op', 'retrained', 'L-BFGS']
    """
    ranks = ranks_of(group, "evaluate_population")
    with ranks.alone("the check of the arguments"):
        weight_decay = check_decay(weight_decay)
        methods = _methods(unlearn, weight_decay, seed)
        _check_train(train)
        n = count(data)
        removed = check_numbers(forget, "forget", n)
        check_integer(n_models, "n_models", 4)
        check_integer(processes, "processes", 1)
        check_integer(max_samples, "max_samples", 1)
        check_integer(draws, "draws", 2)
        check_seed(seed, optional=False)
        check_integer(batch_size, "batch_size", 1)
        check_bool(progress, "progress")
        check_loss_fn(loss_fn)
        scikit_learn()
        kept = np.setdiff1d(np.arange(n), removed).tolist()
        work = Work(
            train, methods, data, removed, kept, test, loss_fn, weight_decay, max_samples, seed,
            batch_size,
        )  # fmt: skip
        compared = {} if group is None else described(work)
    ranks.agree({**compared, "n_models": n_models, "draws": draws, "batch_size": batch_size})
    with ranks.alone("the opening of the directory"):
        store = Store(directory, work)
    done = _done(ranks, store, n_models)
    todo = [k for k in range(n_models) if k not in done]

    def carry_out(some: range) -> list[tuple[int, Found]]:
        shown, total = progress and ranks.rank == 0, len(done) + len(some)
        with progress_bar(shown, total=total, desc="population", unit="seed") as bar:
            bar.update(len(done))
            found = []
            seeds = todo[some.start : some.stop]
            for each in carried_out(work, seeds, processes, store.folder):
                found.append(each)
                bar.update()
        return found

    pieces = ranks.share_out(len(todo), "the training of models", carry_out)
    done |= dict(each for piece in pieces for each in piece)
    found = [done[k] for k in range(n_models)]
    # of one rank, as processors may round differently
    scored = ranks.share_out(1, "the scores", lambda some: _scored(found, work, draws, len(some)))
    assert scored[0] is not None
    return scored[0]


def _done(ranks: AnyRanks, store: Store, n_models: int) -> dict[int, Found]:
    """What was found for the seeds that are in the directory of any rank."""

    def has(_: range) -> list[int]:
        return [k for k in range(n_models) if store.has(k)]

    held = ranks.share_out(ranks.size, "the reading of the directory", has)

    def read(_: range) -> dict[int, Found]:
        others = {k for numbers in held[: ranks.rank] for k in numbers}
        return {k: store.read(k) for k in held[ranks.rank] if k not in others}

    pieces = ranks.share_out(ranks.size, "the reading of the directory", read)
    return {k: found for piece in pieces for k, found in piece.items()}


def _check_train(train: Any) -> None:
    if isinstance(train, nn.Module) or not callable(train):
        raise TypeError(
            f"train must be callable as train(samples, seed); got an object of type "
            f"{type(train).__name__}"
        )
    try:
        inspect.signature(train).bind((), 0)
    except TypeError:
        raise TypeError(
            "train is called as train(samples, seed); what was given does not take two arguments"
        ) from None
    except ValueError:  # one that does not tell its arguments
        pass


def _methods(unlearn: Any, weight_decay: Decay, seed: int) -> dict[str, Method]:
    """The methods by name; a callable becomes one that `carry_out` can call."""
    if isinstance(unlearn, nn.Module | UnlearnResult):
        raise TypeError(
            "unlearn must delete from any model: a callable (model, forget, retain, loss_fn), a "
            "mapping of names to methods or names of methods; got an object of type "
            f"{type(unlearn).__name__}"
        )
    if not callable(unlearn):
        if not isinstance(unlearn, Mapping | Sequence) or isinstance(unlearn, str):
            raise TypeError(
                "unlearn must be a callable (model, forget, retain, loss_fn), a mapping of names "
                f"to methods or a list of names; got an object of type {type(unlearn).__name__}"
            )
        methods = methods_of(unlearn, {"weight_decay": weight_decay, "seed": seed, "score": None})
        for name, method in methods.items():
            if isinstance(method, nn.Module | UnlearnResult):
                raise TypeError(
                    f"method {name!r} must delete from any model; got one model, an object of type "
                    f"{type(method).__name__}"
                )
        return {
            name: Seeded(method) if callable(method) else method for name, method in methods.items()
        }
    name = getattr(unlearn, "__name__", "unlearn")
    return {"unlearn" if name in ("<lambda>", NO_OP, RETRAINED) else name: Seeded(unlearn)}


# ---------------------------------------------------------------------------------------------
# Scores


def _scored(found: list[Found], work: Work, draws: int, wanted: int) -> PopulationEvaluation | None:
    """The evaluation, where it is wanted: on one rank."""
    if not wanted:
        return None

    def population(name: str) -> dict[str, Floats]:
        keys = (*PARTS, "statistics")
        return {key: np.stack([each[f"{name}/{key}"] for each in found]) for key in keys}

    retrained = population(RETRAINED)
    yardstick = _statistics(retrained)
    methods = []
    for name in (NO_OP, RETRAINED, *work.methods):
        errors = [each[f"{name}/error"] for each in found if f"{name}/error" in each]
        if errors:
            error = f"{errors[0]} ({len(errors)} of {len(found)} seeds)"
            warn(f"method {name!r} failed. {error}")
            methods.append(PopulationMethod(name, None, {}, error=error))
            continue
        ours = population(name)
        own = _statistics(ours)
        ratio = math.prod(
            (own[key] or 0.0) / (yardstick[key] or math.inf)
            for key in ("accuracy_retain", "accuracy_test")
            if own[key] is not None
        )
        spread: dict[str, Number] = {}
        if name == RETRAINED:
            scores, spread = _of_retraining(retrained, draws, work.seed)
        else:
            scores = {key: score(ours, retrained) for key, score in SCORES.items()}
        scores["challenge_score"] = (scores["forgetting_quality"] or 0.0) * ratio
        methods.append(
            PopulationMethod(
                name,
                float(ours["statistics"][:, -1].mean()),
                scores | own,
                spread,
                {} if name == RETRAINED else _examples(ours, retrained, work),
            )
        )
    return PopulationEvaluation(
        methods=tuple(methods),
        n_models=len(found),
        n_forget=len(work.removed),
        n_retain=retrained["retain"].shape[1],
        n_test=retrained["test"].shape[1],
        settings={
            "weight_decay": work.weight_decay,
            "seed": work.seed,
            "max_samples": work.max_samples,
            "draws": draws,
            "methods": {name: method_described(method) for name, method in work.methods.items()},
            "versions": {"lcodec_ext": __version__, "torch": torch.__version__},
        },
    )


def _statistics(population: Mapping[str, Floats]) -> dict[str, Number]:
    means = population["statistics"].mean(0)[: len(STATISTICS)]
    return {
        name: None if math.isnan(value) else float(value)
        for name, value in zip(STATISTICS, means, strict=True)
    }


Margins = Mapping[str, Floats]  # of a population, by the set of samples


def _klom(part: str) -> Callable[[Margins, Margins], float]:
    return lambda ours, theirs: float(klom(ours[part], theirs[part]).mean())


def _epsilons(ours: Margins, theirs: Margins) -> Floats:
    return privacy_degrees(ours["forget"], theirs["forget"])


#: By name, what compares unlearned and retrained models.
SCORES: Mapping[str, Callable[[Margins, Margins], float]] = MappingProxyType(
    {
        "ulira_auc": lambda a, b: float(ulira(a["forget"], b["forget"]).auc.mean()),
        "ulira_auc_pooled": lambda a, b: ulira(a["forget"], b["forget"]).pooled_auc,
        "ulira_tpr": lambda a, b: ulira(a["forget"], b["forget"]).pooled_tpr,
        **{f"klom_{part}": _klom(part) for part in PARTS},
        "klom_forget_95": lambda a, b: float(np.quantile(klom(a["forget"], b["forget"]), 0.95)),
        "epsilon": lambda a, b: float(np.median(_epsilons(a, b))),
        "forgetting_quality": lambda a, b: forgetting_quality(_epsilons(a, b)),
    }
)


def _of_retraining(
    retrained: Margins, draws: int, seed: int
) -> tuple[dict[str, Number], dict[str, Number]]:
    """The scores of two populations like that of the retrained models: means, deviations."""
    scores: dict[str, Number] = {}
    spread: dict[str, Number] = {}
    for name, score in SCORES.items():
        part = name.removeprefix("klom_") if name.removeprefix("klom_") in PARTS else "forget"
        scores[name], deviation = of_retraining(
            lambda a, b, part=part, score=score: score({part: a}, {part: b}),  # type: ignore[misc]
            retrained[part],
            draws=draws,
            seed=seed,
        )
        spread[name] = None if math.isnan(deviation) else deviation
    return scores, spread


def _examples(ours: Margins, theirs: Margins, work: Work) -> dict[str, list[Any]]:
    """The scores of single removed samples."""
    pair = ours["forget"], theirs["forget"]
    attack = ulira(*pair)
    return {
        "number": list(work.parts()["forget"] or ()),
        "auc": attack.auc.tolist(),
        "tpr": attack.tpr.tolist(),
        "klom": klom(*pair).tolist(),
        "epsilon": _epsilons(ours, theirs).tolist(),
    }
