"""The notebook in examples/, executed in a kernel as a reader executes it."""

from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "examples/quickstart.ipynb"
SHORT = "--rollout.groups 2 --rollout.group-size 2 --rollout.num-inference-steps 2 --dgpo.timesteps 1"
SHORT += " --evaluation.images 4 --evaluation.num-inference-steps 2 --watch.every 0 --device cpu --name"


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """With few and small iterations: it trains with the shipped reward and with its own, and shows pictures."""
    short = ", ".join(f'"{word}"' for word in SHORT.split())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept"
    for cell in notebook.cells:
        cell.source = cell.source.replace("ITERATIONS = 20", "ITERATIONS = 1")
        cell.source = cell.source.replace('"--evaluation.images", "128", "--name"', short)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4 and not [output for output in outputs if output.output_type == "error"]
    texts = "".join(output.get("text", "") for output in outputs)
    assert "95 % interval" in texts and "Writing my_redness.py" in texts
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"notebook", "redder"}
