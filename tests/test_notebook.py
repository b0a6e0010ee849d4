"""The notebook of the examples runs as it is and ends with a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_quickstart_runs_and_ends_with_a_picture(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    manager = pytest.importorskip("jupyter_client.manager", reason="jupyter_client is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Through sockets in the file system: a kernel's own listeners are reachable by every user of the machine.
    kernel = manager.AsyncKernelManager(transport="ipc", connection_file=str(tmp_path / "kernel.json"))
    client.NotebookClient(notebook, kernel, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    *_, last = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) for output in last.outputs)
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    found, true = (
        int(word) for word in said.split("facts found, ")[0].split()[-1:] + said.split("facts found, ")[1].split()[:1]
    )
    assert true > 30 and true > 0.5 * found
