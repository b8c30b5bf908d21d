"""``lcodec-ext unlearn``: a request, or the check of a ledger."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcodec_ext.cli.console import (
    FAILED,
    OK,
    Console,
    InputError,
    add_common,
    number,
    output_file,
    seed,
)
from lcodec_ext.cli.import_path import call, load_object
from lcodec_ext.cli.problem import (
    FORGET,
    IMPORT_PATHS,
    WEIGHTS,
    Problem,
    add_problem,
    check_ids,
    check_writable,
    n_samples,
    need_torch,
    note_weights,
    parse_ids,
    parts_of,
    write_weights,
)

if TYPE_CHECKING:
    from lcodec_ext.unlearning import Unlearner

PRESETS = ("recommended", "paper")
SETTINGS = {  # options of their own, and the field of Settings they are
    "selection": "selection",
    "curvature": "curvature",
    "damping": "damping",
    "weight_decay": "weight_decay",
    "epsilon": "epsilon",
    "delta": "delta",
    "seed": "seed",
}
UNLEARN = """\
Delete training samples from a model, or verify the ledger of such deletions.

Without --directory, the call takes one request, writes the new weights to --output and keeps
nothing else. With --directory, the folder keeps a ledger and checkpoints. A later call with
--resume takes the next request from there, with the weights and settings on record; leave out
--weights then.

The result is a heuristic unless it says "certified"; evaluate compares it with retraining. If the
guard takes the step back, the weights stay as they were, --output is not written and the exit
status is 1: retrain without these samples. With --epsilon and --delta, --output is a release: it
gets fresh noise and is paid for from the budget on record.

--resume with --output and without --forget writes the weights as the ledger has them, for example
after a removal without --output. With --epsilon and --delta this is another release: releases are
not kept, so a lost one must be paid for again, if the budget allows it.

The head is the hash of the ledger's last entry. Note it elsewhere: --verify --head HASH shows
whether the ledger still contains it. --verify checks chain and checkpoints and, where they are
given, a model's weights (--model, --weights) and the data (--data). It exits with 1 if anything is
wrong.
"""

UNLEARN_EXAMPLES = """\
examples:
  lcodec-ext unlearn --model net.py:build --weights net.pt --data data.py:load \\
      --forget 3,17,20-40 --weight-decay 1e-3 --output new.pt
  lcodec-ext unlearn --model net.py:build --weights net.pt --data data.py:load \\
      --forget @ids.txt --directory run --output new.pt
  lcodec-ext unlearn --model net.py:build --data data.py:load --forget 99 --directory run --resume
  lcodec-ext unlearn --model net.py:build --data data.py:load --directory run --resume \\
      --output new.pt
  lcodec-ext unlearn --verify --directory run --data data.py:load --model net.py:build \\
      --weights new.pt
"""


def add_unlearn(commands: Any) -> None:
    """Add ``unlearn``."""
    parser = commands.add_parser(
        "unlearn",
        help="delete training samples from a model",
        description=UNLEARN,
        epilog="\n".join([IMPORT_PATHS, FORGET, UNLEARN_EXAMPLES]),
    )
    add_problem(parser)
    group = parser.add_argument_group("request")
    group.add_argument("--forget", metavar="IDS", help="numbers of the samples to delete")
    group.add_argument("--note", metavar="TEXT", help="goes into the ledger: who asked, say")
    group.add_argument(
        "--output",
        type=output_file(*WEIGHTS),
        metavar="FILE",
        help="the new weights, a .pt or .safetensors file",
    )
    group = parser.add_argument_group("ledger")
    group.add_argument("--directory", metavar="FOLDER", help="of ledger and checkpoints")
    group.add_argument("--resume", action="store_true", help="go on with the ledger there")
    group.add_argument("--verify", action="store_true", help="check the ledger there, and stop")
    group.add_argument("--head", metavar="HASH", help="for --verify: of an entry, noted earlier")
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--preset", choices=PRESETS, help="what is not said below (default: recommended)"
    )
    group.add_argument(
        "--selection",
        metavar="HOW",
        help="the units to change: full, lfoci, cheap, gradient, random, or a .json file of "
        "UnitSelection.to_dict()",
    )
    group.add_argument(
        "--curvature", metavar="KIND", help="gauss_newton, hessian, fisher or secant"
    )
    group.add_argument(
        "--damping", type=number(), metavar="X", help="added to the curvature's diagonal"
    )
    group.add_argument(
        "--weight-decay",
        type=number(),
        metavar="LAMBDA",
        help="of training: its objective is the mean loss plus (LAMBDA / 2) |w|^2",
    )
    group.add_argument(
        "--epsilon", type=number(), metavar="X", help="privacy of a release, with --delta"
    )
    group.add_argument("--delta", type=number(), metavar="X")
    group.add_argument(
        "--epsilon-budget",
        type=number(),
        metavar="X",
        help="what all releases together may spend (default: one release)",
    )
    group.add_argument("--delta-budget", type=number(), metavar="X")
    group.add_argument("--seed", type=seed, metavar="N", help="of all draws but the privacy noise")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other field of lcodec_ext.unlearning.Settings, the value as in JSON, or inf; "
        "repeat it",
    )
    add_common(parser)
    parser.set_defaults(run=run_unlearn)


def parse_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of Settings, from the options of their own and from --set."""
    given = {
        field: getattr(options, option)
        for option, field in SETTINGS.items()
        if getattr(options, option) is not None
    }
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
    from lcodec_ext.curvature import UnitSelection

    try:
        return UnitSelection.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"--selection {file} must be the JSON of UnitSelection.to_dict(): {error}"
        ) from None


def run_unlearn(options: argparse.Namespace, console: Console) -> int:
    """Take a request, or verify a ledger."""
    if options.verify:
        return _verify(options, console)
    _check_unlearn(options)
    ids = [] if options.forget is None else parse_ids(options.forget)
    need_torch()
    from lcodec_ext.unlearning import Settings, Unlearner

    settings = parse_settings(options)
    preset = options.preset or "recommended"
    if not options.resume:
        Settings.preset(preset, **settings)  # its errors, before models are made
    problem = Problem(options.model, options.weights, options.data)
    train, loss_fn = problem["train"], problem["loss_fn"]
    if not options.resume:
        note_weights(options, console)
    if ids:
        check_ids(ids, n_samples(train, problem.model))
    if options.output:
        check_writable(options.output, problem.model)
    common = {"validation": problem.get("validation"), "progress": console.progress}
    if options.resume:
        taken = {key: settings[key] for key in ("perturb",) if key in settings}
        unlearner = Unlearner.resume(
            options.directory, problem.model, train, loss_fn, **common, **taken
        )
    else:
        unlearner = Unlearner(
            problem.model,
            train,
            loss_fn,
            directory=options.directory,
            preset=preset,
            epsilon_budget=options.epsilon_budget,
            delta_budget=options.delta_budget,
            **common,
            **settings,
        )
    with unlearner:
        return _take(unlearner, ids, options, console)


def _take(
    unlearner: "Unlearner", ids: list[int], options: argparse.Namespace, console: Console
) -> int:
    """Remove samples, if any are named, and write what is left."""
    from lcodec_ext.unlearning import Guarantee

    if again := sorted(set(ids) & set(unlearner.removed)):
        raise InputError(f"--forget names sample {again[0]}, which is removed already")
    result = None
    if ids:
        console.note(f"deleting {len(ids)} samples ...")
        try:
            result = unlearner.remove(ids, note=options.note)
        except Exception:
            if options.directory and not options.resume:
                console.note(
                    f"{options.directory} has the start of a ledger now, with these settings: "
                    "--resume goes on with them; delete the folder to begin again with others"
                )
            raise
    refused = sorted(set(ids) - set(unlearner.removed))
    written, release, loss = None, None, None
    if options.output and (not ids or len(refused) < len(ids)):
        release = _write(unlearner, options, console)
        if release:
            loss = unlearner.ledger[-1].environment.get("retained_loss")
        written = str(options.output)
    document = {
        "ids": ids,
        "not_removed": refused,
        "n_removed": len(unlearner.removed),
        "pending": list(unlearner.pending),
        "result": result and result.to_dict(),
        "release": release,
        "retained_loss": loss,
        "output": written,
        "directory": options.directory,
        "head": unlearner.ledger.head,
    }
    lines = [repr(result or unlearner)]
    if release:
        lines.append(str(Guarantee.from_dict(release)))
    if loss:  # a number that is not finite is a string on record
        before, after = float(loss["before"]), float(loss["after"])
        lines.append(
            f"  with noise    mean loss of retained samples {before:.4g} -> {after:.4g} as written "
            f"(on {loss['n']})"
        )
    if written:
        lines.append(f"  written to    {written}")
    if options.directory:
        lines.append(f"  ledger head   {document['head']}")
    if refused:
        console.warn(
            f"the guard took the removal of {len(refused)} samples back, and the model still "
            "knows them: retrain without them"
        )
    elif not ids and unlearner.pending:
        console.warn(
            f"the guard took the removal of {len(unlearner.pending)} samples back earlier, and the "
            "model still knows them: retrain without them"
        )
    console.emit(document, "\n".join(lines))
    return FAILED if refused else OK


def _write(
    unlearner: "Unlearner", options: argparse.Namespace, console: Console
) -> dict[str, Any] | None:
    """Write the weights to --output; with a budget a release of them, whose guarantee is returned.

    A release is not kept anywhere, so that another one, with other noise, is paid for again.
    """
    if not unlearner.removed:
        raise InputError("this ledger has no removal yet: its weights are those it began with")
    if unlearner.budget is None:
        if options.note and options.forget is None:
            raise InputError("--note goes into the ledger, with --forget or a release")
        write_weights(options.output, unlearner.model)
        return None
    weights = unlearner.ledger[-1].record["checkpoint"]["sha256"]
    paid = sum(
        entry.kind == "release" and entry.record["checkpoint"]["sha256"] == weights
        for entry in unlearner.ledger
    )
    before = f"these weights were released {'once' if paid == 1 else f'{paid} times'} before"
    try:
        model = unlearner.release(note=options.note)
    except Exception:
        if options.directory and options.forget:
            console.note("the samples are removed, and that is on record")
        if paid:
            console.note(f"{before}; what was released is not kept")
        raise
    try:
        write_weights(options.output, model)
    except Exception:
        console.note("the release is on record and paid for, but could not be written")
        raise
    if paid:
        console.warn(
            f"{before}; what was released is not kept, so this is one more release, paid for as "
            "they were"
        )
    release: dict[str, Any] = unlearner.ledger[-1].record["guarantee"]
    return release


def _check_unlearn(options: argparse.Namespace) -> None:
    if not options.model:
        raise InputError("--model is needed (or --verify, with --directory)")
    if options.forget is None and not (options.resume and options.output):
        raise InputError(
            "--forget is needed (or --resume with --output, for the weights as they are, or "
            "--verify, with --directory)"
        )
    if options.head:
        raise InputError("--head belongs to --verify")
    if not options.directory:
        if options.resume:
            raise InputError("--resume needs --directory, where the ledger is")
        if not options.output:
            raise InputError("--output or --directory is needed: nothing would be kept")
        return
    there = (Path(options.directory) / "ledger.jsonl").is_file()
    if there and not options.resume:
        raise InputError(
            f"--directory {options.directory} has a ledger already: --resume goes on with it"
        )
    if options.resume:
        if not there:
            raise InputError(f"--directory {options.directory} has no ledger to --resume")
        own = [name for name in SETTINGS if getattr(options, name) is not None]
        for name in ("preset", "epsilon_budget", "delta_budget"):
            own += [name] * (getattr(options, name) is not None)
        own += [f"set {text}" for text in options.set if not text.startswith("perturb=")]
        if own:
            raise InputError(
                f"--{own[0].replace('_', '-')} cannot change on --resume: settings are those on "
                "record"
            )
        if options.weights:
            raise InputError("--weights goes without --resume: the weights are those on record")


def _verify(options: argparse.Namespace, console: Console) -> int:
    if not options.directory:
        raise InputError("--verify needs --directory, where the ledger is")
    for name in ("forget", "output", "resume", "note"):
        if getattr(options, name):
            raise InputError(f"--{name} does not go with --verify")
    if bool(options.model) != bool(options.weights):
        raise InputError("to verify a model, --verify needs both --model and --weights")
    need_torch()
    from lcodec_ext.unlearning import verify_ledger

    model = train = None
    if options.model:
        problem = Problem(options.model, options.weights, options.data)
        model, train = problem.model, problem.get("train")
    elif options.data:
        train = parts_of(call(options.data, "--data"), f"--data {options.data}").get("train")
    if options.data and train is None:
        raise InputError(f"--data {options.data} must give 'train'")
    found = verify_ledger(options.directory, model, train, head=options.head)
    document = {
        "ok": found.ok,
        "directory": options.directory,
        "problems": list(found.problems),
        "notes": list(found.notes),
        "entries": found.entries,
        "head": found.head,
        "removed": list(found.removed),
        "pending": list(found.pending),
        "counted": found.counted,
    }
    console.emit(document, str(found))
    return OK if found.ok else FAILED
