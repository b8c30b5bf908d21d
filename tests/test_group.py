import os
import signal
import time
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lcodec_ext._one_rank import ONE_RANK
from lcodec_ext._torch.group import Ranks, ranks_of
from processes import Processes


def talk(rank, size, group):
    ranks = Ranks(group, "talk")
    ranks.agree({"seed": 3, "y": np.arange(5.0), "names": ["a", None], "alpha": float("nan")})
    assert ranks.gather_bytes(b"x" * rank) == [b"x" * r for r in range(size)]
    assert ranks.gather_bytes(b"") == [b""] * size
    before = ranks.bytes_sent
    gathered = ranks.gather(np.array([rank, 7], dtype=np.int64))
    assert ranks.bytes_sent - before == 16
    told = ranks.broadcast(torch.full((3,), float(rank)), size - 1)
    given = torch.tensor([rank + 1.0])
    total = ranks.add(given)
    assert given.item() == rank + 1.0
    with ranks.alone("nothing"):
        pass
    return gathered.tolist(), told.tolist(), total.item()


def test_ranks_talk(ranks):
    for gathered, told, total in ranks.run(talk):
        assert gathered == [[r, 7] for r in range(ranks.size)]
        assert told == [ranks.size - 1.0] * 3
        assert total == sum(range(1, ranks.size + 1))


def disagree(rank, size, group, name, values):
    Ranks(group, "foci").agree({"seed": 0, name: values[rank]})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            ("average", "average", "first"),
            "the same option: rank 0 has 'average', rank 2 has 'first'",
        ),
        ((1.5, 1, 1.5), "rank 0 has 1.5, rank 1 has 1"),
        ((True, 1, True), "rank 0 has True, rank 1 has 1"),
        (
            (np.array(["a"], object), np.array(["b"], object), np.array(["a"], object)),
            "rank 0 has object of shape (1,), digest",
        ),
        (
            (np.zeros(4), np.zeros(4), np.zeros(5)),
            "rank 0 has float64 of shape (4,), digest",
        ),
        ((np.zeros(4), np.zeros(4, np.float32), np.zeros(4)), "rank 1 has float32 of shape (4,)"),
        (
            (torch.zeros(2), torch.ones(2), torch.zeros(2)),
            "rank 1 has float32 of shape (2,), digest",
        ),
    ],
)
def test_differences_are_named_on_every_rank(processes, values, said):
    for failure in processes.failures(disagree, "option", values):
        assert failure.kind == "ValueError"
        assert said in failure.message


EQUAL = [
    (0, 0.0, np.float64(0)),
    (True, np.True_, np.bool_(1)),
    (2**64 - 1, np.uint64(2**64 - 1), 2**64 - 1),
    ([0, 2], (np.int64(0), 2), [np.int32(0), 2.0]),
    tuple(np.array(["a" * (k // k), None], object) for k in (1, 2, 3)),
    (torch.ones(2), torch.ones(2, requires_grad=True), torch.ones(4)[::2]),
    tuple(torch.ones(2, dtype=torch.bfloat16, requires_grad=k == 1) for k in range(3)),
    tuple(np.zeros((3, 0)) for _ in range(3)),
    (np.eye(3), np.eye(3, order="F"), np.eye(6)[:3, :3]),
]


def agree_on_all(rank, size, group):
    for values in EQUAL:
        Ranks(group, "foci").agree({"option": values[rank]})


def test_equal_arguments_agree_whatever_their_type(processes):
    processes.run(agree_on_all)


def peak_of_agreeing(rank, size, group):
    values = np.zeros((2000, 2000))
    tracemalloc.start()
    Ranks(group, "foci").agree({"X": values})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / values.nbytes


def test_a_digest_takes_no_copy(processes):
    assert max(processes.run(peak_of_agreeing)) < 0.5


def call_another(rank, size, group):
    Ranks(group, "codec" if rank else "foci").agree({"y": 1} if rank else {"X": 1})


def test_different_functions_are_named(ranks):
    for failure in ranks.failures(call_another):
        assert "the same function: rank 0 called 'foci', rank 1 called 'codec'" in failure.message


def one_fails(rank, size, group):
    with Ranks(group, "foci").alone("reading X"):
        if rank == 1:
            raise OSError("no such file: shard 1")


def test_a_failure_on_one_rank_ends_all(ranks):
    failures = ranks.failures(one_fails)
    assert failures[1].kind == "OSError"
    assert failures[0].kind == "RuntimeError"
    assert failures[0].message == (
        "reading X failed on rank 1 of the group: OSError: no such file: shard 1"
    )


def wait_for_the_killed(rank, size, group):
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    Ranks(group, "foci").gather(np.zeros(1))


def test_a_killed_rank_ends_the_others_within_the_timeout():
    processes = Processes(3, timeout=10)
    try:
        processes.start(wait_for_the_killed)
        begin = time.monotonic()
        answers = processes.finish()
        assert time.monotonic() - begin < 60
        assert [each.kind for each in answers] == ["RuntimeError", "RuntimeError", "died"]
        assert "foci: a rank of the group stopped answering rank 0" in answers[0].message
        assert "timeout= of torch.distributed.init_process_group" in answers[0].message
    finally:
        processes.stop()


def test_without_a_group():
    assert ranks_of(None, "foci") is ONE_RANK
    with pytest.raises(RuntimeError, match=r"init_process_group\(\) first"):
        Ranks("world", "foci")
    with pytest.raises(ValueError, match=r"only its ranks call foci\(group=...\)"):
        Ranks(dist.GroupMember.NON_GROUP_MEMBER, "foci")


def wrong_type(rank, size, group):
    Ranks("world", "foci")


def test_the_type_of_a_group(ranks):
    for failure in ranks.failures(wrong_type):
        assert failure.kind == "TypeError"
        assert "torch.distributed.group.WORLD; got 'world' (str)" in failure.message
