"""`python -m mocme_dist.serve BUNDLE [BUNDLE ...]`: an endpoint and a page over exported bundles."""

from __future__ import annotations

import argparse
import logging

from mocme_dist.environment import SERVICE_TOKEN, lacking
from mocme_dist.errors import ConfigError

log = logging.getLogger(__name__)

DESCRIPTION = """\
Serve exported bundles over HTTP, with a page to explore them.

  mocme serve bundles/demo --data runs/demo/dataset
  mocme serve countries=bundles/demo films=bundles/films --port 8080
  mocme serve bundles/demo --replicas 2
  mocme serve bundles/demo --host 0.0.0.0 --token-file token

Open the address that is printed. /predict, /explain, /new, /entity/ID, /search, /relations, /health and /metrics answer
programs; /docs lists them. Without --host only this machine reaches the server. Another host needs a token, from
--token-file (mode 0600) or the environment variable MOCME_SERVE_TOKEN; requests carry it as
Authorization: Bearer TOKEN."""
PACKAGES = ("fastapi", "uvicorn", "multipart", "prometheus_client")


def parse() -> argparse.Namespace:
    """Return the command line."""
    from mocme_dist.commands import EXIT_CODES, add_trust

    parser = argparse.ArgumentParser(
        prog="python -m mocme_dist.serve",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="folder or URL of a bundle, or NAME=BUNDLE")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port to listen on (default 8000; 0: a free one)"
    )
    parser.add_argument(
        "--data", metavar="DATASET", help="packed data set of the bundle's run: pictures, texts, numbers, sounds, films"
    )
    parser.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="processes that answer, under Ray Serve (default: this process, without Ray)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        metavar="N",
        help="most questions that share one pass over the vectors (default 32)",
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help="file of mode 0600 with the token that requests must carry"
    )
    add_trust(parser)
    args = parser.parse_args()
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port}: expected 0 to 65535")
    if args.replicas is not None and args.replicas < 1:
        parser.error(f"--replicas {args.replicas}: expected 1 or more")
    if args.replicas is not None and args.port == 0:
        parser.error("--port 0: not together with --replicas; give a port")
    if args.batch < 1:
        parser.error(f"--batch {args.batch}: expected 1 or more")
    return args


def main() -> None:
    """Parse, check, serve until a signal comes."""
    args = parse()
    if missing := lacking(PACKAGES):
        raise ConfigError(f"{', '.join(missing)}: not installed; pip install 'mocme-dist[serve]'")
    from mocme_dist.serving.service_guard import is_loopback, read_token

    token = read_token(args.token_file)
    if not is_loopback(args.host) and token is None:
        raise ConfigError(
            f"--host {args.host}: reachable from other machines, which needs a token; give --token-file FILE or set "
            f"{SERVICE_TOKEN}, or leave --host out"
        )
    from mocme_dist.serving.service import ServiceSettings, serve_in_process
    from mocme_dist.serving.service_answers import names_of

    settings = ServiceSettings(
        places=names_of(args.bundles),
        data=args.data,
        token=token,
        loopback=is_loopback(args.host),
        max_batch=args.batch,
        trust_encoders=args.trust_encoders,
    )

    def ready(port: int) -> None:
        shown = "127.0.0.1" if args.host in ("0.0.0.0", "::") else args.host
        print(
            f"serving {', '.join(settings.places)} at http://{f'[{shown}]' if ':' in shown else shown}:{port}",
            flush=True,
        )

    if args.replicas is None:
        serve_in_process(settings, args.host, args.port, ready)
    else:
        from mocme_dist.serving.service_replicas import serve_replicas

        serve_replicas(settings, args.host, args.port, args.replicas, ready)


if __name__ == "__main__":
    from mocme_dist.commands import run_command

    run_command(main)
