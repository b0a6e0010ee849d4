#!/usr/bin/env bash
# A Ray head on this machine, on loopback, with token authentication; and jobs for it.
#
#   cluster/local.sh token                     make the token (once)
#   cluster/local.sh start [CPUS]              start the head; refuses without a token
#   eval "$(cluster/local.sh env)"             address, token and mode, for ray, ray job submit and mocme_dist in this shell
#   cluster/local.sh submit DIR COMMAND...     ray job submit of COMMAND with DIR as its working directory
#   cluster/local.sh logs JOB | status JOB | cancel JOB
#   cluster/local.sh stop                      end the head that `start` began, and no other Ray of this machine
#
# MOCME_CLUSTER_DIR (default ~/.mocme_cluster) holds the token, the head's pid and its log; MOCME_CLUSTER_PORT (default
# 6379) and the nine ports from MOCME_CLUSTER_DASHBOARD_PORT (default 8265) are used.
set -euo pipefail

dir=${MOCME_CLUSTER_DIR:-$HOME/.mocme_cluster}
port=${MOCME_CLUSTER_PORT:-6379}
dashboard=${MOCME_CLUSTER_DASHBOARD_PORT:-8265}
token=$dir/token
address=http://127.0.0.1:$dashboard
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The environment that `make env` built, where none is active.
command -v ray > /dev/null || path=$root/.venv/bin:$PATH
export PATH=${path:-$PATH}

fail() { echo "error: $*" >&2; exit 2; }

require_token() {
  [ -s "$token" ] || fail "$token: no token; an open Ray port lets anyone run code. Make one: cluster/local.sh token"
  [ "$(stat -c %a "$token")" = 600 ] || fail "$token: readable by others; chmod 600 it"
  # Nodes, drivers and clients all need both.
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
}

require_head() {
  require_token
  running || fail "no head runs here; start one: cluster/local.sh start"
}

running() { [ -s "$dir/pid" ] && kill -0 "$(cat "$dir/pid")" 2> /dev/null; }

print_env() {
  require_head
  [ -z "${path:-}" ] || printf 'export PATH=%q\n' "$path"
  # Jobs go to the dashboard; programs join the head. The last one keeps them on loopback, where the head is.
  printf 'export %s=%q\n' RAY_API_SERVER_ADDRESS "$address" RAY_ADDRESS "127.0.0.1:$port" RAY_AUTH_MODE token \
    RAY_AUTH_TOKEN_PATH "$token" RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER 0
  echo "# TensorBoard needs none of it and has no password: tensorboard --host 127.0.0.1 --logdir runs"
}

make_token() {
  [ -e "$token" ] && fail "$token: exists; stop the head and delete it to make another"
  umask 077
  mkdir -p "$dir"
  python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$token"
  echo "token: $token"
}

start() {
  require_token
  if running; then fail "a head runs already, process $(cat "$dir/pid")"; fi
  command -v ray > /dev/null || fail "ray: not installed here; make the environment: make -C $root env"
  unset RAY_ADDRESS RAY_API_SERVER_ADDRESS  # of another head, if this shell had one
  # Without this variable Ray listens on every interface, whatever address it is given.
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
  # A stopped job gets so long to finish its step and save, before it is killed.
  export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-120}
  # One node has nowhere to drain to; Ray would wait half a minute.
  export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
  nohup ray start --head --block --disable-usage-stats --num-cpus "${1:-$(nproc)}" \
    --node-ip-address 127.0.0.1 --port "$port" --temp-dir "$dir/ray" \
    --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" \
    --dashboard-agent-listen-port $((dashboard + 1)) --dashboard-agent-grpc-port $((dashboard + 2)) \
    --runtime-env-agent-port $((dashboard + 3)) --metrics-export-port $((dashboard + 4)) \
    --ray-client-server-port $((dashboard + 5)) --object-manager-port $((dashboard + 6)) \
    --node-manager-port $((dashboard + 7)) > "$dir/head.log" 2>&1 < /dev/null &
  echo $! > "$dir/pid"
  for _ in $(seq 120); do
    if ray job list --address "$address" > /dev/null 2>&1; then
      echo "head: process $(cat "$dir/pid"), $address"
      return
    fi
    running || { tail -20 "$dir/head.log" >&2; fail "the head ended; see $dir/head.log"; }
    sleep 0.5
  done
  fail "the head does not answer within a minute; see $dir/head.log"
}

stop() {
  [ -s "$dir/pid" ] || fail "$dir/pid: no head was started here"
  # By its own number, never `ray stop`: that ends every Ray of the machine.
  pid=$(cat "$dir/pid")
  kill -TERM "$pid" 2> /dev/null || true
  for _ in $(seq 120); do
    kill -0 "$pid" 2> /dev/null || { rm -f "$dir/pid"; echo "head: stopped"; return; }
    sleep 0.5
  done
  fail "process $pid does not end; see $dir/head.log"
}

command=${1:-}
[ $# -gt 0 ] && shift
case $command in
  token) make_token ;;
  start) start "$@" ;;
  stop) stop ;;
  env) print_env ;;
  submit)
    [ $# -ge 2 ] || fail "submit: expected a working directory and a command"
    require_head
    work=$1
    shift
    # Only code and configuration go along: data and results are named by absolute paths.
    ray job submit --address "$address" --working-dir "$work" \
      --runtime-env-json '{"excludes": ["runs/", ".venv/", ".git/", "*.tar", "*.safetensors", "*.npy", "*.pt", "*.parquet"]}' \
      -- "$@"
    ;;
  logs) require_head && ray job logs --address "$address" --follow "$@" ;;
  status) require_head && ray job status --address "$address" "$@" ;;
  cancel) require_head && ray job stop --address "$address" "$@" ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
