"""`python -m mocme_dist.train`: from a raw folder or a packed data set to a trained model and its test metrics."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mocme_dist.cluster import leave_ray
from mocme_dist.commands import command_parser, config_of, run_command
from mocme_dist.config import Config
from mocme_dist.config.load import load_config, parse_config
from mocme_dist.data.storage import is_url
from mocme_dist.errors import ConfigError, MocmeError, Preempted

if TYPE_CHECKING:
    from mocme_dist.training.lease import Lease
    from mocme_dist.training.plan import Plan
    from mocme_dist.training.rundir import RunDirectory

log = logging.getLogger(__name__)

DESCRIPTION = """\
Train MoCME. With data.raw set, whatever is missing is packed and extracted first.

  python -m mocme_dist.train --config configs/demo.yaml
  python -m mocme_dist.train --config configs/mkg_w.yaml --set data.raw=MKG-W run.dir=runs/mkg_w
  ray job submit -- python -m mocme_dist.train --config configs/mkg_w.yaml
  python -m mocme_dist.train --config configs/demo.yaml --set launch.mode=local     (one process, no Ray)
  python -m mocme_dist.train --config configs/demo.yaml --plan                      (what it would need; starts nothing)

Running the same command again resumes. The last line printed is one JSON object with the test metrics."""


def resolve_paths(config: Config) -> Config:
    """The same configuration with absolute paths, so that workers elsewhere on this machine find them."""
    values = config.model_dump(mode="json")
    run_dir = config.run.dir.rstrip("/") if is_url(config.run.dir) else str(Path(config.run.dir).absolute())
    values["run"]["dir"] = run_dir
    for key in ("raw", "dataset"):
        if values["data"][key] is not None:
            values["data"][key] = values["data"][key] if is_url(values["data"][key]) else str(Path(values["data"][key]).absolute())
    if config.data.raw is not None and config.data.dataset is None:
        values["data"]["dataset"] = f"{run_dir}/dataset"
    if values["data"]["dataset"] is None:
        raise ConfigError(
            "data: neither data.raw nor data.dataset is set; give a raw folder or a packed data set, as in --set data.raw=DIR"
        )
    return parse_config(values)


def prepare_data(config: Config) -> None:
    """Pack and extract what is missing; nothing when all is there."""
    from mocme_dist.data.dataset import Dataset
    from mocme_dist.data.packing import pack_folder

    path = str(config.data.dataset)
    dataset = pack_folder(Path(config.data.raw), path, config.data) if config.data.raw is not None else Dataset.open(path)
    from mocme_dist.training.worker import resolve_modalities

    wanted = [name for name in resolve_modalities(config, dataset) if name != "structure"]
    if config.data.raw is not None and wanted:
        from mocme_dist.encoders.pipeline import extract_features
        from mocme_dist.training.launch import start_ray

        use_ray = config.launch.mode == "ray"
        if use_ray:
            start_ray(config)  # with room for the training too; extraction by itself would start a smaller one
        extract_features(dataset, config.encoders, config.data.text_columns, wanted, use_ray, config.data.max_missing)


def train(config: Config) -> dict[str, Any]:
    """The whole job; the report that is printed last."""
    from mocme_dist.training.launch import is_follower, launch
    from mocme_dist.training.rundir import RunDirectory

    if is_follower(config):
        return launch(config, "train")
    directory = RunDirectory(config.run.dir)
    with directory.lock() as lease:
        held = lease.held if lease else None
        try:
            _join(directory, lease)
            if not directory.config.exists():  # that of an earlier run stands until its checkpoint has accepted this one
                directory.write_config(config)
            directory.status("running", pid=os.getpid())
            directory.send(held, "config.yaml", "run_status.json")
            prepare_data(config)
            refuse_what_cannot_fit(config)
            report = launch(config, "train", lease)
        except BaseException as error:
            stopped = isinstance(error, Preempted | KeyboardInterrupt)
            code = 75 if stopped else error.exit_code if isinstance(error, MocmeError) else 70
            state = "preempted" if stopped else "failed"
            directory.status(state, exit_code=code, error=f"{type(error).__name__}: {error}", **_where(directory))
            directory.try_to_send(held, "run_status.json")
            raise
        directory.status("done", exit_code=0, **_where(directory))
        directory.insist_to_send(held, "run_status.json")
    return report


def _join(directory: RunDirectory, lease: Lease | None) -> None:
    """Of a run at a URL: say what it goes on from, and bring its small files."""
    if directory.mirror is None or lease is None:
        return
    from mocme_dist.training import remote_saver

    if remote_saver.inherit(directory.mirror, lease, lambda: directory.send(lease.held, "metrics.jsonl")):
        directory.send(lease.held)  # nobody else has written since
    directory.fetch()


def config_of_run(place: str, files: Sequence[str] = (), overrides: Sequence[str] = ()) -> Config:
    """The configuration of a finished or interrupted run, with changes.

    Args:
        place: its directory or URL.

    Raises:
        ConfigError: it is no run directory.
    """
    from mocme_dist.training.rundir import RunDirectory

    directory = RunDirectory(place)
    there = True
    if directory.mirror is not None:  # a copy of it may be here, of a run that is there no more
        there = bool(directory.mirror.listing(directory.config.name))
        directory.mirror.pull(directory.config.name)
    if not there or not directory.config.is_file():
        raise ConfigError(f"{place}: not a run directory: no config.yaml in it; give the run.dir of a training run")
    return resolve_paths(load_config([directory.config, *files], [*overrides, f"run.dir={json.dumps(place)}"]))


def plan_of(config: Config) -> Plan:
    """What the run will need, from its packed data set; nothing is started."""
    from mocme_dist.data.dataset import Dataset
    from mocme_dist.training.plan import make_plan

    dataset = Dataset.open(str(config.data.dataset))
    # In local mode the ranks are this process's and those that torchrun started beside it.
    local = config.launch.mode == "local"
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if local else config.launch.min_workers
    return make_plan(config, dataset, world_size, under_ray=not local)


def refuse_what_cannot_fit(config: Config) -> None:
    """Hold the plan against the memory of the machines that will run it.

    Raises:
        ConfigError: it does not fit, with the numbers.
    """
    from mocme_dist.cluster import node_memory
    from mocme_dist.training.launch import start_ray
    from mocme_dist.training.plan import Node, check_plan

    under_ray = config.launch.mode == "ray"
    if under_ray:
        start_ray(config)
    plan = plan_of(config)
    per_node = None if under_ray else int(os.environ.get("LOCAL_WORLD_SIZE", plan.world_size))
    nodes = node_memory(config.launch.cpus_per_worker, config.launch.gpus_per_worker, per_node)
    if per_node is not None:  # torchrun: every machine as this one
        nodes = nodes * -(-plan.world_size // per_node)
    check_plan(plan, config, [Node(*node) for node in nodes])
    log.info("plan: %s", plan.summary())
    for note in plan.notes:
        log.warning("plan: %s", note)


def _where(directory: Any) -> dict[str, Any]:
    last = directory.read_status()
    return {key: last[key] for key in ("step", "last_step", "last_checkpoint") if key in last}


def main() -> None:
    """Parse, train, print the report."""
    parser = command_parser("train", DESCRIPTION)
    parser.add_argument("--resume", metavar="auto|STEP|none", help="which checkpoint to go on from (default auto: the newest valid one)")
    parser.add_argument(
        "--on-bad-feature",
        choices=("error", "mask"),
        help="stored features that are not finite stop the run or count as absent (features.on_bad)",
    )
    parser.add_argument("--profile", type=int, metavar="N", help="trace N steps after the first five to RUN_DIR/profile (run.profile)")
    parser.add_argument("--plan", action="store_true", help="only show memory, traffic and steps of the run; the data set must be packed")
    args = parser.parse_args()
    given = {"run.profile": args.profile, "run.resume": args.resume and f'"{args.resume}"', "features.on_bad": args.on_bad_feature}
    config = resolve_paths(config_of(args, [f"{key}={value}" for key, value in given.items() if value is not None]))
    if args.plan:
        plan = plan_of(config)
        print("\n".join(plan.lines()))
        print(json.dumps(plan.as_json()), flush=True)
        return
    report = train(config)
    from mocme_dist.training.launch import is_follower

    leave_ray()
    if not is_follower(config):
        log.info("TensorBoard: tensorboard --logdir %s/tensorboard", config.run.dir)
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    run_command(main)
