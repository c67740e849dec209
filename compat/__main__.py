"""`python -m compat` runs against every server; one of their names after it against that one. See docs/servers.md."""

import argparse
import signal
import sys

from compat import litellm, transformers

SERVERS = {"litellm": litellm.run, "transformers": transformers.run}


def main() -> None:
    """Run against one server, or all."""
    parser = argparse.ArgumentParser(prog="python -m compat", description=__doc__)
    parser.add_argument("server", nargs="?", choices=[*SERVERS], help="all when absent")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended too
    chosen = parser.parse_args().server
    for name, run in SERVERS.items():
        if chosen in (None, name):
            run()


if __name__ == "__main__":
    main()
