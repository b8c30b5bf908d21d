"""``lcodec-ext unlearn``, ``evaluate`` and ``report``; models and data come by import path."""

import argparse
import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcodec_ext.cli._console import (
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
    write_text,
)

if TYPE_CHECKING:
    from torch import nn

    from lcodec_ext.unlearning import Unlearner

PRESETS = ("recommended", "paper")
PARTS = ("train", "test", "validation", "loss_fn", "retrain")
WEIGHTS = (".pt", ".pth", ".safetensors")
SETTINGS = {  # options of their own, and the field of Settings they are
    "selection": "selection",
    "curvature": "curvature",
    "damping": "damping",
    "weight_decay": "weight_decay",
    "epsilon": "epsilon",
    "delta": "delta",
    "seed": "seed",
}

IMPORT_PATHS = """\
models and data:
  --model and --data name a function of yours, as path/to/file.py:name or package.module:name. It
  is called without arguments.
  The model's returns a torch.nn.Module, or (module, parts). The data's returns parts, a dict or an
  object with some of
    train       (inputs, targets), a dict of tensors with "labels", or a Dataset
    loss_fn     loss_fn(outputs, targets), the mean loss of a batch
    validation  optional: what the guard watches
    test        for evaluate: samples that training has not seen
    retrain     for evaluate: retrain(retained, seed), which trains a model from scratch
  Samples go by their number in train, from 0.
"""

FORGET = """\
requests:
  --forget 3,17,20-40      numbers of samples, and ranges with both their ends
  --forget @ids.txt        such numbers in a file, separated by commas, spaces or lines
  --forget ids.json        a JSON list of integers
"""

UNLEARN = """\
Delete training samples from a model, or verify the ledger of such deletions.

Without --directory: one request; --output gets the new weights, and nothing else is kept. With
it, the folder keeps ledger and checkpoints. A later call with --resume takes the next request from
there; its weights and settings are those on record, and --weights is not needed.

What comes out is a heuristic unless the result says "certified"; evaluate compares it with
retraining. Where the guard takes the step back, the weights stay as they were, nothing is written
to --output and the exit status is 1: retrain without these samples. With --epsilon and --delta,
--output is a release, with fresh noise, and paid for from the budget on record.

--resume with --output and without --forget writes the weights as the ledger has them, after a
removal without --output, say. With --epsilon and --delta this is a release again: no release is
kept, so one that was lost is paid for anew, if the budget allows it.

The head is the hash of the ledger's last entry. Note it elsewhere; --verify --head HASH shows
whether it is still there. --verify checks chain and checkpoints and, where they are given, a
model's weights (--model, --weights) and the data (--data); exit status 1 if anything is wrong.
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

EVALUATE = """\
Measure what a deletion left, beside models that were retrained without the samples.

The retrained models (at least 3: how far they are from each other is the floor of all distances)
are trained by the data's "retrain", or are weights given by --retrained. Compared with them are
the methods of --methods, each run here, and weights that exist already (--candidate). No method
sees the test samples.

In the table, "closed" is the share of the gap to retraining that a method closes: 0% for the
model as it was, 100% for one more retrained model, negative where it leads away. "MIA AUC" is how
well an attack tells removed samples from unseen ones: .5 is not at all, and should be near that
of the retrained models.
"""

EVALUATE_EXAMPLES = """\
examples:
  lcodec-ext evaluate --model net.py:build --weights net.pt --data data.py:load --forget 3,17 \\
      --weight-decay 1e-3 --output evaluation.json
  lcodec-ext evaluate --model net.py:build --weights net.pt --data data.py:load --forget 3,17 \\
      --methods recommended,L-BFGS --candidate mine=new.pt --retrained r1.pt r2.pt r3.pt
"""

REPORT = """\
Write a report: JSON, CSV, Markdown and PNG figures, from ledgers and evaluations.

Give folders of unlearn --directory, files of evaluate --output, or both. Several of a kind are
taken for repetitions of one experiment with different seeds: figures show their means, with
bands. Needs matplotlib.
"""

REPORT_EXAMPLES = """\
examples:
  lcodec-ext report run --output report
  lcodec-ext report run evaluation.json --output report
  lcodec-ext report seed0.json seed1.json seed2.json --output report
"""


def add_unlearn(commands: Any) -> None:
    """Add ``unlearn``."""
    parser = commands.add_parser(
        "unlearn",
        help="delete training samples from a model",
        description=UNLEARN,
        epilog="\n".join([IMPORT_PATHS, FORGET, UNLEARN_EXAMPLES]),
    )
    _add_problem(parser)
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
        help="the units to change: full, lfoci, cheap, gradient, fisher_ratio, expected_decrease, "
        "last, random, or a .json file of UnitSelection.to_dict()",
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


def add_evaluate(commands: Any) -> None:
    """Add ``evaluate``."""
    parser = commands.add_parser(
        "evaluate",
        help="compare deletions with retraining",
        description=EVALUATE,
        epilog="\n".join([IMPORT_PATHS, FORGET, EVALUATE_EXAMPLES]),
    )
    _add_problem(parser)
    parser.add_argument(
        "--forget", required=True, metavar="IDS", help="numbers of the samples to delete"
    )
    parser.add_argument(
        "--methods",
        metavar="NAMES",
        help="presets and baselines, separated by commas; 'none' for none (default: all there are)",
    )
    parser.add_argument(
        "--candidate",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="weights to measure too, made by unlearn or anything else; repeat it",
    )
    parser.add_argument(
        "--retrained",
        nargs="+",
        metavar="FILE",
        help="weights of at least 3 retrained models (default: the data's retrain makes them)",
    )
    parser.add_argument(
        "--n-retrain",
        type=integer(3),
        default=3,
        metavar="N",
        help="how many models to retrain, at least 3 (default: 3)",
    )
    parser.add_argument(
        "--weight-decay",
        type=number(),
        default=0.0,
        metavar="LAMBDA",
        help="of training: its objective is the mean loss plus (LAMBDA / 2) |w|^2 (default: 0)",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="(default: 0)")
    parser.add_argument(
        "--no-relearn", action="store_true", help="do not measure the time to learn again"
    )
    parser.add_argument(
        "--output", type=output_file(".json"), metavar="FILE", help="for report, a .json file"
    )
    add_common(parser)
    parser.set_defaults(run=run_evaluate)


def add_report(commands: Any) -> None:
    """Add ``report``."""
    parser = commands.add_parser(
        "report",
        help="tables and figures from ledgers and evaluations",
        description=REPORT,
        epilog=REPORT_EXAMPLES,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a folder of unlearn --directory, or a .json file of evaluate --output",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="made if it is not there")
    add_common(parser)
    parser.set_defaults(run=run_report)


def _add_problem(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", metavar="PATH:NAME", help="a function that makes the model")
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="its weights, a state_dict in a .pt or .safetensors file (default: as it is made)",
    )
    group.add_argument("--data", metavar="PATH:NAME", help="a function that makes the data")


# ---------------------------------------------------------------------------------------------
# Models and data


class Problem:
    """The user's model and data.

    Parameters
    ----------
    model : str
        Import path.
    weights : str or None
    data : str or None
        Import path; without one the model's function gives the data too.
    """

    def __init__(self, model: str, weights: str | None, data: str | None) -> None:
        _need_torch()
        from torch import nn

        from lcodec_ext.cli._import_path import call

        made, parts = call(model, "--model"), None
        if isinstance(made, tuple) and len(made) == 2:
            made, parts = made
        if not isinstance(made, nn.Module):
            raise InputError(
                f"--model must return a torch.nn.Module, or (module, parts); {model}() returned "
                f"an object of type {type(made).__name__}"
            )
        self.model = made
        self._parts = {} if parts is None else _parts(parts, f"--model {model}")
        if data is not None:
            self._parts |= _parts(call(data, "--data"), f"--data {data}")
        self._source = f"--data {data}" if data else f"--model {model}"
        if weights is not None:
            self.model = self.with_weights(weights, "--weights")

    def __getitem__(self, name: str) -> Any:
        if name not in self._parts:
            there = ", ".join(self._parts) or "nothing of use"
            raise InputError(f"{self._source} must give {name!r}; it gives {there}")
        return self._parts[name]

    def get(self, name: str) -> Any:
        """A part, or None if it is not there."""
        return self._parts.get(name)

    def with_weights(self, file: str, option: str) -> "nn.Module":
        """A copy of the model with the weights of a file."""
        import copy

        model = copy.deepcopy(self.model)
        try:
            model.load_state_dict(_read_weights(file, option))
        except RuntimeError as error:  # its message lists what does not fit
            raise InputError(f"{option} {file} does not fit the model: {error}") from None
        return model


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError("this command needs PyTorch: pip install 'lcodec_ext[torch]'") from None


def _parts(given: Any, source: str) -> dict[str, Any]:
    """The parts of a problem, of a dict or of an object's attributes."""
    if isinstance(given, Mapping):
        if unknown := [str(key) for key in given if key not in PARTS]:
            raise InputError(
                f"{source} gives {', '.join(map(repr, unknown))}; the parts are {', '.join(PARTS)}"
            )
        found = dict(given)
    else:
        found = {name: getattr(given, name) for name in PARTS if hasattr(given, name)}
    found = {name: part for name, part in found.items() if part is not None}
    if not found:
        raise InputError(
            f"{source} must return a dict, or an object, with some of {', '.join(PARTS)}; it "
            f"returned an object of type {type(given).__name__}"
        )
    return found


def _read_weights(file: str, option: str) -> dict[str, Any]:
    path = Path(file)
    if path.suffix.lower() not in WEIGHTS:
        raise InputError(f"{option} must be a file ending in {' or '.join(WEIGHTS)}; got {file!r}")
    if not path.is_file():
        raise InputError(f"{option}: there is no file {file}")
    try:
        if path.suffix.lower() == ".safetensors":
            state = _safetensors(option).load_file(path)
        else:
            import torch

            state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:  # its message is long, with terminal codes
        found = "torch.save did not write it"
        if _is_pickled(path):
            found = (
                "it holds pickled Python objects, a whole model perhaps, and to load them could "
                "run any code. Save the tensors alone: torch.save(model.state_dict(), file)"
            )
        raise InputError(f"{option} {file} cannot be read as tensors: {found}") from error
    except Exception as error:
        told = str(error).splitlines() or ["no message"]
        raise InputError(
            f"{option} {file} cannot be read as tensors (a state_dict saved by torch.save or "
            f"safetensors): {type(error).__name__}: {told[0][:200]}"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]  # a checkpoint of Lightning and others
    if not isinstance(state, Mapping):
        raise InputError(
            f"{option} {file} must hold a state_dict; got an object of type {type(state).__name__}"
        )
    return dict(state)


def _is_pickled(path: Path) -> bool:
    """Whether a file is one that torch.save writes, now or before PyTorch 1.6, or a pickle."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def _write_weights(path: Path, model: "nn.Module") -> None:
    """Write a model's state_dict at once."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    unfinished = _unfinished(path)
    _save(state, path.suffix, unfinished)
    unfinished.replace(path)


def _check_writable(path: Path, model: "nn.Module") -> None:
    """Write a file as large as that of the weights, of zeros, and delete it again.

    What is removed or paid for later can then be written: the writer is installed and takes these
    tensors, the folder can be written, and there is space.
    """
    import torch

    if path.is_dir():
        raise InputError(f"--output {path} is a folder; expected the name of a file")
    unfinished = _unfinished(path)
    try:
        state = {
            key: torch.zeros_like(value, device="cpu").contiguous()
            for key, value in model.state_dict().items()
        }
        _save(state, path.suffix, unfinished)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"--output {path} cannot be written: {type(error).__name__}: {error}"
        ) from error
    finally:
        if unfinished.is_file():
            unfinished.unlink()


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _save(state: dict[str, Any], suffix: str, file: Path) -> None:
    if suffix.lower() == ".safetensors":
        state = {key: value.clone() for key, value in state.items()}  # it refuses shared memory
        _safetensors("--output").save_file(state, file)
    else:
        import torch

        torch.save(state, file)


def _safetensors(option: str) -> Any:
    try:
        from safetensors import torch as safetensors
    except ImportError:
        raise InputError(
            f"{option}: .safetensors needs safetensors: pip install safetensors (or use .pt)"
        ) from None
    return safetensors


# ---------------------------------------------------------------------------------------------
# Requests and settings


def parse_ids(text: str) -> list[int]:
    """The numbers of a request, ascending, each once."""
    source, content = "--forget", text
    if text.startswith("@") or text.endswith(".json"):
        source = f"--forget {text}"
        path = Path(text.removeprefix("@"))
        if not path.is_file():
            raise InputError(f"{source}: there is no file {path}")
        content = path.read_text(encoding="utf-8")
    if text.endswith(".json"):
        try:
            ids = json.loads(content)
        except ValueError as error:
            raise InputError(f"{source} is not JSON: {error}") from None
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise InputError(f"{source} must be a list of integers >= 0")
    else:
        ids = []
        for word in re.split(r"[\s,]+", content.strip(" \t\r\n,")):
            match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", word)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last:
                raise InputError(
                    f"{source}: expected numbers and ranges, as 3,17,20-40; got {word!r}"
                )
            ids.extend(range(first, last + 1))
    if not ids:
        raise InputError(f"{source} names no sample")
    return sorted(set(ids))


def parse_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of Settings, from the options of their own and from --set."""
    from lcodec_ext.cli._import_path import load_object

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
    from lcodec_ext.curvature.selection import UnitSelection

    try:
        return UnitSelection.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"--selection {file} must be the JSON of UnitSelection.to_dict(): {error}"
        ) from None


# ---------------------------------------------------------------------------------------------
# Commands


def run_unlearn(options: argparse.Namespace, console: Console) -> int:
    """Take a request, or verify a ledger."""
    if options.verify:
        return _verify(options, console)
    _check_unlearn(options)
    ids = [] if options.forget is None else parse_ids(options.forget)
    _need_torch()
    from lcodec_ext.unlearning import Settings, Unlearner

    settings = parse_settings(options)
    preset = options.preset or "recommended"
    if not options.resume:
        Settings.preset(preset, **settings)  # its errors, before models are made
    problem = Problem(options.model, options.weights, options.data)
    train, loss_fn = problem["train"], problem["loss_fn"]
    if not options.resume:
        _note_weights(options, console)
    if ids:
        _check_ids(ids, n_samples(train, problem.model))
    if options.output:
        _check_writable(options.output, problem.model)
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
                    "--resume goes on with them; delete it to begin anew with others"
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
        raise InputError("nothing is removed in this ledger: its weights are those it began with")
    if unlearner.budget is None:
        if options.note and options.forget is None:
            raise InputError("--note goes into the ledger, with --forget or a release")
        _write_weights(options.output, unlearner.model)
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
        _write_weights(options.output, model)
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


def n_samples(train: Any, model: "nn.Module") -> int:
    """How many samples there are, of any kind of train that `unlearn` takes."""
    import torch

    from lcodec_ext._torch.samples import as_samples

    parameter = next(model.parameters(), torch.zeros(()))
    return len(as_samples(train, "train", parameter.device, torch.float64))


def _note_weights(options: argparse.Namespace, console: Console) -> None:
    if not options.weights:  # they may be random, and nothing else would tell
        console.note(f"no --weights: the model as {options.model} makes it")


def _check_ids(ids: list[int], n: int) -> None:
    if ids[-1] >= n:
        raise InputError(f"--forget names sample {ids[-1]}; train has the numbers 0 to {n - 1}")
    if len(ids) == n:
        raise InputError("--forget must leave at least one sample; it names all of train")


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
    _need_torch()
    from lcodec_ext.cli._import_path import call
    from lcodec_ext.unlearning import verify_ledger

    model = train = None
    if options.model:
        problem = Problem(options.model, options.weights, options.data)
        model, train = problem.model, problem.get("train")
    elif options.data:
        train = _parts(call(options.data, "--data"), f"--data {options.data}").get("train")
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


def run_evaluate(options: argparse.Namespace, console: Console) -> int:
    """Compare methods and given weights with retraining."""
    if not options.model:
        raise InputError("--model is needed")
    ids = parse_ids(options.forget)
    if options.retrained and len(options.retrained) < 3:
        raise InputError(f"--retrained needs at least 3 files; got {len(options.retrained)}")
    candidates = {}
    for text in options.candidate:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise InputError(f"--candidate must be NAME=FILE; got {text!r}")
        if name in candidates:
            raise InputError(f"--candidate names {name!r} twice")
        candidates[name] = file
    _need_torch()
    from lcodec_ext.unlearning import BASELINES, evaluate

    names = [] if options.methods == "none" else list(BASELINES)
    if options.methods not in (None, "none"):
        names = [name.strip() for name in options.methods.split(",")]
        for name in names:
            if name not in BASELINES:
                known = ", ".join(BASELINES)
                raise InputError(f"--methods names {name!r}; expected some of {known}")
    problem = Problem(options.model, options.weights, options.data)
    train = problem["train"]
    _note_weights(options, console)
    n = n_samples(train, problem.model)
    _check_ids(ids, n)
    forget, retain = split(train, ids, n)
    methods: dict[str, Any] = {name: BASELINES[name] for name in names}
    for name, file in candidates.items():
        if name in methods:
            raise InputError(f"--candidate {name!r} has the name of a method of --methods")
        methods[name] = problem.with_weights(file, f"--candidate {name}")
    if not methods:
        raise InputError("--methods none leaves nothing to evaluate; give a --candidate")
    retrained: Any
    if options.retrained:
        retrained = [problem.with_weights(file, "--retrained") for file in options.retrained]
    else:
        retrain = problem["retrain"]

        def retrained(seed: int) -> Any:
            return retrain(retain, seed)

    evaluation = evaluate(
        problem.model,
        forget,
        retain,
        problem["test"],
        problem["loss_fn"],
        retrained=retrained,
        methods=methods,
        n_retrain=options.n_retrain,
        weight_decay=options.weight_decay,
        seed=options.seed,
        relearn=not options.no_relearn,
        progress=console.progress,
    )
    document = evaluation.to_dict()
    if options.output:
        write_text(options.output, dump(document) + "\n")
        console.note(f"wrote {options.output}")
    console.emit(document, repr(evaluation))
    return FAILED if any(method.error for method in evaluation.methods) else OK


def split(train: Any, ids: list[int], n: int) -> tuple[Any, Any]:
    """The removed and the retained ones of n samples, each of the kind of train."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

    if isinstance(train, DataLoader | IterableDataset) or not isinstance(
        train, tuple | list | Mapping | Dataset
    ):
        raise InputError(
            "to evaluate, train must be tensors, a dict of tensors or a Dataset; got an object of "
            f"type {type(train).__name__}"
        )
    kept = np.delete(np.arange(n), ids)

    def take(numbers: Any) -> Any:
        if isinstance(train, Dataset):
            return Subset(train, [int(i) for i in numbers])
        index = torch.as_tensor(numbers)
        if isinstance(train, Mapping):
            return {key: part[index.to(part.device)] for key, part in train.items()}
        return tuple(part[index.to(part.device)] for part in train)

    return take(ids), take(kept)


def run_report(options: argparse.Namespace, console: Console) -> int:
    """Write a report of ledgers and evaluations."""
    ledgers, evaluations = [], []
    for source in options.sources:
        path = Path(source)
        if path.is_dir():
            ledgers.append(path)
        elif path.is_file() and path.suffix.lower() == ".json":
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{source} is not JSON: {error}") from None
            if not isinstance(document, dict) or "methods" not in document:
                raise InputError(f"{source} is no evaluation, as evaluate --output writes them")
            evaluations.append(document)
        elif path.is_file() and path.suffix.lower() == ".jsonl":
            ledgers.append(path)
        else:
            what = "is no folder and no .json file" if path.exists() else "does not exist"
            raise InputError(
                f"{source} {what}; expected a folder of unlearn --directory, or a file of "
                "evaluate --output"
            )
    _need_torch()
    from lcodec_ext.unlearning import write_report

    report = write_report(options.output, evaluation=evaluations or None, ledger=ledgers or None)
    written = {
        "output": options.output,
        "files": [str(path) for path in report.files.values()],
        "summary": list(report.summary),
    }
    console.emit(written, str(report))
    return OK
