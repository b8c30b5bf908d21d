"""Two processes of two threads each that contest one directory, and are killed at random.

As a script: ``python unlearner_contest.py DIRECTORY SEED ROUNDS``. It prints what was acknowledged.
"""

import os
import random
import signal
import sys
import threading
import time

import torch

from lcodec_ext.unlearning.stream import unlearner
from unlearner_process import N, begin_or_resume, step


def remove(stream, own, descriptor):
    """Remove samples, and tell of each that is removed."""
    for number in own:
        try:
            stream.remove(number)
        except ValueError as error:  # by the other thread, or long ago
            if "removed already" not in str(error):
                raise
        else:
            os.write(descriptor, f"{number}\n".encode())


def work(directory, descriptor, seed):
    """Remove samples for as long as this lives."""
    rng = random.Random(seed)
    while True:
        try:
            stream = begin_or_resume(directory)
        except RuntimeError as error:
            if "in use" not in str(error):
                raise
            time.sleep(0.002)
            continue

        threads = [
            threading.Thread(target=remove, args=[stream, rng.sample(range(N // 2), 3), descriptor])
            for _ in range(2)
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        stream.close()
        time.sleep(0.001)


def child(directory, descriptor, seed):
    """A worker process."""
    pid = os.fork()
    if pid == 0:
        try:
            work(directory, descriptor, seed)
        except BaseException as error:
            os.write(descriptor, f"{error!r}\n".encode())
        finally:
            os._exit(1)
    return pid


if __name__ == "__main__":
    torch.set_num_threads(1)
    threading.excepthook = lambda args: os.write(1, f"{args.exc_value!r}\n".encode())
    unlearner.unlearn = lambda *args, **options: step(*args, pause=0.002, **options)
    rng = random.Random(int(sys.argv[2]))
    living = [child(sys.argv[1], 1, rng.random()) for _ in range(2)]
    for _ in range(int(sys.argv[3])):
        time.sleep(rng.uniform(0.0, 0.15))
        k = rng.randrange(2)
        os.kill(living[k], signal.SIGKILL)
        os.waitpid(living[k], 0)
        living[k] = child(sys.argv[1], 1, rng.random())
    for pid in living:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
