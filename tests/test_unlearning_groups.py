"""Requests by user: whose samples these are, what the ledger says of it, and control groups."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lcodec_ext._torch.samples import as_samples
from lcodec_ext._torch.states import state_hash, state_of
from lcodec_ext.unlearning import (
    TrainingStatistics,
    Unlearner,
    estimate,
    unlearn,
    verify_ledger,
)
from lcodec_ext.unlearning.control import control_groups
from lcodec_ext.unlearning.groups import Groups, draw_users
from lcodec_ext.unlearning.request import Kept, Retained
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.stream import LedgerError, unlearner
from unlearner_process import N, make_data, make_model, step

OWNERS = [f"u{k % 8}" for k in range(N)]  # u3 has the samples 3, 11, 19, 27, 35


@pytest.fixture
def calls(monkeypatch):
    """A cheap step in the place of `unlearn`, and what it was called with."""
    found = []

    def record(model, forget, retain, loss_fn, **options):
        found.append({"forget": forget, "retain": retain, **options})
        refuse = getattr(record, "refuse", ())
        return step(model, forget, retain, loss_fn, refuse=refuse, **options)

    monkeypatch.setattr(unlearner, "unlearn", record)
    return found


def make(directory=None, groups=OWNERS, **options):
    return Unlearner(
        make_model(), make_data(), cross_entropy, directory=directory, groups=groups, **options
    )


def resume(directory, groups=OWNERS):
    return Unlearner.resume(directory, make_model(), make_data(), cross_entropy, groups=groups)


def of(owner):
    return [i for i, each in enumerate(OWNERS) if each == owner]


# ---------------------------------------------------------------------------------------------
# Ids


class Series:
    """As polars has them."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)

    def to_list(self):
        return self.values


def test_ids_may_come_in_any_form():
    pandas = pytest.importorskip("pandas")
    forms = [
        ["a", "b", "a"],
        ("a", "b", "a"),
        np.array(["a", "b", "a"]),
        np.array(["a", "b", "a"], dtype=object),
        pandas.Series(["a", "b", "a"], index=[7, 8, 9]),
        pandas.Series(["a", "b", "a"], dtype="category"),
        Series(["a", "b", "a"]),
    ]
    for form in forms:
        groups = Groups.of(form, 3, "train")
        assert groups.ids == ("a", "b")
        assert groups.samples("a") == [0, 2]
        assert groups.sha256() == Groups.of(forms[0], 3, "train").sha256()
    for form in (np.array([17, 5, 17]), torch.tensor([17, 5, 17]), [17, np.int64(5), 17]):
        groups = Groups.of(form, 3, "train")
        assert groups.ids == (17, 5)
        assert [type(each) for each in groups.ids] == [int, int]
    assert groups.subset([1, 2]).samples(17) == [1]
    assert groups.sha256() != Groups.of(["17", "5", "17"], 3, "train").sha256()


def test_the_hash_is_of_the_id_of_every_sample():
    hashes = {
        Groups.of(each, 3, "train").sha256()
        for each in (["a", "b", "a"], ["b", "a", "b"], ["a", "a", "b"], ['a"\n"b', "a", "a"])
    }
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["a", "b"], ValueError, "groups must have one id for each sample of train, 3; got 2"),
        (["a", 1, "b"], TypeError, "all integers or all strings.*; got .* and "),
        (["a", None, "b"], TypeError, r"groups\[1\] must be .*; got None .*; give every sample"),
        ([1, float("nan"), 2], TypeError, r"groups\[1\] must be .*give every sample an id"),
        ([1.0, 2.0, 3.0], TypeError, r"groups\[0\] must be an integer or a string; got 1.0"),
        ([True, False, True], TypeError, r"groups\[0\] must be an integer or a string"),
        (np.zeros((3, 2), int), TypeError, r"groups\[0\] must be an integer or a string; got \["),
        ("abc", TypeError, "groups must be an array, list, series or tensor of ids; got str"),
        (7, TypeError, "groups must be an array, list, series or tensor of ids; got int"),
    ],
)
def test_ids_that_cannot_be(given, error, message):
    with pytest.raises(error, match=message):
        Groups.of(given, 3, "train")


# ---------------------------------------------------------------------------------------------
# Requests


@pytest.mark.parametrize("place", ["in memory", "on disk"])
def test_requests_by_group_and_number_add_up(calls, tmp_path, place):
    folder = None if place == "in memory" else tmp_path / "stream"
    with make(folder, validation=make_data()) as stream:
        stream.remove(groups="u3", note="by the person")
        assert stream.removed == tuple(of("u3"))
        assert stream.removed_groups == ("u3",)
        assert stream.ledger[0].record["groups"]["n"] == 8
        record = stream.ledger[1].record
        assert record["groups"] == [{"id": "u3", "samples": of("u3"), "before": []}]
        assert (record["ids"], record["note"]) == (of("u3"), "by the person")
        stream.remove([4, 0], groups=["u1", "u0"])  # 0 is of u0 and counts once
        assert stream.ledger[2].record["ids"] == [4, 0, *of("u1"), *of("u0")[1:]]
        assert stream.removed_groups == ("u0", "u1", "u3")
        stream.remove(5)
        assert "groups" not in stream.ledger[3].record
        frame = stream.ledger.to_frame()
        assert frame["groups"].tolist()[1:] == [["u3"], ["u1", "u0"], []]
        assert frame["groups"].isna().tolist() == [True, False, False, False]
        # Control groups are users where users are asked for.
        assert [each["groups"] is None for each in calls] == [False, False, True]
        kept = calls[1]["groups"]
        assert [kept.ids[k] for k in kept.members] == [
            each for i, each in enumerate(OWNERS) if i not in (4, *of("u0"), *of("u1"), *of("u3"))
        ]


def test_groups_that_have_no_effect_are_refused(calls, trained):
    """By `unlearn` and `estimate`; a stream has them to find samples by, and does not pass them."""
    model, (x, y), users, held = trained
    ids = users[users >= 2]
    arguments = model, *((x[some], y[some]) for some in (users < 2, users >= 2)), cross_entropy
    for do in (unlearn, estimate):
        for options in ({}, {"validation": held, "damping": 0.1, "calibrate": False}):
            with pytest.raises(ValueError, match="so it has none: leave groups out"):
                do(*arguments, groups=ids, **options)
    with make() as stream:
        stream.remove(groups="u3")
        assert calls[-1]["groups"] is None


def test_of_a_group_that_is_partly_removed_the_rest_goes(calls):
    stream = make()
    stream.remove([3, 19])
    with pytest.warns(UserWarning, match="2 of the 5 samples of group 'u3' .* the other 3"):
        stream.remove(groups=["u3"])
    record = stream.ledger[2].record
    assert record["groups"] == [{"id": "u3", "samples": [11, 27, 35], "before": [3, 19]}]
    assert stream.removed_groups == ("u3",)
    stream.remove(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="1 of the 5"):
            stream.remove(groups="u4")  # a warning that is an error changes nothing
    assert stream.removed == (3, 19, 11, 27, 35, 4)


def test_numbers_stay_numbers(calls):
    stream = make(groups=[k % 8 for k in range(N)])
    stream.remove(3)
    assert stream.removed == (3,)
    with pytest.warns(UserWarning, match="the other 4"):
        stream.remove(groups=3)
    assert stream.removed_groups == (3,)
    assert make(groups=None).removed_groups == ()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": "u3"}, ValueError, "not removed; removed already: 'u3'$"),
        ({"groups": ["u1", "u3"]}, ValueError, "removed already: 'u3'$"),
        ({"groups": "U5"}, ValueError, "no sample is of group 'U5'; close to it: 'u5'"),
        ({"groups": 5}, ValueError, "of group 5; the ids of this data are strings, as 'u0'"),
        ({"groups": "xyz"}, ValueError, "There are 8: 'u0', 'u1', .*'u7'$"),
        ({"groups": []}, ValueError, "groups must name at least one group"),
        ({"groups": 2.5}, TypeError, "groups must be an array, list, .*; got float 2.5"),
        ({"groups": [2.5]}, TypeError, r"groups\[0\] must be an integer or a string; got 2.5"),
        ({"ids": "u1"}, TypeError, "ids must be numbers of samples; got 'u1': pass it as groups="),
        ({"ids": 3, "groups": "u1"}, ValueError, "ids must be samples that are not removed"),
        ({}, TypeError, "remove needs ids, numbers of samples, or groups; got neither"),
        (
            {"groups": [f"u{k}" for k in range(8) if k != 3]},
            ValueError,
            "the request names all remaining samples; leave at least one",
        ),
    ],
)
def test_requests_that_change_nothing(calls, arguments, error, message):
    stream = make()
    stream.remove(groups="u3")
    before = state_hash(state_of(stream.model)), len(stream.ledger), stream.removed
    with pytest.raises(error, match=message):
        stream.remove(**arguments)
    assert (state_hash(state_of(stream.model)), len(stream.ledger), stream.removed) == before


def test_requests_by_group_need_groups(calls):
    stream = make(groups=None)
    with pytest.raises(ValueError, match="give groups= to Unlearner"):
        stream.remove(groups="u3")
    with pytest.raises(ValueError, match="one id for each sample of train, 40; got 39"):
        make(groups=OWNERS[1:])


def test_groups_the_guard_keeps_are_pending(calls):
    x, _ = make_data()
    unlearner.unlearn.refuse = [x[19]]
    stream = make()
    stream.remove(groups="u3")
    assert stream.pending == (19,)
    assert stream.removed_groups == ()
    assert verify_ledger_in_memory(stream)
    unlearner.unlearn.refuse = ()
    with pytest.warns(UserWarning, match="4 of the 5 samples"):
        stream.remove(groups="u3")
    assert stream.ledger[2].record["ids"] == [19]
    assert (stream.pending, stream.removed_groups) == ((), ("u3",))


def verify_ledger_in_memory(stream):
    """Whether the entries can follow each other."""
    from lcodec_ext.unlearning.stream import History

    history = History()
    for entry in stream.ledger:
        history.add(entry)
    return history.removed.keys() == set(stream.removed)


# ---------------------------------------------------------------------------------------------
# Ledger


def test_a_rollback_brings_groups_back(calls, tmp_path):
    with make(tmp_path / "a") as stream:
        stream.remove(groups="u3")
        stream.remove(groups=["u1"])
        stream.rollback()
        assert stream.removed_groups == ("u3",)
        stream.remove(groups="u1")
        assert stream.removed_groups == ("u1", "u3")
        stream.rollback(to=0)
        assert stream.removed_groups == ()
        stream.remove(groups="u3")
        last = stream.model
    found = verify_ledger(tmp_path / "a", last, make_data(), groups=OWNERS)
    assert found, found
    assert found.removed == tuple(of("u3"))


def test_only_the_same_groups_resume(calls, tmp_path):
    folder = tmp_path / "a"
    with make(folder) as stream:
        stream.remove(groups="u3")
    with resume(folder, np.array(OWNERS)) as stream:
        assert stream.removed_groups == ("u3",)
        stream.remove(groups="u1")
    renamed = ["u9" if each == "u7" else each for each in OWNERS]
    for other, message in [
        (None, "ids of 8 groups; got None"),
        (renamed, "these are other ids"),
        (OWNERS[::-1], "these are other ids"),
        (OWNERS[1:], "one id for each sample"),
    ]:
        with pytest.raises(ValueError, match=f"groups must .*{message}"):
            resume(folder, other)
    with make(tmp_path / "b", None) as stream:
        stream.remove(3)
    with pytest.raises(ValueError, match="at the start: none were; leave them out"):
        resume(tmp_path / "b")
    with resume(tmp_path / "b", None):
        pass


def rewrite(folder, change):
    """Write the ledger again with right hashes, as anyone could who may write the file."""
    from lcodec_ext.unlearning.stream import Ledger

    path = folder / "ledger.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    change([entry["record"] for entry in entries])
    path.unlink()
    written = Ledger(path)
    for entry in entries:
        written.append(entry["kind"], entry["record"], entry["environment"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[1]["groups"][0]["samples"].append(4), r"which it does not ask for once"),
        (lambda r: r[1]["groups"][0].update(samples=[]), "which it does not ask for once"),
        (lambda r: r[1]["groups"].append(r[1]["groups"][0]), "which it does not ask for once"),
        (lambda r: r[1]["groups"][0].update(before=[4]), r"'u3', \[4\] were not removed before"),
        (lambda r: r[4]["groups"][0].update(id="u5"), "sample 4 is of another group than in"),
        (lambda r: r[0].update(groups=None), "it names groups, and the stream has none"),
        (lambda r: r[1]["groups"][0].pop("before"), "its record lacks something"),
    ],
)
def test_groups_that_cannot_be_are_found(calls, tmp_path, change, message):
    folder = tmp_path / "a"
    with make(folder) as stream:
        stream.remove(groups="u3")
        stream.remove(groups="u4")
        stream.rollback()
        stream.remove(groups="u4")
    rewrite(folder, lambda records: None)
    assert verify_ledger(folder, groups=OWNERS)
    rewrite(folder, change)
    (problem,) = verify_ledger(folder).problems
    assert "of the ledger: " in problem
    assert re.search(message, problem)
    with pytest.raises(LedgerError, match=message):
        resume(folder)


def test_all_of_a_group_was_asked_for(calls, tmp_path):
    folder = tmp_path / "a"
    with make(folder) as stream:
        stream.remove(groups="u3")
    assert verify_ledger(folder, groups=OWNERS)

    def leave_one_out(records):
        record = records[1]
        record["groups"][0]["samples"] = record["ids"] = record["ids"][:-1]
        record["hashes"] = record["hashes"][:-1]
        record |= {"n_removed": 4, "n_retained": N - 4}

    rewrite(folder, leave_one_out)
    assert verify_ledger(folder)
    (problem,) = verify_ledger(folder, groups=OWNERS).problems
    assert "entry 1 asks for samples [3, 11, 19, 27] of group 'u3'" in problem
    assert "the group has [3, 11, 19, 27, 35]" in problem
    (problem,) = verify_ledger(folder, groups=OWNERS[::-1]).problems
    assert "these are other ids" in problem
    (problem,) = verify_ledger(folder, groups=OWNERS[1:]).problems
    assert "one id for each sample" in problem


# ---------------------------------------------------------------------------------------------
# Control groups of users


def drawn(sizes, m, count=8, size=0, most=None, seed=0):
    """Control groups among users who have so many samples each, and whose each sample is."""
    members = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    groups = Groups(tuple(range(len(sizes))), members)
    most = len(members) if most is None else most
    return draw_users(groups, m, count, size, most, np.random.default_rng(seed)), members


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_whole_users_of_about_the_requests_size(seed):
    sizes = [3 + k % 5 for k in range(60)]
    found, members = drawn(sizes, 30, seed=seed)
    assert len(found.groups) == 8
    owners = [set(members[group].tolist()) for group in found.groups]
    assert len(set.union(*owners)) == sum(map(len, owners))  # nobody is in two
    for group, those in zip(found.groups, owners, strict=True):
        assert 22.5 <= len(group) <= 37.5
        assert len(group) == sum(sizes[one] for one in those)  # all samples of each
        assert group == sorted(group)
    assert abs(np.mean([len(group) for group in found.groups]) - 30) < 3
    # The pool has all samples of everyone in it, so that the step reads none of them.
    inside = np.unique(members[found.pool])
    assert found.pool.tolist() == np.flatnonzero(np.isin(members, inside)).tolist()
    places = [found.pool[own].tolist() for own in found.places()]
    assert places == found.groups


def test_a_user_who_has_far_more_is_cut():
    found, members = drawn([100] * 10, 12)
    assert [len(group) for group in found.groups] == [12] * 8
    assert all(len(set(members[group].tolist())) == 1 for group in found.groups)
    assert len(found.pool) == 800
    # Of a second one as much as is lacking, unless the first alone comes near enough.
    found, members = drawn([8] * 20, 12, count=4)
    assert [len(group) for group in found.groups] == [12] * 4
    found, members = drawn([10] * 20, 12, count=4)
    assert [len(group) for group in found.groups] == [10] * 4
    found, members = drawn([13] * 20, 12, count=4)
    assert [len(group) for group in found.groups] == [13] * 4


def test_too_few_users_make_no_groups():
    assert drawn([5] * 11, 15)[0] is None  # three groups, and two users over
    assert len(drawn([5] * 12, 15)[0].groups) == 4  # fewer than eight, rather than shared ones
    assert drawn([5] * 12, 15, most=59)[0] is None
    found, members = drawn([500, *[5] * 30], 5, count=4, most=100)  # who has most is left out
    assert 0 not in members[found.pool]
    assert len(found.pool) == 20
    assert len(drawn([500, *[5] * 30], 5, count=4, size=73, most=100)[0].pool) == 75


PLACE = torch.device("cpu"), torch.float64


def test_the_step_reads_nobody_of_a_control_group():
    """Groups and pool are of retained samples; who is in them is not among those read."""
    n, settings = 400, Settings(calibrate=True, n_curvature=150, control_groups=8)
    owners = np.random.default_rng(0).integers(0, 50, n)
    x = torch.arange(n, dtype=torch.float64)[:, None]
    samples = as_samples((x, torch.zeros(n, dtype=torch.int64)), "retain", *PLACE)
    kept = Kept.drawn(samples, settings, 20, Groups.of(owners, n, "retain"))

    def numbers(samples):
        return samples.fetch(slice(None)).args[0][:, 0].long().numpy()

    pool, read = numbers(kept.pool), numbers(kept.read)
    assert not set(owners[pool]) & set(owners[read])
    assert (len(read), len(kept.users)) == (150, 8)
    block = Block(kept, samples.subset(range(20)))
    control = control_groups(block, np.random.default_rng(0), 8)
    assert control.of == "users"
    assert [numbers(each).tolist() for each in control.groups] == [
        pool[own].tolist() for own in kept.users
    ]
    assert control.size == round(np.mean([len(own) for own in kept.users]))
    # Too large a request for four groups of users: random samples, as without groups.
    same = [Kept.drawn(samples, settings, 90, *given) for given in ([Groups.of(owners, n, "")], [])]
    assert same[0].users is None
    assert numbers(same[0].pool).tolist() == numbers(same[1].pool).tolist()
    assert control_groups(Block(same[0], samples), np.random.default_rng(0), 4).of == "samples"


class Block:
    """What `control_groups` reads of a block."""

    def __init__(self, kept, forget):
        self.part = self.work = self
        self.retained = Retained(kept.all, kept.read, kept.pool, kept.users)
        self.forget, self.settings, self.start = forget, Settings(), torch.zeros(10)


# ---------------------------------------------------------------------------------------------
# Deletions


@pytest.fixture(scope="module")
def trained():
    """A softmax regression on the samples of thirty users, each with its own offset."""
    generator = torch.Generator().manual_seed(0)
    n = 340
    users = torch.arange(n) % 34
    offset = torch.randn(34, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64) + offset[users]
    y = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(1)
    y[torch.rand(n, generator=generator) < 0.2] = 0
    model = nn.Linear(6, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
    seen = users < 30
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(model(x[seen]), y[seen]).backward()
        optimizer.step()
    return model, (x[seen], y[seen]), users[seen], (x[~seen], y[~seen])


OPTIONS = {"weight_decay": 1e-3, "calibrate": True, "finish": 0}


def test_control_groups_are_other_users(trained):
    model, (x, y), users, held = trained
    forget, retain = ((x[some], y[some]) for some in (users < 2, users >= 2))
    arguments = model, forget, retain, cross_entropy
    result = unlearn(*arguments, validation=held, groups=users[users >= 2], **OPTIONS)
    found = result.calibration
    assert (found.groups_of, found.group_size, len(found.control_after)) == ("users", 20, 4)
    assert "4 control groups of 20 samples of other users: loss" in repr(result)
    assert found.to_dict()["groups_of"] == "users"
    plain = unlearn(*arguments, validation=held, **OPTIONS).calibration
    assert (plain.groups_of, plain.group_size, len(plain.control_after)) == ("samples", 20, 4)
    assert plain.control_before != found.control_before
    few = unlearn(*arguments, validation=held, groups=users[users >= 2] % 3, **OPTIONS)
    assert few.calibration == plain  # bit for bit as without
    with pytest.raises(ValueError, match="one id for each sample of retain, 280; got 300"):
        unlearn(*arguments, validation=held, groups=users, **OPTIONS)


def test_a_whole_class_is_compared_with_others(trained):
    model, (x, y), _, (x_held, y_held) = trained
    gone = y == 2
    with pytest.warns(UserWarning, match="a class was deleted as a whole"):
        result = unlearn(
            model,
            (x[gone][:10], y[gone][:10]),
            (x[~gone], y[~gone]),
            cross_entropy,
            validation=(x_held, y_held),
            max_drop=None,
            **OPTIONS,
        )
    assert result.calibration.groups_of == "classes"


@pytest.mark.filterwarnings("ignore:the deletion forgets little")  # of so small a model
def test_a_stream_asks_for_groups_of_the_same_kind(trained, tmp_path):
    model, train, users, held = trained
    ids = [f"u{k}" for k in users.tolist()]
    stream = {"validation": held, "groups": ids}
    with Unlearner(model, train, cross_entropy, directory=tmp_path / "a", **stream, **OPTIONS) as s:
        result = s.remove(groups=["u7", "u11"])
        assert result.calibration.groups_of == "users"
        record = s.ledger[1].record
        assert record["result"]["calibration"]["groups_of"] == "users"
        assert s.remove([0, 1]).calibration.groups_of == "samples"
        weights = state_hash(state_of(s.model))
    # Killed after the first request, it goes on to the same bits.
    lines = (tmp_path / "a" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a" / "ledger.jsonl").write_bytes(b"".join(lines[:1]))
    with Unlearner.resume(tmp_path / "a", model, train, cross_entropy, **stream) as s:
        s.remove(groups=["u7", "u11"])
        s.remove([0, 1])
        assert state_hash(state_of(s.model)) == weights
    found = verify_ledger(tmp_path / "a", s.model, train, groups=ids)
    assert found, found


def test_with_statistics_groups_name_samples_only(trained):
    model, train, users, held = trained
    kept = TrainingStatistics.collect(model, train, cross_entropy, curvature="gauss_newton")
    options = {"statistics": kept, "weight_decay": 1e-3, "groups": users, "validation": held}
    with Unlearner(model, train, cross_entropy, **options) as stream:
        result = stream.remove(groups=torch.tensor([7]))
        assert result.calibration is None
        assert stream.removed_groups == (7,)
    forget = tuple(t[users == 7] for t in train)
    with pytest.raises(ValueError, match="ids of the retained samples, and retain is None"):
        unlearn(model, forget, None, cross_entropy, **options)
