"""The environment of clusters that tests start. Ray reads the token when it is imported."""

import os
import secrets
from pathlib import Path

os.environ |= {
    "PYTHONPATH": str(Path(__file__).parents[1]),  # Replicas load engines of tests/support.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
}
