"""Faults from outside: Python runs this file at its start wherever PYTHONPATH names this folder.

MOCME_TEST_SLOW_SYNC=SECONDS makes the disk slow where checkpoints are written, so that a process can be killed there.
MOCME_TEST_RAISE=RANK:STEP makes one rank fail in a step, at every attempt. MOCME_TEST_SLOW_TEST=SECONDS makes the final
evaluation slow. MOCME_TEST_GCS_SILENT=SECONDS shortens the time after which a silent GCS counts as lost,
MOCME_TEST_LEAVE=SECONDS that after which a silent Ray is left behind. The product knows nothing of them.
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


def slow_test(module):
    """Make the evaluation of the test split take long."""
    seconds = float(os.environ["MOCME_TEST_SLOW_TEST"])
    evaluate = module.evaluate

    def slowly(worker, blend, split, *args, **kwargs):
        time.sleep(seconds * (split == "test"))
        return evaluate(worker, blend, split, *args, **kwargs)

    module.evaluate = slowly


def failing_step(module):
    """Make one rank fail in one step."""
    rank, step = map(int, os.environ["MOCME_TEST_RAISE"].split(":"))
    original, begin, training = module.train_step, module.Loop.train, []

    def train(self, *args, **kwargs):
        training.append(self)
        begin(self, *args, **kwargs)

    def train_step(*args, **kwargs):
        if training[-1].worker.comm.rank == rank and training[-1].step == step:
            raise RuntimeError(f"a fault at step {step}")
        return original(*args, **kwargs)

    module.train_step, module.Loop.train = train_step, train


def silent_gcs(module):
    """Give a silent GCS up sooner."""
    module.GCS_SILENT_S = float(os.environ["MOCME_TEST_GCS_SILENT"])


def silent_at_the_end(module):
    """Leave a silent Ray behind sooner."""
    module.LEAVE_S = float(os.environ["MOCME_TEST_LEAVE"])


class Finder:
    """Patches a module once it is imported."""

    def __init__(self, name, patch):
        self.name, self.patch = name, patch

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.patch(module)

        spec.loader.exec_module = exec_module
        return spec


if "MOCME_TEST_RAISE" in os.environ:
    sys.meta_path.insert(0, Finder("mocme_dist.training.loop", failing_step))
if "MOCME_TEST_GCS_SILENT" in os.environ:
    sys.meta_path.insert(0, Finder("mocme_dist.ray_loss", silent_gcs))
if "MOCME_TEST_LEAVE" in os.environ:
    sys.meta_path.insert(0, Finder("mocme_dist.cluster", silent_at_the_end))
if "MOCME_TEST_SLOW_TEST" in os.environ:
    sys.meta_path.insert(0, Finder("mocme_dist.runs.task", slow_test))
