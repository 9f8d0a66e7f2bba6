"""systemd reads the unit as it is meant."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.files import DEPLOY

UNIT = DEPLOY / "systemd/loraserve.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_finds_nothing_to_mend(tmp_path: Path) -> None:
    unit = tmp_path / "loraserve.service"
    unit.write_text(UNIT.read_text().replace("/opt/loraserve/bin/loraserve", sys.executable))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if unit.name in line]) == (0, [])
    unit.write_text(unit.read_text().replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "NoNewPrivilege" in done.stderr
