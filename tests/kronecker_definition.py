"""EK-FAC from its definition, sample by sample, by autograd on a model's own layers."""

import torch


def output_hessian(loss_fn, outputs, targets):
    """Second derivatives of one sample's loss by its outputs, (C, C)."""
    flat = outputs.detach().flatten()

    def loss(z):
        return loss_fn(z.reshape(outputs.shape), targets)

    return torch.autograd.functional.hessian(loss, flat)


def seeds_of(kind, loss_fn, outputs, targets):
    """What is sent back: the gradient, or the columns of a square root of the Hessian."""
    z = outputs.detach().requires_grad_()
    if kind == "empirical":
        return [torch.autograd.grad(loss_fn(z, targets), z)[0]]
    values, vectors = torch.linalg.eigh(output_hessian(loss_fn, outputs, targets))
    return [c.reshape(outputs.shape) for c in (vectors * values.clamp(min=0).sqrt()).T]


def one(batch, i):
    """Sample i, as a batch of one."""
    return (
        {k: v[i : i + 1] for k, v in batch.items()} if isinstance(batch, dict) else batch[i : i + 1]
    )


def gradients(model, loss_fn, inputs, targets, kind):
    """For each sample and column the gradients by all parameters, by name."""
    names = dict(model.named_parameters())
    found = []
    for i in range(len(targets)):
        outputs = model(one(inputs, i))
        for seed in seeds_of(kind, loss_fn, outputs, one(targets, i)):
            each = torch.autograd.grad(
                outputs, [*names.values()], seed, retain_graph=True, materialize_grads=True
            )
            found.append(dict(zip(names, each, strict=True)))
    return found


def moments(model, layer, loss_fn, inputs, targets, kind, unfold):
    """A and G of a layer: the mean of x x^T over positions, and the sum of g g^T.

    unfold turns a layer's input and what reaches its output into (positions, D) and (positions, r).
    """
    seen = []

    def hook(module, args, out):
        out.retain_grad()
        seen.append((args[0].detach(), out))

    handle = layer.register_forward_hook(hook)
    xs, gs = [], []
    for i in range(len(targets)):
        seen.clear()
        outputs = model(one(inputs, i))
        for number, seed in enumerate(seeds_of(kind, loss_fn, outputs, one(targets, i))):
            for x, out in seen:
                (reached,) = torch.autograd.grad(outputs, out, seed, retain_graph=True)
                x, g = unfold(x, reached)
                gs.append(g)
                if number == 0:
                    xs.append(x)
    handle.remove()
    x, g = torch.cat(xs), torch.cat(gs)
    return x.T @ x / len(x), g.T @ g / len(targets)


def corrected(A, G, matrices):
    """Eigenvectors of A and G with the mean squares of samples' gradients (r, D) along them."""
    QA, QG = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
    values = sum((QG.T @ each @ QA).square() for each in matrices)
    Q = torch.kron(QG, QA)
    return (Q * values.flatten()) @ Q.T
