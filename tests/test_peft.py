"""Models with adapters of peft: operators, deletions, patches and streams on the adapters alone."""

import copy

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, one_hot

from lcodec_ext.curvature import (
    EKFACOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    ParameterSelection,
    UnitSelection,
    all_trainable,
    per_sample_gradients,
)
from lcodec_ext.unlearning import Settings, Unlearner, WeightPatch, unlearn, verify_ledger

N, M, C = 15, 3, 3
WORDS = 16
STEP = Settings(curvature="gauss_newton", damping=0.1, weight_decay=1e-2, max_drop=None)

pytestmark = [  # of peft, when it wraps a model
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def bert_base(seed=0):
    torch.manual_seed(seed)
    config = transformers.DistilBertConfig(
        vocab_size=WORDS, max_position_embeddings=10, n_layers=1, n_heads=2, dim=8, hidden_dim=12,
        num_labels=C,
    )  # fmt: skip
    return transformers.DistilBertForSequenceClassification(config).double()


def gpt_base(seed=0):
    """Its layers are Conv1D, which hold their weights as inputs x outputs."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=10, n_embd=8, n_layer=1, n_head=2, num_labels=C,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2ForSequenceClassification(config).double()


def bert(**how):
    return adapted(bert_base(), {"target_modules": ["q_lin", "v_lin"], "lora_dropout": 0.1} | how)


def gpt(**how):
    return adapted(gpt_base(), {"target_modules": ["c_attn"], "fan_in_fan_out": True} | how)


def adapted(model, how):
    return drawn(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, **how))


def drawn(model, config):
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # matrices B start at 0
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.double()


def scaled():
    layers = {"target_modules": ["k_lin", "v_lin", "lin2"], "feedforward_modules": ["lin2"]}
    return drawn(bert_base(), peft.IA3Config(task_type="SEQ_CLS", **layers))


def prompted():
    sizes = {"num_virtual_tokens": 2, "token_dim": 8, "num_layers": 1, "num_attention_heads": 2}
    return drawn(bert_base(), peft.PromptTuningConfig(task_type="SEQ_CLS", **sizes))


CASES = {
    "bert": bert,
    "gpt": gpt,
    "rank-stabilised": lambda: bert(use_rslora=True),
    "bias": lambda: bert(bias="lora_only", lora_bias=False),
    "bias of B": lambda: bert(lora_bias=True),
    "dora": lambda: bert(use_dora=True),
    "dora gpt": lambda: gpt(use_dora=True),
    "embedding": lambda: bert(target_modules=["word_embeddings", "q_lin"]),
    "scales": scaled,
    "prompt": prompted,
}


def samples(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (n, 1), generator=generator)
    mask = (torch.arange(6) < lengths).long()
    ids = torch.randint(1, WORDS, (n, 6), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(n) % C}


def some(batch, which):
    return {key: value[which] for key, value in batch.items()}


def parted(batch):
    return some(batch, slice(0, M)), some(batch, slice(M, None))


def adapters(model):
    return {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()])


class Dense:
    """Derivatives by all trainable parameters, one after the other, by autograd."""

    def __init__(self, model, batch):
        self.model, self.own, self.y = model.eval(), adapters(model), batch["labels"]
        self.inputs = {k: v for k, v in batch.items() if k != "labels"}
        self.theta, self.sizes = flat(self.own), [p.numel() for p in self.own.values()]
        J = torch.autograd.functional.jacobian(self.outputs, self.theta, vectorize=True)
        p = self.outputs(self.theta).softmax(1)
        r = p - one_hot(self.y, C)
        self.gradients = torch.einsum("ica,ic->ia", J, r)
        by_output = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        self.gauss_newton = torch.einsum("ica,icd,idb->ab", J, by_output, J) / len(r)
        self.fisher = self.gradients.T @ self.gradients / len(r)

    def hessian(self):
        def loss(vector):
            return cross_entropy(self.outputs(vector), self.y)

        return torch.autograd.functional.hessian(loss, self.theta, vectorize=True)

    def outputs(self, vector):
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(self.model, self.by_name(vector), (), self.inputs).logits

    def by_name(self, vector):
        parts = zip(self.own.items(), vector.split(self.sizes), strict=True)
        return {name: part.reshape(p.shape) for (name, p), part in parts}

    def order(self, selection):
        numbers = torch.arange(len(self.theta), dtype=torch.float64)
        return selection.gather(self.by_name(numbers), model=self.model).long()


def off(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", ["bert", "gpt", "dora", "embedding"])
def test_curvature_and_gradients_are_those_of_dense_autograd(case):
    model, batch = CASES[case](), samples(5)
    dense = Dense(model, batch)
    matrices = {
        HessianOperator: dense.hessian(),
        GaussNewtonOperator: dense.gauss_newton,
        FisherOperator: dense.fisher,
    }
    for selection in (ParameterSelection.of(model), UnitSelection.all(model)):
        order = dense.order(selection)
        for operator, expected in matrices.items():
            found = operator(model, cross_entropy, batch, selection).to_dense()
            assert off(found, expected[order][:, order]) < 1e-10, (operator, selection)
        whole = EKFACOperator(model, cross_entropy, batch, selection).diagonal().sum()
        assert off(whole, dense.gauss_newton.diagonal()[order].sum()) < 1e-10
        each = per_sample_gradients(model, cross_entropy, batch, selection)
        found = torch.cat([part.dense() for part in each])
        assert off(found, dense.gradients[:, order]) < 1e-10


def by_rows(used, like):
    """Whether anything in the row of an entry is used, in a flat tensor."""
    if like.ndim < 2:
        return used
    return (
        used.view(len(like), -1).any(1, keepdim=True).expand(len(like), like[0].numel()).flatten()
    )


@pytest.mark.parametrize("case", CASES)
def test_by_default_adapters_are_what_moves(case):
    """By the step of dense autograd; everything else stays bit for bit."""
    model, (forget, retain) = CASES[case](), parted(samples())
    before = copy.deepcopy(model.state_dict())
    result = unlearn(model, forget, retain, cross_entropy, preset=STEP)
    own, every = adapters(model), all_trainable(model)
    raw = case in ("dora", "dora gpt", "embedding", "scales")
    assert isinstance(every, ParameterSelection if raw else UnitSelection)
    assert result.selection == every
    assert result.n_parameters == len(flat(own))
    removed, kept, wide = Dense(model, forget), Dense(model, retain), STEP.weight_decay
    used = ((kept.gradients != 0).any(0) | (removed.gradients != 0).any(0)).split(kept.sizes)
    used = torch.cat([by_rows(u, p) for u, p in zip(used, own.values(), strict=True)])
    step = torch.linalg.solve(
        kept.gauss_newton + (0.1 + wide) * torch.eye(len(used), dtype=torch.float64),
        (removed.gradients.sum(0) + M * wide * flat(own) * used) / (N - M),
    )
    assert off(flat(adapters(result.model)) - flat(own), step) < 1e-10
    after = result.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed == set(result.patch().tensors) <= own.keys()
    assert len(changed) == len(own)


def remove(model, **options):
    return unlearn(model, *parted(samples()), cross_entropy, preset=STEP, **options)


def test_merged_adapters_are_refused():
    model = bert()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_lin' is merged .*model.unmerge_adapter\(\)"):
        remove(model)
    units = UnitSelection.from_globs(model, "*q_lin.lora_A*")
    with pytest.raises(ValueError, match="q_lin' is merged"):
        GaussNewtonOperator(model, cross_entropy, samples(), units)
    head = UnitSelection.from_globs(model, "*.classifier.*")
    GaussNewtonOperator(
        model, cross_entropy, samples(), head
    )  # which the adapters do not matter to
    model.unmerge_adapter()
    remove(model)


@pytest.mark.parametrize("kind", ["integers", "backend"])
def test_adapters_of_quantised_layers_are_refused(kind):
    model = bert()
    layer = model.get_submodule("base_model.model.distilbert.transformer.layer.0.attention.v_lin")
    if kind == "integers":
        weight = layer.base_layer.weight
        layer.base_layer.weight = torch.nn.Parameter((weight * 50).to(torch.int8), False)
    else:
        layer.quantization_backend = object()
    with pytest.raises(ValueError, match="v_lin' has an adapter on quantised weights"):
        remove(model)


def test_loaded_adapters_that_are_frozen_say_how_to_train_them(tmp_path):
    bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no trainable parameter: peft .*is_trainable=True"):
        remove(peft.PeftModel.from_pretrained(bert_base(), tmp_path))
    remove(peft.PeftModel.from_pretrained(bert_base(), tmp_path, is_trainable=True))


def test_of_several_adapters_the_active_one_moves():
    model = bert()
    more = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["q_lin"])
    model.add_adapter("other", more)
    model = model.double()
    for active, idle in (("default", "other"), ("other", "default")):
        model.set_adapter(active)
        changed = remove(model).patch().tensors
        assert any(active in name for name in changed)
        assert not any(f".{idle}" in name for name in changed)
    with pytest.raises(ValueError, match="lora_A.default.* do not require gradients"):
        remove(model, selection=UnitSelection.from_globs(model, "*lora_A.default"))


def test_the_optimizer_of_the_adapters_gives_the_weight_decay():
    model = bert()
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups["lora_" in name].append(p)
    optimizer = torch.optim.SGD(
        [{"params": groups[True], "weight_decay": 1e-2}, {"params": groups[False]}], lr=0.1
    )
    found = remove(model, weight_decay=optimizer)
    named = {k: 1e-2 for k in adapters(model) if "lora_" in k}
    expected = remove(model, weight_decay=named)
    assert torch.equal(flat(adapters(found.model)), flat(adapters(expected.model)))
    other = remove(model, weight_decay=1e-2)
    assert not torch.equal(flat(adapters(found.model)), flat(adapters(other.model)))


@pytest.mark.parametrize("case", ["bert", "gpt", "dora", "embedding", "bias"])
def test_a_deletion_is_an_adapter_and_a_patch_of_one(case, tmp_path):
    """What peft saves and loads; a patch of its names, for adapters on whatever base."""
    model, batch = CASES[case](), samples()
    model.save_pretrained(tmp_path / "before", save_embedding_layers=False)
    result = remove(model)
    result.model.save_pretrained(tmp_path / "after", save_embedding_layers=False)
    base = (gpt_base if case == "gpt" else bert_base)()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "after")
    assert torch.equal(logits(loaded, batch), logits(result.model, batch))

    patch = WeightPatch.between(adapter(model), adapter(result.model))
    patch.save(tmp_path / "patch.safetensors")
    patch = WeightPatch.load(tmp_path / "patch.safetensors")
    assert patch.tensors.keys() <= adapter(model).keys()
    assert patch.nbytes <= sum(t.nbytes for t in adapter(model).values())

    with torch.no_grad():  # as transformers draws a head that a checkpoint has not
        for p in base.get_submodule("score" if case == "gpt" else "classifier").parameters():
            p.normal_()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "before")
    assert patch.apply(adapter(loaded))
    assert torch.equal(logits(loaded, batch), logits(result.model, batch))
    with pytest.raises(ValueError, match="the patch is for weights whose SHA-256"):
        result.patch().apply(loaded)  # of all weights, the base's among them

    file = "adapter_model.safetensors"  # also without a model
    state = load_file(tmp_path / "before" / file)
    assert patch.apply(state)
    expected = load_file(tmp_path / "after" / file)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], expected[k]) for k in expected)


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


def adapter(model):
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def test_a_stream_keeps_the_base_once(tmp_path):
    model, batch = bert(), samples()
    options = {"directory": tmp_path, "damping": 0.1, "max_drop": None, "weight_decay": 1e-2}
    with Unlearner(model, batch, cross_entropy, **options) as stream:
        stream.remove([0, 5])
        stream.remove(7)
        last = stream.model
    sizes = [(tmp_path / "checkpoints" / f"00000{k}.pt").stat().st_size for k in range(3)]
    kept = torch.load(tmp_path / "checkpoints" / "000002.pt", weights_only=True)
    assert len(kept) == 1
    assert next(iter(kept.values())).keys() == adapters(model).keys()
    assert max(sizes[1:]) < sizes[0] / 2
    assert verify_ledger(tmp_path, last, batch)
    with Unlearner.resume(tmp_path, bert(), batch, cross_entropy) as stream:
        assert torch.equal(logits(stream.model, batch), logits(last, batch))
        stream.rollback(0)
        assert torch.equal(logits(stream.model, batch), logits(model, batch))
        stream.remove([0, 5])
        stream.remove(7)
        assert torch.equal(logits(stream.model, batch), logits(last, batch))
    assert verify_ledger(tmp_path, last, batch)
    (tmp_path / "checkpoints" / "000000.pt").unlink()
    assert not verify_ledger(tmp_path)


def test_a_language_model_with_adapters():
    """GPT-2, whose output layer is its embedding, by a mean over the words of each sample."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=10, n_embd=8, n_layer=1, n_head=2, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    how = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    base = transformers.GPT2LMHeadModel(config).double()
    model = drawn(base, peft.LoraConfig(task_type="CAUSAL_LM", **how)).eval()
    batch = samples(8)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def each(outputs, targets):
        """The losses of words, those of a sample with a sum of 1 / words."""
        targets = targets[:, 1:]
        counts = (targets != -100).sum(1, keepdim=True)
        return cross_entropy(outputs[:, :-1].transpose(1, 2), targets, reduction="none") / counts

    def loss(outputs, targets):
        return each(outputs, targets).sum(1).mean()

    selection = UnitSelection.all(model)
    assert len(selection.layout(model).parameters) == 2
    own, inputs = adapters(model), {k: v for k, v in batch.items() if k != "labels"}

    def outputs(*values):
        with sdpa_kernel(SDPBackend.MATH):
            tensors = dict(zip(own, values, strict=True))
            return functional_call(model, tensors, (), inputs).logits

    J = torch.autograd.functional.jacobian(outputs, tuple(own.values()), vectorize=True)
    J = torch.cat([part.flatten(3) for part in J], 3)[:, :-1]
    p = outputs(*own.values()).softmax(2)[:, :-1]
    weight = (batch["labels"][:, 1:] != -100).double()
    weight = weight / weight.sum(1, keepdim=True) / 8
    Jp = torch.einsum("itca,itc->ita", J, p)
    expected = torch.einsum("it,itca,itc,itcb->ab", weight, J, p, J)
    expected = expected - torch.einsum("it,ita,itb->ab", weight, Jp, Jp)
    found = GaussNewtonOperator(model, loss, batch, selection).to_dense()
    assert off(found, expected) < 1e-10
    result = unlearn(model, *parted(batch), loss, preset=STEP)
    assert result.patch().tensors.keys() == own.keys()
    assert result.loss_forget.after > result.loss_forget.before
