"""The engine's thread keeps torch to itself without changing torch for anyone else."""

import subprocess
import sys

CODE = """
import threading
import torch
from loraserve.engine.thread import use_one_torch_thread

def num_threads():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]

torch.set_num_threads(3)
seen = []
def engine():
    use_one_torch_thread()
    seen.append(torch.get_num_threads())
thread = threading.Thread(target=engine)
thread.start()
thread.join()
print(seen[0], torch.get_num_threads(), num_threads())
"""


def test_only_the_engines_thread_is_limited_to_one_torch_thread() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1", "3", "3"]
