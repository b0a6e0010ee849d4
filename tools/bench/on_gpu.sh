#!/bin/bash
# All checks and figures of a GPU in under ten minutes, in order of value; results are written as they come.
#
#   tools/bench/on_gpu.sh [--dry-run] [OUT]        OUT defaults to bench-on-gpu
#
# Each part has a time limit. It writes OUT/PART.log and one line of OUT/summary.jsonl: its exit status, seconds, and the
# reason if it is skipped, as every part is without a GPU. --dry-run prints the commands and only checks that their modules
# exist. Ray and DeepSpeed are not needed; parts that train on a packed graph need WebDataset.
# PYTHON names another interpreter than `python`, BUDGET_S another total limit in seconds.
set -u
DRY=0
[ "${1:-}" = --dry-run ] && DRY=1 && shift
OUT=$(mkdir -p "${1:-bench-on-gpu}" && cd "${1:-bench-on-gpu}" && pwd)
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
BUDGET_S=${BUDGET_S:-580}
START=$SECONDS
: >"$OUT/summary.jsonl"

note() { # PART STATUS SECONDS REASON
    printf '{"part": "%s", "status": "%s", "seconds": %d, "reason": "%s"}\n' "$1" "$2" "$3" "$4" | tee -a "$OUT/summary.jsonl"
}

missing() { # MODULE...: the first module that cannot be found
    "$PYTHON" - "$@" <<'EOF'
import importlib.util, sys
for name in sys.argv[1:]:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        print(name)
        break
EOF
}

part() { # NAME LIMIT_S MODULES COMMAND...
    local name=$1 limit=$2 modules=$3 began=$SECONDS left lacks
    shift 3
    left=$((BUDGET_S - (SECONDS - START)))
    # shellcheck disable=SC2086 # a list of modules
    lacks=$(missing $modules)
    if [ -n "$lacks" ]; then note "$name" skipped 0 "no module $lacks"; return; fi
    if [ "$DRY" = 1 ]; then echo "+ $*"; note "$name" skipped 0 "dry run"; return; fi
    if [ "$GPU" = no ]; then note "$name" skipped 0 "torch finds no GPU"; return; fi
    if [ "$left" -lt 20 ]; then note "$name" skipped 0 "time is used up"; return; fi
    timeout $((left < limit ? left : limit)) "$@" >"$OUT/$name.log" 2>&1
    local status=$?
    tail -n 3 "$OUT/$name.log"
    note "$name" "$status" $((SECONDS - began)) "$([ $status = 124 ] && echo "time limit")"
}

GPU=no
[ "$DRY" = 1 ] || GPU=$("$PYTHON" -c 'import torch; print("yes" if torch.cuda.is_available() else "no")' 2>/dev/null || echo no)

part tests_model 120 "torch pytest" "$PYTHON" -m pytest -q -m gpu tests/model/test_on_gpu.py
part step 100 "torch webdataset tools.bench.step" "$PYTHON" -m tools.bench.step --batches 1024 8192 65536
part loss 60 "torch tools.bench.loss" "$PYTHON" -m tools.bench.loss --quick
part mine 60 "torch tools.bench.mine" "$PYTHON" -m tools.bench.mine --quick
part experts 45 "torch tools.bench.experts" "$PYTHON" -m tools.bench.experts --quick
part ranking 45 "torch tools.bench.ranking" "$PYTHON" -m tools.bench.ranking --quick
part counters 90 "torch webdataset tools.bench.step" "$PYTHON" -m tools.bench.step --quick
part pykeen 90 "torch pykeen webdataset tools.bench.peers" "$PYTHON" -m tools.bench.peers --quick
part tests_runs 150 "torch pytest webdataset" "$PYTHON" -m pytest -q -m gpu tests/training/test_run_on_gpu.py

! grep -qE '"status": "([1-9]|[1-9][0-9]+)"' "$OUT/summary.jsonl"
