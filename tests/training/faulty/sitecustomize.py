"""Faults from outside: Python runs this file at its start wherever PYTHONPATH names this folder.

MOCME_TEST_SLOW_SYNC=SECONDS makes the disk slow where checkpoints are written, so that a process can be killed there.
MOCME_TEST_RAISE=RANK:STEP makes one rank fail in a step, at every attempt. The product knows nothing of either.
"""

import importlib.util
import os
import sys
import time

if slow := float(os.environ.get("MOCME_TEST_SLOW_SYNC", "0")):
    _fsync = os.fsync

    def fsync(handle):
        if {"checkpoints", "unsent"} & set(os.readlink(f"/proc/self/fd/{handle}").split("/")):
            time.sleep(slow)
        _fsync(handle)

    os.fsync = fsync


class Finder:
    """Patches the loop once it is imported."""

    name = "mocme_dist.training.loop"

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            rank, step = map(int, os.environ["MOCME_TEST_RAISE"].split(":"))
            original = module.train_step
            training = []
            begin = module.Training.train

            def train(self):
                training.append(self)
                begin(self)

            def train_step(*args, **kwargs):
                if training[-1].comm.rank == rank and training[-1].step == step:
                    raise RuntimeError(f"a fault at step {step}")
                return original(*args, **kwargs)

            module.train_step, module.Training.train = train_step, train

        spec.loader.exec_module = exec_module
        return spec


if "MOCME_TEST_RAISE" in os.environ:
    sys.meta_path.insert(0, Finder())
