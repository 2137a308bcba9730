"""The pages: every command parses, every link leads to a file, and every quoted line is in the code.

A command is a line of a fenced block or of a docstring that begins with a program, or a `code span` with flags.
"""

import ast
import contextlib
import dataclasses
import importlib
import io
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap

import nbformat
import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT
from matplotlib.mathtext import MathTextParser
from PIL import Image
from test_presets import build, parameters
from torch.distributed.run import get_args_parser as torchrun_parser

from ddpm_hf import __main__ as package
from ddpm_hf.config.command_line import parse_config
from ddpm_hf.config.presets import PRESETS
from ddpm_hf.config.training_config import TrainingConfig
from ddpm_hf.evaluation.records import record_table
from ddpm_hf.training.loop import train


PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
FOLDERS = ("ddpm_hf", "benchmarks", "pipelines", "spaces")
SOURCES = [
    ROOT / "train_unconditional.py",
    *(path for name in FOLDERS for path in sorted(ROOT.glob(f"{name}/**/*.py"))),
]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
HOW_IT_WORKS, SCALING = (ROOT / "docs" / name for name in ("how_it_works.md", "scaling.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(
    r"([A-Z_]+=\S+ )*(python -m|python \S+\.py|ddpm_hf|accelerate (launch|config)|torchrun|make|pip|git|hf) "
)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def commands_of(block):
    """Return the lines that begin with a program, without comments; a backslash at an end joins the next line."""
    lines = [re.sub(r"\s+#.*", "", line.strip()) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if PROGRAM.match(f"{line} ")]


def commands_in(page):
    """Return the commands of a page in Markdown."""
    found = [line for kind, block in FENCE.findall(page) if kind in ("bash", "") for line in commands_of(block)]
    for span in map(str.split, re.findall(r"`([^`]+)`", FENCE.sub("", page))):
        if PROGRAM.match(" ".join(span)) and any(word.startswith("--") for word in span):
            is_launcher_alone = span[:2] == ["accelerate", "launch"] and not {"-m", "train_unconditional.py"} & {*span}
            found.append(" ".join(span + ["train_unconditional.py", "..."] * is_launcher_alone))
    return found


def docstrings(path):
    """Return the docstrings of a file, each without its first line, which is prose."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    return [(ast.get_docstring(node) or "").partition("\n")[2] for node in nodes]


def markdown_of(path):
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")


def notebook_commands(path):
    """Return what cells run by `!`, with the values of the notebook's parameters."""
    values, found = {"sys": sys, "SOURCE": ".", "RECORD": "a.json"}, []
    for cell in [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]:
        if "parameters" in cell.metadata.get("tags", []):
            exec(cell.source, values)
            values["HUB_MODEL_ID"] = "me/digits"
        lines = [line.format_map(values) for line in re.findall(r"^\s*!(.*)", cell.source, re.MULTILINE)]
        found += [line.replace(sys.executable, "python") for line in lines]
    return found + commands_in(markdown_of(path))


COMMANDS = [(page, line) for page in PAGES for line in commands_in(page.read_text())]
COMMANDS += [(path, line) for path in SOURCES for text in docstrings(path) for line in commands_of(text)]
COMMANDS += [(path, line) for path in NOTEBOOKS for line in notebook_commands(path)]


def parse_flags(parser, arguments):
    """Run a parser that leaves with exit code 2 on bad input, and fail with what it said then."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser(arguments)
    except SystemExit as leaving:
        if leaving.code:
            pytest.fail(said.getvalue().strip().splitlines()[-1], pytrace=False)


def parse_script(script, arguments, folder):
    """Parse the arguments of a Python script, or of a module of ours."""
    # "..." stands for flags that suffice.
    arguments = [word for flag in arguments for word in (["--preset", "mnist"] if flag == "..." else [flag])]
    if script == "ddpm_hf":
        return parse_flags(package.parse, arguments)
    module = script.replace(".", "/") + ".py" if script.startswith("ddpm_hf.") else script
    path = next((place / module for place in (ROOT, folder) if (place / module).is_file()), None)
    assert path, f"there is no {script}"
    if path.name == "train_unconditional.py":
        return parse_flags(parse_config, arguments)
    # What it imports need not be installed here, so its flags are read off its source.
    known = set(re.findall(r"\"(--[a-z][\w-]*)\"", path.read_text()))
    if "parse_known_args" in path.read_text():  # the rest is for a training
        known |= {f"--{field.name}" for field in dataclasses.fields(TrainingConfig)}
    unknown = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")} - known
    assert not unknown, f"{script} has no {', '.join(unknown)}"


def check_command(line, folder):
    """Parse a command by the parsers of all programs in it; fail for what is wrong, return the launcher's flags."""
    words = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, shlex.split(line)))
    program, arguments = words[0], words[1:]
    if words[:3] == ["python", "-m", "pip"] or program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", line)
        for extra in (name for names in extras for name in names.split(",")):
            assert re.search(rf"^{extra} =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE), f"no extra {extra}"
    elif program == "python":
        arguments = arguments[1:] if arguments[0] == "-m" else arguments
        parse_script(arguments[0], arguments[1:], folder)
    elif program == "ddpm_hf":
        parse_script(program, arguments, folder)
    elif program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[:2] == ["accelerate", "launch"] or program == "torchrun":
        parser = torchrun_parser() if program == "torchrun" else launch.launch_command_parser()
        known = parse_flags(parser.parse_args, arguments[program == "accelerate" :])
        parse_script(known.training_script, known.training_script_args, folder)


@pytest.mark.parametrize(("path", "line"), COMMANDS, ids=[f"{name_of(path)}: {line}" for path, line in COMMANDS])
def test_every_command_is_parsed(path, line):
    check_command(line, path.parent)


def test_the_collector_finds_and_the_parsers_catch():
    page = textwrap.dedent("""
        ```bash
        OMP_NUM_THREADS=1 accelerate launch train_unconditional.py --preset mnist \\
            --use_emma                                             # no such flag
        python -m ddpm_hf sample runs/mnist --sampler ddim         # a good one
        ddpm_hf sample runs/mnist --smapler ddim                   # no such flag
        accelerate launch -m ddpm_hf train --preset mnist --use_emma
        ```
        and `make nothing-of-the-kind --always-make`, `pip install --quiet -e ".[imaginary]"`, `accelerate
        launch --multi_gpus -m ddpm_hf presets`, `python benchmarks/restoration.py --speed`, `python gone.py --x`,
        `torchrun --nproc_per_node 2 train_unconditional.py ... --no_such_flag`, `accelerate launch --gpu_speed 2`.
    """)
    bad, good, *others = commands_in(page)
    check_command(good, ROOT)
    assert len(others) == 9
    for line in [bad, *others]:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check_command(line, ROOT)
    counts = {name_of(path): sum(path == other for other, _ in COMMANDS) for path, _ in COMMANDS}
    least = {"README.md": 20, "docs/scaling.md": 6, "docs/results.md": 9, "train_unconditional.py": 4}
    least |= {f"ddpm_hf/commands/{name.replace('-', '_')}.py": 1 for name in package.COMMANDS}
    least |= {"notebooks/run_in_cloud.ipynb": 4, "benchmarks/speed.py": 2}
    assert all(counts[name] >= count for name, count in least.items()), counts


HELP = [["--help"], *([name, "--help"] for name in package.COMMANDS)]


@pytest.mark.parametrize("arguments", [["presets"], *(["presets", name] for name in PRESETS), *HELP], ids=" ".join)
def test_cheap_commands_run(arguments, capsys):
    with contextlib.suppress(SystemExit):
        package.main(arguments)
    said = capsys.readouterr().out
    expected = {"--help": ["usage:"], "presets": list(PRESETS)}.get(
        arguments[-1], ["about", "flags", "attention_head_dim"]
    )
    assert all(word in said for word in expected)


DIGITS = [(path, line) for path, line in COMMANDS if re.search(r"train_unconditional.py.*digits", line)]


@pytest.mark.parametrize(("path", "line"), DIGITS, ids=[f"{name_of(path)}: {line}" for path, line in DIGITS])
def test_the_digits_that_pages_train_can_be_trained(path, line, tmp_path, capsys):
    flags = shlex.split(line.partition("train_unconditional.py")[2])
    assert train(parse_config([*flags, "--dry_run", "--output_dir", str(tmp_path / "run")])) is None
    assert "1,617 images of 8x8x1" in capsys.readouterr().out and not (tmp_path / "run").exists()


# Links, blocks and formulas.


def slug(heading):
    """Return GitHub's anchor of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")


def anchors(text):
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)}


ADDRESS = re.search(r"^url = (\S+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=name_of)
def test_links_lead_somewhere(path):
    text = FENCE.sub("", markdown_of(path))
    assert not re.search(r"@[A-Z_]+@|TODO|TBD", text)
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        target, _, anchor = "".join(link).partition("#")
        if path in NOTEBOOKS:  # Colab has the notebook alone, so its links name the repository
            assert re.match(r"https?:", target), target
        inside = target.removeprefix(f"{ADDRESS}/blob/main/")
        target, folder = (inside, ROOT) if inside != target else (target, path.parent)
        page = (folder / target).resolve() if target else path
        if not re.match(r"[a-z]+:", target):
            assert page.exists(), target
            assert not anchor or anchor in anchors(markdown_of(page)), f"{target}#{anchor}"


EXCERPT = re.compile(r"^\[`([^`]+)`\]\(\S+\) `([^`]+)`\n\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXCERPTS = EXCERPT.findall(HOW_IT_WORKS.read_text())
BLOCKS = [(page, block) for page in PAGES for kind, block in FENCE.findall(page.read_text()) if kind == "python"]
WHOLE = [(page, block) for page, block in BLOCKS if block not in [quoted for _, _, quoted in EXCERPTS]]


@pytest.mark.parametrize(("page", "block"), WHOLE, ids=[name_of(page) for page, _ in WHOLE])
def test_python_blocks_compile_and_import_what_exists(page, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            assert all(importlib.import_module(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_numbers_of_how_it_works_are_what_the_code_prints():
    shown = re.findall(r"```python\n([^`]*)```\n\n```text\n(.*?)```", HOW_IT_WORKS.read_text(), re.DOTALL)
    assert len(shown) >= 2
    for code, said in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert printed.getvalue() == said


@pytest.mark.parametrize(("path", "name", "quoted"), EXCERPTS, ids=[f"{k} {e[1]}" for k, e in enumerate(EXCERPTS)])
def test_quoted_lines_are_in_the_function_named(path, name, quoted):
    source = (ROOT / path).read_text()
    node = ast.parse(source)
    for part in name.split("."):
        node = next((each for each in node.body if getattr(each, "name", None) == part), None)
        assert node, f"{path} has no {name}"
    lines = iter([line.strip() for line in ast.get_source_segment(source, node).splitlines()])
    for line in quoted.splitlines():
        assert line.strip() in lines, f"{name} has no line `{line.strip()}` after those before it"


def test_every_section_of_how_it_works_has_its_formula_and_its_line_of_code():
    sections = re.split(r"^##+ ", HOW_IT_WORKS.read_text(), flags=re.MULTILINE)[1:-1]
    sections = [section for section in sections if not section.startswith("Exercises")]
    assert len(sections) >= 14 and all(EXCERPT.search(section) for section in sections)
    assert all("```math" in section or section.startswith("Which steps") for section in sections)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_formulas_can_be_typeset(page):
    text, parser = page.read_text(), MathTextParser("path")
    displayed = [block.strip() for kind, block in FENCE.findall(text) if kind == "math"]
    inline = re.findall(r"(?<![\w$`])\$([^$`\n]+)\$(?![\w$])", re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))
    for formula in displayed + inline:
        parser.parse(f"${formula}$")
    assert not [formula for formula in inline if re.search(r"\\[^a-zA-Z]", formula)]  # GitHub drops that backslash


def test_accelerate_loads_the_yaml_files_and_launches_by_them(tmp_path, monkeypatch):
    started = []
    for name, block in re.findall(r"`(\w+\.yaml)`(?:(?!```).)*```yaml\n(.*?)```", SCALING.read_text(), re.DOTALL):
        (tmp_path / name).write_text(block)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["four_gpus.yaml", "fsdp.yaml", "tpu.yaml", "two_machines.yaml"]
    monkeypatch.chdir(tmp_path)
    for launcher in ("simple_launcher", "multi_gpu_launcher", "tpu_launcher"):
        monkeypatch.setattr(launch, launcher, lambda args, launcher=launcher: started.append((launcher, args)))
    flags = vars(launch.launch_command_parser().parse_args(["script.py"]))
    for name in files:
        config = load_config_from_file(name)  # refuses unknown keys
        assert set(yaml.safe_load((tmp_path / name).read_text()).get("fsdp_config", {})) <= set(flags), name
        words = ["--config_file", name, "--machine_rank", "1", "train_unconditional.py", "--preset=cifar10"]
        launch.launch_command(launch.launch_command_parser().parse_args(words))
        launcher, args = started[-1]
        assert launcher == ("tpu_launcher" if name == "tpu.yaml" else "multi_gpu_launcher")
        assert args.use_fsdp == (name == "fsdp.yaml") and args.machine_rank == 1
        assert (args.num_processes, args.num_machines) == (config.num_processes, config.num_machines)


def test_the_memory_table_is_right():
    told = {}
    for names, *numbers in re.findall(r"^\| (`[^|]*`) \| (\S+) M \| (\S+) GiB \|$", SCALING.read_text(), re.MULTILINE):
        told |= dict.fromkeys(re.findall(r"`([^`]+)`", names), numbers)
    assert set(told) == set(PRESETS) - {"digits"}
    for name, (millions, gib) in told.items():
        count = parameters(build(f"--preset={name}", channels=1 if name.startswith("mnist") else 3))
        assert (float(millions), float(gib)) == (round(count / 1e6, 1), float(f"{20 * count / 2**30:.2g}")), name


README = (ROOT / "README.md").read_text()


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 200 and (ROOT / "docs/images/mnist_reverse.gif").stat().st_size < 400_000


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/images/*")), ids=lambda path: path.name)
def test_a_picture_of_the_docs_is_opaque(path):
    """Dark text on a transparent background could not be read in a dark page."""
    with Image.open(path) as picture:
        assert picture.convert("RGBA").getextrema()[3] == (255, 255)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_picture_says_what_it_shows(page):
    text = FENCE.sub("", page.read_text())
    for picture in re.findall(r"<img [^>]*>", text):
        assert len(re.search(r'alt="([^"]*)"', picture)[1]) >= 20, picture
    assert all(len(alt) >= 20 for alt in re.findall(r"!\[([^\]]*)\]\(", text))


@pytest.mark.parametrize("page", ["README.md", "docs/reproductions.md"])
def test_the_numbers_of_a_page_are_those_of_the_results(page):
    """Each has the digits of a number in results.md, or more of them: 2.443 agrees with 2.44. FIDs are of others."""
    decimal = r"(?<![\w.])\d+\.\d+(?![\w.])"
    results = re.findall(decimal, (ROOT / "docs/results.md").read_text())
    left_out = r"\]\([^)]*\)|<[^>]*>|Python 3.11|Apache-2.0|CC BY\S* 4.0|FID \d+\.\d+"
    told = re.findall(decimal, re.sub(left_out, "](", (ROOT / page).read_text()))
    assert len(told) > 10
    for number in told:
        assert any(float(n) == round(float(number), len(n.partition(".")[2])) for n in results), number


def test_the_times_of_the_readme_are_those_of_the_presets():
    rows = re.findall(r"^\| (\d CPU cores?) \| `([^`]+)` \|.*\| (\d+) min \|", README, re.MULTILINE)
    assert len(rows) >= 4
    for hardware, preset, minutes in rows:
        assert f"{minutes} minutes on {hardware}" in PRESETS[preset].about, preset


def test_the_scores_of_the_readme_are_laid_out_as_evaluate_prints_them():
    entry = {"value": 1.0, "se": None, "floor": None, "n_gen": 40, "n_ref": 40, "lower_is_better": True}
    record = {"metrics": [entry | {"id": id} for id in ("fid", "memorization_authpct")]}
    head, _, question = record_table(record).splitlines()[:3]
    assert " ".join(head.split()) in " ".join(README.split()) and f"\n{question}\nmemorization_" in README


def test_make_setup_says_what_it_does_and_how_long_that_takes():
    command = ["make", "-n", "VENV=none", "setup"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    first, *rest = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True).stdout.splitlines()
    assert "2 GB" in first and "minutes" in first and sum("pip install" in line for line in rest) == 2
    assert not any("--quiet" in line for line in rest)  # pip shows its progress


def test_the_address_of_the_repository_is_written_everywhere_at_once(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "set_address.py"))
    for remote in (
        "git@host.org:me/it.git",
        "https://user:hf_secret@host.org/me/it",
        "ssh://git@host.org:22/me/it.git",
    ):
        assert script["web_address"](remote) == "https://host.org/me/it"
    (tmp_path / "notebooks").mkdir()
    names = [name_of(path) for path in (ROOT / "setup.cfg", ROOT / "README.md", *NOTEBOOKS)]
    for name in names:
        shutil.copy(ROOT / name, tmp_path / name)
    for address in ("https://host.org/me/it", "https://else.org/you/that"):  # the second replaces the first
        changed = script["write_address"](tmp_path, address)
        assert [name_of(ROOT / path.relative_to(tmp_path)) for path in changed] == names
        texts = [(tmp_path / name).read_text() for name in names]
        assert all(address in text for text in texts) and not any(ADDRESS in text for text in texts)
    assert f'"ddpm_hf @ git+{address}"' in texts[1] and not any("host.org" in text for text in texts)
