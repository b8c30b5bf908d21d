"""Modules of PyTorch Lightning, their checkpoints, and what its Fabric sets up."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it uses of torch
    import pytorch_lightning as pl
    from lightning_fabric import Fabric
    from torchmetrics.classification import MulticlassAccuracy

from lcodec_ext._torch.names import without_prefix
from lcodec_ext.curvature import HessianOperator, UnitSelection
from lcodec_ext.evaluation import evaluate
from lcodec_ext.unlearning import Unlearner, unlearn

N, M, D, C = 48, 4, 6, 3
STEP = {"damping": 0.1, "calibrate": False, "max_drop": None, "weight_decay": 0.01}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(self.trainer|isinstance|GPU|num_workers|log_every_n_steps|configure_optimizers)",
    "ignore:.*(torch.jit|treespec|LeafSpec|_pytree)",
)


def data():
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(N) % C


def parts():
    x, y = data()
    return (x[:M], y[:M]), (x[M:], y[M:])


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


class Lit(pl.LightningModule):
    """With hyperparameters, a metric that has buffers, and a forward pass that logs."""

    def __init__(self, hidden=8, logs=True):
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(nn.Linear(D, hidden), nn.Tanh(), nn.Linear(hidden, C))
        self.accuracy = MulticlassAccuracy(C)

    def forward(self, x):
        out = self.model(x)
        if self.hparams.logs:
            self.log("size", out.abs().mean())
        return out

    def training_step(self, batch, index):
        x, y = batch
        out = self(x)
        self.accuracy(out, y)
        self.log("accuracy", self.accuracy)
        return cross_entropy(out, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.01)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A module with the trainer that trained it attached, and its checkpoint."""
    torch.manual_seed(0)
    lit, folder = Lit(), tmp_path_factory.mktemp("lit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(lit, DataLoader(TensorDataset(*data()), batch_size=16))
        trainer.save_checkpoint(folder / "last.ckpt")
    return lit, trainer, folder / "last.ckpt"


def test_the_module_and_the_model_in_it_are_one(fitted):
    lit, trainer, _ = fitted
    start = weights(lit)
    whole = unlearn(lit, *parts(), cross_entropy, **STEP)
    inner = unlearn(lit.model, *parts(), cross_entropy, **STEP)
    by_optimizer = unlearn(
        lit, *parts(), cross_entropy, **STEP | {"weight_decay": lit.optimizers()}
    )
    assert torch.equal(weights(whole.model), weights(inner.model))
    assert torch.equal(weights(by_optimizer.model), weights(whole.model))
    assert not torch.equal(weights(whole.model), start)
    assert isinstance(whole.model, Lit)
    assert whole.model.hparams == lit.hparams
    assert torch.equal(weights(lit), start)
    assert lit.trainer is trainer  # it may be trained on
    A, B = (
        HessianOperator(m, cross_entropy, data(), UnitSelection({name: [1]})).to_dense()
        for m, name in ((lit, "model.0"), (lit.model, "0"))
    )
    assert torch.equal(A, B)


def test_the_result_is_trained_on_by_a_new_trainer(fitted, tmp_path):
    lit, _, _ = fitted
    result = unlearn(lit, *parts(), cross_entropy, **STEP)
    before = weights(result.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(result.model, DataLoader(TensorDataset(*parts()[1]), batch_size=16))
    assert not torch.equal(weights(result.model), before)


def test_a_stream_and_an_evaluation_of_a_module(fitted, tmp_path):
    lit, _, _ = fitted
    with Unlearner(lit, data(), cross_entropy, directory=tmp_path, **STEP) as stream:
        stream.remove([3, 5])
        found = weights(stream.model)
    with Unlearner(lit.model, data(), cross_entropy, **STEP) as stream:
        stream.remove([3, 5])
        assert torch.equal(weights(stream.model), found)
    quiet = [Lit(logs=False) for _ in range(2)]
    (x, y), given = data(), parts()
    table = evaluate(
        lit.model,
        *given,
        (x[:9], y[:9]),
        cross_entropy,
        relearn=False,
        retrained=[each.model for each in quiet],
    )
    assert table.methods[0].metrics["weight_distance"] > 0


def test_a_checkpoint_of_a_module(fitted):
    lit, _, file = fitted
    state = torch.load(file, weights_only=True)["state_dict"]
    found, left = without_prefix(state | {"accuracy.tp": torch.zeros(3)}, lit.model.state_dict())
    assert left == ["accuracy.tp"]
    for name, tensor in lit.model.state_dict().items():
        assert torch.equal(found[name], tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = Lit.load_from_checkpoint(file)
    a, b = (unlearn(m, *parts(), cross_entropy, **STEP) for m in (again, lit))
    assert torch.equal(weights(a.model), weights(b.model))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_fabric_has_set_up(precision):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        torch.manual_seed(0)
        plain = Lit(logs=False).model
        model = fabric.setup(plain)
    assert UnitSelection.all(model) == UnitSelection.all(plain)
    a, b = (unlearn(m, *parts(), cross_entropy, **STEP) for m in (model, plain))
    assert type(a.model) is nn.Sequential
    assert torch.equal(weights(a.model), weights(b.model))
    result = unlearn(model, *parts(), cross_entropy, inplace=True, **STEP)
    assert result.model is model
    assert torch.equal(weights(plain), weights(a.model))
