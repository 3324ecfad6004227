"""MLflow's server as `mft up` starts it: MLflow's own, whose page opens the view of trainings.

Since 3.17 the page opens its view of LLM traces, whatever kind an experiment is of, until somebody has chosen the other
one in this browser; and it unfolds an assistant over a quarter of the window. Both are defaults that it keeps in the
browser, set here where they are not there yet. `mlflow server --app-name mft` finds it by its entry point.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_DEFAULTS = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.telemetry.info.alert.dismissed_v1": "true",  # it is off, and the note says that it is on
}
_SCRIPT = (
    f"<script>for (const [key, value] of Object.entries({json.dumps(_DEFAULTS)}))"
    " if (localStorage.getItem(key) === null) localStorage.setItem(key, value);</script>"
)


def create() -> Any:
    """Return MLflow's application with that page."""
    from mlflow.server import app as pages
    from mlflow.server.fastapi_app import app

    def page() -> str:
        text = Path(str(pages.static_folder), "index.html").read_text(encoding="utf-8")
        return text.replace("<head>", f"<head>{_SCRIPT}", 1)

    pages.view_functions["serve"] = page
    return app
