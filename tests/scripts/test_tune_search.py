"""Trials, pruning, the front, the choice and the resumed study of scripts.tune, on made-up runs."""

import copy
import itertools
import random
from types import SimpleNamespace

import pytest
import yaml

from harness.evidence import RunStore, build_summary, provenance
from harness.fields import ConfigError
from harness.runner import RunFailed
from harness.schema import resolve, to_dict
from scripts.tuning import front, pruning, space
from scripts.tuning import study as stored
from scripts.tuning.measure import Measure, against, excess
from scripts.tuning.search import Effort, Search
from scripts.tuning.trials import Bench
from scripts.tuning.validation import held_back, judge
from tasks.base import Example, TaskError
from tests.evidence_samples import proof, record

EXAMPLES = 6
SPACE = {"attn.topk": {"choices": [4, 8, 16, 32, 64]}, "draft.depth": {"low": 2, "high": 8}}
IDENTITY = {"configuration": "a", "sources": "b"}
MEASURE = Measure("ar", "kl", "rougeL")


def rows(name, gain, kl, *, noise=0.05, seed=0, cluster=""):
    """The records of one example: sparse is `gain` times as fast as ar; the example itself varies far more."""
    chance, own = random.Random(f"{seed}/{name}"), random.Random(name)
    hard = own.uniform(0.5, 2.0)
    seconds = 1.0 * own.uniform(0.8, 1.2)
    fast = {"ar": 1.0, "dense": 1.2, "sparse": gain * chance.uniform(1 - noise, 1 + noise)}
    made = []
    for arm in fast:
        fidelity = {"tokens": 24, "agreeing": 20, "kl": 24 * kl * hard * chance.uniform(1 - noise, 1 + noise)}
        fidelity |= {"steps": 8, "flips": 1}
        changes = {"cluster": cluster, "fidelity": fidelity if arm == "sparse" else {}}
        made.append(record(name, arm, histogram=(0, 24), seconds=seconds / fast[arm], **changes))
    return made


def table(gain, kl, count=EXAMPLES, **options):
    return MEASURE.table([row for index in range(count) for row in rows(f"e{index}", gain, kl, **options)])


class Machine:
    """Stands in for harness.runner.run: makes records up, stores them as it does, and can die in the middle."""

    def __init__(self, effect):
        self.effect = effect
        self.made = []
        self.dies_at = None
        self.broken = False

    def __call__(self, config, member="", *, watch=None):
        plain = to_dict(config)
        with RunStore(config.results_dir, plain, config.arms) as store:
            if store.reusable("s"):
                return None
            store.begin(proof("s"))
            reason = None
            names = [f"e{index}" for index in range(config.task.limit) if f"e{index}" not in store.done()]
            for left, name in zip(range(len(names) - 1, -1, -1), names, strict=True):
                self.made.append((store.fingerprint, name))
                if len(self.made) == self.dies_at:
                    raise KeyboardInterrupt
                store.append(rows(name, *self.effect(config)))
                if watch and left and (reason := watch(store.records())):
                    break
            summary = build_summary(
                fingerprint=store.fingerprint,
                task="xsum",
                model="made up",
                device="CPU",
                records=store.records(),
                arms=config.arms,
                metrics=("rougeL",),
                status="failed" if self.broken else "partial" if reason else "ok",
                reason="out of memory" if self.broken else reason,
                resamples=50,
            )
            store.finish(summary, provenance.finished(proof("s")))
        if self.broken:
            raise RunFailed(f"run {store.fingerprint} is failed: out of memory")
        return None


def effect(config):
    """Fewer blocks are faster and lose more; a depth of 4 is best."""
    return 2.0 - config.attn.topk / 80 - abs(config.draft.depth - 4) / 10, 0.8 / config.attn.topk


def truly(outcome):
    """Gain and KL of a setting without the chance of its examples."""
    typed = {"attn.topk": "16", "draft.depth": "6"} | dict(word.split("=") for word in outcome.words)
    attn, draft = SimpleNamespace(topk=int(typed["attn.topk"])), SimpleNamespace(depth=int(typed["draft.depth"]))
    return effect(SimpleNamespace(attn=attn, draft=draft))


@pytest.fixture
def studied(compose, tmp_path):
    machine = Machine(effect)
    plain = compose(f"task.limit={EXAMPLES}", f"results_dir={tmp_path}")

    def configured(words):
        raw = copy.deepcopy(plain)
        for word in words:
            key, _, value = word.partition("=")
            group, _, name = key.partition(".")
            raw[group][name] = yaml.safe_load(value)
        return resolve(raw)

    def search(trials, *, limit=None, sampler="tpe", name="s", content=SPACE, identity=IDENTITY):
        told = []
        bench = Bench(configured, to_dict, machine, MEASURE, EXAMPLES, tmp_path)
        base = space.base_values(to_dict(configured(())))
        with stored.opened(tmp_path / f"{name}.log", identity) as study:
            found = Search(study, space.parse(content), base, bench, limit)
            ended = found.run(Effort(trials, None, sampler, 0), told.append)
            return found, told, ended

    search.machine, search.folder = machine, tmp_path
    return search


def test_the_first_trial_is_the_default_and_all_are_counted_once(studied):
    found, told, ended = studied(8)
    outcomes = stored.outcomes(found.study)
    assert told[0].outcome.words == () and told[0].outcome.state == "measured" and ended == "8 trials"
    assert told[-1].costly == 8 == sum(one.state in ("measured", "pruned") for one in outcomes.values())
    names = [one.fingerprint for one in outcomes.values() if one.state != "repeated"]
    assert len(set(names)) == len(names) and len(studied.machine.made) == len(set(studied.machine.made))
    assert {"speed", "loss"} <= set(outcomes[0].plain()) and found.study.directions[0].name == "MAXIMIZE"


def test_hopeless_trials_are_stopped_after_three_examples(studied):
    found, _, _ = studied(20)
    outcomes = stored.outcomes(found.study)
    pruned = [one for one in outcomes.values() if one.state == "pruned"]
    assert pruned and all(3 <= one.examples < EXAMPLES and one.reason for one in pruned)
    truth = {name: truly(one) for name, one in outcomes.items()}
    whole = [truth[name] for name, one in outcomes.items() if one.state == "measured"]
    for name in (name for name, one in outcomes.items() if one.state == "pruned"):
        gain, kl = truth[name]
        assert kl > truth[0][1] or any(other > gain and lost <= kl for other, lost in whole), outcomes[name]


def test_the_front_and_the_choice_are_those_of_the_whole_space(studied):
    found, _, _ = studied(24, limit=float("inf"))
    outcomes = stored.outcomes(found.study)
    best = front.choose(found.tables(), 0, None)
    chosen = dict(word.split("=") for word in outcomes[best.number].words)
    default = {"attn.topk": "16", "draft.depth": "6"}
    assert int(chosen["attn.topk"]) == int(default["attn.topk"]) and chosen["draft.depth"] in ("3", "4", "5")
    speeds = [outcomes[number].speed.value for number in found.front()]
    losses = [outcomes[number].loss.value for number in found.front()]
    assert speeds == sorted(speeds, reverse=True) and losses == sorted(losses, reverse=True)


def test_every_sampler_ends_a_space_that_is_exhausted(studied, monkeypatch):
    monkeypatch.setattr("scripts.tuning.search.PATIENCE", 8)
    tiny = {"attn.topk": {"choices": [8, 16]}}
    for sampler in ("tpe", "nsga2", "random"):
        _, told, ended = studied(10, sampler=sampler, name=sampler, content=tiny)
        assert "known or impossible, after 2 trials" in ended
        assert [one.outcome.state for one in told].count("repeated") >= 8


def test_impossible_settings_do_not_end_the_study(studied):
    odd = {"attn.query": {"choices": ["first", "middle"]}}
    found, told, ended = studied(5, content=odd)
    states = {one.outcome.state for one in told}
    assert "impossible" in states and "known or impossible" in ended
    assert all("attn.query=middle" in one.outcome.reason for one in told if one.outcome.state == "impossible")
    assert found.front() == [0]


@pytest.mark.parametrize("dies_at", [4, 15])
def test_a_study_goes_on_after_its_process_died(studied, dies_at):
    studied.machine.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        studied(6)
    studied.machine.dies_at = None
    log = studied.folder / "s.log"
    log.write_bytes(log.read_bytes() + b'{"op_code":4,"worker')
    (studied.folder / "s.log.lock").symlink_to("nowhere")
    found, _, _ = studied(6)
    again = [pair for pair, group in itertools.groupby(sorted(studied.machine.made)) if len(list(group)) > 1]
    assert again == [studied.machine.made[dies_at - 1]], "only the example in flight runs twice"
    assert len([one for one in stored.outcomes(found.study).values() if one.state != "repeated"]) == 6
    undisturbed, _, _ = studied(6, name="t")
    settings = [{one.words for one in stored.outcomes(run.study).values()} for run in (found, undisturbed)]
    assert settings[0] == settings[1]


def test_a_study_is_of_one_configuration_and_of_one_process(studied):
    studied(1)
    with pytest.raises(ConfigError, match="another sources"):
        studied(1, identity=IDENTITY | {"sources": "c"})
    with (
        stored.opened(studied.folder / "s.log", IDENTITY),
        pytest.raises(ConfigError, match="in use by another process"),
    ):
        studied(1)


def test_a_broken_run_ends_the_study_only_where_it_is_the_first(studied):
    studied.machine.broken = True
    with pytest.raises(ConfigError, match=r"the configuration to start from is failed: run .* out of memory"):
        studied(2)
    studied.machine.broken = False
    studied(2)
    studied.machine.broken = True
    found, told, _ = studied(4)
    assert [one.outcome.state for one in told].count("failed") == 2 and found.front()[-1] in (0, 1, 2)


def test_the_budget_counts_the_time_of_all_calls(studied, monkeypatch):
    clock = itertools.count(step=10)
    monkeypatch.setattr("scripts.tuning.trials.time.monotonic", lambda: float(next(clock)))
    found, _, _ = studied(2)
    told = []
    with stored.opened(studied.folder / "s.log", IDENTITY) as study:
        found.study = study
        assert "the budget, after 3 trials" in found.run(Effort(9, 25.0, "random", 0), told.append)
    assert len([one for one in told if one.outcome.state != "repeated"]) == 1


BAR = {"rivals": {7: table(2.0, 0.02)}, "default": table(1.5, 0.05)}


@pytest.mark.parametrize(
    ("gain", "kl", "count", "limit", "why"),
    [
        (1.2, 0.03, 3, None, "times as fast as trial 7"),
        (1.2, 0.03, 2, None, None),
        (1.2, 0.01, 3, None, None),
        (2.6, 0.03, 3, None, None),
        (2.6, 0.09, 3, None, "above the default's"),
        (2.6, 0.09, 3, 0.2, None),
        (2.6, 0.09, 3, 0.01, "above the limit of 0.01"),
        (1.99, 0.0201, 3, None, None),
    ],
)
def test_a_trial_is_stopped_where_even_its_best_end_is_beaten(gain, kl, count, limit, why):
    found = pruning.hopeless(table(gain, kl, count, seed=5), pruning.Bar(limit=limit, **BAR))
    assert (found is None) if why is None else why in found


def test_examples_of_one_cluster_say_nothing():
    bar = pruning.Bar(limit=0.01, **BAR)
    assert pruning.hopeless(table(1.2, 0.09, 3, cluster="article"), bar) is None


def test_pairs_cancel_what_the_examples_differ_in():
    speed, loss = against(table(2.2, 0.03, seed=1), table(2.0, 0.04, seed=2))
    assert speed.ci[0] < 1.1 < speed.ci[1] and loss.ci[1] < 0
    alone = table(2.2, 0.03, seed=1).loss()
    assert loss.ci[1] - loss.ci[0] < alone.ci[1] - alone.ci[0]


def test_a_front_holds_what_nothing_beats():
    points = {0: (1.0, 0.5), 1: (2.0, 0.5), 2: (3.0, 0.9), 3: (2.0, 0.5), 4: (0.5, 0.1), 5: (2.9, 0.95)}
    assert front.pareto(points) == [2, 1, 4]
    assert front.pareto({}) == []


def test_the_choice_is_the_fastest_that_surely_keeps_to_the_limit():
    tables = {0: table(1.5, 0.05), 1: table(1.8, 0.03, seed=1), 2: table(2.5, 0.08, seed=2)}
    assert front.choose(tables, 0, None).number == 1
    assert front.choose(tables, 0, float("inf")).number == 2
    assert front.choose({0: tables[0], 2: tables[2]}, 0, None).number == 0
    assert "with 95% confidence" in front.choose(tables, 0, 0.06).rule
    half_sure = excess(tables[1], tables[0], 0.0).ci[1] * 1.001
    assert half_sure < excess(tables[1], tables[0], 0.0, level=0.95).ci[1]
    assert "by one standard error" in front.choose(tables, 0, half_sure).rule
    edge = tables[1].loss().value * 1.001
    assert "point estimate alone" in front.choose(tables, 0, edge).rule
    none = front.choose(tables, 0, 0.001)
    assert none.number == 1 and "no setting has a loss of at most 0.001" in none.rule


def test_the_verdict_says_what_was_found():
    default = table(1.5, 0.05)
    assert judge(default, table(1.8, 0.03, seed=1)).beats
    larger = judge(default, table(1.8, 0.06, seed=1))
    assert not larger.beats and "its loss is larger" in larger.words()
    slower = judge(default, table(1.2, 0.03, seed=1))
    assert not slower.beats and "it is not faster" in slower.words()
    even = judge(default, table(1.51, 0.03, seed=3, noise=0.2))
    assert not even.beats and even.plain()["beats"] is False


def articles(*names):
    return [Example(f"{name}{index}", name, {}, ()) for index, name in enumerate(names)]


def test_held_back_examples_share_no_cluster_with_tuned_ones():
    stream = articles(*"aabbccaddee")

    def ready(offset, count=3):
        if offset - 10 >= len(stream):
            raise TaskError("none")
        return stream[offset - 10 : offset - 10 + count]

    assert held_back(stream, stream[:2], ready, 10, 3).offset == 12
    assert held_back(stream, stream[:3], ready, 10, 3).offset == 17, "b goes on, and a comes back"
    with pytest.raises(ConfigError, match="--validate=3: 2 examples are left"):
        held_back(stream, stream[:8], ready, 10, 3)
    with pytest.raises(ConfigError, match="0 examples are left"):
        held_back(stream, stream, ready, 10, 3)
