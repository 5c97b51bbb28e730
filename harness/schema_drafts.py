"""The settings of the drafters and the checks between them and the rest. No torch."""

from dataclasses import dataclass

from harness.fields import ConfigError, setting, show

TRAIN_DRAFT = "python -m scripts.train_draft"
_PATH = (
    "what drafts: hub id, folder or .gguf file of a model, null = the target's own weights; or folder of an EAGLE-3 "
    "head, null = where scripts.train_draft writes it"
)
_SAMPLE = "draw draft tokens from the drafter's distribution instead of taking its best ones (decode=sample)"


@dataclass(frozen=True, slots=True)
class NoDraft:
    """No drafter: every step decodes one token."""

    name: str = setting("who proposes the tokens that a step verifies")


@dataclass(frozen=True, slots=True)
class GrowingDraft(NoDraft):
    """What every drafter has: the form of its drafts and when it stops early."""

    depth: int = setting("draft tokens on a path at most", minimum=1, maximum=256)
    topk: int = setting(
        "children of a draft token at most, and tokens of a level that grow on; 1 = chains", minimum=1, maximum=256
    )
    total: int | None = setting("draft tokens of a step at most, null = depth * topk", minimum=1, maximum=1024)
    adaptive: str = setting(
        "when a draft ends early: never, confidence = below draft.min_confidence, gain = when the measured cost of one "
        "more token exceeds its expected gain",
        choices=("never", "confidence", "gain"),
    )
    min_confidence: float = setting(
        "least chance of acceptance by the drafter's own estimate (adaptive=confidence)", above=0, below=1
    )

    @property
    def size(self) -> int:
        """Draft tokens of a step at most."""
        return self.depth * self.topk if self.total is None else self.total


@dataclass(frozen=True, slots=True)
class LookupDraft(GrowingDraft):
    """Prompt lookup: drafts copied from behind earlier occurrences of the last n-gram."""

    max_ngram: int = setting("longest n-gram of recent tokens looked up", minimum=1, maximum=64)


@dataclass(frozen=True, slots=True)
class SuffixDraft(GrowingDraft):
    """Drafts from a suffix automaton over prompt and output, longer where more matches."""

    max_match: int = setting("longest match that counts, in tokens", minimum=1, maximum=256)
    factor: float = setting("draft tokens on a path per matched token at most", above=0)
    earlier: bool = setting("also draft from earlier outputs of the run; acceptance then depends on their order")


@dataclass(frozen=True, slots=True)
class ModelDraft(GrowingDraft):
    """A smaller model with the target's vocabulary."""

    path: str | None = setting(_PATH)
    revision: str | None = setting("branch, tag or commit on the hub, null = its main branch")
    sample: bool = setting(_SAMPLE)


@dataclass(frozen=True, slots=True)
class SelfSparseDraft(GrowingDraft):
    """The target itself, made cheap by a small KV budget or by leaving layers out."""

    blocks: int | None = setting(
        "cache blocks (of attn.block_size, else of 16) kept per KV head while drafting, null = all", minimum=2
    )
    skip_layers: tuple[int, ...] = setting("layers left out while drafting", minimum=0)
    sample: bool = setting(_SAMPLE)


@dataclass(frozen=True, slots=True)
class Eagle3Draft(GrowingDraft):
    """An EAGLE-3 head on hidden states of the target."""

    path: str | None = setting(_PATH)
    window: int | None = setting("last tokens that the head attends to, null = all; short for long prompts", minimum=1)
    sample: bool = setting(_SAMPLE)


@dataclass(frozen=True, slots=True)
class OracleDraft(GrowingDraft):
    """Replays the greedy continuation with a chosen acceptance: for studies of speed."""

    acceptance: float = setting("chance that a draft token is right once its parent is", minimum=0, maximum=1)
    forced: bool = setting(
        "keep the right tokens whatever the target says, so that sparse arms and random weights have this acceptance "
        "too (outputs are then those of the continuation)"
    )


@dataclass(frozen=True, slots=True)
class CombinedDraft(NoDraft):
    """A suffix drafter first, a model where the match is short."""

    min_match: int = setting("matched tokens from which on the suffix drafter's draft is taken", minimum=1)
    second: str = setting("who drafts where the match is shorter", choices=("model", "selfsparse", "eagle3"))
    join: bool = setting("where the match is shorter, verify the drafts of both in one tree")
    suffix: SuffixDraft = setting("the first drafter")
    model: ModelDraft = setting("the second drafter with draft.second=model")
    selfsparse: SelfSparseDraft = setting("the second drafter with draft.second=selfsparse")
    eagle3: Eagle3Draft = setting("the second drafter with draft.second=eagle3")

    @property
    def parts(self) -> tuple[GrowingDraft, GrowingDraft]:
        """Both drafters, the first one first."""
        return self.suffix, {"model": self.model, "selfsparse": self.selfsparse, "eagle3": self.eagle3}[self.second]

    @property
    def size(self) -> int:
        """Draft tokens of a step at most."""
        sizes = [part.size for part in self.parts]
        return sum(sizes) if self.join else max(sizes)


def drafters(draft: NoDraft) -> list[tuple[str, GrowingDraft]]:
    """Every drafter that takes part, with the prefix of its keys."""
    if isinstance(draft, CombinedDraft):
        return [("draft.suffix", draft.suffix), (f"draft.{draft.second}", draft.parts[1])]
    return [("draft", draft)] if isinstance(draft, GrowingDraft) else []


def check_draft(draft: NoDraft, decode: str) -> None:
    """Refuse drafters whose keys contradict each other or the decoding.

    Args:
        draft: the drafter.
        decode: name of the decoding group.

    Raises:
        ConfigError: one line.
    """
    for path, part in drafters(draft):
        if part.size < part.depth:
            raise ConfigError(
                f"{path}.total={part.total}: less than {path}.depth={part.depth}, so the longest path would not fit; "
                f"choose at least {part.depth}"
            )
        if part.topk == 1 and part.size > part.depth:
            raise ConfigError(
                f"{path}.total={part.total}: with {path}.topk=1 a draft is a chain of {part.depth} tokens; choose "
                f"null, or more with {path}.topk"
            )
        if getattr(part, "sample", False) and decode != "sample":
            raise ConfigError(
                f"{path}.sample=true: decode={decode} compares with the target's own choice; choose decode=sample or "
                f"{path}.sample=false"
            )
        if isinstance(part, SelfSparseDraft):
            layers = part.skip_layers
            if part.blocks is None and not layers:
                raise ConfigError(
                    f"{path}.blocks=null: with {path}.skip_layers=[] the draft costs as much as the target; set one"
                )
            if list(layers) != sorted(set(layers)):
                raise ConfigError(f"{path}.skip_layers={show(layers)}: name each layer once, in ascending order")
    if isinstance(draft, CombinedDraft) and draft.join and getattr(draft.parts[1], "sample", False):
        raise ConfigError(
            f"draft.join=true: drawn drafts cannot be joined with others; choose draft.{draft.second}.sample=false"
        )
    if isinstance(draft, OracleDraft) and draft.adaptive != "never":
        raise ConfigError(f"draft.adaptive={draft.adaptive}: draft=oracle chooses its acceptance; choose never")
    if isinstance(draft, OracleDraft) and decode != "greedy":
        raise ConfigError(f"draft=oracle: replays the greedy continuation; decode={decode} has none, choose greedy")
