"""The environment of a command: packages that are missing, and every environment variable that the package reads.

The variables of launchers, of Ray, of the shell's completion and of this package (MOCME_*) have one function each. No
other module reads or sets a variable, with one exception: `mocme_dist/__init__.py` sets GOMP_SPINCOUNT, because OpenMP
must find it when torch is first imported, and importing the package must not import this module.

Needs the standard library alone, because it runs where nothing else is installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Packages that commands import before they can catch an error; `commands.run_command` handles all others.
FIRST_IMPORTS = ("numpy", "pydantic", "pydantic_core", "typing_extensions", "annotated_types", "yaml")
OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parents[1]
SERVICE_TOKEN = "MOCME_SERVE_TOKEN"


def lacking(modules: Sequence[str]) -> list[str]:
    """Return the top-level modules among `modules` that this Python cannot find."""
    return [name for name in modules if name not in sys.modules and importlib.util.find_spec(name) is None]


def remedy(missing: Sequence[str]) -> str:
    """Return one line about missing modules: for which Python, and how to install them."""
    are = "is" if len(missing) == 1 else "are"
    here = f"{', '.join(missing)} {are} not installed for {sys.executable}"
    python = ROOT / ".venv" / "bin" / "python"
    if python.exists():
        return f"{here}; activate the environment: . {python.parent}/activate"
    if (ROOT / "Makefile").exists():
        return f"{here}; make the environment and activate it: make -C {ROOT} env && . {python.parent}/activate"
    return f"{here}; pip install mocme-dist"


# Oldest versions with the security fixes that loading weights and running a cluster need.
OLDEST_VERSIONS = {"torch": (2, 10), "ray": (2, 54)}


def outdated() -> str:
    """Return one line about a package that is installed in too old a version, and the remedy.

    Empty if there is none.
    """
    from importlib import metadata  # takes longer than the rest of this module

    for name, oldest in OLDEST_VERSIONS.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        numbers = [int(number) for number in re.findall(r"\d+", found)[:2]]
        if tuple(numbers) < oldest:
            wanted = ".".join(map(str, oldest))
            here = f"{name} {found} is installed for {sys.executable}"
            return f"{here}; expected {wanted} or later: pip install -U '{name}>={wanted}'"
    return ""


# Open files that a command needs: Ray holds a few hundred on one machine.
OPEN_FILES = 512


def few_open_files() -> str:
    """Raise this process's limit of open files as far as it is allowed; return one line if that is not far enough."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return ""
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == OPEN_FILES:
        return ""
    return f"this process may open {hard} files, expected {OPEN_FILES} or more; raise the limit: ulimit -n {OPEN_FILES}"


def require() -> None:
    """Exit with code 2 and one line if this Python cannot start a command.

    Called on import of the package, because a command's own imports would end in a traceback.
    """
    if sys.version_info < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        reason = f"Python {oldest} or later is needed, {sys.executable} is {sys.version.split()[0]}"
    elif missing := lacking(FIRST_IMPORTS):
        reason = remedy(missing)
    else:
        return
    print(f"error: ConfigError: {reason}", file=sys.stderr)
    sys.exit(2)


def end_on_signals() -> None:
    """Let SIGINT and SIGTERM end a command with code 75 while it imports its modules, before `run_command`.

    There is nothing to save yet. Programs that import the package keep their own handlers.
    """
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
    if module and module[0].startswith("mocme_dist."):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)


def _end(number: int, frame: object) -> None:
    # os.write and os._exit, because an import may hold any lock.
    os.write(2, f"error: interrupted ({signal.Signals(number).name}); run the same command again\n".encode())
    os._exit(75)


# -- this package


def log_level() -> str:
    """Return the value of MOCME_LOG, INFO by default; it is not checked."""
    return os.environ.get("MOCME_LOG", "INFO")


def cache_folder() -> Path:
    """Return the user's cache folder, $MOCME_CACHE or ~/.cache/mocme_dist; it may not exist.

    Raises:
        RuntimeError: the path starts with ~ and the home folder is not known.
    """
    return Path(os.environ.get("MOCME_CACHE") or "~/.cache/mocme_dist").expanduser().absolute()


def service_token() -> str | None:
    """Return the token that requests to `mocme serve` must carry (MOCME_SERVE_TOKEN), or None; it is not checked."""
    return os.environ.get(SERVICE_TOKEN)


# -- ranks that a launcher has started: torchrun, or Ray Train


def has_launcher() -> bool:
    """Return whether a launcher started this process as a rank and says where the ranks meet."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ


def torchrun_rank() -> int:
    """Return the rank of this process under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0")) if "MASTER_ADDR" in os.environ else 0


def torchrun_sizes() -> tuple[int, int]:
    """Return the number of processes that torchrun started in all and on this machine; both are 1 without it."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def rank_and_world_size() -> tuple[int, int]:
    """Return rank and number of ranks of a process that Ray Train or torchrun has started."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def local_rank() -> int:
    """Return the number of this rank on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def master_host() -> str:
    """Return the host where the ranks meet."""
    return os.environ["MASTER_ADDR"]


def master_port() -> int:
    """Return the port where the ranks meet."""
    return int(os.environ["MASTER_PORT"])


def launcher_serves_store() -> bool:
    """Return whether torchrun itself serves the ranks' store at the address where they meet."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


# -- Ray


def ray_address() -> str | None:
    """Return the address of the cluster that the user or `ray job submit` named, or None."""
    return os.environ.get("RAY_ADDRESS")


def in_ray_job() -> bool:
    """Return whether this process or one of its parents is the driver of a job that was submitted to Ray."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def has_ray_token() -> bool:
    """Return whether the user gave Ray a token, or chose to use none."""
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    return bool(given) or os.environ.get("RAY_AUTH_MODE", "token") != "token"


def temporary_folder() -> str:
    """Return the folder in which Ray would put its sockets and logs."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


# -- completion by the shell


def is_completing() -> bool:
    """Return whether the shell called this process for completions."""
    return "_ARGCOMPLETE" in os.environ


def completed_line() -> str:
    """Return the line that the shell completes."""
    return os.environ["COMP_LINE"]


def completed_part() -> str:
    """Return the line that the shell completes, up to the cursor."""
    return completed_line()[: int(os.environ["COMP_POINT"])]


def hide_first_word() -> None:
    """Let argcomplete leave out the first word of the line: the parser of a command does not see `mocme`."""
    os.environ["_ARGCOMPLETE"] = "2"


# -- variables of libraries, for this process and those that it starts


def set_variables(variables: Mapping[str, str]) -> None:
    """Set variables that a library reads, whatever they were before."""
    os.environ.update(variables)


def set_defaults(variables: Mapping[str, str]) -> None:
    """Set variables that are not set, for libraries that read them when they are imported."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def raise_to(name: str, seconds: float) -> None:
    """Set a variable to a time in seconds, if it has less."""
    os.environ[name] = f"{max(float(os.environ.get(name, '0')), seconds):g}"


def seconds(name: str, default: float) -> float:
    """Return the value of a variable in seconds."""
    return float(os.environ.get(name, default))


def chosen(names: Sequence[str]) -> dict[str, str]:
    """Return those of the variables that are set, with their values."""
    return {name: os.environ[name] for name in names if name in os.environ}
