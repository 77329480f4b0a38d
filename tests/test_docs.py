"""The documentation against the code: commands, settings, trees of files, links, examples."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from annexe import cli
from annexe.build import build_component, load_config
from annexe.config import LossWeights, RewardConfig, RunConfig, WandbConfig
from annexe.datasets.annotations import read_annotations
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.structures.batch import QueryIndex

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PICTURES = ROOT / "docs" / "images"
TREES = [ROOT / "README.md", ROOT / "docs" / "architecture.md"]

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
_FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
_TABLE = re.compile(r"(?:^\|.*\n)+", re.M)
_CELL_END = re.compile(r"(?<!\\)\|")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)
_SETTING = re.compile(r"\b(run|datasets\.ego_irgbench)\.([a-z_]+(?:\.[a-z_]+)?)")


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a page in one language."""
    return [text for name, text in _BLOCK.findall(page.read_text()) if name == language]


def commands() -> list[list[str]]:
    """Words of every shell command of every page."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]
    return [shlex.split(line) for line in lines]


def tree(page: Path) -> Iterator[tuple[Path, str]]:
    """Path and note of every line of a page's annotated tree; folders end with a slash there."""
    (block,) = blocks(page, "tree")
    folders: list[str] = []
    for line in block.splitlines():
        name, _, note = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        yield ROOT.joinpath(*folders), note.strip()


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    kept = (
        re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(page.read_text())
    )
    return {heading.replace(" ", "-") for heading in kept}


def test_the_pages_show_every_kind_of_command():
    assert {"make", "annexe", "torchrun"} <= {words[0] for words in commands()}


def annexe_commands() -> Iterator[list[str]]:
    """Words of every command of `annexe`, also under torchrun."""
    for words in commands():
        if words[0] == "annexe":
            yield words
        elif words[0] == "torchrun" and "-m" in words:
            yield words[words.index("-m") + 1 :]


def test_every_torchrun_command_has_a_configuration_that_loads():
    for words in (words for words in commands() if words[0] == "torchrun" and "-m" not in words):
        (script,) = [word for word in words if word.endswith(".py")]
        assert (ROOT / script).is_file(), script
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--cfg-path", required=True)
        parser.add_argument("--options", nargs="+", default=[])
        parser.add_argument("--dataset")
        given = parser.parse_args(words[words.index(script) + 1 :])
        if given.cfg_path in ("train_configs/finetune.yaml", "train_configs/rewards.yaml"):
            continue  # need a run to start from; tests/test_finetune.py, test_rewards.py have one
        config = load_config(
            ROOT / given.cfg_path, [o for o in given.options if not o.startswith("imports=")]
        )
        assert given.dataset is None or given.dataset in config.datasets, words


def test_every_make_target_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in (words for words in commands() if words[0] == "make"):
        assert set(words[1:]) <= targets, words


def parser_of(tool: str) -> argparse.ArgumentParser:
    """The parser of a sub-command of `annexe`."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"annexe.tools.{tool.replace('-', '_')}").add_arguments(parser)
    return parser


def test_every_annexe_command_parses():
    for words in annexe_commands():
        assert words[:1] == ["annexe"] and words[1] in cli.TOOLS, words
        parser_of(words[1]).parse_args(words[2:])


@pytest.mark.parametrize("tool", cli.TOOLS)
def test_every_help_ends_with_examples_that_parse(tool: str):
    parser = parser_of(tool)
    helps = [parser.epilog or ""]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = [each.epilog for each in action.choices.values()]
    for text in helps:
        examples = re.findall(rf"^  .*\bannexe ({tool} .*)$", text, re.M)
        assert examples, f"annexe {tool} --help has no example"
        for example in examples:
            parser.parse_args(shlex.split(example)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_is_named_exists(page: Path):
    run = {field.name for field in dataclasses.fields(RunConfig)}
    run |= {f"loss_weights.{field.name}" for field in dataclasses.fields(LossWeights)}
    run |= {f"rewards.{field.name}" for field in dataclasses.fields(RewardConfig)}
    run |= {f"wandb.{field.name}" for field in dataclasses.fields(WandbConfig)}
    parameters = inspect.signature(EgoIRGBench).parameters.values()
    of_data = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    known = {"run": run, "datasets.ego_irgbench": {*of_data, "type", "ratio"}}
    for block, name in _SETTING.findall(page.read_text()):
        assert name in known[block], f"{block}.{name}"


@pytest.mark.parametrize("page", TREES, ids=lambda page: page.name)
def test_every_file_of_a_tree_exists_and_has_a_note(page: Path):
    for path, note in tree(page):
        assert path.exists(), path
        assert note or path.is_dir(), f"{path} has no note"


def test_every_module_is_in_the_tree_of_the_architecture():
    shown = {path for path, _ in tree(ROOT / "docs" / "architecture.md")}
    files = {path for kind in ("*.py", "*.html") for path in (ROOT / "annexe").rglob(kind)}
    files |= {*(ROOT / "train_configs").iterdir(), *(ROOT / "eval_configs").iterdir()}
    assert sorted(str(path.relative_to(ROOT)) for path in files - shown) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_has_a_head_and_rows_of_its_length(page: Path):
    """An empty line within a table makes text of the rows behind it."""
    for table in _TABLE.findall(_FENCED.sub("", page.read_text())):
        rows = table.splitlines()
        has_head = len(rows) > 1 and set(rows[1]) <= set("|-: ")
        assert has_head, f"no line of dashes: {rows[:2]}"
        lengths = {row: len(_CELL_END.findall(row)) for row in rows}
        assert len(set(lengths.values())) == 1, lengths


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_repository_resolves(page: Path):
    for link in (link for link in _LINK.findall(page.read_text()) if "://" not in link):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists() or (target.parent == PICTURES and not PICTURES.is_dir()), link
        assert not anchor or anchor in anchors(target), link


def test_the_plug_in_of_the_architecture_page_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page = ROOT / "docs" / "architecture.md"
    (code,), (block,) = blocks(page, "python"), blocks(page, "yaml")
    (tmp_path / "my_decoders.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    settings = yaml.safe_load((ROOT / "train_configs" / "annexe_tiny.yaml").read_text())
    own = yaml.safe_load(block)
    settings["model"]["pixel_decoder"], settings["imports"] = (
        own["model"]["pixel_decoder"],
        own["imports"],
    )
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    config = load_config(tmp_path / "own.yaml")
    assert "my_decoders" in sys.modules
    decoder = build_component("pixel_decoder", config.model["pixel_decoder"], 12, 10, 6, 2)
    maps = [torch.rand(2, 6, side, side) for side in (2, 4, 8, 16)]
    prompt, mask = torch.rand(3, 5, 12), torch.arange(5) < torch.tensor([[5], [3], [4]])
    queries = QueryIndex(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), max_queries=2)
    ((presence, masks),) = decoder(prompt, mask, torch.rand(2, 4, 10), maps, queries)
    assert presence.shape == (3, 4) and masks.shape == (3, 4, 16, 16)


def test_the_annotation_of_the_data_page_is_accepted(tmp_path: Path):
    (block,) = blocks(ROOT / "docs" / "data.md", "json")
    (tmp_path / "example.json").write_text(block)
    (annotation,) = read_annotations(tmp_path / "example.json")
    fields = {field.name for field in dataclasses.fields(annotation)}
    assert fields == json.loads(block)[0].keys() and annotation.slots == {0: 2, 1: 1}


def test_every_test_named_in_the_pages_exists():
    named = {
        match
        for page in PAGES
        for match in re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text())
    }
    assert len(named) > 10
    for file, function in named:
        assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(), re.M), (
            f"{file}::{function}"
        )


# Speeds of the released code that were measured under other conditions than its own, with the
# memory then and the ratios to them: 12 to 15 in training, 13 and 27 to 28 in generation
_WITHDRAWN = re.compile(
    r"\b(2\.27|1\.44|77\.5)\b(?= ?(samples|photos|images|GB|GiB|/s|\|))"
    r"|\b(1[2-5]|2[78])(\.\d+)? ?(x|×|-?fold|times) (the|of|as|faster|that)\b"
    r"|hours of the released"
)


def test_no_figure_stems_from_a_withdrawn_measurement():
    for line in ("2.27 samples/s", "| 1.44 images/s |", "12x the released code", "12.4 times as"):
        assert _WITHDRAWN.search(line)
    kinds = ("*.md", "*.py", "*.yaml", "*.html", "*.js")
    folders = ("annexe", "docs", "scripts", "train_configs", "eval_configs", "eval_scripts")
    files = [*ROOT.glob("*.md"), ROOT / "Makefile"]
    for folder in folders:
        files += [path for kind in kinds for path in (ROOT / folder).rglob(kind)]
    assert len(files) > 150
    for path in files:
        found = _WITHDRAWN.search(path.read_text())
        assert found is None, f"{path}: {found[0] if found else ''}"


def test_the_comparison_with_the_released_code_divides_what_it_shows():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    section = page.partition("### One table")[2].partition("\n- ")[0]
    pairs = re.findall(
        r"^\| released code \| \d+ \| ([\d.]+) .*\n"
        r"\| annexe, the same card .*?\| \d+ \| ([\d.]+) .*?, ([\d.]+) times as fast",
        section,
        re.M,
    )
    assert len(pairs) == 2
    for released, ours, ratio in pairs:
        assert round(float(ours) / float(released), 1) == float(ratio)
