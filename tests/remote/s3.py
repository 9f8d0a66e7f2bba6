"""A bucket of an S3 server on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "adapters-bucket"
SECRET = "wJalrXUtnFEMI-not-to-be-shown"


class Bucket:
    """Starts the server, and makes the environment's credentials those for it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.environment = {
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_REGION": "us-east-1",
        }
        for name, value in self.environment.items():
            patch.setenv(name, value)
        httpx.post(
            f"http://{host}:{port}/moto-api/reset"
        ).raise_for_status()  # servers of a process share all
        self.port = port
        self.client: Any = boto3.client("s3", region_name="us-east-1")
        self.client.create_bucket(Bucket=BUCKET)

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def put_directory(self, prefix: str, directory: str | Path) -> None:
        for path in Path(directory).iterdir():
            self.put(f"{prefix}/{path.name}", path.read_bytes())

    def stop(self) -> None:
        """From now on the address refuses connections."""
        self._server.stop()
