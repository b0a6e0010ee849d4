"""`python -m mocme_dist.train`: from a raw folder or a packed data set to a trained model and its test metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mocme_dist import ray_loss
from mocme_dist.cluster import leave_ray
from mocme_dist.commands import absolute, command_parser, config_of, run_command
from mocme_dist.config import Config
from mocme_dist.config.encoders import refuse_foreign_code
from mocme_dist.config.load import load_config, parse_config
from mocme_dist.console import print_result, reserve_stdout
from mocme_dist.data.progress import Progress
from mocme_dist.environment import torchrun_sizes
from mocme_dist.errors import ConfigError

if TYPE_CHECKING:
    from mocme_dist.runs.directory import RunDirectory
    from mocme_dist.runs.lease import Lease
    from mocme_dist.training.plan import Plan

log = logging.getLogger(__name__)

DESCRIPTION = """\
Train MoCME. With data.raw set, whatever is missing is packed and extracted first.

  python -m mocme_dist.train --config configs/demo.yaml
  python -m mocme_dist.train --config configs/mkg_w.yaml --set data.raw=MKG-W run.dir=runs/mkg_w
  ray job submit -- python -m mocme_dist.train --config $PWD/configs/mkg_w.yaml \\
    --set data.raw=$PWD/MKG-W run.dir=$PWD/runs/mkg_w                            (a job of the head of cluster/local.sh)
  python -m mocme_dist.train --config configs/demo.yaml --set launch.mode=local     (one process, no Ray)
  python -m mocme_dist.train --config configs/demo.yaml --plan                      (what it would need; starts nothing)

Running the same command again resumes. The last line printed is one JSON object with the test metrics."""


def resolve_paths(config: Config) -> Config:
    """Return the configuration with absolute paths, which workers in other folders can use."""
    values = config.model_dump(mode="json")
    run_dir = absolute("run.dir", config.run.dir).rstrip("/")
    values["run"]["dir"] = run_dir
    for key in ("raw", "dataset"):
        if values["data"][key] is not None:
            values["data"][key] = absolute(f"data.{key}", values["data"][key])
    if config.data.raw is not None and config.data.dataset is None:
        values["data"]["dataset"] = f"{run_dir}/dataset"
    if values["data"]["dataset"] is None:
        raise ConfigError(
            "data: neither data.raw nor data.dataset is set; give a raw folder or a packed data set, as in --set"
            " data.raw=DIR"
        )
    return parse_config(values)


def prepare_data(config: Config) -> None:
    """Pack and extract what is missing."""
    from mocme_dist.data.dataset import Dataset
    from mocme_dist.data.packing import pack_folder

    path = str(config.data.dataset)
    dataset = (
        pack_folder(Path(config.data.raw), path, config.data) if config.data.raw is not None else Dataset.open(path)
    )
    from mocme_dist.training.build import feature_modalities

    wanted = list(feature_modalities(config.modalities, config.evidence.spaces, dataset))
    if config.data.raw is not None and wanted:
        from mocme_dist.encoders.pipeline import extract_features
        from mocme_dist.runs.launch import start_ray

        use_ray = config.launch.mode == "ray"
        if use_ray:
            # with room for the training too; extraction by itself would start a smaller one
            start_ray(config.launch, config.encoders)
        extract_features(dataset, config.encoders, config.data.text_columns, wanted, use_ray, config.data.max_missing)


def train(config: Config) -> dict[str, Any]:
    """Run the whole job and return the report that is printed last."""
    from mocme_dist.runs.directory import RunDirectory
    from mocme_dist.runs.launch import is_follower, launch
    from mocme_dist.runs.status import State
    from mocme_dist.runs.stopping import signals_blocked

    if is_follower(config.launch):
        return launch(config, "train")
    directory = RunDirectory(config.run.dir)
    with directory.lock() as lease:
        held = lease.held if lease else None
        _join(directory, lease)
        if (report := finished_report(config, directory)) is not None:
            return report
        state = State(directory)

        def end(error: BaseException, durable: bool = True) -> None:
            with signals_blocked():
                state.end(error, durable)
            directory.try_to_send(held, "run_status.json")

        try:
            try:
                # The configuration of an earlier run stays until its checkpoint has accepted this one.
                if not directory.config.exists():
                    directory.write_config(config)
                state.begin()
                directory.send(held, "config.yaml", "run_status.json")
                with ray_loss.telling(lambda error: end(error, durable=False)), state.beating():
                    prepare_data(config)
                    refuse_what_cannot_fit(config)
                    report = launch(config, "train", lease)
            except BaseException as error:
                end(error)
                raise
        except KeyboardInterrupt as second:
            if not state.ended:  # it came between the first signal and the block that delays signals
                end(second)
            raise
        state.end(None)
        directory.send_at_end(held, "run_status.json")
    return report


def finished_report(config: Config, directory: RunDirectory) -> dict[str, Any] | None:
    """Return the report of a finished run without steps left; None if there is something to do.

    Raises:
        ConfigError: other settings are given, and no step is left to which they would apply.
    """
    from mocme_dist.training.compatibility import UNREPORTED, changed_settings, nothing_to_do

    status, then, report = directory.read_status(), directory.read_config(), directory.read_report()
    if config.run.resume != "auto" or status.get("state") != "done" or then is None or report is None:
        return None
    before, now = then.train, config.train
    if now.epochs > before.epochs or now.patience != before.patience:
        return None  # only the ranks know whether steps are left
    if changed := changed_settings(then, config, UNREPORTED):
        raise ConfigError(nothing_to_do(directory.place, status.get("step", 0), changed))
    log.info("%s: finished at step %s; this is its report", directory.place, status.get("step"))
    return report


def _join(directory: RunDirectory, lease: Lease | None) -> None:
    """For a run at a URL: write down which checkpoints it continues from, and fetch its small files."""
    if lease is None:
        return
    if directory.checkpoints.inherit(lease, lambda: directory.send(lease.held, "metrics.jsonl")):
        directory.send(lease.held)  # no other process has written since
    directory.fetch()


def config_of_run(
    place: str, files: Sequence[str] = (), overrides: Sequence[str] = (), trust_encoders: bool = False
) -> Config:
    """Return the configuration of a finished or interrupted run, with changes.

    Args:
        place: directory or URL of the run.
        trust_encoders: whether an encoder that the run names may import any code.

    Raises:
        ConfigError: it is not a run directory, or it names such an encoder and `trust_encoders` is False.
    """
    from mocme_dist.runs.directory import RunDirectory

    absolute("RUN_DIR", place)
    directory = RunDirectory(place)
    if not directory.fetch_file(directory.config):
        raise ConfigError(f"{place}: not a run directory: no config.yaml in it; give the run.dir of a training run")
    if not trust_encoders:
        refuse_foreign_code(load_config([directory.config]).encoders, place)
    return resolve_paths(load_config([directory.config, *files], [*overrides, f"run.dir={json.dumps(place)}"]))


def plan_of(config: Config) -> Plan:
    """Return the plan of the run from its packed data set, without starting anything."""
    from mocme_dist.data.dataset import Dataset
    from mocme_dist.runs.launch import gpus_of_this_machine
    from mocme_dist.training.plan import Planner

    dataset = Dataset.open(str(config.data.dataset))
    local = config.launch.mode == "local"
    world_size = torchrun_sizes()[0] if local else config.launch.min_workers
    launch = gpus_of_this_machine(config.launch, 1 if local else world_size)
    return Planner(config.model_copy(update={"launch": launch}), dataset, world_size).plan(under_ray=not local)


def refuse_what_cannot_fit(config: Config) -> None:
    """Compare the plan with the memory of the machines that will run it.

    Raises:
        ConfigError: it does not fit, with the numbers.
    """
    from mocme_dist.cluster import node_memory
    from mocme_dist.runs.launch import start_ray
    from mocme_dist.training.plan import Node, check_plan

    under_ray = config.launch.mode == "ray"
    if under_ray:
        config = config.model_copy(update={"launch": start_ray(config.launch, config.encoders)})
    plan = plan_of(config)
    per_node = None if under_ray else torchrun_sizes()[1]
    nodes = node_memory(config.launch.cpus_per_worker, config.launch.gpus, per_node)
    if per_node is not None:  # torchrun: every machine counts like this one
        nodes = nodes * -(-plan.world_size // per_node)
    check_plan(plan, config.launch, config.features, [Node(*node) for node in nodes])
    log.info("plan: %s", plan.summary())
    for note in plan.notes:
        log.warning("plan: %s", note)


def main() -> None:
    """Parse, train, print the report."""
    parser = command_parser("train", DESCRIPTION)
    parser.add_argument(
        "--resume",
        metavar="auto|STEP|none",
        help="which checkpoint to continue from (default auto: the newest valid one)",
    )
    parser.add_argument(
        "--on-bad-feature",
        choices=("error", "mask"),
        help="whether stored features that are not finite stop the run or count as absent (features.on_bad)",
    )
    parser.add_argument(
        "--profile", type=int, metavar="N", help="trace N steps after the first five to RUN_DIR/profile (run.profile)"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="only show memory, traffic and steps of the run; the data set must be packed",
    )
    args = parser.parse_args()
    given = {
        "run.profile": args.profile,
        "run.resume": args.resume and f'"{args.resume}"',
        "features.on_bad": args.on_bad_feature,
    }
    config = resolve_paths(config_of(args, [f"{key}={value}" for key, value in given.items() if value is not None]))
    if args.plan:
        plan = plan_of(config)
        print("\n".join(plan.lines()))
        print(json.dumps(plan.as_json()), flush=True)
        return
    from mocme_dist.evaluation.metrics import report_table
    from mocme_dist.runs.launch import is_follower

    reserve_stdout()
    with Progress("train", active=not is_follower(config.launch)):
        report = train(config)
        leave_ray()
    if not is_follower(config.launch):
        log.info("TensorBoard: tensorboard --logdir %s/tensorboard", config.run.dir)
        print_result(report, report_table(report))


if __name__ == "__main__":
    run_command(main)
