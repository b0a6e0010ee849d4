"""The plan says what a run needs before it starts.

Exactly what stays, within 15 % of the measured peak, and what is sent.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config

from mocme_dist import cluster
from mocme_dist import train as command
from mocme_dist.config import Config, load_config
from mocme_dist.data.dataset import Dataset
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.parallel.comm import Comm
from mocme_dist.prefetch import DEPTH
from mocme_dist.training import plan as planning
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.plan import Node, Plan, Planner, check_plan, exchange_bytes
from tools.bench import stages
from tools.bench.rank import measure_ranks
from tools.synthetic.packed import write_packed
from tools.synthetic.planted import Planted

GIB = 1 << 30


def plan_for(config: Config, world_size: int) -> Plan:
    return Planner(config, open_dataset(config.data), world_size).plan(under_ray=False)


def rank_bytes(comm: Comm, dataset: Path, run_dir: Path, optimizer: str) -> dict[str, Any]:
    """Body of one rank: bytes that its worker holds, and what its first routes send."""
    config = tiny_config(dataset, run_dir, "modalities=[structure, numeric]", f"entities.optimizer={optimizer}")
    worker = build_worker(config, open_dataset(config.data), comm)
    routes = [part.route for step in range(3) for part in worker.prepare(step)]
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    store = worker.stores["numeric"]
    return {
        "rows": size([worker.table.rows_rD]),
        "rows: optimizer": size(worker.table.state.values()),
        "features: numeric": size([store._values, store._present, store._index]),
        "dense": sum(p.numel() for p in worker.model.parameters()),
        "steps": worker.maker.sampler.steps_per_epoch,
        "wanted": [sum(route.recv_counts) for route in routes],
        "asked": [len(route.rows_V) for route in routes],
        "sent": [route.sent_vectors for route in routes],
    }


@pytest.mark.parametrize("wrong", [{"width": -3}, {"width": "many"}, {"present": -1}, {"dtype": "int4"}])
def test_a_damaged_manifest_of_features_is_refused_in_one_line(featured_dataset, tmp_path, wrong):
    data = shutil.copytree(featured_dataset, tmp_path / "data")
    manifest = data / "features" / "numeric" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **wrong}))
    config = tiny_config(data, tmp_path / "run", "modalities=[structure, numeric]")
    with pytest.raises(
        DataError, match=f"numeric/manifest.json: {next(iter(wrong))}: .*; run python -m mocme_dist.extract"
    ):
        plan_for(config, 1)


@pytest.mark.parametrize(("world", "optimizer"), [(1, "adam"), (2, "adagrad"), (3, "adam")])
def test_what_stays_and_what_is_asked_for_is_exact(run_ranks, featured_dataset, tmp_path, world, optimizer):
    found = run_ranks(world, rank_bytes, featured_dataset, tmp_path / "run", optimizer)
    config = tiny_config(
        featured_dataset, tmp_path / "run", "modalities=[structure, numeric]", f"entities.optimizer={optimizer}"
    )
    plan = plan_for(config, world)
    for part in ("rows", "rows: optimizer"):
        assert plan.resident[part] == max(rank[part] for rank in found), part
    # Who has a modality is a random share of a rank's rows: its values differ by a few rows from the mean.
    assert plan.resident["features: numeric"] == pytest.approx(
        max(rank["features: numeric"] for rank in found), rel=0.3
    )
    assert plan.resident["batches: features made ahead"] == 0
    assert plan.dense_parameters == found[0]["dense"] and plan.steps_per_epoch == found[0]["steps"]
    assert vars(plan.requests) == {name: max(max(rank[name]) for rank in found) for name in ("wanted", "asked", "sent")}
    assert (plan.requests.sent > 0) == (world > 1)


def bytes_ahead(comm: Comm, dataset: Path, run_dir: Path) -> int:
    """Body of one rank: features of as many of its largest batches as wait."""
    config = tiny_config(dataset, run_dir, "modalities=[structure, numeric]", "features.residency=mmap")
    worker = build_worker(config, open_dataset(config.data), comm)
    known = [part.entities for step in range(3) for part in worker.prepare(step)]
    return (DEPTH + 1) * max(entities.raw["numeric"].nbytes for entities in known if entities)


@pytest.mark.parametrize("world", [1, 2])
def test_features_made_ahead_are_counted(run_ranks, featured_dataset, tmp_path, world):
    found = run_ranks(world, bytes_ahead, featured_dataset, tmp_path / "run")
    config = tiny_config(
        featured_dataset, tmp_path / "run", "modalities=[structure, numeric]", "features.residency=mmap"
    )
    assert plan_for(config, world).resident["batches: features made ahead"] == max(found) > 0


def moved_bytes(comm: Comm, dataset: Path, run_dir: Path) -> int:
    """Body of one rank: bytes that one step's vectors take to the other ranks, counted where they are handed over."""
    import torch.distributed as dist

    config = tiny_config(dataset, run_dir, "modalities=[structure]")
    worker = build_worker(config, open_dataset(config.data), comm)
    route = worker.prepare(0)[0].route
    sent = []
    original = dist.all_to_all_single

    def counted(out: Any, value: Any, receive: list[int], send: list[int], **kwargs: Any) -> Any:
        sent.append((sum(send) - send[comm.rank]) * value.shape[1] * value.element_size())
        return original(out, value, receive, send, **kwargs)

    dist.all_to_all_single = counted
    try:
        from mocme_dist.parallel.exchange import exchange

        rows_VD = worker.table.gather(route.rows_V)
        exchange(rows_VD, route).sum().backward()
    finally:
        dist.all_to_all_single = original
    assert len(sent) == 2 and sent[0] == exchange_bytes(route.sent_vectors, worker.table.width)
    # Gradients go the other way: what came in goes back.
    assert sent[1] == exchange_bytes(sum(route.recv_counts) - route.recv_counts[comm.rank], worker.table.width)
    return sent[0]


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_on_the_wire_are_those_of_the_formula(run_ranks, featured_dataset, tmp_path, monkeypatch, world):
    found = run_ranks(world, moved_bytes, featured_dataset, tmp_path / "run")
    config = tiny_config(featured_dataset, tmp_path / "run", "modalities=[structure]")
    dataset = open_dataset(config.data)
    monkeypatch.setattr(planning, "_COUNTED_STEPS", 1)  # the one step that was measured
    requests = Planner(config, dataset, world).count_requests()
    assert exchange_bytes(requests.sent, config.experts.width) == max(found) > 0
    assert plan_for(config, world).wire["fused vectors"] == exchange_bytes(requests.sent, config.experts.width)


def test_what_cannot_fit_is_refused_with_numbers_and_what_to_change(featured_dataset, tmp_path):
    config = tiny_config(featured_dataset, tmp_path / "run", "modalities=[structure, numeric]")
    plan, sections = plan_for(config, 3), (config.launch, config.features)
    check_plan(plan, *sections, [Node("one", 3, 3 * plan.peak)])
    check_plan(plan, *sections, [Node("one", 2, 9 * plan.peak), Node("two", 1, plan.peak)])
    with pytest.raises(
        ConfigError,
        match=r"plan: 3 rank\(s\) need .* MiB each \(process .*\), but only 2 fit \(one: .* for 3\); .* saves up to",
    ):
        check_plan(plan, *sections, [Node("one", 3, 3 * plan.peak - 1)])
    with pytest.raises(ConfigError, match=r"entities.optimizer=adagrad saves up to"):
        check_plan(
            Plan(**{**vars(plan), "resident": {**plan.resident, "rows": GIB, "rows: optimizer": 2 * GIB}}),
            *sections,
            [Node("one", 3, GIB)],
        )


def test_train_refuses_before_anything_starts(featured_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "free_memory", lambda: 1 << 20)
    config = tiny_config(featured_dataset, tmp_path / "run", "modalities=[structure]")
    with pytest.raises(ConfigError, match=r"plan: 1 rank\(s\) need"):
        command.train(config)
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["exit_code"] == 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_command_prints_a_table_and_one_json_object_and_starts_nothing(
    featured_dataset, tmp_path, monkeypatch, capsys
):
    settings = [
        f"data.dataset={featured_dataset}",
        f"run.dir={tmp_path / 'run'}",
        "launch.workers=4",
        "modalities=[structure, numeric]",
    ]
    monkeypatch.setattr("sys.argv", ["train", "--plan", "--set", *settings])
    command.main()
    *table, last = capsys.readouterr().out.strip().splitlines()
    found = json.loads(last)
    assert found["world_size"] == 4 and found["rows_per_rank"] == 15 and found["steps_per_epoch"] == 1
    assert found["peak"] == sum(found["resident"].values()) + max(found["passing"].values())
    assert any(line.split()[:1] == ["peak"] for line in table) and any("rows: optimizer" in line for line in table)
    assert not (tmp_path / "run").exists()


def test_memory_that_is_free_is_that_of_this_machine():
    (name, ranks, memory), *others = cluster.node_memory(1, 0, 2)
    assert name and ranks == 2 and 1 << 28 < memory < 1 << 45 and not others


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """200,000 entities and three modalities: the rows, features and a step all weigh."""
    return write_packed(
        tmp_path_factory.mktemp("planted") / "data", Planted(200_000, 300_000, valid=0.001, test=0.001), 65536
    )


SHAPES = {
    "rows weigh": (1, ["modalities=[structure]", "experts.num_experts=1", "entities.optimizer=adagrad", "compile=off"]),
    "a step weighs": (1, ["experts.width=128", "train.batch_size=2048", "compile=off"]),
    "two ranks, DeepSpeed": (2, ["deepspeed.engine=deepspeed", "entities.optimizer=adagrad", "compile=on"]),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_peak_is_within_15_percent_of_the_measured_one(planted, tmp_path, shape):
    world, settings = SHAPES[shape]
    # What is measured ranks by the model alone.
    settings = ["deepspeed.engine=torch", "evaluation.query_block=64", "evidence.spaces=[]", *settings]
    settings = [f"data.dataset={planted.directory}", *settings]
    plan = plan_for(command.resolve_paths(load_config([], ["launch.mode=local", *settings])), world)

    def measure() -> float:
        return max(rank["peak_mb"] for rank in measure_ranks(world, settings, steps=5, queries=64))

    # What the allocator loses in gaps depends on how two threads take turns: one run is up to 8 % beside another. The
    # median of three runs decides, and the second and third are made only where the first one lies outside.
    found = [measure()]
    if plan.peak / 2**20 != pytest.approx(found[0], rel=0.15):
        found += [measure(), measure()]
    assert plan.peak / 2**20 == pytest.approx(statistics.median(found), rel=0.15), f"{found}; {plan.summary()}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", [1, 3])
def test_dense_memory_of_each_stage_is_within_15_percent_of_the_measured_one(tmp_path, stage):
    """Six modalities, eight experts of width 1,024: 102 million parameters, nearly all of them experts'."""
    settings = stages.settings_of(stages.make_dataset(tmp_path), 6, 8, 1024)
    found = stages.measure_stage(settings, stage, 2, 3, 1)
    peak, plan, error, *_ = stages.figures(found)
    assert error["name"] == f"stage{stage}_plan_error" and error["value"] <= 0.15, (peak, plan)


def test_each_stage_shards_more_of_the_dense_part(featured_dataset, tmp_path):
    def dense(stage: int, world: int, *more: str) -> list[int]:
        plan = plan_for(
            tiny_config(
                featured_dataset,
                tmp_path,
                "modalities=[structure, numeric]",
                "deepspeed.engine=deepspeed",
                f"deepspeed.stage={stage}",
                *more,
            ),
            world,
        )
        N = 4 * plan.dense_parameters
        return [
            round(plan.resident[f"dense: {kind}"] * world / N)
            for kind in ("values and gradients", "moments and masters")
        ]

    # In units of the values, over all of four ranks.
    assert [dense(stage, 4) for stage in range(4)] == [[8, 8], [8, 3], [5, 3], [2, 3]]
    assert [dense(stage, 1) for stage in range(4)] == [[2, 2], [2, 3], [2, 3], [2, 3]]
    assert dense(0, 4, "deepspeed.bf16=true") == [4, 3]


def test_ranks_without_a_chunk_are_told_with_the_batch_that_gives_them_one(featured_dataset, tmp_path):
    config = tiny_config(
        featured_dataset, tmp_path / "run", "modalities=[structure]", "train.batch_size=64", "negatives.chunk_size=16"
    )
    assert plan_for(config, 4).notes == ()
    (note,) = plan_for(config, 5).notes
    assert "4 chunk(s) of 16 queries for 5 ranks" in note and "train.batch_size to 80" in note
    (note,) = plan_for(
        config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"gradient_accumulation_steps": 2})}),
        3,
    ).notes
    assert "3 ranks in 2 micro-batches each" in note and "train.batch_size to 96" in note


def test_the_plan_that_the_clusters_readme_shows_has_the_lines_of_today(featured_dataset, tmp_path):
    text = (Path(__file__).resolve().parents[2] / "cluster" / "README.md").read_text()
    block = text[text.index("memory of a rank:") : text.index("```", text.index("memory of a rank:"))]
    shown = {
        re.sub(r"features: \w+", "features", line[:36].strip())
        for line in block.splitlines()
        if not line.startswith("note: ")
    }
    config = tiny_config(featured_dataset, tmp_path / "run", "modalities=[structure, numeric]")
    lines = list(plan_for(config, 2).lines())[2:]
    assert shown == {re.sub(r"features: \w+", "features", line[:36].strip()) for line in lines}


def test_evidence_adds_memory_and_time_and_is_left_out_where_it_takes_too_long(featured_dataset, tmp_path):
    def plan(*more: str):
        config = tiny_config(featured_dataset, tmp_path, "modalities=[structure, numeric]", *more)
        return Planner(config, Dataset.open(str(config.data.dataset)), 1).plan(under_ray=False)

    without, with_it, late = (
        plan(),
        plan("evidence.spaces=auto"),
        plan("evidence.spaces=auto", "evidence.max_minutes=1e-12"),
    )
    assert without.evidence_s == late.evidence_s == 0 < with_it.evidence_s
    assert with_it.passing["a ranking"] > without.passing["a ranking"] == late.passing["a ranking"]
    assert any("evidence of neighbours: about" in line for line in with_it.lines())
    assert not any("evidence" in note for note in (*without.notes, *with_it.notes))
    assert any("evidence.spaces=auto leaves evidence out" in note for note in late.notes)
