"""docs/notebook.ipynb, executed from top to bottom by Jupyter; the seed's cells in it."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple, Union

import nbformat
import psutil
import pytest
from jupyter_client import BlockingKernelClient, KernelManager
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

from .test_notebook_use import SEED

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
STEPS = 3
SMALL = f"data.dataset=fashion_mnist_sample train.max_steps={STEPS} monitor.every_steps=1"


def _code(notebook: nbformat.NotebookNode) -> List[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def _text(cell: nbformat.NotebookNode) -> str:
    """All that a cell printed and showed as text."""
    outputs = cell.get("outputs", [])
    return "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


def _pictures(notebook: nbformat.NotebookNode) -> List[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    return [kind for kind in kinds if kind.startswith("image/")]


PICTURES = ["image/svg+xml", "image/png", "image/svg+xml"]  # images, curves, predictions


class Watched(NotebookClient):
    """Keeps what the kernel showed, in its order: texts, and pictures (bytes) as they changed."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shown: List[Union[str, bytes]] = []

    def process_message(self, msg: Dict, *args: Any) -> Any:
        content = msg["content"]
        picture = content.get("data", {}).get("image/png")
        if picture is not None:
            self.shown.append(base64.b64decode(picture))
        elif msg["msg_type"] == "stream":
            self.shown.append(content["text"])
        return super().process_message(msg, *args)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """The notebook after a run on a few images, in a folder of its own."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTEBOOK_SETTINGS", SMALL)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        resources = {"metadata": {"path": str(folder)}}
        client = Watched(notebook, timeout=300, resources=resources)
        client.execute()
    return client


def test_it_runs_from_top_to_bottom_on_two_ranks(executed: Watched) -> None:
    said = "\n".join(map(_text, executed.nb.cells))
    assert "(1, 512, 7, 7)" in said, "the seed's shapes"
    assert "2 ranks on cpu, global batch 256, 128 per rank" in said
    assert "done: test accuracy" in said and "(500 images)" in said
    assert '"event"' not in said, "the ranks' JSON is for the curves"
    assert _pictures(executed.nb) == PICTURES


def test_the_curves_grow_while_the_ranks_train(executed: Watched) -> None:
    texts = [shown if isinstance(shown, str) else "" for shown in executed.shown]
    begin = next(place for place, text in enumerate(texts) if "2 ranks on cpu" in text)
    epoch = next(place for place, text in enumerate(texts) if "epoch 1: training loss" in text)
    during = [shown for shown in executed.shown[begin:epoch] if isinstance(shown, bytes)]
    assert len(during) == STEPS and len(set(during)) == STEPS
    end = next(place for place, text in enumerate(texts) if "done: test accuracy" in text)
    after = [shown for shown in executed.shown[epoch:end] if isinstance(shown, bytes)]
    assert len(after) == 1, "with the test set's figures"


def test_the_seeds_code_stands_in_it_unchanged() -> None:
    code = "\n".join(_code(nbformat.read(NOTEBOOK, as_version=4)))
    for line in filter(None, map(str.rstrip, SEED.splitlines())):
        assert line in code
    ours = code[code.index("import launch") :]
    assert "nn." not in ours, "the net is the seed's"


def test_the_committed_outputs_are_of_a_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    said = "\n".join(map(_text, notebook.cells))
    assert "60000 training and 10000 test images" in said and "(10000 images)" in said
    accuracy = float(re.search(r"done: test accuracy (0\.\d+)", said)[1])
    assert accuracy > 0.8 and _pictures(notebook) == PICTURES
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "executed once, in order"
    assert len(NOTEBOOK.read_bytes()) < 500_000


@pytest.fixture
def kernel() -> Iterator[Tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel(env={**os.environ, "PYTHONPATH": str(ROOT)})
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def _run_cell(client: BlockingKernelClient, code: str, seen: Callable[[Dict], None]) -> Dict:
    return client.execute_interactive(code, timeout=60, output_hook=seen)["content"]


def test_a_failed_rank_is_one_line_and_the_stop_button_ends_the_ranks(kernel: tuple) -> None:
    manager, client = kernel
    shown: List[Dict] = []
    failing = "import launch\nlaunch.run(lambda: [] [int('7')], ranks=2)"
    assert _run_cell(client, failing, shown.append)["ename"] == "RankError"
    (error,) = [message["content"] for message in shown if message["msg_type"] == "error"]
    (line,) = error["traceback"]
    assert re.fullmatch(
        r"RankError: rank [01] ended with exit code 1: IndexError: list index out of range", line
    )

    wrong = "from trainer import Config\nConfig(device='cuda')"
    assert _run_cell(client, wrong, shown.append)["ename"] == "ConfigError"
    errors = [message["content"] for message in shown if message["msg_type"] == "error"]
    (line,) = errors[-1]["traceback"]
    assert line == "ConfigError: device is 'cuda'; it must be one of auto, cpu, gpu"

    alive: List[psutil.Process] = []

    def stop(message: Dict) -> None:
        if not alive and "at work" in message["content"].get("text", ""):
            alive.extend(psutil.Process(manager.provisioner.pid).children(recursive=True))
            manager.interrupt_kernel()

    waiting = "import time\nlaunch.run(lambda: print('at work') or time.sleep(100), ranks=2)"
    assert _run_cell(client, waiting, stop)["ename"] == "KeyboardInterrupt"
    assert len(alive) == 4, "a supervisor, its watcher and two ranks"
    assert psutil.wait_procs(alive, timeout=20)[1] == []
