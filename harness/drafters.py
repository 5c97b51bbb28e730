"""From the configuration to drafters: what they need of target and disk, and one per arm and row of the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from harness import models, schema
from harness.engine.acceptance import Greedy, Rule
from harness.engine.acceptance_relaxed import TopkMatch, Typical
from harness.engine.acceptance_sampled import Sampled
from harness.engine.cache import KVCache
from harness.engine.drafting.base import Drafter, NoDrafter
from harness.engine.drafting.combined import CombinedDrafter
from harness.engine.drafting.eagle3 import Eagle3Drafter
from harness.engine.drafting.expansion import Growth, Pace
from harness.engine.drafting.expansion import room as room_to_grow
from harness.engine.drafting.lookup import LookupDrafter
from harness.engine.drafting.model import ModelDrafter
from harness.engine.drafting.oracle import OracleDrafter
from harness.engine.drafting.pace import ConfidencePace, GainPace, StepCost
from harness.engine.drafting.selfsparse import SelfSparseDrafter
from harness.engine.drafting.suffix import SharedHistory, SuffixDrafter
from harness.engine.model import eagle3, loading
from harness.engine.model.engines import make_step
from harness.engine.model.families import UnsupportedModel, adapt, check_supported, max_positions, model_shape
from harness.engine.model.step import Segment, Step
from harness.engine.model.verification import Verification
from harness.engine.sampling import Sampling
from harness.evidence import provenance
from harness.fields import ConfigError, show
from harness.schema_drafts import TRAIN_DRAFT, drafters
from sparse.budget import AttentionBudget, Sparsity
from sparse.cost import ModelShape

_TRIALS = 5
_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(slots=True)
class Drafting:
    """What the drafters of a run share.

    Attributes:
        config: resolved.
        step, cache: the target's.
        context: positions that are typically before a step, where steps are measured for ``adaptive=gain``.
        clock: seconds.
        head: of ``draft=eagle3``.
        model: step of the draft model of ``draft=model``.
        costs: measured times of steps and drafts, per drafter and budget.
    """

    config: schema.Config
    step: Step
    cache: KVCache
    context: int
    clock: Callable[[], float]
    head: eagle3.Eagle3Head | None = None
    model: Step | None = None
    costs: dict[tuple[schema.GrowingDraft, Sparsity], StepCost] = field(default_factory=dict)

    def of_arm(self, sparsity: Sparsity) -> list[Drafter]:
        """One drafter per row of the cache for an arm with these budgets."""
        draft, rows = self.config.draft, range(len(self.cache.lengths))
        suffixes = [part for _, part in drafters(draft) if isinstance(part, schema.SuffixDraft) and part.earlier]
        history = SharedHistory(suffixes[0].max_match) if suffixes else None
        cache = self._model_cache(len(rows))
        if isinstance(draft, schema.CombinedDraft):
            first, second = draft.parts
            return [
                CombinedDrafter(
                    self._drafter(first, row, sparsity, history, cache),
                    self._drafter(second, row, sparsity, history, cache),
                    draft.min_match,
                    draft.join,
                )
                for row in rows
            ]
        return [self._drafter(draft, row, sparsity, history, cache) for row in rows]

    def _drafter(
        self,
        draft: schema.NoDraft,
        row: int,
        sparsity: Sparsity,
        history: SharedHistory | None,
        cache: KVCache | None,
    ) -> Any:
        if not isinstance(draft, schema.GrowingDraft):
            return NoDrafter()
        grown, pace = growth(draft), self._pace(draft, sparsity)
        sample = sampling(self.config) if getattr(draft, "sample", False) else None
        if isinstance(draft, schema.LookupDraft):
            return LookupDrafter(grown, draft.max_ngram, pace)
        if isinstance(draft, schema.SuffixDraft):
            return SuffixDrafter(grown, draft.max_match, draft.factor, history, pace)
        if isinstance(draft, schema.OracleDraft):
            return OracleDrafter(grown, draft.acceptance, self.step.weights.shape.vocab, draft.forced)
        if isinstance(draft, schema.SelfSparseDraft):
            return SelfSparseDrafter(
                self.step,
                self.cache,
                row,
                grown,
                sparsity=self_budget(self.config, draft),
                left_out=frozenset(draft.skip_layers),
                sample=sample,
                pace=pace,
            )
        if isinstance(draft, schema.Eagle3Draft):
            assert self.head is not None
            embedding = self.step.weights.embedding
            return Eagle3Drafter(self.head, embedding, grown, sample=sample, pace=pace, window=draft.window)
        assert self.model is not None and cache is not None
        return ModelDrafter(self.model, cache, row, grown, sample=sample, pace=pace)

    def _model_cache(self, rows: int) -> KVCache | None:
        if self.model is None:
            return None
        return self.model.new_cache(self.cache.capacity, AttentionBudget(), rows)

    def _pace(self, draft: schema.GrowingDraft, sparsity: Sparsity) -> Pace | None:
        if draft.adaptive == "confidence":
            return ConfidencePace(draft.min_confidence)
        if draft.adaptive == "gain":
            key = (draft, sparsity)
            if key not in self.costs:
                self.costs[key] = StepCost.fit(self._steps(sparsity, draft.size), self._drafting(draft, sparsity))
            return GainPace(self.costs[key])
        return None

    def _tokens(self, count: int) -> list[int]:
        """Random tokens, so that experts are spread as in text."""
        random = Random(count)
        return [random.randrange(self.step.weights.shape.vocab) for _ in range(count)]

    def _place(self, most: int) -> int:
        """A context of the usual length that leaves room for ``most`` tokens."""
        length = max(1, min(self.context, self.step.weights.positions - most))
        self.cache.truncate(0, 0)
        self.cache.advance(0, length)
        return length

    def _steps(self, sparsity: Sparsity, size: int) -> list[tuple[int, float]]:
        """(tokens, seconds) of verification steps on a context of the usual length."""
        sizes = [count for count in _SIZES if count <= size + 1]
        samples, length = [], self._place(sizes[-1])
        for tokens in sizes:
            run, segment = Verification(sparsity), Segment(0, self._tokens(tokens))
            for trial in range(_TRIALS + 1):
                start = self.clock()
                self.step.run([segment], self.cache, run)
                if trial:
                    samples.append((tokens, self.clock() - start))
                self.cache.truncate(0, length)
        self.cache.truncate(0, 0)
        return samples

    def _drafting(self, draft: schema.GrowingDraft, sparsity: Sparsity) -> float:
        """Seconds per draft token of a drafter that runs a model, levels of a tree shared out; 0 for the others."""
        if not isinstance(draft, schema.ModelDraft | schema.SelfSparseDraft | schema.Eagle3Draft) or draft.depth < 2:
            return 0.0
        length, taps = self._place(draft.size + 1), len(self.step.taps)
        drafter = self._drafter(replace(draft, adaptive="never"), 0, sparsity, None, self._model_cache(1))
        features = torch.zeros(
            length,
            taps * self.step.weights.shape.hidden,
            dtype=self.step.weights.dtype,
            device=self.step.weights.device,
        )
        drafter.reset(self._tokens(length), features[1:])
        drafter.observe([1], features[:1])
        times: dict[int, list[float]] = {1: [], draft.depth: []}
        for _ in range(_TRIALS + 1):
            for depth, seconds in times.items():
                start = self.clock()
                drafter.propose(depth)
                seconds.append(self.clock() - start)
        self.cache.truncate(0, 0)
        shortest, longest = (min(seconds[1:]) for seconds in times.values())
        return max(0.0, longest - shortest) / ((draft.depth - 1) * draft.topk)


def rule(config: schema.Config) -> Rule:
    """How drafts are accepted."""
    decode = config.decode
    if isinstance(decode, schema.TypicalDecode):
        return Typical(sampling(config), decode.epsilon, decode.delta)
    if isinstance(decode, schema.SampledDecode):
        return Sampled(sampling(config))
    return TopkMatch(decode.k) if isinstance(decode, schema.TopkMatchDecode) else Greedy()


def sampling(config: schema.Config) -> Sampling:
    """How tokens are drawn; only for decodings that draw."""
    decode = config.decode
    assert isinstance(decode, schema.SampledDecode)
    return Sampling(decode.temperature, decode.top_p, decode.top_k)


def growth(draft: schema.GrowingDraft) -> Growth:
    """How far drafts grow."""
    return Growth(draft.depth, draft.topk, draft.total)


def depth(config: schema.Config) -> int:
    """Draft tokens on a path at most; 0 without drafts."""
    return max((part.depth for _, part in drafters(config.draft)), default=0)


def room(config: schema.Config) -> int:
    """Cache positions beyond the sequence that drafting and verification may fill."""
    parts = [part for _, part in drafters(config.draft)]
    return max([1 + getattr(config.draft, "size", 0), *(room_to_grow(growth(part)) for part in parts)])


def self_budget(config: schema.Config, draft: schema.SelfSparseDraft) -> Sparsity:
    """What the target reads while it drafts for itself; its blocks are those of the cache."""
    if draft.blocks is None:
        return Sparsity()
    attn = config.attn
    if isinstance(attn, schema.BlockTopkAttention):
        return Sparsity(AttentionBudget(topk=draft.blocks, block_size=attn.block_size))
    return Sparsity(AttentionBudget(topk=draft.blocks))


def cache_budgets(config: schema.Config) -> list[AttentionBudget]:
    """Budgets of drafters that read the target's cache, whose block summaries it must keep."""
    own = [part for _, part in drafters(config.draft) if isinstance(part, schema.SelfSparseDraft)]
    return [self_budget(config, part).attention for part in own]


def head_folder(config: schema.Config, draft: schema.Eagle3Draft) -> Path:
    """Where the head lies."""
    if draft.path is not None:
        return Path(draft.path).expanduser()
    return loading.cache_dir() / "eagle3" / str(config.model.name)


def memory(config: schema.Config, shape: ModelShape, dtype: torch.dtype, positions: int) -> int:
    """Bytes that drafters need beside the target, roughly: weights, a cache in each drafting arm, features.

    Args:
        config: resolved, its drafters checked.
        shape: of the target.
        dtype: of both.
        positions: of a cache, all rows together.
    """
    arms, found = len({"dense", "sparse"} & set(config.arms)), 0
    for _, part in drafters(config.draft):
        if isinstance(part, schema.ModelDraft):
            own = shape
            if part.path is not None:
                own = model_shape(models.library_config(_draft_model(config, part)), dtype)
                found += own.weight_bytes + own.itemsize * own.hidden * own.vocab
            found += arms * own.kv_bytes_per_token * positions
        elif isinstance(part, schema.Eagle3Draft):
            found += 3 * shape.hidden * shape.itemsize * positions
    return found


def taps(config: schema.Config, shape: ModelShape) -> tuple[int, ...]:
    """Target layers whose inputs the drafter reads."""
    reads = any(isinstance(part, schema.Eagle3Draft) for _, part in drafters(config.draft))
    return eagle3.feature_layers(shape.layers) if reads else ()


def check(config: schema.Config, shape: ModelShape, tokenizer: Any, capacity: int) -> None:
    """Refuse drafters that do not fit the target, before any weights are loaded.

    Args:
        config: resolved.
        shape: of the target.
        tokenizer: of the target.
        capacity: positions of the longest prompt and its answer.

    Raises:
        ConfigError: one line.
    """
    for path, part in drafters(config.draft):
        if isinstance(part, schema.Eagle3Draft):
            _check_head(config, part, path, shape)
        elif isinstance(part, schema.ModelDraft) and part.path is not None:
            if isinstance(config.model, schema.ShapeModelConfig):
                raise ConfigError(f"{path}.path={part.path}: model=shape reads bytes, no draft model does; choose null")
            _check_model(config, part, path, shape, tokenizer, capacity)
        elif isinstance(part, schema.SelfSparseDraft):
            _check_blocks(config, part, path, capacity)
            layers = part.skip_layers
            if layers and (layers[-1] >= shape.layers or len(layers) == shape.layers):
                raise ConfigError(
                    f"{path}.skip_layers={show(layers)}: the model has layers 0 to {shape.layers - 1}, and at "
                    "least one must run"
                )


def _check_blocks(config: schema.Config, draft: schema.SelfSparseDraft, path: str, capacity: int) -> None:
    budget = self_budget(config, draft).attention
    whole = (capacity - 1) // budget.block_size
    if not budget.is_dense and not budget.skips(0, whole * budget.block_size):
        raise ConfigError(
            f"{path}.blocks={draft.blocks}: the longest sequence of this run fills {whole} blocks of "
            f"{budget.block_size}, so the draft would cost as much as the target (valid: below {whole})"
        )


def _check_head(config: schema.Config, draft: schema.Eagle3Draft, path: str, shape: ModelShape) -> None:
    folder = head_folder(config, draft)
    if not (folder / "config.json").is_file():
        where = "there is no head where scripts.train_draft writes it" if draft.path is None else "no head lies there"
        raise ConfigError(f"{path}.path={show(draft.path)}: {where}; make one with {TRAIN_DRAFT}")
    try:
        eagle3.feature_layers(shape.layers)
        head = eagle3.read_shape(folder, shape.layers)
    except eagle3.HeadError as error:
        raise ConfigError(f"{path}.path={show(draft.path)}: {error}") from error
    if (head.features, head.hidden, head.vocab) != (3 * shape.hidden, shape.hidden, shape.vocab):
        raise ConfigError(
            f"{path}.path={show(draft.path)}: made for a target of width {head.features // 3}, embeddings of "
            f"{head.hidden} and {head.vocab} tokens; this one has {shape.hidden}, {shape.hidden} and {shape.vocab}"
        )


def _draft_model(config: schema.Config, draft: schema.ModelDraft) -> schema.HfModelConfig:
    """The draft model as a model group would describe it."""
    model = config.model
    return schema.HfModelConfig("hf", None, model.dtype, model.device, draft.path, draft.revision)


def _check_model(
    config: schema.Config, draft: schema.ModelDraft, path: str, shape: ModelShape, tokenizer: Any, capacity: int
) -> None:
    model = _draft_model(config, draft)
    try:
        found = models.library_config(model)
        check_supported(found)
        own = models.tokenizer(model)
    except (loading.ModelError, UnsupportedModel) as error:
        raise ConfigError(str(error).replace("model.path", f"{path}.path", 1)) from error
    if int(found.vocab_size) != shape.vocab or own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{path}.path={draft.path}: its vocabulary of {found.vocab_size} tokens is not the target's of "
            f"{shape.vocab}; choose a model of the same family"
        )
    if max_positions(found) < capacity:
        raise ConfigError(
            f"{path}.path={draft.path}: holds {max_positions(found)} positions, prompts and answers need {capacity}; "
            "set task.max_prompt_tokens"
        )


def load(config: schema.Config, drafting: Drafting, dtype: torch.dtype, device: torch.device) -> None:
    """Load what the drafters need beside the target.

    Raises:
        ConfigError: weights cannot be read.
    """
    for path, part in drafters(config.draft):
        try:
            if isinstance(part, schema.Eagle3Draft):
                drafting.head = eagle3.load_head(head_folder(config, part), dtype, device, packed=config.engine.packed)
            elif isinstance(part, schema.ModelDraft):
                drafting.model = drafting.step
                if part.path is not None:
                    model = _draft_model(config, part)
                    library = models.library_model(model, models.library_config(model), dtype, device, config.seed)
                    engine = "eager" if config.engine.name == "cuda_graph" else config.engine.name
                    drafting.model = make_step(adapt(library, packed=config.engine.packed), engine=engine)
        except (loading.ModelError, UnsupportedModel, eagle3.HeadError) as error:
            raise ConfigError(f"{path}.path={show(getattr(part, 'path', None))}: {error}") from error


def file_hashes(config: schema.Config) -> dict[str, str]:
    """Hashes of the files that the drafters are read from, for the fingerprint.

    Raises:
        ConfigError: a head cannot be read.
    """
    found = {}
    for path, part in drafters(config.draft):
        if isinstance(part, schema.Eagle3Draft):
            folder = head_folder(config, part)
            weights = next((folder / name for name in eagle3.WEIGHTS if (folder / name).is_file()), folder)
            if not weights.is_file():
                raise ConfigError(f"{path}.path={show(part.path)}: no head lies there; make one with {TRAIN_DRAFT}")
            found[f"{path}.head"] = models.file_sha256(f"{path}.path", weights)
            found[f"{path}.head_config"] = models.file_sha256(f"{path}.path", folder / "config.json")
        elif isinstance(part, schema.ModelDraft) and part.path is not None:
            local = Path(part.path).expanduser()
            found[f"{path}.model"] = provenance.content_hash(local) or part.path
    return found
