"""The model card states what the records in its folder state, and nothing else."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, TINY
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from test_saving import tiny_unet

import ddpm_hf
from ddpm_hf.__main__ import main
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.diffusion.scheduler import PaperDDPMScheduler
from ddpm_hf.errors import UserError
from ddpm_hf.evaluation.records import COPYING, NOTHING_KNOWN, read_record
from ddpm_hf.models.pretrained import load_pretrained
from ddpm_hf.models.saving import save_pipeline
from ddpm_hf.provenance import command, hide_paths, without_paths
from ddpm_hf.run_folder import PUBLISHED
from ddpm_hf.sharing.card import write_card
from ddpm_hf.training.figures import loss_figure
from ddpm_hf.training.loop import train


def enough(record):
    """Return a record as if it were of 1,000 images, because a card leaves out quick checks."""
    entries = [entry | {"n_gen": entry["n_gen"] and 1000, "n_ref": 1000} for entry in record["metrics"]]
    return record | {"metrics": entries, "model": {"name": "any"}}


RECORD = enough(json.loads((ROOT / "tests/fixtures/run_5c3000a/run/evaluations/finished.json").read_text()))
ENTRY = RECORD["metrics"][0]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A run of a moment, scored."""
    folder = tmp_path_factory.mktemp("scored") / "digits-run"
    flags = ["--max_train_steps=6", "--validation_split=0.1", "--use_ema"]
    train(parse_config([*TINY, *flags, f"--output_dir={folder}"]))
    what = ["--metrics=memorization,bits_per_dim", "--num_images=260", "--bound_images=80", "--bound_timesteps=5"]
    argv = ["evaluate", str(folder), *what, "--num_inference_steps=3", "--features=inception"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(ROOT / "ddpm_hf" / "__main__.py"), *argv])
        main(argv)
    return folder


def test_every_number_of_the_card_is_in_a_record(scored):
    card = ModelCard.load(scored / "README.md")
    texts = [path.read_text() for path in [scored / "train_config.json", scored / "model_index.json"]]
    texts += [path.read_text() for path in [*scored.glob("evaluations/*.json"), *scored.glob("*/*config.json")]]
    texts += (scored / "metrics.jsonl").read_text().splitlines()
    recorded = set()
    for text in texts:
        recorded |= {float(found) for found in re.findall(r"(?<![\w.])-?\d+\.?\d*(?:e-\d+)?(?!\w)", text)}
    forms = (
        set(map(str, recorded))
        | {f"{value:.4g}" for value in recorded}
        | {f"{value:,.0f}" for value in recorded if value == int(value)}
    )
    body = re.sub(r"https?://\S+|\]\([^)]*\)|```.*?```|`[^`]*`|\(CVPR \d+\)", "", card.text, flags=re.DOTALL)
    body = body.replace("8x8", "8 8")
    body = re.sub(r"CC BY[-NC]* 4\.0", "", body)
    numbers = re.findall(r"(?<![\w.])-?\d[\d,]*\.?\d*(?:e[-+]?\d+)?(?![\w.]*[A-Za-z])", body)
    numbers = [number.rstrip(",.") for number in numbers]
    assert len(numbers) > 40
    unknown = [number for number in numbers if number not in forms]
    assert not unknown, "these numbers are in no record"
    # And the other way round: what was measured is told.
    for path in scored.glob("evaluations/*.json"):
        for entry in json.loads(path.read_text())["metrics"]:
            if entry.get("status") != "skipped":
                (row,) = [line for line in card.text.splitlines() if f"(`{entry['id']}`)" in line]
                direction = f" {'lower' if entry['lower_is_better'] else 'higher'} is better"
                about_copying = entry["id"].startswith("memorization_")
                assert ("is better" in row) != about_copying and (direction in row) != about_copying
                assert f" | {entry['value']:.4g} ".replace(" 0.0 ", " 0 ") in row
    assert card.text.index(COPYING) > card.text.index("(`bits_per_dim`)") and NOTHING_KNOWN in card.text


def test_the_card_of_a_scored_run_is_valid_metadata(scored):
    data = ModelCard.load(scored / "README.md").data
    records = [json.loads(path.read_text()) for path in sorted(scored.glob("evaluations/*.json"))]
    entries = [(entry, record) for record in records for entry in record["metrics"] if "value" in entry]
    (bound,) = [entry["value"] for entry, _ in entries if entry["id"] == "bits_per_dim"]
    (result,) = data.eval_results  # the details of memorization are in the text only
    assert data.model_name == "digits-run" and len(entries) > 3
    assert (result.metric_name, result.metric_value) == ("bits_per_dim", bound)
    assert (result.dataset_type, result.dataset_split, result.metric_args) == ("digits", "test", {"num_images": 80})
    # The rules of the Hub's own check of `model-index`: plain YAML, and these keys in each result.
    front = yaml.safe_load((scored / "README.md").read_text().split("---")[1])
    (model,) = front["model-index"]
    for result in model["results"]:
        assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
        for metric in result["metrics"]:
            assert metric["type"] and isinstance(metric["value"], int | float) and metric["name"]


def test_the_card_shows_pictures_commands_and_limits(scored):
    text = ModelCard.load(scored / "README.md").text
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (scored / path).is_file(), path
    for part in (
        "samples/epoch_0001.png",
        "figures/reverse.gif",
        "figures/loss.png",
        'DDPMPipeline.from_pretrained("digits-run")',
        "| bits per dimension (`bits_per_dim`) | ↓ lower is better |",
        "@inproceedings{ho2020denoising,",
        "python -m ddpm_hf evaluate digits-run --metrics=memorization,bits_per_dim",
        "Of 260 generated images, 0 are exact copies of training images",
        "CC BY 4.0",
    ):
        assert part in text, part
    assert str(scored.parent) not in text and str(ROOT) not in text


def card_of(folder, *flags, record=None, name=None, **scheduler):
    save_pipeline(folder, tiny_unet(), PaperDDPMScheduler.nichol_cosine(1000, **scheduler))
    flags = parse_config([f"--output_dir={folder}", "--dataset_name=digits", "--resolution=8", *flags]).to_dict()
    (folder / "train_config.json").write_text(json.dumps({"flags": flags, **(record or {})}))
    assert write_card(folder, name)
    return ModelCard.load(folder / "README.md")


def test_a_pipeline_that_was_saved_without_classes_has_a_card(tmp_path):
    card_of(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"id2label": None}))  # as by RestorationPipeline
    assert write_card(tmp_path)


def test_the_front_matter_and_the_training_of_a_hub_dataset(tmp_path):
    for name in ("samples/epoch_0999.png", "samples/epoch_10000.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    lines = [{"step": 500, "images_seen": 64000, "loss": 0.5}, {"step": 1000, "images_seen": 128000, "loss": 0.03125}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = {"command": "python train_unconditional.py --preset cifar10", "parameters": 35746307, "host": "secret"}
    card = card_of(tmp_path, "--preset=cifar10", "--dataset_name=uoft-cs/cifar10", record=record, name="me/cifar")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "ddpm", "unconditional-image-generation", "pytorch", "ddpm_hf"],
        "datasets": ["uoft-cs/cifar10"],
    }
    for part in (
        "# cifar\n",
        'DDPMPipeline.from_pretrained("me/cifar")\nimage = pipeline(num_inference_steps=1000).images[0]',
        'DDIMPipeline.from_pretrained("me/cifar")(num_inference_steps=50)',
        "[uoft-cs/cifar10](https://huggingface.co/datasets/uoft-cs/cifar10)",
        "(samples/epoch_10000.png)",
        "| Parameters | 35,746,307 |",
        "| Images seen | 128,000 |",
        "| Last training loss | 0.03125 |",
        "the preset `cifar10`: ",
        "| `attention_head_dim` | 0 |",
        "| `flip_sin_to_cos` | False |",
        "Not scored yet",
        "was not measured",
        "who state no licence",
    ):
        assert part in card.text, part
    for word in (
        "center_crop",
        "alidation loss",
        "secret",
        "epoch_0999",
        "NAVER",
        "hub_",
        "None",
        "reverse.gif",
        "loss.png",
    ):
        assert word not in card.text, word


def test_the_card_of_a_local_folder_names_no_dataset_and_of_afhq_its_licence(tmp_path):
    card = card_of(tmp_path, f"--dataset_name={tmp_path}/afhq-cat-64")
    assert "datasets" not in card.data.to_dict() and card.data.license == "cc-by-nc-4.0"
    assert "trained on `afhq-cat-64`" in card.text and "CC BY-NC 4.0" in card.text and "Choi et al." in card.text
    assert str(tmp_path) not in card.text
    card = card_of(tmp_path, f"--train_data_dir={tmp_path}", "--dataset_name=my-cats")
    assert "not known here" in card.text and "license" not in card.data.to_dict()
    card = card_of(tmp_path, "--dataset_name=zalando-datasets/fashion_mnist")
    write_card(tmp_path, "me/pushed")
    write_card(tmp_path)  # as `evaluate` does
    assert ModelCard.load(tmp_path / "README.md").text.startswith("\n<!-- ddpm_hf: me/pushed -->\n# pushed\n")
    assert "LeCun" not in card.text and "not known here" in card.text


def test_each_metric_is_shown_once_by_its_best_record_and_quick_checks_never(tmp_path):
    (tmp_path / "evaluations").mkdir()

    def fid(name, n, value, **more):
        entry = ENTRY | {"id": f"fid{n}_full", "value": value, "n_gen": n, "n_ref": 1617} | more
        (tmp_path / "evaluations" / name).write_text(json.dumps(RECORD | {"metrics": [entry]}))

    fid("smoke.json", 256, 1.5)
    card = card_of(tmp_path)
    command = f"`python -m ddpm_hf evaluate {tmp_path.name}`"
    too_few = "Only a quick check was made (`--suite smoke`), and it used too few images for its scores to be shown. "
    assert f"{too_few}{command} uses enough: 2,000 images." in card.text
    assert not card.data.eval_results
    (tmp_path / "evaluations" / "smoke.json").unlink()
    assert f"Not scored yet: {command} scores 2,000 images" in card_of(tmp_path).text
    fid("few.json", 2000, 7.5)
    fid("many.json", 50000, 6.25)
    fid("many-worse.json", 50000, 8.5)
    fid("guessed.json", 5000, 0.5, lower_is_better=False)
    card = card_of(tmp_path)
    rows = [line for line in card.text.splitlines() if line.startswith("| FID")]
    assert len(rows) == 1 and "(`fid50000_full`) | ↓ lower is better | 6.25 ±" in rows[0]
    assert [result.metric_value for result in card.data.eval_results] == [6.25]


def test_scores_of_two_ways_of_drawing_are_not_mixed(tmp_path):
    """The record with more metrics is shown. bits/dim does not depend on how images are drawn."""
    card_of(tmp_path)
    (tmp_path / "evaluations").mkdir()
    fid, accuracy = ENTRY | {"id": "fid2k_full", "n_gen": 2000}, ENTRY | {"id": "class_accuracy", "n_gen": 2000}
    bound = ENTRY | {"id": "bits_per_dim", "value": 1.5, "n_gen": None, "n_ref": 1000}
    for name, sampler, entries in [
        ("plain", {}, [fid | {"value": 1.25}, bound]),
        ("guided", {"guidance_scale": 2.0}, [fid | {"value": 6.5}, accuracy | {"value": 0.75}]),
    ]:
        record = RECORD | {"metrics": entries, "sampler": RECORD["sampler"] | sampler}
        (tmp_path / "evaluations" / f"{name}.json").write_text(json.dumps(record))
    card = card_of(tmp_path)
    assert sorted(result.metric_value for result in card.data.eval_results) == [1.5, 6.5]
    assert "| 0.75 ±" in card.text and "| 1.25" not in card.text
    others = r"drawn in other ways or compared with other data:\n\n- \[.*\]\(evaluations/plain.json\): FID 1.25 ±"
    assert re.search(others, card.text)


@pytest.mark.parametrize("other", ["data", "extractor", "reference"])
def test_scores_that_cannot_be_compared_do_not_compete(tmp_path, other):
    """The record with more metrics decides, even if another one has a lower FID."""
    card_of(tmp_path)
    (tmp_path / "evaluations").mkdir()
    fid = ENTRY | {"id": "fid2k_full", "n_gen": 2000, "extractor": "inception-tf1-a"}
    easy, data = fid | {"value": 5.0}, RECORD["data"]
    if other == "data":
        data = data | {"name": "other-data", "train": {"n": 9, "fingerprint": "0" * 16}}
    elif other == "reference":
        data = data | {"reference_sha256": "ab" * 32}
    else:
        easy["extractor"] = "inception-tf1-b"
    main = RECORD | {"metrics": [fid | {"value": 30.0}, ENTRY | {"id": "class_accuracy", "n_gen": 2000}]}
    for name, record in [("easy", RECORD | {"metrics": [easy], "data": data}), ("main", main)]:
        (tmp_path / "evaluations" / f"{name}.json").write_text(json.dumps(record))
    card = card_of(tmp_path)
    assert 30.0 in [result.metric_value for result in card.data.eval_results] and "| 5 ±" not in card.text
    assert ("against `other-data` (9 training images" in card.text) == (other == "data")


@pytest.mark.parametrize(("preset", "has_sources"), [("digits", True), ("mine", False), (None, False)])
def test_only_presets_of_the_package_have_their_sources_in_its_file(tmp_path, monkeypatch, preset, has_sources):
    monkeypatch.setitem(ddpm_hf.PRESETS, "mine", ddpm_hf.Preset("a recipe of my own", {"resolution": 8}))
    text = card_of(tmp_path, *([f"--preset={preset}"] if preset else ["--dataset_name=digits"])).text
    assert ("config/presets.py" in text) == has_sources
    assert ("a recipe of my own" in text) == (preset == "mine")


def test_only_scores_of_the_published_weights_are_shown(tmp_path):
    """--eval_metrics leaves records of earlier steps, whose scores may be better."""
    card_of(tmp_path)
    hash = load_pretrained(tmp_path).facts["unet_sha256"]
    (tmp_path / "evaluations").mkdir()
    for step, value, sha256 in [(500, 1.25, "0" * 64), (1000, 6.5, hash)]:
        entry = ENTRY | {"id": "fid2k_full", "value": value, "n_gen": 2000}
        record = RECORD | {"metrics": [entry], "model": {"name": "any", "unet_sha256": sha256}}
        (tmp_path / "evaluations" / f"step_{step:07d}.json").write_text(json.dumps(record))
    assert [result.metric_value for result in card_of(tmp_path).data.eval_results] == [6.5]
    (tmp_path / "evaluations" / "step_0001000.json").unlink()
    card = card_of(tmp_path)
    assert "Not scored yet" in card.text and not card.data.eval_results


def test_the_card_of_a_model_that_started_from_another_one(tmp_path):
    base = {"base_model": {"name": "me/ddpm-afhq-cat", "revision": "0"}}
    card = card_of(tmp_path, "--dataset_name=ylecun/mnist", record=base)
    assert "license" not in card.data.to_dict() and "last trained on `ylecun/mnist`" in card.text
    assert "The licence of the model that the training started from applies too." in card.text
    assert card_of(tmp_path, "--dataset_name=huggan/AFHQ", record=base).data.license == "cc-by-nc-4.0"


@pytest.mark.parametrize("flag", ["--train_data_dir=/home/me/digits", "--dataset_name=/home/me/digits"])
def test_a_folder_of_ones_own_is_not_taken_for_a_known_data_set(tmp_path, flag):
    folder = "--dataset_name=" if "train_data" in flag else "--resolution=8"
    card = card_of(tmp_path, folder, flag)
    assert "scikit-learn" not in card.text and "trained on `digits`" in card.text
    assert "license" not in card.data.to_dict() and "datasets" not in card.data.to_dict()
    card = card_of(tmp_path, "--dataset_name=", "--train_data_dir=photos/mnist")
    assert "license" not in card.data.to_dict() and "datasets" not in card.data.to_dict()


def test_bits_per_dim_of_training_images_is_called_so(tmp_path):
    card_of(tmp_path)
    (tmp_path / "evaluations").mkdir()
    for split, published in [("train", "train"), ("held_out", "test")]:
        entry = ENTRY | {"id": "bits_per_dim", "n_gen": None, "n_ref": 1000, "extra": {"split": split}}
        (tmp_path / "evaluations" / "bound.json").write_text(json.dumps(RECORD | {"metrics": [entry]}))
        card = card_of(tmp_path)
        assert [result.dataset_split for result in card.data.eval_results] == [published]
        assert ("bits per dimension, on training images" in card.text) == (split == "train")


def test_the_usage_of_a_converted_conditional_model_gives_a_class(tmp_path):
    """It has no names, and therefore no embedding that is known to mean "no class"."""
    save_pipeline(tmp_path, tiny_unet(num_class_embeds=3), PaperDDPMScheduler.nichol_cosine(10))
    shutil.copyfile(ROOT / "pipelines" / "class_guided.py", tmp_path / "class_guided.py")
    assert write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "class_labels=[0]" in text and "guidance_scale" not in text


def test_the_model_is_loaded_by_its_path_before_a_push_and_by_its_id_after_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "digits"
    assert '.from_pretrained("runs/digits")' in card_of(folder).text
    assert '.from_pretrained("me/digits")' in card_of(folder, name="me/digits").text
    monkeypatch.chdir(folder)
    (folder / "README.md").unlink()
    assert '.from_pretrained("digits")' in card_of(folder).text


def test_a_conditional_model_shows_its_guided_sheet_first(guidance_models):
    text = (guidance_models / "conditional" / "README.md").read_text()
    assert text.index("Samples with guidance, one row for each class") < text.index("figures/reverse.gif")
    assert "samples/epoch" not in text
    assert "figures/guided.png" in PUBLISHED and not (guidance_models / "plain" / "figures").exists()
    with Image.open(guidance_models / "conditional" / "figures" / "guided.png") as picture:
        assert picture.height == 32 + 10 * 132 - 4


def test_the_card_of_a_learned_variance_does_not_promise_ddim(tmp_path):
    card = card_of(tmp_path, "--variance_type=learned_range", variance_type="learned_range")
    assert "`DDIMPipeline` cannot use this model" in card.text and "DDIMPipeline.from_pretrained" not in card.text


def test_the_card_promises_ddim_only_for_schedules_that_it_knows(tmp_path):
    card_of(tmp_path, "--ddpm_beta_schedule=sigmoid")
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "sigmoid"}))
    with pytest.raises(NotImplementedError):
        DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "does not know the noise schedule sigmoid" in card.text and "DDIMPipeline.from_pretrained" not in card.text


@pytest.mark.parametrize(
    ("variance_type", "spacing", "said"),
    [
        ("fixed_small", None, []),
        ("fixed_large", None, ["`DDPMPipeline` needs all 1000 steps"]),
        ("learned_range", None, ["`DDPMPipeline` draws the same images as `ddpm_hf sample --timesteps linspace`"]),
        ("learned_range", "trailing", ["`DDPMPipeline` needs all 1000 steps"]),  # as earlier versions saved it
    ],
)
def test_the_card_says_what_stock_ddpm_does_in_fewer_steps(tmp_path, variance_type, spacing, said):
    card_of(tmp_path, f"--variance_type={variance_type}", variance_type=variance_type)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    if spacing:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_spacing": spacing}))
        write_card(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert all(sentence in text for sentence in said)
    assert said or "needs all" not in text and "--timesteps linspace" not in text
    assert (variance_type == "learned_range") or "If the number of steps divides 1000, the images are those" in text


def test_the_cards_of_conditional_models_and_classifiers(guidance_models, tmp_path):
    text = ModelCard.load(guidance_models / "conditional" / "README.md").text
    assert "class-conditional" in text and "Its classes: 0, 1, 2," in text and "class_labels=[0]" in text
    assert (
        'from_pretrained("conditional", custom_pipeline="class_guided", ' in text
        and "DDPMPipeline" not in text
        and "DDIMPipeline" not in text
    )
    card = ModelCard.load(guidance_models / "classifier" / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert "A classifier of noisy images" in card.text and 'subfolder="classifier"' in card.text
    assert "| Last validation accuracy, over all noise levels |" in card.text


def test_a_folder_saved_with_class_conditional_py_keeps_its_usage_and_its_file(guidance_models, tmp_path):
    folder = shutil.copytree(guidance_models / "conditional", tmp_path / "earlier")
    (folder / "class_guided.py").rename(folder / "class_conditional.py")
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert 'custom_pipeline="class_conditional", ' in text and "class_guided" not in text
    assert "class_conditional.py" in PUBLISHED


@pytest.mark.parametrize("name", ["my digits", " digits\n2 ", "a --> b", "<!-- x", "```", 'a"b', "50%"])
def test_the_card_of_a_folder_of_any_name_is_ours(name, tmp_path):
    folder = tmp_path / name
    card_of(folder)
    (folder / "samples").mkdir()
    (folder / "samples/epoch_0001.png").touch()
    assert write_card(folder) and "epoch_0001" in (folder / "README.md").read_text()
    earlier = re.sub("<!-- ddpm_hf: .* -->", lambda _: f"<!-- ddpm_hf: {name} -->", (folder / "README.md").read_text())
    (folder / "README.md").write_text(earlier)
    assert write_card(folder)


@pytest.mark.parametrize(
    "name",
    ["<!--", "```", "[x](http://y)", "# h", "|", "a\n# b", "<b>", "`", "\\|", "**b**", "a_b", "http://y", "&lt;"],
)
def test_names_from_elsewhere_cannot_change_the_card(name, tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    record = RECORD

    def kinds_of(folder, text):
        """Return the kinds of all that a card with `text` in every place is made of, but plain text and code."""
        (folder / "evaluations").mkdir(parents=True)
        entries = [entry | {"id": text} for entry in record["metrics"] if "value" in entry]
        changed = {"command": f"run\n{text}", "metrics": entries, "data": record["data"] | {"name": text}}
        (folder / "evaluations" / "r.json").write_text(json.dumps(record | changed))
        run = {"command": f"train\n{text}", "device": text, "processor": text}
        save_pipeline(folder, tiny_unet(num_class_embeds=3), PaperDDPMScheduler.nichol_cosine(10), [text, "dog"])
        flags = parse_config([f"--output_dir={folder}", "--dataset_name=digits", "--resolution=8"]).to_dict()
        flags |= {"dataset_name": text, "channel_mults": text}
        (folder / "train_config.json").write_text(json.dumps({"flags": flags, **run}))
        assert write_card(folder, "me/model")
        text = ModelCard.load(folder / "README.md").text
        tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
        kinds = [token.type for token in tokens]
        for token in tokens:
            kinds += [child.type for child in token.children or []]
        return [kind for kind in kinds if kind not in ("text", "code_inline")]

    assert kinds_of(tmp_path / "1", name) == kinds_of(tmp_path / "2", "cat")


FOREIGN_RECORDS = {
    "half": json.dumps(RECORD)[:500],
    "empty": "",
    "list": "[]",
    "no parts": json.dumps({"schema": RECORD["schema"]}),
    "no metrics": json.dumps(RECORD | {"metrics": None}),
    "entry without id": json.dumps(RECORD | {"metrics": [{"value": 1.0}]}),
    "entry of text": json.dumps(RECORD | {"metrics": [ENTRY | {"value": "low"}]}),
    "entry of a list": json.dumps(RECORD | {"metrics": [[1, 2]]}),
    "entry without an error": json.dumps(RECORD | {"metrics": [{"id": "fid", "value": 1.0}]}),
    "data of text": json.dumps(RECORD | {"data": "digits"}),
    "data without sizes": json.dumps(RECORD | {"data": {"name": "digits"}}),
    "held out of text": json.dumps(RECORD | {"data": RECORD["data"] | {"held_out": "some"}}),
    "direction of a list": json.dumps(RECORD | {"metrics": [ENTRY | {"lower_is_better": [True]}]}),
    "sampler of a list": json.dumps(RECORD | {"sampler": {"method": ["ddim"]}}),
}


@pytest.mark.parametrize("name", FOREIGN_RECORDS)
def test_a_half_or_foreign_record_is_left_out_of_the_card(name, tmp_path):
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations/a.json").write_text(FOREIGN_RECORDS[name])
    (tmp_path / "evaluations/b.json").write_text(json.dumps(RECORD))
    text = card_of(tmp_path).text
    assert "(evaluations/a.json)" not in text and "(evaluations/b.json)" in text and "bits_per_dim" in text
    with pytest.raises(UserError, match=r"^[^\n]*a\.json [^\n]*: give [^\n]*\.$"):
        read_record(tmp_path / "evaluations/a.json")


@pytest.mark.parametrize(
    "change",
    [
        [],
        {},
        {"flags": None},
        {"flags": {"dataset_name": ["digits"], "hub_model_id": 3, "preset": {}, "objective": []}},
        {"flags": {"channel_mults": {"a": []}, "no_such_flag": 1}, "device": ["cpu"], "parameters": {}},
        {"flags": {}, "command": 7},
    ],
    ids=str,
)
def test_of_an_odd_train_config_the_card_is_made_or_refused_in_a_sentence(change, tmp_path):
    card_of(tmp_path)
    (tmp_path / "train_config.json").write_text(json.dumps(change))
    before = (tmp_path / "README.md").read_text()
    try:
        assert write_card(tmp_path)
    except UserError as error:
        assert (
            re.fullmatch(r"[^\n]*: (give|remove) [^\n]*\.", str(error))
            and before == (tmp_path / "README.md").read_text()
        )


@pytest.mark.parametrize("text", ["caf\xe9".encode("latin-1"), b"\xff\xfe", b""])
def test_a_readme_that_is_not_utf_8_is_the_users_and_stays(text, tmp_path):
    (tmp_path / "README.md").write_bytes(text)
    assert not write_card(tmp_path) and (tmp_path / "README.md").read_bytes() == text


def test_a_readme_that_is_a_link_is_the_users_and_stays(tmp_path):
    (tmp_path / "README.md").symlink_to("nowhere.md")
    assert (
        not write_card(tmp_path) and (tmp_path / "README.md").is_symlink() and not (tmp_path / "nowhere.md").exists()
    )


def test_damaged_files_never_end_a_training(tmp_path, caplog):
    """A line of metrics.jsonl is cut, records are damaged, and no card can be written."""
    folder = tmp_path / "caf\xe9"
    flags = [*TINY, f"--output_dir={folder}", "--checkpointing_steps=3", "--save_model_epochs=1000", "--use_ema"]
    train(parse_config([*flags, "--max_train_steps=3"]))
    assert write_card(folder) and "caf" in (folder / "README.md").read_text(encoding="utf-8")
    (folder / "evaluations").mkdir()
    for name, text in FOREIGN_RECORDS.items():
        (folder / f"evaluations/{name}.json").write_text(text)
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"3\n" + whole[:-20] + b"\n{}\n\xff\n" + whole + whole[:50])
    (folder / "README.md").unlink()
    (folder / ".README.md.tmp").mkdir()  # so that no card can be written
    run = train(parse_config([*flags, "--max_train_steps=6", "--resume_from_checkpoint=latest"]))
    assert run.finished and run.step == 6 and run.losses["loss"] > 0
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [3, 6]
    assert (folder / "figures/loss.png").is_file() and (folder / "figures/reverse.gif").is_file()
    assert "has no up-to-date model card: the model card could not be written" in caplog.text
    (folder / ".README.md.tmp").rmdir()
    assert write_card(folder) and "Not scored yet" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_metrics_jsonl_without_a_whole_line_has_no_figure_and_no_numbers(tmp_path):
    for text in (b"", b'{"step": 3, "lo', b"{}\n[]\n3\n\xff", b'{"step": 3}'):
        (tmp_path / "metrics.jsonl").write_bytes(text)
        assert loss_figure(tmp_path / "metrics.jsonl", tmp_path / "loss.png") is None
        assert not (tmp_path / "loss.png").exists() and "## Training" in card_of(tmp_path).text


def test_a_card_written_by_hand_stays(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# By hand")
    (tmp_path / "model_index.json").write_text("{}")
    main(["card", str(tmp_path)])
    assert "was not written by ddpm_hf and is kept" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text() == "# By hand"


def test_no_path_of_this_machine_and_no_token_is_told(tmp_path, monkeypatch):
    told = without_paths(
        {"a": ["/home/me/data/mnist", "--x=/home/me", "C:\\me\\cats", "~/cats", "../up/cats", 3], "b": None}
    )
    assert told == {"a": ["mnist", "--x=me", "cats", "cats", "cats", 3], "b": None}
    assert without_paths(["runs/mnist", "uoft-cs/cifar10", "--seed", "1e-3"]) == [
        "runs/mnist",
        "uoft-cs/cifar10",
        "--seed",
        "1e-3",
    ]
    argv = [
        "/opt/train_unconditional.py",
        "--dataset_name",
        "/home/me/a b",
        "--hub_token",
        "hf_secret",
        "--hub-token=hf_s",
    ]
    monkeypatch.setattr("ddpm_hf.provenance.sys", SimpleNamespace(argv=argv))
    assert command() == "python train_unconditional.py --dataset_name 'a b' --hub_token '***' '--hub-token=***'"
    (tmp_path / "train_config.json").write_text(json.dumps({"flags": {"output_dir": "/home/me/run"}}))
    # diffusers and earlier versions of ddpm_hf write this key. A class may have any name.
    for name in ("unet/config.json", "best/classifier/config.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps({"_name_or_path": "runs/x/unet", "id2label": {"0": "/a"}}))
    hide_paths(tmp_path)
    assert json.loads((tmp_path / "train_config.json").read_text()) == {"flags": {"output_dir": "run"}}
    for path in tmp_path.rglob("config.json"):
        assert json.loads(path.read_text()) == {"id2label": {"0": "/a"}}


def test_names_of_classes_are_no_paths():
    names = {"class_names": ["/m/0199g", "/m/01g317"]}
    assert without_paths(names | {"flags": names}) == names | {"flags": names}
