"""The Hub: a real client in its own process talks HTTP to tests/hub_server.py; cards and pipelines on disk."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import datasets
import pytest
import yaml
from conftest import ROOT, TINY, command
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, Repo
from odd_server import OddServer
from test_saving import tiny_unet

import ddpm_hf
from ddpm_hf import UserError
from ddpm_hf.__main__ import main
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.models.saving import save_pipeline
from ddpm_hf.sharing import hub as ddpm_hub
from ddpm_hf.sharing.card import write_card


OTHER_TOKEN = "hf_ThisOneIsKnownToNobodyAtAll000000003"


@pytest.fixture(scope="module")
def open_hub(tmp_path_factory):
    """A Hub, and a process that has done the imports and runs scripts in processes of their own."""
    home = tmp_path_factory.mktemp("home")
    words = [sys.executable, str(ROOT / "tests" / "client_server.py")]
    with HubServer() as server:
        server.home, environment = home, server.environment(home) | {"PYTHONPATH": str(ROOT)}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with subprocess.Popen(words, env=environment, cwd=ROOT, **pipes) as server.clients:
            yield server


@pytest.fixture
def hub(open_hub):
    """A Hub on which nothing is yet, and no client has a cache."""
    for what in (open_hub.repos, open_hub.requests, open_hub.fail):
        what.clear()
    shutil.rmtree(open_hub.home / "hf", ignore_errors=True)
    return open_hub


@pytest.fixture
def run(tmp_path):
    """A run folder with all that a run may leave, and some that must not leave it."""
    folder = tmp_path / "digits-run"
    save_pipeline(folder, tiny_unet(), PaperDDPMScheduler.nichol_cosine(10))
    save_pipeline(folder / "best", tiny_unet(), PaperDDPMScheduler.nichol_cosine(10))
    contents = {
        "metrics.jsonl": '{"step": 3}',
        "samples/epoch_0001.png": "png",
        "samples/.epoch_0002.png": "half",
        "figures/loss.png": "png",
        "figures/forward.png": "training images",
        "evaluations/pairs.png": "training images",
        "checkpoint-3/optimizer.bin": "state",
        "checkpoint-6.tmp/model.safetensors": "state",
        "logs/ddpm_hf/events.out.tfevents.1": "log",
        "notes.txt": "mine",
    }
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    flags = parse_config([f"--output_dir={folder}", "--dataset_name=digits", "--resolution=8"]).to_dict()
    (folder / "train_config.json").write_text(json.dumps({"flags": flags}))
    write_card(folder)
    (folder / "evaluations/leak.json").write_text(json.dumps({"argv": WRITE_TOKEN}))
    return folder


def add_own_files(folder, elsewhere):
    """Put into a run folder what a user may keep there: own files in every place, links out of it, and secrets."""
    record = json.loads((ROOT / "tests/fixtures/run_5c3000a/run/evaluations/finished.json").read_text())
    elsewhere.mkdir()
    outside = {
        "private.json": json.dumps(record),
        "private.png": "of my diary",
        "pictures/epoch_0007.png": "of my diary",
        "network/config.json": "{}",
    }
    inside = [
        "secrets.txt", "id_rsa.py", "class_guided.py.bak", ".env", "samples/secrets.txt", "samples/epoch_.png",
        "samples/epoch_me.png", "samples/epoch_0001.png.txt", "samples/sub/epoch_0001.png", "samples/.epoch_0003.png",
        "figures/id_rsa", "figures/loss.svg", "figures/me.png", "figures/forward.png", "figures/ddim_mine.png",
        "evaluations/notes.txt", "evaluations/sub/pairs.png", "evaluations/mine.pairs.png", "evaluations/sub/r.json",
        "evaluations/.hidden.json", "unet/pytorch_model.bin", "unet/diffusion_pytorch_model.bin", "unet/notes.md",
        "unet/diffusion_pytorch_model.fp16.safetensors", "scheduler/config.json", "best/notes.txt", "best/README.md",
        "best/samples/epoch_0001.png", "best/unet/optimizer.bin", "classifier/photos/me.png", "classifier/notes.txt",
    ]  # fmt: skip
    for name, text in outside.items():
        (elsewhere / name).parent.mkdir(exist_ok=True)
        (elsewhere / name).write_text(text)
    for name in inside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of my diary")
    passwords = {"schema": record["schema"], "password": "of my diary"}
    (folder / "evaluations/passwords.json").write_text(json.dumps(passwords))
    (folder / "evaluations/list.json").write_text('["of my diary"]')
    (folder / "evaluations/half.json").write_text('{"of my diary')
    links = {
        "samples/epoch_0008.png": "private.png",
        "evaluations/linked.json": "private.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors": "private.png",
        "restoration.py": "private.png",
        "best/classifier": "network",
    }
    for name, target in links.items():
        (folder / name).symlink_to(elsewhere / target)
    # Names that are on the list, with a token in them.
    (folder / "figures/reverse.png").write_bytes(b"\x89PNG tEXt" + OTHER_TOKEN.encode() + b"\0")
    (folder / "reconstruction.py").write_text(f'TOKEN = "{OTHER_TOKEN}"')
    (folder / "evaluations/finished.json").write_text(json.dumps(record))


def client(hub, tmp_path, script, token=None):
    """Run a script as a user of this Hub; return what it printed and what it warned."""
    hub.clients.stdin.write(json.dumps([script, token, str(tmp_path / "printed")]) + "\n")
    hub.clients.stdin.flush()
    code = int(hub.clients.stdout.readline())
    printed, warned = (Path(f"{tmp_path}/printed.{k}").read_text() for k in (1, 2))
    assert code == 0, warned
    assert not any(secret in printed + warned for secret in (WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN))
    return printed.splitlines(), warned


def test_a_private_run_is_pushed_and_loads_from_the_hub(hub, tmp_path, run):
    printed, warned = client(
        hub,
        tmp_path,
        f"""
from pathlib import Path
from diffusers import DDPMPipeline
from ddpm_hf.sharing.hub import create_repository, push_in_background

repo_id = create_repository("digits-run", private=True)
print(repo_id, create_repository("digits-run", private=True) == repo_id)
pushing = push_in_background("{run}", repo_id, None, "Step 3")
Path("{run}/metrics.jsonl").write_text('{{"step": 6}}')  # training goes on
print(pushing.result())
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
    pictures = ["samples/epoch_0001.png", "figures/loss.png"]
    assert set(repo.files) == {*pipeline, *(f"best/{name}" for name in pipeline), *records, *pictures}
    assert repo.files["metrics.jsonl"] == b'{"step": 3}'  # what was there when push was called
    assert [commit["message"] for commit in repo.commits] == ["Step 3"]
    assert not list(run.glob(".push-*"))
    flags = json.loads(repo.files["train_config.json"])["flags"]
    assert flags["output_dir"] == "digits-run" and str(tmp_path).encode() not in b"".join(repo.files.values())


def test_what_cannot_be_pushed_is_said_in_one_sentence(hub, tmp_path, run):
    hub.repos["me/public"] = Repo(private=False)
    hub.fail["/me/down/auth-check"] = 500
    hub.fail["/me/broken/commit"] = 500
    cases = {
        "unknown token": ("me/a", False, OTHER_TOKEN),
        "reader": ("me/public", False, READ_TOKEN),
        "no token": ("me/a", False, None),
        "line break": ("me/a", False, WRITE_TOKEN + "\r"),
        "public": ("me/public", True, WRITE_TOKEN),
        "bad name": ("a/b/c", False, WRITE_TOKEN),
        "down": ("me/down", False, WRITE_TOKEN),
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))  # not in the script, whose text an error would show
    (tmp_path / "token").write_text(WRITE_TOKEN)
    printed, warned = client(
        hub,
        tmp_path,
        f"""
import json
from pathlib import Path
from ddpm_hf import UserError
from ddpm_hf.sharing import hub

def attempt(case, *arguments):
    try:
        hub.create_repository(*arguments)
    except UserError as error:
        print(case, error, sep=": ")

for case, arguments in json.loads(Path("{tmp_path}/cases.json").read_text()).items():
    attempt(case, *arguments)
token = Path("{tmp_path}/token").read_text()
hub.WAITS = (0.1, 0.2)
repo_id = hub.create_repository("me/broken", False, token)
print(hub.push_in_background("{run}", repo_id, token, "Step 3").result())
hub.API.endpoint = "http://127.0.0.1:9"
attempt("unreachable", "digits-run")
""",
    )
    log_in = "log in with `hf auth login`, or give a --hub_token with write access to this repository."
    later = "check the network, or push later."
    assert printed == [
        f"unknown token: cannot push to 'me/a' on {hub.url} (401 Unauthorized): {log_in}",
        f"reader: cannot push to 'me/public' on {hub.url} (403 Forbidden): {log_in}",
        f"no token: cannot push to 'me/a' on {hub.url} (401 Unauthorized): {log_in}",
        f"line break: cannot push to 'me/a' on {hub.url} (the access token has a character that cannot be sent, "
        f"e.g. a line break): {log_in}",
        "public: me/public exists and is public: make it private, or choose another --hub_model_id.",
        "bad name: 'a/b/c' cannot name a repository: give --hub_model_id NAME or USER/NAME.",
        f"down: cannot push to 'me/down' on {hub.url} (500 Internal Server Error): {later}",
        "False",
        f"unreachable: cannot push to 'digits-run' on http://127.0.0.1:9 ([Errno 111] Connection refused): {later}",
    ]
    failed = "The push to me/broken failed (500 Internal Server Error): "
    again = f"push it again with `python -m ddpm_hf push {run} --hub_model_id me/broken`."
    assert [line.partition(failed)[2] for line in warned.splitlines() if failed in line] == [
        "trying again in 0.1 s.",
        "trying again in 0.2 s.",
        again,
    ]
    assert not list(run.glob(".push-*"))


def test_a_full_disk_is_a_warning(run, monkeypatch, caplog):
    def copyfile(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    assert not ddpm_hub.push_in_background(run, "me/run", None, "Step 3").result()
    assert (
        "Nothing was pushed to me/run, because the files could not be copied ([Errno 28] No space left" in caplog.text
    )


def http(status: str, body: str, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close", f"Content-Length: {len(body)}", *headers, "", body]
    return "\r\n".join(lines).encode()


PAGE = http("200 OK", "<html><h1>Log in to the WLAN</h1></html>", "Content-Type: text/html")
ODD_SERVERS = {
    "login page": (PAGE,),
    "json": (http("200 OK", '{"a": 1}', "Content-Type: application/json"),),
    "json of numbers": (http("200 OK", '{"url": 1, "id": 2, "siblings": 3}', "Content-Type: application/json"),),
    "list": (http("200 OK", "[[]]", "Content-Type: application/json"),),
    "text": (http("200 OK", '"welcome"', "Content-Type: application/json"),),
    "deep json": (http("200 OK", "[" * 20_000, "Content-Type: application/json"),),
    "empty": (http("200 OK", ""),),
    "redirect to itself": (http("302 Found", "", "Location: /"),),
    "no http": (b"SSH-2.0-OpenSSH_9.6\r\n",),
    "hangs up": (b"",),
    "silent": (b"", 0.1),
    "drips": (b"x", 0.1),
}


def test_a_server_that_is_not_the_hub_is_a_sentence_in_bounded_time(hub, tmp_path, run):
    servers = {name: OddServer(*answer) for name, answer in ODD_SERVERS.items()}
    printed, told = client(
        hub,
        tmp_path,
        f"""
import sys, time
from ddpm_hf import hub_requests
from ddpm_hf.__main__ import main
from ddpm_hf.sampling import sample_set, settings
from ddpm_hf.sharing import push, space  # imported before the clock starts

hub_requests.ANSWER_SECONDS = 0.5
for name, url in {[(name, server.url) for name, server in servers.items()]}:
    hub_requests.API.endpoint = url
    for argv in (
        ["push", "{run}", "--hub_model_id", "me/x"],
        ["push-space", "me/x"],
        ["sample", "me/x", "--output", "{tmp_path}/out"],
    ):
        start = time.monotonic()
        print(name, *argv, sep="|", file=sys.stderr)
        try:
            main(argv)
        except SystemExit as stopped:
            print(stopped.code, time.monotonic() - start < 20)
""",
        token=WRITE_TOKEN,
    )
    assert printed == ["2 True"] * 3 * len(servers)
    blocks = re.split(r"^(.*\|.*)\n", told, flags=re.MULTILINE)[1:]
    for case, said in zip(blocks[::2], blocks[1::2]):
        errors = [line for line in said.splitlines() if ": error: " in line]
        assert len(errors) == 1 and servers[case.split("|")[0]].url in errors[0] and "Traceback" not in said, case
        assert re.search(r": (check|log in)[^:]*\.$", errors[0]), errors
    assert not (tmp_path / "out").exists() and not list(run.glob(".push-*"))


def test_only_the_newest_push_waits_and_only_two_copies_are_kept(run, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    sent = []

    def upload_folder(folder_path, commit_message, **target):
        begun.set()
        assert go_on.wait(60)
        sent.append((commit_message, (Path(folder_path) / "metrics.jsonl").read_text()))

    monkeypatch.setattr(ddpm_hub.API, "upload_folder", upload_folder)
    pushing = None
    for k in range(9):
        (run / "metrics.jsonl").write_text(str(k))
        pushing = ddpm_hub.push_in_background(run, "me/run", None, f"Step {k}", replaces=pushing)
        assert begun.wait(60)
        assert len(list(run.glob(".push-*"))) == min(k + 1, 2)
    go_on.set()
    assert ddpm_hub.wait_for_push(pushing, run, "me/run")
    assert sent == [("Step 0", "0"), ("Step 8", "8")] and not list(run.glob(".push-*"))


def test_the_wait_for_the_last_push_is_bounded(run, monkeypatch, caplog):
    go_on = threading.Event()
    monkeypatch.setattr(ddpm_hub.API, "upload_folder", lambda **target: go_on.wait(60))
    monkeypatch.setattr(ddpm_hub, "WAITS", (0.1, 0.1))
    monkeypatch.setattr(ddpm_hub, "transfer_seconds", lambda size: 0.5)
    waiting = ddpm_hub.in_thread(lambda: go_on.wait(60), ddpm_hub.PUSHING)  # an upload of before that hangs
    pushing = ddpm_hub.push_in_background(run, "me/run", None, "End of training")
    start = time.monotonic()
    assert not ddpm_hub.wait_for_push(pushing, run, "me/run") and time.monotonic() - start < 5
    assert "The push to me/run was not complete after 1 s: push it again with `python -m ddpm_hf push" in caplog.text
    assert pushing.cancel() and not list(run.glob(".push-*"))
    go_on.set()
    assert waiting.result(60)
    go_on.clear()
    hanging = ddpm_hub.push_in_background(run, "me/run", None, "Step 3")
    assert hanging.result(5) is False  # an attempt has a limit too, and is not tried again
    assert "The push to me/run failed (no complete answer in 0 s): push it again" in caplog.text
    go_on.set()


def test_the_server_serves_datasets(hub, tmp_path):
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_dict({"label": [3, 1, 4]})
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    hub.add_folder("datasets/me/rows", tmp_path / "data")
    script = 'from datasets import load_dataset\nprint(load_dataset("me/rows", split="train")["label"][:])'
    assert client(hub, tmp_path, script)[0] == ["[3, 1, 4]"]


def test_training_goes_on_when_pushes_fail(hub, tmp_path):
    """The first push meets failures; a lost connection and a 500 are tried again, a 401 says to log in."""
    failures = {"down": ["drop", 500], "shut": [401]}
    for name, failure in failures.items():
        hub.fail[f"/me/{name}/commit"] = failure
    script = f"""
from ddpm_hf.sharing import hub
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.training.loop import train

hub.WAITS = (0.1, 0.2, 0.3)
flags = {TINY} + ["--num_epochs=3", "--max_train_steps=6", "--validation_split=1773", "--push_to_hub"]
for name in {list(failures)}:
    where = [f"--hub_model_id=me/{{name}}", f"--output_dir={tmp_path}/{{name}}"]
    train(parse_config([*flags, "--save_model_epochs=1", *where]))
"""
    printed, warned = client(hub, tmp_path, script, token=WRITE_TOKEN)
    assert sum(line.startswith("Trained 6 steps") for line in printed) == 2
    lost, down, shut = re.findall("The push to .*", warned)
    assert lost.startswith("The push to me/down failed (") and lost.endswith("): trying again in 0.1 s.")
    assert down == "The push to me/down failed (500 Internal Server Error): trying again in 0.2 s."
    assert shut.startswith(
        "The push to me/shut failed (401 Unauthorized): log in with `hf auth login`, or give a --hub_"
    )
    for name, commits in {"down": 2, "shut": 1}.items():
        repo = hub.repos[f"me/{name}"]
        assert repo.commits[-1]["message"] == "End of training" and len(repo.commits) == commits
        assert b"| Optimizer steps | 6 |" in repo.files["README.md"] and "unet/config.json" in repo.files


def test_of_a_folder_full_of_own_files_only_those_of_the_run_are_pushed(hub, tmp_path, run):
    add_own_files(run, tmp_path / "elsewhere")
    (run / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").write_text("a shard")
    config = json.loads((run / "unet/config.json").read_text())
    (run / "unet/config.json").write_text(json.dumps({"_name_or_path": str(run / "unet"), **config}))
    script = f'from ddpm_hf.__main__ import main\nmain(["push", "{run}", "--hub_model_id", "me/full"])'
    _, warned = client(hub, tmp_path, script, token=WRITE_TOKEN)
    pipeline = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
    pipeline += ["unet/diffusion_pytorch_model.safetensors"]
    rest = ["README.md", "train_config.json", "metrics.jsonl", "samples/epoch_0001.png", "figures/loss.png"]
    rest += ["evaluations/finished.json", "unet/diffusion_pytorch_model-00002-of-00002.safetensors"]
    files = hub.repos["me/full"].files
    assert set(files) == {*pipeline, *(f"best/{name}" for name in pipeline), *rest}
    sent = b"".join(files.values())
    words = ("of my diary", OTHER_TOKEN, str(tmp_path), '"_name_or_path"')
    assert not any(word.encode() in sent for word in words)
    for name in ("evaluations/leak.json", "figures/reverse.png", "reconstruction.py"):
        assert f"{run / name} holds an access token" in warned
    assert "half.json cannot be read as JSON" in warned and "list.json contains a JSON list" in warned


def test_no_folder_of_a_run_that_is_a_link_is_pushed_but_a_run_behind_a_link_is(hub, tmp_path, run):
    for name in ("samples", "evaluations", "best"):
        (run / name).rename(tmp_path / name)
        (run / name).symlink_to(tmp_path / name)
    (tmp_path / "linked").symlink_to(run)
    script = f"""
from ddpm_hf.sharing.hub import create_repository, push_in_background

print(push_in_background("{tmp_path}/linked", create_repository("me/linked"), None, "Step 3").result())
"""
    assert client(hub, tmp_path, script, token=WRITE_TOKEN)[0] == ["True"]
    files = {"README.md", "model_index.json", "train_config.json", "metrics.jsonl", "figures/loss.png"}
    files |= {"scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert set(hub.repos["me/linked"].files) == files


def test_push_sends_what_changed_and_the_card_anew(hub, tmp_path, run):
    script = f"""
import sys
from ddpm_hf.__main__ import main

main(["push", "{run}", "--hub_model_id", "me/pushed", "--hub_private_repo"])
main(["push", "{run}", "--hub_model_id", "me/pushed"])
open("{run}/samples/epoch_0002.png", "w").write("new")
main(["push", "{run}", "--hub_model_id", "me/pushed"])
try:
    main(["push", "{run}", "--hub_model_id", "me/shut"])
except SystemExit as stopped:
    print(stopped.code)
"""
    hub.fail["/me/shut/commit"] = 401
    printed, told = client(hub, tmp_path, script, token=WRITE_TOKEN)
    assert printed == [f"The model is at {hub.url}/me/pushed."] * 3 + ["2"]
    assert "error: nothing was uploaded to me/shut: see the warning above, then push again.\n" in told
    repo = hub.repos["me/pushed"]
    assert repo.private and b'DDPMPipeline.from_pretrained("me/pushed")' in repo.files["README.md"]
    changed = [commit["paths"] for commit in repo.commits]
    assert len(changed[0]) > 10 and changed[1:] == [["README.md", "samples/epoch_0002.png"]]


def test_the_example_of_push_runs(hub, tmp_path, run):
    shutil.copytree(run, tmp_path / "runs" / "digits")
    script = f"""
import doctest, os
import ddpm_hf

os.chdir("{tmp_path}")
example = ddpm_hf.push.__doc__.replace("https://huggingface.co", "{hub.url}")
test = doctest.DocTestParser().get_doctest(example, {{"ddpm_hf": ddpm_hf}}, "push", None, 0)
print(doctest.DocTestRunner().run(test))
"""
    printed, _ = client(hub, tmp_path, script, token=WRITE_TOKEN)
    assert printed == ["TestResults(failed=0, attempted=1)"]
    assert "README.md" in hub.repos["me/ddpm-digits"].files


def test_exports_load_from_the_hub_with_their_code(hub, tmp_path, guidance_models):
    """A conditional run, and a plain model with a classifier, as who trusts their code loads them."""
    guided = tmp_path / "guided"
    command("export", guidance_models / "plain", guided, "--classifier", guidance_models / "classifier")
    shutil.copytree(guidance_models / "conditional", tmp_path / "conditional")
    script = f"""
from ddpm_hf.__main__ import main

main(["push", "{tmp_path}/conditional"])
main(["push", "{guided}"])
"""
    client(hub, tmp_path, script, token=WRITE_TOKEN)
    script = """
import sys

sys.modules["ddpm_hf"] = None  # importing it fails
from diffusers import DiffusionPipeline

for name, which in {"me/conditional": {"custom_pipeline": "class_guided"}, "me/guided": {}}.items():
    try:
        DiffusionPipeline.from_pretrained(name, **which)
    except ValueError as error:
        print("trust_remote_code=True" in str(error))
    pipeline = DiffusionPipeline.from_pretrained(name, **which, trust_remote_code=True)
    images = pipeline(class_labels=["3"], guidance_scale=2.0, num_inference_steps=2).images
    print(type(pipeline).__name__, images[0].size)
pipeline = DiffusionPipeline.from_pretrained("me/guided", custom_pipeline="restoration", trust_remote_code=True)
print(type(pipeline).__name__)
"""
    # A process that has never imported anything of ours.
    environment = hub.environment(hub.home, READ_TOKEN)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "True",
        "ClassGuidedPipeline (8, 8)",
        "True",
        "ClassGuidedPipeline (8, 8)",
        "RestorationPipeline",
    ]
    assert "classifier/classifier.py" in hub.repos["me/guided"].files


def test_a_run_is_fed_from_a_dataset_on_the_hub(hub, tmp_path, image_folder):
    rows = datasets.load_dataset("imagefolder", data_dir=str(image_folder), split="train").with_format("arrow")
    rows = rows.map(datasets.table.embed_table_storage, batched=True)  # the bytes of the files, as push_to_hub does
    (tmp_path / "mnist" / "mnist").mkdir(parents=True)
    rows.to_parquet(tmp_path / "mnist" / "mnist" / "train-00000-of-00001.parquet")
    hub.add_folder("datasets/user/mnist", tmp_path / "mnist")
    script = f"""
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.training.loop import train

flags = {TINY} + ["--dataset_name=user/mnist", "--resolution=16", "--max_train_steps=3", "--train_batch_size=4"]
train(parse_config([*flags, "--output_dir={tmp_path}/run", "--push_to_hub"]))

# Nobody answers at this address. The dataset in the cache is found at once, another one is refused at once.
import time, datasets
from ddpm_hf.data.dataset import load_images
from ddpm_hf.errors import UserError
from ddpm_hf.hub_requests import API

API.endpoint = datasets.config.HF_ENDPOINT = "http://127.0.0.1:9"
started = time.monotonic()
print("from the cache:", load_images(parse_config(flags))[0].num_images)
try:
    load_images(parse_config([*flags, "--dataset_name=user/else"]))
except UserError as error:
    print(error)
print("seconds:", time.monotonic() - started)
"""
    printed, warned = client(hub, tmp_path, script, token=WRITE_TOKEN)
    assert any(line.startswith("12 images of 16x16x3") for line in printed) and "Retry" not in str(warned)
    assert "from the cache: 12" in printed and float(printed[-1].removeprefix("seconds: ")) < 8
    assert "user/else cannot be loaded (the Hub cannot be reached" in printed[-2] and "--dataset_name" in printed[-2]
    assert b"datasets:\n- user/mnist" in hub.repos["me/run"].files["README.md"]


def test_a_space_shows_a_model_of_the_hub(hub, tmp_path):
    script = """
from ddpm_hf.__main__ import main

main(["push-space", "me/ddpm-mnist", "--hub_private_repo"])
try:
    main(["push-space", "me/typo"])
except SystemExit as stopped:
    print(stopped.code)
"""
    hub.repos["me/ddpm-mnist"] = Repo(private=True, files={"model_index.json": b"{}"})
    printed, told = client(hub, tmp_path, script, token=WRITE_TOKEN)
    assert printed[-1] == "2" and "me/typo is not a pipeline on" in told and "spaces/me/typo-demo" not in hub.repos
    assert printed[0] == f"The Space is at {hub.url}/spaces/me/ddpm-mnist-demo."
    space = hub.repos["spaces/me/ddpm-mnist-demo"]
    ours = {path.name for path in (ROOT / "spaces").iterdir() if path.is_file()}
    ours |= {f"tabs/{path.name}" for path in (ROOT / "spaces/tabs").glob("*.py")}
    ours |= {f"pipelines/{path.name}" for path in (ROOT / "pipelines").glob("*.py")} | {"judge.py", "hub_requests.py"}
    assert space.private and set(space.files) == ours and {"app.py", "README.md", "requirements.txt"} <= ours
    assert {"tabs/generate.py", "pipelines/class_guided.py"} <= ours
    assert space.variables == {"DDPM_MODEL": "me/ddpm-mnist"}
    front = yaml.safe_load(space.files["README.md"].decode().split("---")[1])
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["models"] == ["me/ddpm-mnist"]


@pytest.mark.parametrize(
    "argv", [["push", "nowhere"], ["card", "tests"], ["push-space", "nowhere"], ["push-space", "."]]
)
def test_what_cannot_be_published_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert ("cannot see this disk: push the model first" if argv[0] == "push-space" else "has no model") in error


@pytest.mark.parametrize("kind", ["unet is a link", "the file is a link", "no weights"])
def test_a_model_whose_weights_would_not_go_up_is_refused(run, kind, caplog):
    card = (run / "README.md").read_text()
    shutil.rmtree(run / "best")
    weights = run / "unet" / "diffusion_pytorch_model.safetensors"
    if kind == "no weights":
        weights.unlink()
    else:
        place = run / "unet" if kind == "unet is a link" else weights
        place.rename(run / "elsewhere")
        place.symlink_to(run / "elsewhere")
    with pytest.raises(UserError, match=r"has no weights to push .* links are not followed\): put the files"):
        ddpm_hf.push(run, "me/x")
    assert (run / "README.md").read_text() == card
    assert ddpm_hub.push_in_background(run, "me/x", None, "a message").result() is False  # as training does
    assert "Nothing was pushed to me/x: " in caplog.text and not list(run.glob(".push-*"))


def test_a_model_whose_card_cannot_be_made_creates_no_repository(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"7": "seven"}}))
    monkeypatch.setattr(ddpm_hub.API, "create_repo", lambda *_, **__: pytest.fail("a repository was created"))
    with pytest.raises(UserError, match="the card of .* cannot be written"):
        ddpm_hf.push(tmp_path / "model", "me/new")
