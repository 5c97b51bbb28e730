"""conf/ against the schema: the same keys, the same comments, and everything composes."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import cli, manual
from harness.fields import fields_of, is_settings, join
from harness.schema import DOCS, GROUPS, Config, resolve

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
GROUP_FILES = [file for file in FILES if file.parent.name in GROUPS]
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
NEEDED = {
    "model=hf": ["model.path=org/name"],
    "attn=dense": ["arms=[ar,dense]"],
    "draft=none": ["arms=[ar,sparse_ar]"],
    "ffn=quantile": ["calibration=some.json"],
    "moe=median_ratio": ["calibration=some.json"],
    "reuse=skips": ["reuse.skip_layers=[3,4]"],
}

Compose = Callable[..., dict[str, Any]]


def leaves(cls: type, path: str) -> Iterator[str]:
    for name, hint, _ in fields_of(cls):
        yield from leaves(hint, join(path, name)) if is_settings(hint) else [join(path, name)]


def label(file: Path) -> str:
    return str(file.relative_to(CONF))


@pytest.mark.parametrize("file", FILES, ids=label)
def test_every_line_with_a_key_carries_a_comment(file: Path) -> None:
    bare = [line for line in file.read_text().splitlines() if line.strip() and not re.search(r"(^|\s)# \S", line)]
    assert bare == []


@pytest.mark.parametrize("file", GROUP_FILES, ids=label)
def test_group_files_hold_the_keys_and_comments_of_the_schema(file: Path) -> None:
    group, content = file.parent.name, yaml.safe_load(file.read_text())
    discriminator, classes = GROUPS[group]
    assert [key for key, _ in manual._flat(content, group)] == list(leaves(classes[content[discriminator]], group))
    text = file.read_text().split("\n", 1)[1]
    assert text == "\n".join(manual.yaml_lines(content, group)) + "\n"


def test_top_level_holds_the_keys_and_comments_of_the_schema() -> None:
    text = (CONF / "config.yaml").read_text()
    keys = [key for key in yaml.safe_load(text) if key not in ("defaults", "hydra")]
    assert keys == [name for name, hint, _ in fields_of(Config) if not is_settings(hint)]
    assert all(re.search(rf"^{key}: .*  # {re.escape(DOCS[key])}$", text, re.MULTILINE) for key in keys)


def test_every_choice_of_the_schema_has_a_file_that_composes(compose: Compose) -> None:
    for group, (discriminator, classes) in GROUPS.items():
        found = set()
        for file in (CONF / group).glob("*.yaml"):
            choice = f"{group}={file.stem}"
            config = resolve(compose(choice, *NEEDED.get(choice, [])))
            found.add(getattr(getattr(config, group), discriminator))
        assert found == set(classes), group


@pytest.mark.parametrize("file", GROUP_FILES, ids=label)
def test_group_files_say_first_what_they_are(file: Path) -> None:
    assert re.fullmatch(r"# \S.*\.", file.read_text().splitlines()[0])


@pytest.mark.parametrize("name", ["attn", "reuse", "ffn", "moe", "hybrid"])
def test_curves_have_five_points_of_one_key(name: str) -> None:
    content = yaml.safe_load((CONF / "experiment" / f"{name}_curve.yaml").read_text())
    (key, values), *others = content["hydra"]["sweeper"]["params"].items()
    assert key in DOCS and others == [] and len(set(values.split(","))) >= 5


def test_curves_of_one_mechanism_leave_the_others_dense(compose: Compose) -> None:
    for name, wanted in {"attn": {"attn"}, "ffn": {"ffn"}, "moe": {"moe"}, "reuse": {"attn", "reuse"}}.items():
        config = resolve(compose(f"experiment={name}_curve"))
        groups = {group: getattr(config, group).name for group in ("attn", "ffn", "moe", "reuse")}
        assert {group for group, choice in groups.items() if choice not in ("dense", "none")} == wanted


def test_hybrids_are_sparse_on_every_axis_of_their_model(compose: Compose) -> None:
    for name, axis in {"hybrid": "ffn", "hybrid_curve": "ffn", "hybrid_moe": "moe"}.items():
        config = resolve(compose(f"experiment={name}"))
        assert config.attn.name == "block_topk" and config.reuse.name == "anchors"
        assert getattr(config, axis).name != "dense" and config.task.source == "bundled"


@pytest.mark.parametrize("file", EXPERIMENTS, ids=label)
def test_experiments_start_with_their_command_and_resolve(file: Path, compose: Compose) -> None:
    package, command = file.read_text().splitlines()[:2]
    assert package == "# @package _global_" and command == f"# python run.py experiment={file.stem}"
    hydra = yaml.safe_load(file.read_text()).get("hydra", {})
    params = hydra.get("sweeper", {}).get("params", {})
    assert bool(params) == (hydra.get("mode") == "MULTIRUN")
    swept = [[f"{key}={value}" for value in str(values).split(",")] for key, values in params.items()]
    for member in itertools.product(*swept):
        resolve(compose(f"experiment={file.stem}", *member))


def test_command_line_wins_over_an_experiment(compose: Compose) -> None:
    config = resolve(compose("experiment=smoke", "task.limit=5", "task=squad"))
    assert (config.task.name, config.task.limit, config.task.max_new_tokens) == ("squad", 5, 24)


def test_hub_revisions_are_pinned_commits() -> None:
    for file in (CONF / "task").glob("*.yaml"):
        hub = yaml.safe_load(file.read_text()).get("hub")
        assert hub is None or re.fullmatch("[0-9a-f]{40}", hub["revision"]), file.name


def test_help_names_every_key_with_its_comment() -> None:
    text = manual.help_text()
    keys = {key for group, (_, classes) in GROUPS.items() for cls in classes.values() for key in leaves(cls, group)}
    keys |= {name for name, hint, _ in fields_of(Config) if not is_settings(hint)}
    assert {key for key, _, _ in manual.every_key()} == keys
    for key in keys:
        assert re.search(rf"^  {re.escape(key)}=.*  # {re.escape(DOCS[key])}$", text, re.MULTILINE), key
    assert all(file.stem in text for file in FILES)


def test_keys_name_all_choices_that_bring_them() -> None:
    only = {key: choices for key, _, choices in manual.every_key()}
    assert only["attn.topk"] == only["task.limit"] == only["seed"] == ""
    assert only["ffn.mask"] == "ffn=quantile or threshold or topk" and only["ffn.tau"] == "ffn=threshold"
    assert only["model.path"] == "model=carved_moe or hf" and only["reuse.theta"] == "reuse=anchors"


def test_documentation_is_current() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == manual.markdown(), "bring it up to date: python -m harness.manual > docs/configuration.md"


def test_shown_configuration_keeps_its_content_and_gains_comments(compose: Compose) -> None:
    for choice in ("task=math", "task=needle", "track=wandb"):
        raw = compose(choice)
        shown = cli.annotate(yaml.safe_dump(raw, sort_keys=False))
        assert yaml.safe_load(shown) == raw
        assert all("  # " in line for line in shown.splitlines())
    part = cli.annotate("# @package attn\ntopk: 16\n")
    assert part == f"# @package attn\ntopk: 16  # {DOCS['attn.topk']}\n"
    assert cli.annotate("16\n") == "16\n"


@pytest.mark.parametrize(
    "value", ["a", "", "null", "3", "a: b", "a # b", "\n\nQ:", "[x]", "${x}", "é", "C:\\x", "-", "a b "]
)
def test_texts_survive_the_way_they_are_written(value: str) -> None:
    assert yaml.safe_load(f"key: [{manual.scalar(value)}]") == {"key": [value]}


def test_every_key_is_read_somewhere() -> None:
    """A key that nothing reads changes nothing; the keys that pick a class are read by `resolve`."""
    own = {"schema.py", "schema_groups.py", "schema_sparsity.py", "fields.py", "manual.py"}
    files = [*(ROOT / "harness").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]
    source = "\n".join(file.read_text() for file in files if file.name not in own)
    picks = {f"{group}.{discriminator}" for group, (discriminator, _) in GROUPS.items()}
    leaf = {key.rpartition(".")[2] for key, _, _ in manual.every_key() if key not in picks}
    assert sorted(name for name in leaf if not re.search(rf"\.{name}\b|\"{name}\"", source)) == []
