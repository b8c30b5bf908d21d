"""``lcodec-ext unlearn``: delete samples from a model, or verify a ledger of deletions."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lcodec_ext._checks import counted
from lcodec_ext.cli.console import (
    FAILED,
    OK,
    Console,
    InputError,
    add_common,
    integer,
    number,
    output_file,
    seed,
)
from lcodec_ext.cli.import_path import call, load_object
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
    parts_of,
)
from lcodec_ext.cli.weights import SUFFIXES, check_writable, write_weights

if TYPE_CHECKING:
    from lcodec_ext.unlearning import Unlearner, UnlearnResult

PRESETS = ("recommended", "paper")
SETTINGS = (
    "selection",
    "curvature",
    "damping",
    "weight_decay",
    "max_seconds",
    "max_memory",
    "epsilon",
    "delta",
    "seed",
)
UNLEARN = """\
Delete training samples from a model, or verify the ledger of such deletions.

Without --directory, the command takes one request, writes the new weights to --output and keeps
nothing else. With --directory, the folder keeps a ledger and checkpoints. A later call with
--resume takes the next request from there, with the weights and settings on record; leave out
--weights then.

The result is heuristic unless it says "certified"; evaluate compares it with retraining. If the
guard takes the step back, the weights stay as they were, --output is not written and the exit
status is 1: retrain without these samples. With --epsilon and --delta, --output is a release: it
gets fresh noise, which is paid for from the budget on record.

--estimate says what a request will cost, in passes over samples, seconds and memory. It deletes and
writes nothing.

--resume with --output and without --forget writes the weights on record, for example after a
removal without --output. With --epsilon and --delta this is another release. Releases are not
kept, so a lost one must be paid for again, if the budget allows it.

The head is the hash of the ledger's last entry. Note it elsewhere: --verify --head HASH shows
whether the ledger still contains it. --verify checks the chain and the checkpoints and, if you
give them, the weights of a model (--model, --weights) and the data (--data). It exits with 1 if
anything is wrong.
"""

UNLEARN_EXAMPLES = """\
examples:
  lcodec-ext unlearn --model net.py:build --weights net.pt --data data.py:load \\
      --forget 3,17,20-40 --weight-decay 1e-3 --output new.pt
  lcodec-ext unlearn --model net.py:build --weights net.pt --data data.py:load \\
      --forget @ids.txt --directory run --output new.pt
  lcodec-ext unlearn --model net.py:build --data data.py:load --forget 99 --directory run --resume
  lcodec-ext unlearn --model net.py:build --data data.py:load --forget-group u17,u18 \\
      --directory run --resume
  lcodec-ext unlearn --model net.py:build --data data.py:load --directory run --resume \\
      --output new.pt
  lcodec-ext unlearn --verify --directory run --data data.py:load --model net.py:build \\
      --weights new.pt
"""

# ---------------------------------------------------------------------------------------------
# Options


def add_unlearn(commands: Any) -> None:
    """Add ``unlearn``."""
    parser = commands.add_parser(
        "unlearn",
        help="delete training samples from a model",
        description=UNLEARN,
        epilog="\n".join([IMPORT_PATHS, FORGET, UNLEARN_EXAMPLES]),
    )
    add_problem(parser)
    add = parser.add_argument_group("request").add_argument
    add("--forget", metavar="IDS", help="numbers of the samples to delete")
    add(
        "--forget-group",
        metavar="IDS",
        help="ids of the groups whose samples to delete, such as users; with --forget, both",
    )
    add("--note", metavar="TEXT", help="for the ledger, for example who asked")
    add(
        "--estimate",
        action="store_true",
        help="say what the deletion will cost, in passes, seconds and memory; delete nothing",
    )
    add(
        "--output",
        type=output_file(*SUFFIXES),
        metavar="FILE",
        help="the new weights, a .pt or .safetensors file",
    )
    add(
        "--patch",
        type=output_file(".safetensors"),
        metavar="FILE",
        help="what this request changes of the weights, for WeightPatch.load and apply",
    )
    add = parser.add_argument_group("ledger").add_argument
    add("--directory", metavar="FOLDER", help="where the ledger and the checkpoints are kept")
    add("--resume", action="store_true", help="go on with the ledger in the folder")
    add(
        "--no-lock",
        action="store_true",
        help="for a folder on a file system without file locks: see to it that one process at a "
        "time uses it",
    )
    add("--verify", action="store_true", help="check the ledger in the folder, and stop")
    add("--head", metavar="HASH", help="for --verify: the hash of an entry, noted earlier")
    _add_settings(parser)
    add_common(parser)
    parser.set_defaults(run=run_unlearn)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("settings").add_argument
    add("--preset", choices=PRESETS, help="for settings that are not given (default: recommended)")
    add(
        "--selection",
        metavar="HOW",
        help="what to change: the name of a rule (docs/unlearning.md lists them), or a .json file "
        "of UnitSelection.to_dict() or ParameterSelection.to_dict()",
    )
    add("--curvature", metavar="KIND", help="gauss_newton, hessian, fisher, secant or ekfac")
    add("--damping", type=number(), metavar="X", help="added to the curvature's diagonal")
    add(
        "--weight-decay",
        type=number(),
        metavar="LAMBDA",
        help="of the training, whose objective is the mean loss plus (LAMBDA / 2) |w|^2",
    )
    add("--max-seconds", type=number(), metavar="S", help="the most that a deletion may take")
    add(
        "--max-memory",
        type=integer(1),
        metavar="BYTES",
        help="the most that it may take in addition to model and data",
    )
    add("--epsilon", type=number(), metavar="X", help="privacy of a release, with --delta")
    add("--delta", type=number(), metavar="X", help="privacy of a release, with --epsilon")
    add(
        "--epsilon-budget",
        type=number(),
        metavar="X",
        help="what all releases together may spend (default: one release)",
    )
    add("--delta-budget", type=number(), metavar="X", help="the same for delta")
    add("--seed", type=seed, metavar="N", help="of all random draws except the privacy noise")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other field of lcodec_ext.unlearning.Settings, with a value in JSON, or inf; "
        "may be repeated",
    )


def parse_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of Settings, from their own options and from --set."""
    given = {name: getattr(options, name) for name in SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    for assignment in options.set:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise InputError(f"--set must be KEY=VALUE; got {assignment!r}")
        if key in given:
            raise InputError(f"--set {assignment}: {key} is given already")
        try:
            given[key] = math.inf if text == "inf" else json.loads(text)
        except ValueError:
            given[key] = text
    if str(given.get("selection", "")).endswith(".json"):
        given["selection"] = _read_selection(given["selection"])
    if isinstance(given.get("candidates"), list):
        given["candidates"] = tuple(given["candidates"])
    if isinstance(given.get("dtype"), str):
        import torch

        known = {"float32": torch.float32, "float64": torch.float64}
        if given["dtype"] not in known:
            raise InputError(f"--set dtype must be float32 or float64; got {given['dtype']!r}")
        given["dtype"] = known[given["dtype"]]
    if isinstance(given.get("perturb"), str):
        given["perturb"] = load_object(given["perturb"], "--set perturb")
    return given


def _read_selection(file: str) -> Any:
    from lcodec_ext.curvature import selection_from_dict

    try:
        return selection_from_dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"--selection {file} must be the JSON of UnitSelection.to_dict() or "
            f"ParameterSelection.to_dict(): {error}"
        ) from None


def _check_request(options: argparse.Namespace) -> None:
    """Refuse combinations of options that make no request."""
    if not options.model:
        raise InputError("--model is needed (or --verify, with --directory)")
    writes = options.resume and options.output and not options.estimate
    if not _asks(options) and not writes:
        raise InputError(
            "--forget or --forget-group is needed (or --resume with --output, to write the weights "
            "on record, or --verify, with --directory)"
        )
    if options.head:
        raise InputError("--head belongs to --verify")
    if options.no_lock and not options.directory:
        raise InputError("--no-lock needs --directory, the folder that is not locked")
    if options.estimate:
        _check_estimate(options)
        return
    if options.patch:
        _check_patch(options)
    if not options.directory:
        if options.resume:
            raise InputError("--resume needs --directory, the folder of the ledger")
        if not (options.output or options.patch):
            raise InputError("--output or --directory is needed: nothing would be kept")
        return
    if options.resume:
        _check_resume(options)
    elif _has_ledger(options):
        raise InputError(
            f"--directory {options.directory} has a ledger already: --resume goes on with it"
        )


def _check_patch(options: argparse.Namespace) -> None:
    """Refuse a patch of nothing, and one that would go around a release's noise."""
    if not _asks(options):
        raise InputError("--patch needs --forget or --forget-group: it is what a request changes")
    if options.epsilon is not None:
        raise InputError("--patch has no noise, and --epsilon asks for it: leave one of them out")


def _check_estimate(options: argparse.Namespace) -> None:
    """Refuse what would have no effect; `_check_request` has seen that samples are named."""
    for name in ("output", "patch", "note"):
        if getattr(options, name):
            raise InputError(f"--{name} does not go with --estimate, which deletes nothing")
    if options.resume:
        if not options.directory:
            raise InputError("--resume needs --directory, the folder of the ledger")
        _check_resume(options)


def _asks(options: argparse.Namespace) -> bool:
    """Whether samples are to be deleted."""
    return options.forget is not None or options.forget_group is not None


def _has_ledger(options: argparse.Namespace) -> bool:
    return (Path(options.directory) / "ledger.jsonl").is_file()


def _check_resume(options: argparse.Namespace) -> None:
    if not _has_ledger(options):
        raise InputError(f"--directory {options.directory} has no ledger to --resume")
    names = (*SETTINGS, "preset", "epsilon_budget", "delta_budget")
    own = [name.replace("_", "-") for name in names if getattr(options, name) is not None]
    own += [f"set {text}" for text in options.set if not text.startswith("perturb=")]
    if own:
        raise InputError(f"--{own[0]} cannot change on --resume: the settings on record apply")
    if options.weights:
        raise InputError("--weights goes without --resume: the weights on record apply")


# ---------------------------------------------------------------------------------------------
# Requests


class _Outcome(NamedTuple):
    """What a command did."""

    ids: list[int]
    groups: list[dict[str, Any]]  # as on record
    refused: list[int]  # of these: the guard took their removal back
    result: "UnlearnResult | None"
    written: bool
    patched: bool
    release: dict[str, Any] | None  # the guarantee of what was written


def run_unlearn(options: argparse.Namespace, console: Console) -> int:
    """Take a request, or verify a ledger."""
    if options.verify:
        return _verify(options, console)
    _check_request(options)
    ids = [] if options.forget is None else parse_ids(options.forget)
    named = [] if options.forget_group is None else parse_groups(options.forget_group)
    need_torch()
    unlearner, named = _open(options, ids, named, console)
    with unlearner:
        if again := sorted(set(ids) & set(unlearner.removed)):
            raise InputError(f"--forget names sample {again[0]}, which is removed already")
        if gone := set(unlearner.removed_groups).intersection(named):
            one = next(each for each in named if each in gone)
            raise InputError(f"--forget-group names group {one!r}, which is removed already")
        if options.estimate:
            return _estimate(unlearner, ids, named, console)
        if options.patch and unlearner.budget is not None:
            raise InputError("--patch has no noise, which releases from this ledger have")
        result, groups = None, []
        if ids or named:
            result = _remove(unlearner, ids, named, options, console)
            ids = sorted(unlearner.ledger[-1].record["ids"])
            groups = unlearner.ledger[-1].record.get("groups", [])
        refused = sorted(set(ids) - set(unlearner.removed))
        writes = bool(options.output) and (not ids or len(refused) < len(ids))
        release = _write(unlearner, options, console) if writes else None
        patched = bool(options.patch) and result is not None and len(refused) < len(ids)
        if patched and result is not None:
            result.patch().save(options.patch)
        outcome = _Outcome(ids, groups, refused, result, writes, patched, release)
        return _tell(unlearner, outcome, options, console)


def _open(
    options: argparse.Namespace, ids: list[int], named: list[int | str], console: Console
) -> tuple["Unlearner", list[int | str]]:
    """Start or resume a stream of requests, after checking everything that can be checked.

    Also returned are the groups of the request, with ids as the data have them.
    """
    from lcodec_ext.unlearning import Settings, Unlearner

    settings, preset = parse_settings(options), options.preset or "recommended"
    if not options.resume:
        Settings.preset(preset, **settings)  # its errors, before models are made
    problem = Problem(options.model, options.weights, options.data)
    model, train, loss_fn = problem.model, problem["train"], problem["loss_fn"]
    if not options.resume:
        note_weights(options, console)
    if ids:
        check_ids(ids, n_samples(train, model))
    groups = problem.get("groups")
    if named:
        groups = as_groups(groups, n_samples(train, model), problem.source)
        named = known_groups(groups, named)
    if options.output:
        check_writable(options.output, model)
    more: dict[str, Any] = {"validation": problem.get("validation"), "groups": groups}
    more |= {"progress": console.progress, "lock": not options.no_lock}
    if options.resume:
        more |= {key: settings[key] for key in ("perturb",) if key in settings}
        return Unlearner.resume(options.directory, model, train, loss_fn, **more), named
    budget = {"epsilon_budget": options.epsilon_budget, "delta_budget": options.delta_budget}
    folder = None if options.estimate else options.directory  # nothing is kept of an estimate
    more |= {"directory": folder, "preset": preset} | budget | settings
    return Unlearner(model, train, loss_fn, **more), named


def _estimate(
    unlearner: "Unlearner", ids: list[int], named: list[int | str], console: Console
) -> int:
    found = unlearner.estimate(ids or None, groups=named or None)
    console.emit({"ids": ids, "groups": named, "estimate": found.to_dict()}, str(found))
    return OK


def _remove(
    unlearner: "Unlearner",
    ids: list[int],
    named: list[int | str],
    options: argparse.Namespace,
    console: Console,
) -> "UnlearnResult":
    both = [counted(len(ids), "sample")] * bool(ids) + [counted(len(named), "group")] * bool(named)
    console.note(f"deleting {' and '.join(both)} ...")
    try:
        return unlearner.remove(ids or None, groups=named or None, note=options.note)
    except Exception:
        if options.directory and not options.resume:
            console.note(
                f"{options.directory} has the start of a ledger now, with these settings: "
                "--resume goes on with them; to begin again with others, delete the folder"
            )
        raise


def _write(
    unlearner: "Unlearner", options: argparse.Namespace, console: Console
) -> dict[str, Any] | None:
    """Write the weights to --output; with a budget, a release of them. Return its guarantee."""
    if not unlearner.removed:
        raise InputError("this ledger has no removal yet: its weights are those it began with")
    if unlearner.budget is None:
        if options.note and not _asks(options):
            raise InputError("--note goes into the ledger, with --forget or a release")
        write_weights(options.output, unlearner.model)
        return None
    weights = unlearner.ledger[-1].record["checkpoint"]["sha256"]
    paid = sum(
        entry.kind == "release" and entry.record["checkpoint"]["sha256"] == weights
        for entry in unlearner.ledger
    )
    before = (
        f"these weights were released {'once' if paid == 1 else f'{paid} times'} before; what was "
        "released is not kept"
    )
    try:
        model = unlearner.release(note=options.note)
    except Exception:
        if options.directory and _asks(options):
            console.note("the samples are removed, and that is on record")
        if paid:
            console.note(before)
        raise
    try:
        write_weights(options.output, model)
    except Exception:
        console.note("the release is on record and paid for, but could not be written")
        raise
    if paid:
        console.warn(f"{before}, so this counts as one more release and is charged to the budget")
    release: dict[str, Any] = unlearner.ledger[-1].record["guarantee"]
    return release


def _tell(
    unlearner: "Unlearner", outcome: _Outcome, options: argparse.Namespace, console: Console
) -> int:
    """Print what was done; return the exit status."""
    from lcodec_ext.unlearning import Guarantee

    ids, groups, refused, result, written, patched, release = outcome
    lines = [repr(result or unlearner)]
    if groups:
        each = (f"{one['id']!r} ({counted(len(one['samples']), 'sample')})" for one in groups)
        lines.append(f"  groups        {', '.join(each)}")
    loss = None
    if release:
        lines.append(str(Guarantee.from_dict(release)))
        loss = unlearner.ledger[-1].environment.get("retained_loss")
    if loss:  # a number that is not finite is a string on record
        before, after = float(loss["before"]), float(loss["after"])
        lines.append(
            f"  with noise    mean loss of retained samples {before:.4g} -> {after:.4g} as written "
            f"(on {loss['n']})"
        )
    if written:
        lines.append(f"  written to    {options.output}")
    if patched:
        lines.append(f"  patch         {options.patch}")
    if options.directory:
        lines.append(f"  ledger head   {unlearner.ledger.head}")
    pending = unlearner.pending if not ids else ()
    if refused or pending:
        console.warn(
            f"the guard took the removal of {counted(len(refused or pending), 'sample')} back"
            f"{'' if refused else ' earlier'}, and the model still knows what it learnt from "
            "them: retrain without them"
        )
    document = {
        "ids": ids,
        "groups": groups,
        "not_removed": refused,
        "n_removed": len(unlearner.removed),
        "pending": list(unlearner.pending),
        "result": result and result.to_dict(),
        "release": release,
        "retained_loss": loss,
        "output": str(options.output) if written else None,
        "patch": str(options.patch) if patched else None,
        "directory": options.directory,
        "head": unlearner.ledger.head,
    }
    console.emit(document, "\n".join(lines))
    return FAILED if refused else OK


# ---------------------------------------------------------------------------------------------
# Verification


def _verify(options: argparse.Namespace, console: Console) -> int:
    if not options.directory:
        raise InputError("--verify needs --directory, the folder of the ledger")
    for name in (
        "forget",
        "forget_group",
        "output",
        "patch",
        "resume",
        "note",
        "estimate",
        "no_lock",
    ):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} does not go with --verify")
    if bool(options.model) != bool(options.weights):
        raise InputError("to verify a model, --verify needs both --model and --weights")
    need_torch()
    from lcodec_ext.unlearning import verify_ledger

    model, parts = None, {}
    if options.model:
        problem = Problem(options.model, options.weights, options.data)
        model = problem.model
        parts = {name: problem.get(name) for name in ("train", "groups")}
    elif options.data:
        parts = parts_of(call(options.data, "--data"), f"--data {options.data}")
    train, groups = parts.get("train"), parts.get("groups")
    if options.data and train is None:
        raise InputError(f"--data {options.data} must give 'train'")
    found = verify_ledger(options.directory, model, train, head=options.head, groups=groups)
    names = ("ok", "problems", "notes", "entries", "head", "removed", "pending", "counted")
    document = {"directory": options.directory} | {name: getattr(found, name) for name in names}
    console.emit(document, str(found))
    return OK if found.ok else FAILED
