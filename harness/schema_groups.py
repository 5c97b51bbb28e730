"""The settings of each configuration group: one frozen dataclass per choice, a comment and limits on every field.

Those of the sparsity groups are in `harness.schema_sparsity`. `harness.schema` puts all of them together into a Config
and holds the checks across groups; defaults live in conf/. No torch.
"""

from dataclasses import dataclass

from harness.fields import setting


@dataclass(frozen=True, slots=True)
class HubConfig:
    """Where the hub keeps a task's data (used with task.source=hub)."""

    path: str = setting("hub id of the data set")
    config: str | None = setting("configuration (subset) of the data set, null = its default")
    split: str = setting("split that is graded")
    revision: str = setting("pinned commit of the data set")


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """Settings that every task has. Lengths are in tokens of the model's tokenizer."""

    name: str = setting("the task; also picks its prompt and its grading")
    source: str = setting(
        "where examples come from: the bundled samples, your files, the hub", choices=("bundled", "files", "hub")
    )
    data_files: tuple[str, ...] = setting(
        "JSONL, JSONL.gz or parquet files with the hub's field names (task.source=files)"
    )
    limit: int | None = setting("examples to run, null = all there are", minimum=1)
    offset: int = setting("examples to skip at the start of the source", minimum=0)
    max_new_tokens: int = setting("tokens generated per example at most", minimum=1)
    min_prompt_tokens: int = setting("examples with a shorter prompt are skipped", minimum=0)
    max_prompt_tokens: int | None = setting(
        "longer prompts lose the middle of their document, null = what the model holds", minimum=1
    )
    style: str = setting(
        "chat = the model's chat template, plain = text with a cue at its end", choices=("chat", "plain")
    )
    shots: int = setting("demonstrations put before the question, never taken from graded items", minimum=0)
    stop: tuple[str, ...] = setting(
        "texts that end an answer, nothing after them is graded; [] = those of the task and style"
    )


@dataclass(frozen=True, slots=True)
class HubTaskConfig(TaskConfig):
    """A task that the hub has a data set for: xsum, squad, math, gsm8k."""

    hub: HubConfig = setting("where the hub keeps this task's data")


@dataclass(frozen=True, slots=True)
class NeedleConfig(TaskConfig):
    """Synthetic long documents with one fact to find."""

    context_tokens: int = setting("length of the synthetic document in tokens, roughly", minimum=200)
    depth: float | None = setting(
        "where the fact lies: 0 = start, 1 = end, null = spread evenly over the examples", minimum=0, maximum=1
    )


@dataclass(frozen=True, slots=True)
class SquadLongConfig(TaskConfig):
    """Questions on several paragraphs of one article."""

    bucket: str = setting("length of the joined paragraphs in tokens", choices=("4k", "8k"))
    questions: int = setting("questions taken from each article or meeting", minimum=1)


@dataclass(frozen=True, slots=True)
class QmsumConfig(TaskConfig):
    """Summaries of meetings asked for by a query."""

    questions: int = setting("questions taken from each article or meeting", minimum=1)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Settings that every model has; by itself the packaged SmolLM2-135M-Instruct."""

    kind: str = setting(
        "smollm2 = the packaged model, hf = a checkpoint, shape = random weights, carved_moe = the packaged model with "
        "its feed-forward layers carved into experts",
        choices=("smollm2", "hf", "shape", "carved_moe"),
    )
    name: str | None = setting("label in tables and results, null = the last part of model.path")
    dtype: str = setting(
        "number format of weights and cache; auto = bfloat16 where the device computes in it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("where the model runs; auto = cuda where present, else cpu", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True, slots=True)
class HfModelConfig(ModelConfig):
    """A checkpoint of the hub or of this machine."""

    path: str | None = setting(
        "hub id, folder or .gguf file; with model=carved_moe the file of scripts.carve_moe, null = where it writes it"
    )
    revision: str | None = setting("branch, tag or commit on the hub, null = its main branch")


@dataclass(frozen=True, slots=True)
class ShapeModelConfig(ModelConfig):
    """Random weights in the shape of a public architecture: speed without a download, no meaning in its text."""

    arch: str = setting("public architecture whose shape is used")
    layers: int | None = setting("decoder layers kept, null = all", minimum=1)


@dataclass(frozen=True, slots=True)
class CarvedModelConfig(ModelConfig):
    """The packaged model as a mixture of experts: its channels grouped, with a router fitted to them."""

    path: str | None = setting(
        "hub id, folder or .gguf file; with model=carved_moe the file of scripts.carve_moe, null = where it writes it"
    )
    active: int = setting("routed experts that a token uses", minimum=1)


@dataclass(frozen=True, slots=True)
class GreedyDecode:
    """The most probable token at every position."""

    name: str = setting("how tokens are picked, and drafts accepted")


@dataclass(frozen=True, slots=True)
class SampledDecode(GreedyDecode):
    """Tokens drawn from the target's distribution; speculation does not change it."""

    temperature: float = setting("divides the logits", above=0)
    top_p: float = setting("smallest set of tokens with this probability is kept, 1 = all", above=0, maximum=1)
    top_k: int | None = setting("most probable tokens kept, null = all", minimum=1)


@dataclass(frozen=True, slots=True)
class TypicalDecode(SampledDecode):
    """Drafts accepted where the target finds them typical: lossy."""

    epsilon: float = setting("probability that always suffices", above=0, maximum=1)
    delta: float = setting("share of exp(-entropy) that suffices where the target is unsure", above=0, maximum=1)


@dataclass(frozen=True, slots=True)
class TopkMatchDecode(GreedyDecode):
    """Drafts accepted among the target's best tokens: a lossy reference."""

    k: int = setting("target's most probable tokens that a draft token may be one of", minimum=1)


@dataclass(frozen=True, slots=True)
class EagerEngine:
    """Decoding step by step in plain torch."""

    name: str = setting("how steps are executed")
    threads: int | None = setting("CPU threads, null = all cores", minimum=1)
    prefill_chunk: int = setting("prompt tokens per prefill pass", minimum=1)
    packed: bool = setting("pre-pack linear weights where the CPU supports it: faster steps, more memory")
    warmup: int = setting("examples run before timing starts", minimum=0)
    batch_size: int = setting("sequences decoded in one step; a finished one makes room for the next", minimum=1)
    wave: int | None = setting(
        "examples prefilled together and decoded by one arm after the other, null = 1, with batches twice "
        "engine.batch_size",
        minimum=1,
    )


@dataclass(frozen=True, slots=True)
class CompiledEngine(EagerEngine):
    """Halves of layers as CPU kernels that the system's compiler builds at first use; elsewhere as eager."""


@dataclass(frozen=True, slots=True)
class CudaGraphEngine(EagerEngine):
    """The whole verification step captured once per form and replayed, with Triton kernels."""


@dataclass(frozen=True, slots=True)
class NoTrack:
    """No experiment tracker; the local files are complete without one."""

    name: str = setting("experiment tracker")


@dataclass(frozen=True, slots=True)
class WandbOffline(NoTrack):
    """Weights & Biases, written under results_dir and uploaded by `python -m scripts.sync`."""

    project: str = setting("W&B project")
    group: str | None = setting("W&B group that holds the runs of a sweep, null = the name of the sweep")
    texts: bool = setting("outputs of the examples too; false = numbers alone, texts stay in records.jsonl")


@dataclass(frozen=True, slots=True)
class Wandb(WandbOffline):
    """Weights & Biases, uploaded while running."""

    entity: str | None = setting("W&B user or team, null = the account's default")
