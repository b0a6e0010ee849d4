"""The parts of the benchmarks that decide what is said: bars, tables that keep their history, and peers that agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.bench import all as bench_all
from tools.bench import stages as bench_stages
from tools.bench import step as bench_step
from tools.bench.common import finish, is_met, measure, row, spread
from tools.bench.eager_rotate import EagerRotatE
from tools.bench.workload import FULL, STRUCTURE_ONLY, make_graph, step_config, timed_steps


def test_bars_are_read():
    assert [is_met(row("a", 2.0, "x", bar)) for bar in (">= 2", "> 2", "<= 2", "< 2", "", "about 2")] == [
        True,
        False,
        True,
        False,
        None,
        None,
    ]


def test_a_measure_is_a_median_and_a_percentile():
    assert spread([3.0, 1.0, 2.0])[0] == 2.0
    calls = []
    median_ms, p90_ms = measure(lambda: calls.append(1), 2, 20)
    assert len(calls) == 22 and 0 <= median_ms <= p90_ms


def test_twins_that_disagree_end_with_1(capsys):
    finish("x", True, [row("speedup", 3, "x", ">= 2")])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["bench"], last["parity"], last["rows"][0]["value"]) == ("x", True, 3)
    with pytest.raises(SystemExit) as ended:
        finish("x", False, [])
    assert ended.value.code == 1


def result(value: float, *more: dict) -> dict:
    return {
        "bench": "loss",
        "parity": True,
        "rows": [row("speedup", value, "x", ">= 20"), *more],
        "machine": {"device": "cpu, 2 cores", "commit": "abc"},
    }


def test_a_new_run_adds_a_row_and_loses_nothing():
    page = (
        "# Results\n\nBy hand.\n\n<!-- bench loss -->\n<!-- end loss -->\n\n| by | hand |\n| --- | --- |\n| 1 | 2 |\n"
    )
    once = bench_all.update(page, "loss", result(39.0))
    twice = bench_all.update(once, "loss", result(12.5, row("memory_ratio", 0.01, "of eager")))
    assert twice.startswith("# Results\n\nBy hand.\n\n<!-- bench loss -->\n| date")
    assert twice.endswith("<!-- end loss -->\n\n| by | hand |\n| --- | --- |\n| 1 | 2 |\n")
    columns, rows = bench_all.read_table(twice.split("-->\n")[1])
    assert columns == ["date", "commit", "speedup", "memory_ratio", "command"]
    assert [r["speedup"] for r in rows] == ["39 (>= 20, met)", "12.5 (>= 20, missed)"]
    assert [r["memory_ratio"] for r in rows] == ["", "0.01"]
    assert rows[0]["command"] == "`python -m tools.bench.loss`"


def test_a_table_has_at_most_eight_columns_and_names_its_machines():
    page = bench_all.update("# Results\n", "loss", result(39.0))
    page = bench_all.update(page, "loss", result(39.0))  # the same commit is listed once
    many = result(40.0, *(row(f"figure_{i}", i, "ms") for i in range(9)), row("held", 3, "x", "<= 4"))
    many["machine"] = {"device": "gpu: large", "commit": "def"}
    page = bench_all.update(page, "loss", many)
    many["machine"] = {"device": "gpu: large", "commit": "fed"}
    page = bench_all.update(page, "loss", many)
    columns, rows = bench_all.read_table(page)
    kept = ["speedup", "held", "figure_0", "figure_1", "figure_2"]
    assert columns == ["date", "commit", *kept, "command"] and len(rows) == 4
    assert page.endswith("|\n\n- cpu, 2 cores: abc\n- gpu: large: def, fed\n<!-- end loss -->\n")


def test_the_tables_of_the_page_have_at_most_eight_columns_and_short_rows():
    text = (bench_all.FOLDER / "RESULTS.md").read_text(encoding="utf8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) > 100
    for line in lines:
        assert line.count("|") <= bench_all.WIDEST + 1 and len(line) <= 200, line
    for name in bench_all.BENCHES:
        assert text.count(f"<!-- bench {name} -->") == text.count(f"<!-- end {name} -->") <= 1


def test_a_bench_without_a_section_gets_one():
    page = bench_all.update("# Results\n", "new", result(1.0))
    assert page.count("<!-- bench new -->") == 1 and "## Runs of tools/bench/new.py" in page


@pytest.mark.slow
def test_all_tells_of_a_bench_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["all", "--only", "loss", "mine", "--results", str(tmp_path / "R.md")])
    monkeypatch.setattr(
        bench_all, "run", lambda name, quick: {**result(1.0), "parity": False} if name == "loss" else None
    )
    with pytest.raises(SystemExit) as ended:
        bench_all.main()
    assert ended.value.code == 1 and "loss, mine" in capsys.readouterr().out
    assert "PARITY FAILED" in (tmp_path / "R.md").read_text()


def test_steps_of_the_real_loop_are_timed_phase_by_phase(tmp_path):
    dataset = make_graph(tmp_path, 250, 700, {"text": 6, "numeric": 4})
    small = ("compile=off", "deepspeed.engine=torch", "mine.hidden=4")
    for name, overrides in (("structure", STRUCTURE_ONLY), ("full", FULL)):
        config = step_config(dataset, tmp_path / name, *overrides, *small, queries=256, negatives=8, width=8)
        timed = timed_steps(config, 4, 2)
        assert len(timed.step_s) == 4 and min(timed.step_s) > 0 and timed.prepare_s > 0
        assert {"wait", "lookup", "encode", "exchange", "loss", "agree", "backward", "update"} <= timed.phases.keys()
        # However long one of the steps was held up: phases are parts of the steps that are counted.
        assert 0 < sum(timed.phases.values()) < sum(timed.step_s) / 4
    (overhead,) = (figure for figure in bench_step.figures("full", timed, 256) if figure["name"] == "host_overhead")
    assert 0 < overhead["value"] < 1 and overhead["bar"] == "<= 0.1"
    sizes = {"queries": 256, "negatives": 8, "width": 8}
    assert np.isfinite(bench_step.first_loss(step_config(dataset, tmp_path / "first", *FULL, *small, **sizes)))


def test_the_eager_peers_compute_the_published_loss():
    """Shared and per-triple forms against complex arithmetic, and with each other where pools are the same."""
    gen = torch.Generator().manual_seed(0)
    E, R, C, B, N = 11, 3, 4, 6, 5
    model = EagerRotatE(torch.randn(E, 2 * C, generator=gen), torch.rand(R, C, generator=gen) * 6, 3.0).double()
    draw = lambda high, *shape: torch.randint(high, shape, generator=gen)  # noqa: E731
    source, relation, target, pool = draw(E, 1, B), draw(R, 1, B), draw(E, 1, B), draw(E, 1, N)
    sign = torch.tensor([[1.0, -1, 1, -1, 1, 1]]).double()
    shared = model.shared(source, relation, sign, target, pool, torch.ones(1, B, N, dtype=torch.bool))
    own = model.per_triple(source[0], relation[0], sign[0], target[0], pool.expand(B, N))
    z_EC = torch.complex(*model.entity.detach().chunk(2, -1))
    expected = 0.0
    for b in range(B):
        query = z_EC[source[0, b]] * torch.exp(1j * sign[0, b] * model.phase.detach()[relation[0, b]])
        score = lambda rows: 3.0 - (query - z_EC[rows]).abs().sum(-1)  # noqa: B023, E731
        weight = torch.softmax(score(pool[0]), 0)
        expected -= (
            float(
                torch.log(torch.sigmoid(score(target[0, b])))
                + (weight * torch.log(torch.sigmoid(-score(pool[0])))).sum()
            )
            / 2
        )
    assert torch.allclose(shared, own) and np.isclose(float(shared.detach()), expected / B)


def test_the_script_for_a_gpu_names_every_part_and_runs_none_when_dry(tmp_path):
    script = str(Path(bench_step.__file__).with_name("on_gpu.sh"))
    subprocess.run(["bash", "-n", script], check=True)
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", script, "--dry-run", str(tmp_path / "out")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = [json.loads(line) for line in (tmp_path / "out" / "summary.jsonl").read_text().splitlines()]
    assert [part["part"] for part in parts][:4] == ["tests_model", "step", "loss", "mine"] and len(parts) == 9
    assert all(part["status"] == "skipped" and part["reason"] for part in parts)


def test_stages_are_compared_with_the_plan_by_the_rank_that_needs_most():
    rank = {"build_peak_mb": 500.0, "steps_peak_mb": 900.0, "after_mb": 800.0, "step_ms": [90.0, 80.0, 10.0, 30.0]}
    other = {**rank, "build_peak_mb": 1000.0, "step_ms": [70.0, 60.0, 20.0, 20.0]}
    found = {"stage": 3, "ranks": [rank, other], "plan_mb": {"dense parameters": 7, "process": 450.0, "a step": 450.0}}
    rows = {figure["name"]: figure["value"] for figure in bench_stages.figures(found)}
    assert rows == {
        "stage3_peak_mb": 1000.0,
        "stage3_plan_mb": 900.0,
        "stage3_plan_error": 0.1,
        "stage3_after_mb": 800.0,
        "stage3_step_ms": 25.0,
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_losses_of_stages_1_and_3_are_equal_on_two_ranks():
    sizes = ["--modalities", "3", "--experts", "2", "--width", "16", "--steps", "3"]
    command = [sys.executable, "-m", "tools.bench.stages", "--quick", *sizes]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parity"] and found["losses"].keys() == {"1", "3"} and len(set(found["losses"]["1"])) == 3
