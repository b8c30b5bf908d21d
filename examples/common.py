"""What the examples share: options, progress, the record of a run, and the style of figures."""

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # networks, data and the description of the machine

import environment  # noqa: E402

SCHEMA = 1


def options(doc: str, data: str | None) -> argparse.ArgumentParser:
    """The options of every example; `data` says what `--data` has to hold."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if data is not None:
        parser.add_argument("--data", type=Path, metavar="DIR", help=data)
    parser.add_argument(
        "--full", action="store_true", help="the recorded size; without it a run takes a minute"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data, networks and draws")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="folder for the record (JSON) and the figure (PNG), by default demo_output",
    )
    return parser


def main(
    name: str,
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], dict],
    draw: Callable[[dict, Path], None],
    show: Callable[[dict], str],
) -> None:
    """Run an example: compute, write NAME.json and NAME.png, print a table."""
    arguments = parser.parse_args()
    if getattr(arguments, "data", None) is not None and not arguments.data.is_dir():
        parser.error(f"--data: {arguments.data} is not a folder")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if "torch" in sys.modules:  # a second thread gains little on networks this small
        sys.modules["torch"].set_num_threads(1)
    began = time.perf_counter(), time.process_time()
    start = head(name, arguments)  # the commit that runs, whatever is edited meanwhile
    found = run(arguments)
    record = start | {
        "seconds": round(time.perf_counter() - began[0], 1),
        "cpu_seconds": round(time.process_time() - began[1], 1),
    }
    record |= found
    file = arguments.output / f"{name}.json"
    file.write_text(as_json(record) + "\n")
    figure = file.with_suffix(".png")
    draw(record, figure)
    print(f"\n{show(record)}\n\nRecord: {file}\nFigure: {figure}")


def head(name: str, arguments: argparse.Namespace) -> dict:
    """What a record starts with: what was run, on which version and machine."""
    given = {k: v for k, v in vars(arguments).items() if k not in ("output", "data")}
    data = getattr(arguments, "data", None)
    return {
        "schema": SCHEMA,
        "example": name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **environment.commit(),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "options": given | {"data": None if data is None else data.name},
    }


def as_json(record: dict) -> str:
    """Strict JSON: NaN is null, and an infinite number the text "inf" or "-inf"."""
    from lcodec_ext._files import json_ready

    ready = json_ready(record, nonfinite=lambda x: None if math.isnan(x) else str(x))
    return json.dumps(ready, indent=1, allow_nan=False)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation of several runs, as tables have them; of one run its value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def progress(items: Iterable, what: str, unit: str = "it"):
    """The items, with a bar that says how long the rest will take."""
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=unit, dynamic_ncols=True)


def paper_noise(n: int, decay: float, epsilon: float, delta: float) -> float:
    """Standard deviation of the paper's noise for one sample of n, with its L = 1 and M = 1/4."""
    from lcodec_ext.unlearning.privacy import gaussian_sigma, sekhari_sensitivity

    constants = {"lipschitz": 1.0, "hessian_lipschitz": 0.25, "strong_convexity": decay}
    return gaussian_sigma(sekhari_sensitivity(n, 1, **constants), epsilon, delta)


def paper_removal(model, forget, retain, loss_fn, refused: Counter, sigma: float, draws, **options):
    """Remove samples from a model in place by the paper's preset, then add its noise.

    Returns the units that changed, on which the noise is; None if no step came about: without
    positive curvature along it, with nothing to select, and from a model that is already broken.
    `refused` then counts how the message begins.
    """
    from lcodec_ext.unlearning import (
        IndefiniteCurvatureError,
        NotFiniteError,
        NothingSelectedError,
        unlearn,
    )

    try:
        result = unlearn(model, forget, retain, loss_fn, preset="paper", inplace=True, **options)
    except (IndefiniteCurvatureError, NothingSelectedError, NotFiniteError) as error:
        refused[str(error)[:60]] += 1
        return None
    units = result.selection.units
    if sigma:
        add_noise_on(model, units, sigma, draws)
    return units


def add_noise_on(model, units, sigma: float, generator) -> None:
    """Noise on the weights and biases of these units alone, as the published code adds it."""
    import torch

    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, rows in units.items():
            for parameter in modules[name].parameters(recurse=False):
                chosen = torch.as_tensor(rows)
                drawn = torch.randn(parameter[chosen].shape, generator=generator)
                parameter[chosen] += sigma * drawn


@contextmanager
def figure(file: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 3.2)):
    """Axes of a figure in the package's style, which is saved at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lcodec_ext.evaluation.figures import style

    with style():
        drawn = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn.subplots(rows, columns)
        drawn.savefig(file, dpi=150)
