"""The space of scripts.tune: what its files may say, what is sampled, and what a command line fixes."""

import optuna
import pytest
import yaml

from harness.fields import ConfigError
from harness.schema import resolve, to_dict
from scripts.tuning import space

KEPT = {"attn.kept_tokens": {"low": 128, "high": 2048, "log": True}, "attn.block_size": {"choices": [16, 32, 64]}}
NESTED = {
    "ffn": {"choices": ["dense", "topk"]},
    "ffn.mask": {"choices": ["root", "weighted"], "when": {"ffn": "topk"}},
    "ffn.survival": {"low": 0.5, "high": 0.9, "step": 0.1, "when": {"ffn.mask": ["weighted"]}},
}


@pytest.fixture(scope="module")
def base(compose):
    return space.base_values(to_dict(resolve(compose())))


def samples(content, base, count=60):
    parsed = space.parse(content)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=1))
    return [parsed.sample(study.ask(), base) for _ in range(count)]


def test_kept_tokens_become_blocks(base):
    for values in samples(KEPT, base):
        words = dict(word.split("=") for word in space.overrides(values, base))
        assert set(words) == {"attn.topk", "attn.block_size"}
        kept = int(words["attn.topk"]) * values["attn.block_size"]
        assert abs(kept - values["attn.kept_tokens"]) <= values["attn.block_size"] / 2 and kept > 0


def test_kept_tokens_use_the_block_size_that_is_not_varied(base):
    assert space.overrides({"attn.kept_tokens": 512}, base) == [f"attn.topk={512 // base['attn.block_size']}"]


def test_conditions_hold_in_every_sample(base):
    drawn = samples(NESTED, base)
    for values in drawn:
        assert ("ffn.mask" in values) == (values["ffn"] == "topk")
        assert ("ffn.survival" in values) == (values.get("ffn.mask") == "weighted")
    seen = {values.get("ffn.survival") for values in drawn}
    assert seen == {None, 0.5, 0.6, 0.7, 0.8, 0.9}


def test_groups_come_before_their_keys(base):
    words = space.overrides({"reuse.every": 3, "attn.topk": 4, "reuse": "anchors"}, base)
    assert words == ["reuse=anchors", "reuse.every=3", "attn.topk=4"]


def test_a_condition_on_a_fixed_key_is_judged_by_the_configuration(compose, base):
    left = space.parse(NESTED).without(["ffn.mask"])
    weighted = space.base_values(to_dict(resolve(compose("ffn=topk", "ffn.mask=weighted"))))
    study = optuna.create_study(directions=["maximize", "minimize"])
    assert "ffn.survival" in left.sample(study.ask(), weighted)
    assert "ffn.survival" not in left.sample(study.ask(), base)


def test_what_the_command_line_sets_leaves_the_space():
    whole = space.load(space.DEFAULT)
    assert set(whole.keys) - set(whole.without(["attn.topk", "ffn"]).keys) == {"attn.kept_tokens", "ffn", "ffn.keep"}
    assert {key.split(".")[0] for key in whole.without(["attn"]).keys} == {"reuse", "ffn", "draft"}
    with pytest.raises(ConfigError, match="fixes every key"):
        space.parse(KEPT).without(["attn"])


def test_the_configuration_as_typed_is_told_as_far_as_the_space_can_express_it(compose, base):
    whole = space.load(space.DEFAULT)
    assert whole.within(base)["attn.kept_tokens"] == base["attn.topk"] * base["attn.block_size"]
    assert "reuse.every" not in whole.within(base) and "ffn.keep" not in whole.within(base)
    other = space.base_values(to_dict(resolve(compose("draft=combined", "attn.query=weighted", "attn.survival=0.75"))))
    told = whole.within(other)
    assert not {"draft", "draft.depth", "attn.survival"} & set(told) and told["attn.query"] == "weighted"


def test_the_default_space_composes(compose, base):
    whole = space.load(space.DEFAULT)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(8):
        resolve(compose(*space.overrides(whole.sample(study.ask(), base), base)))
    assert all("  # " in line for line in space.DEFAULT.read_text().splitlines()[1:])


def test_identity_is_that_of_what_is_sampled():
    one, same = space.parse(KEPT), space.parse(yaml.safe_load(yaml.safe_dump(KEPT, sort_keys=False)))
    assert one.identity == same.identity
    wider = KEPT | {"attn.kept_tokens": {"low": 128, "high": 4096, "log": True}}
    assert len({one.identity, space.parse(wider).identity, space.parse(NESTED).identity}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["attn"], "must be a mapping"),
        ({"attn.topq": {"choices": [1]}}, "attn.topq is not a key: did you mean attn.topk"),
        ({"task.limit": {"low": 1, "high": 2}}, "task.limit cannot be tuned; choose a group or a key of draft"),
        ({"engine": {"choices": ["eager"]}}, "engine cannot be tuned"),
        ({"attn.name": {"choices": ["dense"]}}, "attn.name cannot be tuned"),
        ({"reuse": {"choices": ["none", "anchor"]}}, "reuse=anchor: choose from none, anchors, skips"),
        ({"attn.topk": [1, 2]}, "must be {choices"),
        ({"attn.topk": {"low": 1, "high": 2, "size": 3}}, "size is unknown; choose from choices, low"),
        ({"attn.topk": {"low": 1}}, "low=1 and high=null must be numbers"),
        ({"attn.topk": {"low": 3, "high": 1}}, "low first"),
        ({"attn.topk": {"low": 1, "high": 3, "choices": [1]}}, "either choices, or low and high"),
        ({"attn.topk": {"choices": []}}, "a list of values"),
        ({"attn.topk": {"low": 1, "high": 9, "step": 0.5}}, "step must be a positive number"),
        ({"ffn.keep": {"low": 0, "high": 0.5, "log": True}}, "must be above 0"),
        ({"reuse.every": {"choices": [2], "when": {"reuse": "anchors"}}}, "must be a key of an earlier line"),
        (KEPT | {"attn.topk": {"low": 1, "high": 2}}, "attn.kept_tokens sets attn.topk"),
    ],
)
def test_a_bad_space_is_one_line(content, message):
    with pytest.raises(ConfigError) as caught:
        space.parse(content)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--space=none.yaml: cannot be read"):
        space.load(tmp_path / "none.yaml")
    (tmp_path / "torn.yaml").write_text("attn: {choices: [")
    with pytest.raises(ConfigError, match=r"--space=torn.yaml: not YAML"):
        space.load(tmp_path / "torn.yaml")
