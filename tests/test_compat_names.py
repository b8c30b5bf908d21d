"""The parts of the published modules: hooks, dense steps, data sets."""

import codecs
import pickle
import types

import numpy as np
import pytest
import torch
from torch import nn

from lcodec_ext.compat import scrub
from test_compat_install import mnist


class Reused(nn.Module):
    """Layers out of the order of registration, one of them called twice, one never."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.twice = nn.Linear(3, 3)
        self.never = nn.Linear(3, 4)

    def forward(self, x, **_):
        return self.last(self.twice(self.twice(x)))


def test_hooks_agree_with_layers():
    model, x = Reused(), torch.randn(5, 3)
    hooks = scrub.ActivationsHook(model)
    acts, output = hooks.getActivations(x)
    first = model.twice(x)
    assert [len(a) for a in acts] == [len(layer.weight) for layer in hooks.getLayers()] == [2, 3, 4]
    torch.testing.assert_close(acts[0], output.mean(0))
    torch.testing.assert_close(acts[1], (first.mean(0) + model.twice(first).mean(0)) / 2)
    hooks.clearHooks()
    assert not model.last._forward_hooks
    hooks = scrub.ActivationsHook(model, reference_bugs=True)
    assert [len(a) for a in hooks.getActivations(x)[0]] == [3, 3, 2]  # by call
    texts = scrub.NLP_ActivationsHook(model)
    acts, _ = texts.get_NLP_Activations({"x": x[None], "labels": None})
    torch.testing.assert_close(acts[0], output.mean(0))


def test_hypercolumns():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3))
    params = types.SimpleNamespace(interp_size=8)
    image = torch.randn(1, 8, 8)
    columns, layers = scrub.getHyperColumn(model, image, params, "cpu")
    assert columns.shape == (1, 5, 8, 8)
    assert layers == list(model)
    maps, _ = scrub.HyperC(model).getHC(image[None])
    assert [tuple(each.shape) for each in maps] == [(1, 2, 6, 6), (1, 3, 4, 4)]
    columns = torch.cat([torch.randn(1, 2, 8, 8), image[None]], 1)
    assert scrub.myFOCI(image, columns)[0] == [2]
    chosen = scrub.reverseLinearIndexingToLayers([3, 0], layers)
    assert chosen == [[layers[1], 1], [layers[0], 0]]
    assert scrub.reverseIndexingToLayers([4], layers) == [[layers[1], 2]]
    with pytest.raises(IndexError, match="column 5 of the activations is beyond the 5 units"):
        scrub.reverseLinearIndexingToLayers([5], layers)


def test_dense_steps():
    rng = torch.Generator().manual_seed(0)
    g1, g2, w1, w2 = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    w1 = w2 + 0.5 * (g1 - g2) + 0.01
    y, s = g1 - g2, w1 - w2
    hessian = scrub.getHessian(g1, g2, "FD", w1, w2)
    torch.testing.assert_close(hessian @ s, y)  # a secant
    published = scrub.getHessian(g1, g2, "FD", w1, w2, reference_bugs=True)
    torch.testing.assert_close(published, torch.outer(y, y) / s.abs().sum(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scrub.getHessian(g1, approxType="Fisher"), torch.outer(g1, g1))
    with pytest.raises(ValueError, match="needs positive curvature"):
        scrub.getHessian(g1, g2, "FD", w2, w1)
    with pytest.raises(ValueError, match="needs dw2, w1 and w2"):
        scrub.getHessian(g1)
    exact = torch.linalg.solve(hessian + 0.1 * torch.eye(6), g1)
    torch.testing.assert_close(scrub.NewtonScrubStep(w1, g1, hessian, 11, 0.1), w1 + exact / 10)
    torch.testing.assert_close(scrub.CR_NaiveNewton(w1, g1, hessian, 0.1), w1 + exact)
    torch.manual_seed(0)
    noise = scrub.NoisyReturn(torch.zeros(4000), nsamps=1000, lamb=0.1)
    assert noise.std() == pytest.approx(0.5e-3 / 0.1 * np.sqrt(2 * np.log(125)), rel=0.1)


def test_vectors_of_twins():
    """Layers that print the same keep their own gradients, except with the published defect."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model(torch.randn(4, 3)).square().mean().backward()
    gradients = scrub.getGradObjs(model)[0]
    slices = [[model[0], 1], [model[1], 1]]
    g, w, places = scrub.getVectorizedGrad(gradients, model, slices, "cpu")
    for start, layer in ((0, model[0]), (4, model[1])):
        torch.testing.assert_close(g[start : start + 3], layer.weight.grad[1])
        torch.testing.assert_close(w[start + 3], layer.bias[1].detach())
    assert len(places) == 4
    scrub.updateModelParams(w + 1, places, model)
    torch.testing.assert_close(model[0].weight[1].detach(), w[:3] + 1)
    g, _, places = scrub.getVectorizedGrad(gradients, model, slices, "cpu", reference_bugs=True)
    torch.testing.assert_close(g[:4], g[4:])
    assert len(places) == 2


def python_2(pixels, labels):
    """A batch as Python 2 wrote it in protocol 2, as the published files are: strings are bytes."""
    rows, size = len(pixels), pixels.nbytes.to_bytes(4, "little")
    return (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K"
        + bytes([rows])
        + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|"
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + size + pixels.tobytes() + b"tb"
        b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"eu."
    )


class Runs:
    """What a pickle can run."""

    def __init__(self, *call):
        self._call = call

    def __reduce__(self):
        return self._call[0], self._call[1:]


def test_data_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="'mnist' is read from ./data/MNIST/raw"):
        scrub.getDatasets()
    mnist(tmp_path / "data/MNIST/raw", 30)
    train, val = scrub.getDatasets(exclude_indices=[0, 4])
    assert (len(train), len(val)) == (28, 30)
    image, target = train[0]
    assert (image.shape, target) == ((1, 8, 8), 1)
    assert image.min() == pytest.approx(-0.1307 / 0.3081, rel=1e-5)
    binary, _ = scrub.getDatasets("binary-mnist")
    assert {int(y) for _, y in binary} == {0, 1}
    chosen = scrub.BinaryDatasetWrapper(val, (3, 7))
    assert all(int(y) == (3, 7).index(val[k][1]) for (_, y), k in zip(chosen, chosen.valid_indices))  # noqa: B905
    with pytest.raises(FileNotFoundError, match="'cifar10' is read from .*no data_batch_1"):
        scrub.getDatasets("cifar10")
    folder = tmp_path / "data/cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, -1)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    for protocol, name in enumerate(names):
        batch = pickle.dumps({b"data": pixels, b"labels": [3, 5]}, protocol)
        (folder / name).write_bytes(batch)
    train, val = scrub.getDatasets("cifar10", data_augment=True)
    assert (len(train), len(val), train[0][0].shape, val[1][1]) == (10, 2, (3, 32, 32), 5)
    assert train.targets == [3, 5] * 5
    plain, _ = scrub.getDatasets("cifar10")
    for k in range(2, 10):
        assert torch.equal(plain[k][0], plain[k % 2][0])
    (folder / "test_batch").write_bytes(python_2(pixels, [7, 2]))
    _, val = scrub.getDatasets("cifar10")
    assert val.targets == [7, 2]
    assert torch.equal(val[1][0], plain[1][0])
    for call, protocol in [
        ((print, "run"), 0),
        ((eval, "1"), 2),
        ((np.load, "file"), 5),
        ((codecs.encode, "text", "rot13"), 2),
        ((codecs.decode, b"text", "latin1"), 5),
    ]:
        (folder / "test_batch").write_bytes(pickle.dumps(Runs(*call), protocol))
        with pytest.raises(pickle.UnpicklingError, match="has arrays alone|written in latin1"):
            scrub.getDatasets("cifar10")
    with pytest.raises(ValueError, match="name must be 'mnist'.*keep="):
        scrub.getDatasets("mrleye")
    with pytest.raises(ModuleNotFoundError, match="VGGFaceDataset.py, which belongs beside"):
        scrub.getDatasets("vggface")
