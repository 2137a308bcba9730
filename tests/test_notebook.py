"""The notebooks run from top to bottom in a kernel of this Python, the first with a small Hub to push to."""

import os
import re
import sys

import nbformat
import pytest
from conftest import ROOT
from hub_server import USER, WRITE_TOKEN, HubServer
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient


NOTEBOOK, MATHEMATICS = (ROOT / "notebooks" / f"{name}.ipynb" for name in ("run_in_cloud", "how_it_works"))
# Like TINY, as TrainingConfig takes it from Python.
FLAGS = dict(
    dataset_name="digits",
    resolution=8,
    base_channels=8,
    channel_mults=[1, 2],
    layers_per_block=1,
    ddpm_num_steps=10,
    ddpm_num_inference_steps=5,
    train_batch_size=8,
    eval_batch_size=2,
    lr_warmup_steps=2,
    learning_rate=1e-3,
    logging_steps=3,
    max_train_steps=6,
    validation_split="0.1",
    logger="tensorboard",
)
PARAMETERS = {
    "FLAGS": FLAGS,
    "RUN": "runs/tiny",
    "SAMPLING_STEPS": 5,
    "HUB_MODEL_ID": "tiny-digits",
}


class ThisPython(AsyncKernelManager):
    """A kernel of the Python that runs the tests; no kernelspec is looked for in anybody's home."""

    kernel_spec = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


def execute(path, folder, environment, parameters):
    """Run a notebook in `folder` with these values appended to its parameters; return the outputs by cell id."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assigned = [line.partition(" = ")[0] for line in cell.source.splitlines()]
    assert set(parameters) <= set(assigned), "the parameters that the test sets are those of the notebook"
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    client = NotebookClient(notebook, kernel_manager_class=ThisPython, timeout=300)
    client.execute(cwd=str(folder), env=environment)
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def executed(tmp_path_factory, hub):
    """The folder that the notebook was run in, and its outputs."""
    folder = tmp_path_factory.mktemp("notebook")
    environment = hub.environment(folder, WRITE_TOKEN) | places(folder)
    return folder, execute(NOTEBOOK, folder, environment, PARAMETERS)


def places(folder):
    """The environment of a kernel that writes only into `folder`, and finds the package without an installation."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    home = {"HOME": str(folder), "IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "jupyter")}
    return home | {"PATH": path, "PYTHONPATH": str(ROOT)}


def printed(outputs):
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(outputs):
    """Return the MIME types of the pictures shown, in their order."""
    return [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]


def test_an_installed_package_is_left_alone(executed):
    folder, outputs = executed
    said = printed(outputs["installation"])
    assert said.startswith("ddpm_hf ") and said.count("\n") == 1
    assert not (folder / "ddpm_hf_source").exists()


def test_the_dry_run_says_how_long_it_takes_and_shows_the_data(executed):
    said = printed(executed[1]["preview"])
    assert "Time: " in said and "Memory: " in said and pictures(executed[1]["preview"]) == ["image/png"]


def test_training_leaves_a_run_that_is_shown(executed):
    folder, outputs = executed
    said = printed(outputs["training"])
    assert "Trained 6 steps" in said and "error" not in said, said
    for name in ("model_index.json", "checkpoint-6/state.pt", "logs", "samples/epoch_0001.png", "figures/loss.png"):
        assert (folder / "runs" / "tiny" / name).exists(), name
    assert pictures(outputs["training"]) == ["image/png", "image/png"], "the loss and the sheet, updated in place"
    assert pictures(outputs["pictures"]) == ["image/gif"]


def test_stock_diffusers_samples_from_it(executed):
    assert "image/png" in pictures(executed[1]["sampling"])


def test_the_package_samples_from_it_and_restores(executed):
    assert "image/png" in pictures(executed[1]["drawing"])
    assert "image/png" in pictures(executed[1]["restoring"])


def test_the_score_has_its_record(executed):
    folder, outputs = executed
    assert "bits_per_dim" in printed(outputs["scoring"]), printed(outputs["scoring"])
    assert (folder / "runs" / "tiny" / "evaluations" / "smoke.json").is_file()
    shown = printed(outputs["record"])
    assert '"num_inference_steps": 10' in shown and str(folder) not in shown


def test_the_run_arrives_at_the_hub_without_its_checkpoints(executed, hub):
    said = printed(executed[1]["pushing"])
    assert f"{USER}/tiny-digits" in hub.repos, said
    files = hub.repos[f"{USER}/tiny-digits"].files
    assert {"model_index.json", "README.md", "evaluations/smoke.json", "samples/epoch_0001.png"} <= set(files)
    assert not any(path.startswith(("checkpoint", "logs")) for path in files)
    assert WRITE_TOKEN not in said and not any(WRITE_TOKEN.encode() in content for content in files.values())


def test_the_mathematics_agrees_with_the_package(tmp_path):
    outputs = execute(MATHEMATICS, tmp_path, os.environ | places(tmp_path), {"STEPS": 3, "T": 20})
    assert printed(outputs["schedule"]).endswith("as in ddpm_hf: True\n")
    simulated, formula = (
        re.findall(r"(?:mean|deviation) (\S+\d)", line) for line in printed(outputs["bayes"]).splitlines()
    )
    assert [float(number) for number in simulated] == pytest.approx([float(number) for number in formula], abs=0.02)
    difference = re.search(r"difference of a pixel: (\S+)", printed(outputs["ten"]))[1]
    assert float(difference) < 1e-4
    assert "bits per pixel" in printed(outputs["bits"])
    for name in ("digits", "schedule", "noising", "loop", "ddpm", "samples", "ten", "guided"):
        assert "image/png" in pictures(outputs[name]), name


@pytest.mark.parametrize("path", [NOTEBOOK, MATHEMATICS], ids=lambda path: path.stem)
def test_what_is_committed_is_clean_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 900_000
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not re.search(r"/(home|root|tmp|work|Users)/|hf_\w{10}", path.read_text())
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4


def test_the_parameters_need_nothing_and_give_nothing():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    values = {}
    exec(parameters.source, values)
    assert values["PRESET"] == "digits" and values["FLAGS"] == {} and values["HUB_MODEL_ID"] == ""
