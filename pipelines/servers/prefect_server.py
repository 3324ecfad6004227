"""Prefect's server as this project runs it, with the check of the Host header that Prefect does not make itself.

Whoever may give commands is Prefect's own affair (PREFECT_SERVER_API_AUTH_STRING), and so is which pages may read its
answers (PREFECT_SERVER_CORS_ALLOWED_ORIGINS): `pipelines.servers.services` and `docker/compose.yaml` set both. Without
the Host check a web page whose name resolves to 127.0.0.1 would be of the server's own origin. Run as a module with
HOST PORT NAME...: the names, besides this machine's own, by which the server is addressed.
"""

from __future__ import annotations

import os
import sys

import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware


def main(host: str, port: int, names: list[str]) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        SystemExit: no authentication string is set.
    """
    if not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        sys.exit("PREFECT_SERVER_API_AUTH_STRING is empty: a server without it takes commands from anybody.")
    from prefect.server.api.server import create_app

    app = create_app(final=True)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", *names])
    uvicorn.run(app, host=host, port=port, log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
