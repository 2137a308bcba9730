"""The Hub: a real client in a process of its own, talking HTTP to tests/hub_server.py; cards and pipelines on disk."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, Repo
from huggingface_hub import ModelCard

from ddpm_hf import hub as ddpm_hub
from ddpm_hf.command_line import parse_config
from ddpm_hf.scheduler import PaperDDPMScheduler


OTHER_TOKEN = "hf_ThisOneIsKnownToNobodyAtAll000000003"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], block_out_channels=[8])
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)


@pytest.fixture
def run(tmp_path, unet):
    """A run folder with all that a run may leave, and some that must not leave it."""
    folder = tmp_path / "digits-run"
    ddpm_hub.save_pipeline(folder, unet, PaperDDPMScheduler.nichol_cosine(10))
    ddpm_hub.save_pipeline(folder / "best", unet, PaperDDPMScheduler.nichol_cosine(10))
    contents = {
        "metrics.jsonl": "old",
        "samples/epoch_0001.png": "png",
        "samples/.epoch_0002.png": "half",
        "figures/loss.png": "png",
        "evaluations/fid.json": "{}",
        "evaluations/leak.json": json.dumps({"argv": WRITE_TOKEN}),
        "checkpoint-3/optimizer.bin": "state",
        "checkpoint-6.tmp/model.safetensors": "state",
        "logs/ddpm_hf/events.out.tfevents.1": "log",
        "notes.txt": "mine",
    }
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    write_flags(folder)
    ddpm_hub.write_card(folder, config_of(folder), {"command": "train_unconditional.py"})
    return folder


def config_of(folder, *flags):
    return parse_config([f"--output_dir={folder}", "--dataset_name=digits", "--resolution=8", *flags])


def write_flags(folder, *flags):
    record = {"flags": config_of(folder, *flags).to_dict()}
    (folder / "train_config.json").write_text(json.dumps(record))


def client(hub, tmp_path, script, token=None):
    """Run a script as a user of this Hub; return what it printed and what it warned."""
    done = subprocess.run(
        [sys.executable, "-c", script], env=hub.environment(tmp_path, token), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not any(secret in done.stdout + done.stderr for secret in (WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN))
    return done.stdout.splitlines(), done.stderr


def test_a_private_run_is_pushed_and_loads_from_the_hub(hub, tmp_path, run):
    printed, warned = client(
        hub,
        tmp_path,
        f"""
from pathlib import Path
from diffusers import DDPMPipeline
from ddpm_hf.command_line import parse_config
from ddpm_hf.hub import create_repository, finish_push, push

config = parse_config(["--output_dir={run}", "--dataset_name=digits", "--push_to_hub", "--hub_private_repo"])
repo_id = create_repository(config)
print(repo_id, create_repository(config) == repo_id)
pushing = push(config.output_dir, repo_id, config.hub_token, "Step 3")
Path("{run}/metrics.jsonl").write_text("new")  # training goes on
print(finish_push(pushing))
pipeline = DDPMPipeline.from_pretrained(repo_id)
print(pipeline(num_inference_steps=2, output_type="np").images.shape, pipeline.unet.training)
""",
        token=WRITE_TOKEN,
    )
    assert printed == ["me/digits-run True", "True", "(1, 8, 8, 1) False"]
    assert "leak.json holds an access token" in warned

    repo = hub.repos["me/digits-run"]
    assert repo.private
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{hub.url}/me/digits-run/resolve/main/model_index.json")
    pipeline = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
    pipeline += ["unet/diffusion_pytorch_model.safetensors"]
    records = ["README.md", "train_config.json", "metrics.jsonl"]
    pictures = ["samples/epoch_0001.png", "figures/loss.png", "evaluations/fid.json"]
    assert set(repo.files) == {*pipeline, *(f"best/{name}" for name in pipeline), *records, *pictures}
    assert repo.files["metrics.jsonl"] == b"old"  # what was there when push was called
    assert [commit["message"] for commit in repo.commits] == ["Step 3"]
    assert not list(run.glob(".push-*"))


def test_what_cannot_be_pushed_is_said_in_one_sentence(hub, tmp_path, run):
    hub.repos["me/public"] = Repo(private=False)
    hub.fail["/me/down/auth-check"] = 500
    hub.fail["/me/broken/commit"] = 500
    cases = {
        "unknown token": ["--hub_model_id=me/a", f"--hub_token={OTHER_TOKEN}"],
        "reader": ["--hub_model_id=me/public", f"--hub_token={READ_TOKEN}"],
        "no token": ["--hub_model_id=me/a"],
        "public": ["--hub_model_id=me/public", "--hub_private_repo", f"--hub_token={WRITE_TOKEN}"],
        "bad name": ["--hub_model_id=a/b/c", f"--hub_token={WRITE_TOKEN}"],
        "down": ["--hub_model_id=me/down", f"--hub_token={WRITE_TOKEN}"],
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))  # not in the script, whose text an error would show
    (tmp_path / "token").write_text(WRITE_TOKEN)
    printed, warned = client(
        hub,
        tmp_path,
        f"""
import json
from pathlib import Path
from ddpm_hf import UserError, hub
from ddpm_hf.command_line import parse_config

def attempt(name, flags):
    try:
        hub.create_repository(parse_config(["--output_dir={run}", "--dataset_name=digits", *flags]))
    except UserError as error:
        print(name, error, sep=": ")

for name, flags in json.loads(Path("{tmp_path}/cases.json").read_text()).items():
    attempt(name, flags)
token = Path("{tmp_path}/token").read_text()
config = parse_config(["--hub_model_id=me/broken", "--dataset_name=digits", f"--hub_token={{token}}"])
print(hub.finish_push(hub.push("{run}", hub.create_repository(config), token, "Step 3")))
hub.API.endpoint = "http://127.0.0.1:9"
attempt("unreachable", [])
""",
    )
    log_in = "log in with `hf auth login`, or give --hub_token a token that may write there."
    later = "check the network, or train without --push_to_hub and push later."
    assert printed == [
        f"unknown token: cannot push to 'me/a' on {hub.url} (401 Unauthorized): {log_in}",
        f"reader: cannot push to 'me/public' on {hub.url} (403 Forbidden): {log_in}",
        f"no token: cannot push to 'me/a' on {hub.url} (401 Unauthorized): {log_in}",
        "public: me/public exists and is public: make it private, or choose another --hub_model_id.",
        "bad name: 'a/b/c' cannot name a repository: give --hub_model_id NAME or USER/NAME.",
        f"down: cannot push to 'me/down' on {hub.url} (500 Internal Server Error): {later}",
        "False",
        f"unreachable: cannot push to 'digits-run' on http://127.0.0.1:9 ([Errno 111] Connection refused): {later}",
    ]
    assert "The push to me/broken failed (500 Internal Server Error): the run is whole here, push again." in warned
    assert not list(run.glob(".push-*"))


def test_a_full_disk_is_a_warning(run, monkeypatch, caplog):
    def copyfile(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ddpm_hub.shutil, "copyfile", copyfile)
    assert not ddpm_hub.finish_push(ddpm_hub.push(run, "me/run", None, "Step 3"))
    assert "Nothing was pushed to me/run, for want of a copy ([Errno 28] No space left on device)" in caplog.text


def test_the_server_serves_datasets(hub, tmp_path):
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_dict({"label": [3, 1, 4]})
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    hub.add_folder("datasets/me/rows", tmp_path / "data")
    script = 'from datasets import load_dataset\nprint(load_dataset("me/rows", split="train")["label"][:])'
    assert client(hub, tmp_path, script)[0] == ["[3, 1, 4]"]


def test_a_pipeline_is_stock_and_loads_as_ddpm_and_ddim(tmp_path, unet):
    scheduler = PaperDDPMScheduler.ho_linear(100)
    (tmp_path / "README.md").write_text("mine")
    unet.train()
    ddpm_hub.save_pipeline(tmp_path, unet, scheduler)
    ddpm_hub.save_pipeline(tmp_path, unet.to(torch.float64), scheduler)  # over the first one
    assert unet.training and unet.dtype == torch.float64
    unet.to(torch.float32)

    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("_class_name") == "DDPMPipeline" and index.pop("_diffusers_version")
    assert index == {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    for pipeline in (DDPMPipeline.from_pretrained(tmp_path), DDIMPipeline.from_pretrained(tmp_path)):
        assert torch.equal(pipeline.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
        assert pipeline.unet.dtype == torch.float32 and not pipeline.unet.training
        for name, tensor in pipeline.unet.state_dict().items():
            assert torch.equal(tensor, unet.state_dict()[name])
    assert (tmp_path / "README.md").read_text() == "mine"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "model_index.json", "scheduler", "unet"]


@pytest.mark.parametrize("kill_at", range(1, 5))
def test_a_kill_while_saving_leaves_a_pipeline_that_loads(tmp_path, unet, monkeypatch, kill_at):
    scheduler = PaperDDPMScheduler.nichol_cosine(10)
    ddpm_hub.save_pipeline(tmp_path, unet, scheduler)
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        Path(source).replace(target)

    with monkeypatch.context() as patch:
        patch.setattr(ddpm_hub, "os", SimpleNamespace(replace=replace))
        with pytest.raises(KeyboardInterrupt):
            ddpm_hub.save_pipeline(tmp_path, unet, scheduler)
    DDPMPipeline.from_pretrained(tmp_path)
    ddpm_hub.save_pipeline(tmp_path, unet, scheduler)
    assert not (tmp_path / ".saving").exists()


def card_of(folder, facts, *flags):
    folder.mkdir(exist_ok=True)
    write_flags(folder, *flags)
    assert ddpm_hub.write_card(folder, config_of(folder, *flags), facts)
    return ModelCard.load(folder / "README.md")


def test_the_card_says_what_the_run_recorded_and_no_more(tmp_path):
    for name in ("samples/epoch_0999.png", "samples/epoch_10000.png", "figures/loss.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    facts = {
        "command": f"train.py --push_to_hub --hub_token {OTHER_TOKEN} '--hub-token=***' --n={WRITE_TOKEN}",
        "parameters": 35746307,
        "images_seen": 128000,
        "seconds": 1234.5,
        "loss": 0.03125,
        "validation_loss": None,
        "host": "not for publication",
    }
    card = card_of(tmp_path, facts, "--hub_model_id=me/ddpm-cifar10", "--dataset_name=uoft-cs/cifar10", "--seed=1")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "ddpm", "unconditional-image-generation", "pytorch", "ddpm_hf"],
        "datasets": ["uoft-cs/cifar10"],
    }
    assert "train.py --push_to_hub --n=***\n" in card.text
    for part in (
        "# ddpm-cifar10\n",
        'DDPMPipeline.from_pretrained("me/ddpm-cifar10")\nimage = pipeline(num_inference_steps=1000).images[0]',
        'DDIMPipeline.from_pretrained("me/ddpm-cifar10")(num_inference_steps=50)',
        "[uoft-cs/cifar10](https://huggingface.co/datasets/uoft-cs/cifar10)",
        "(samples/epoch_10000.png)",
        "(figures/loss.png)",
        "| Parameters | 35,746,307 |",
        "| Images seen | 128,000 |",
        "| Training time in seconds | 1,234.5000 |",
        "| Last training loss | 0.0312 |",
        "| `seed` | 1 |",
        "| `ddpm_beta_schedule` | linear |",
    ):
        assert part in card.text, part
    for word in ("alidation loss", "not for publication", "epoch_0999", "NAVER", "hub_", "use_ema", "None"):
        assert word not in card.text, word


def test_the_card_of_a_local_folder_names_no_dataset_and_of_afhq_its_licence(tmp_path):
    card = card_of(tmp_path / "local-run", {"command": "x"}, f"--dataset_name={tmp_path}/afhq-cat-64")
    assert "datasets" not in card.data.to_dict()
    assert "trained on `afhq-cat-64`" in card.text and "CC BY-NC 4.0" in card.text and "Choi et al." in card.text
    assert 'from_pretrained("local-run")' in card.text and "samples/" not in card.text and "loss.png" not in card.text


def test_the_card_of_a_learned_variance_does_not_promise_ddim(tmp_path):
    card = card_of(tmp_path, {"command": "x"}, "--variance_type=learned_range")
    assert "`DDIMPipeline` cannot use it" in card.text and "DDIMPipeline.from_pretrained" not in card.text


def test_a_card_written_by_hand_stays(tmp_path):
    write_flags(tmp_path)
    (tmp_path / "README.md").write_text("# By hand")
    assert not ddpm_hub.write_card(tmp_path, config_of(tmp_path), {"command": "x"})
    assert (tmp_path / "README.md").read_text() == "# By hand"
