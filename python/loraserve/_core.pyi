"""The Rust core, as Python sees it: indices and bytes go in, plain values and numpy arrays come out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypedDict, final

import numpy as np
from numpy.typing import NDArray

from loraserve.errors import LoraserveError
from loraserve.models.ops import Linear

__all__ = [
    "Activation",
    "AdapterLayout",
    "AdapterSlice",
    "AdapterStats",
    "BaseShape",
    "Batch",
    "CpuBaseLinears",
    "CpuKernels",
    "CpuProgram",
    "CpuRecording",
    "CpuStep",
    "CudaKernels",
    "CudaStep",
    "FlowStats",
    "HostSampler",
    "HostTier",
    "HostTierStats",
    "LoadPace",
    "MessageShape",
    "PackedAdapter",
    "PackedLinear",
    "PendingSamples",
    "PoolPretouch",
    "QuantizedWeight",
    "Receipt",
    "RequestEnd",
    "RequestOutputs",
    "SampleArrays",
    "SampledRows",
    "Sampler",
    "Scheduler",
    "SchedulerOutput",
    "SchedulerStats",
    "Simulated",
    "__version__",
    "check_adapter",
    "check_cuda",
    "count_json",
    "cuda_facts",
    "default_isa",
    "ggml_format",
    "load_adapter",
    "recognise_file",
    "routing_policies",
    "row_digests",
    "simulate",
    "usable_cores",
]

__version__: str

# rust/py/src/batch.rs

class _StepArrays(TypedDict):
    token_ids: NDArray[np.int32]  # [T]
    positions: NDArray[np.int32]  # [T]
    slot_mapping: NDArray[np.int32]  # [T] page * block_size + offset, where a token's KV is written
    query_indptr: NDArray[np.int32]  # [S + 1] first token of each sequence
    context_lens: NDArray[np.int32]  # [S] tokens in the KV cache after this step
    block_table: NDArray[np.int32]  # pages of all sequences, in token order
    block_table_indptr: NDArray[np.int32]  # [S + 1] first entry of each sequence in `block_table`
    logits_indices: NDArray[np.int32]  # [L] rows of T that are sampled, ascending
    wave_indptr: NDArray[np.int32]  # [W + 1] first segment of each wave
    seg_start: NDArray[np.int32]  # [G] first token; segments are disjoint and ascending within a wave
    seg_end: NDArray[np.int32]  # [G] one past the last token
    seg_slot: NDArray[np.int32]  # [G]
    seg_weight: NDArray[np.float32]  # [G] the request's own weight, without the adapter's scale

@final
class Batch:
    """One step's work: T tokens of S sequences, L of them sampled, W waves of G adapter segments together.

    Its arrays stay in Rust, from the scheduler to the kernels. Sequences that decode come first; within each
    phase those with the same adapters and weights are neighbours. One made from `arrays` is of no requests.
    Raises TypeError for an array of another type, or one that is not contiguous.
    """

    def __new__(
        cls, arrays: _StepArrays, num_prefill_tokens: int, hidden_indices: list[int] = ...
    ) -> Batch: ...
    @property
    def num_tokens(self) -> int:
        """T"""
    @property
    def num_seqs(self) -> int:
        """S"""
    @property
    def num_samples(self) -> int:
        """L"""
    @property
    def num_waves(self) -> int:
        """W, the most adapters of one request."""
    @property
    def num_items(self) -> int:
        """Pieces of up to 64 rows of one adapter, all waves together, of a step that only decodes."""
    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of sequences that do not merely decode; they come last."""
    @property
    def slot_end(self) -> int:
        """One past the highest KV slot that the step writes, as in `slot_mapping`; 0 without tokens."""
    @property
    def request_ids(self) -> list[int]:
        """[S] whose the sequences are."""
    @property
    def sample_request_ids(self) -> list[int]:
        """[L] whose the sampled rows are; guesses give a sequence several, which are neighbours."""
    @property
    def draft_token_ids(self) -> list[int]:
        """[L] what each sample is guessed to be, -1 where nothing is; empty in a step without guesses."""
    @property
    def num_hidden(self) -> int:
        """H, rows of T whose hidden states are given out."""
    @property
    def hidden_indices(self) -> NDArray[np.int32]:
        """[H] which rows of T these are, ascending; a copy."""
    @property
    def hidden_spans(self) -> list[tuple[int, int, int]]:
        """Whose they are, in order: request, position of the first row in its prompt, number of rows."""
    def to_bytes(self) -> bytes:
        """For `from_bytes` in another process, which computes the same step."""
    @staticmethod
    def from_bytes(data: bytes) -> Batch:
        """The arrays, of no requests. Raises ValueError for bytes that are cut, or too many."""
    def step_shape(self) -> tuple[tuple[float, float, float, float, float, float], list[int]]:
        """(rows, samples, prompts' pairs, contexts' tokens, adapters' rows, segments); distinct slots."""
    def arrays(self) -> _StepArrays:
        """Copies of the arrays, for a backend that computes in Python."""

# rust/py/src/stats.rs

@final
class SchedulerStats:
    """Present load and counts since start; pages are of the one pool."""

    @property
    def num_running(self) -> int:
        """Requests admitted and not ended, preempted ones left out."""
    @property
    def num_waiting(self) -> int:
        """Accepted requests that are not running."""
    @property
    def num_waiting_for_adapters(self) -> int:
        """Waiting requests that an adapter is missing for."""
    @property
    def num_registered_adapters(self) -> int:
        """By content, with those that are unloaded once their requests end."""
    @property
    def num_resident_adapters(self) -> int:
        """By content: those whose bytes are in the pool."""
    @property
    def num_pages(self) -> int:
        """Pages of the pool, whoever has them."""
    @property
    def num_free_pages(self) -> int:
        """Pages that hold nothing."""
    @property
    def num_kv_pages(self) -> int:
        """Pages of running sequences."""
    @property
    def num_adapter_pages(self) -> int:
        """Pages of adapters, of those being loaded too."""
    @property
    def num_pinned_pages(self) -> int:
        """What pinned adapters take or will take."""
    @property
    def num_cached_pages(self) -> int:
        """Idle pages that the prefix cache keeps."""
    @property
    def num_adapter_loads(self) -> int:
        """Loads begun, failed ones too."""
    @property
    def num_adapter_evictions(self) -> int:
        """Idle adapters that made room for others."""
    @property
    def num_preemptions(self) -> int:
        """Running requests that gave up their pages and wait once more."""
    @property
    def num_prefix_hit_tokens(self) -> int:
        """Tokens whose KV was found in the prefix cache when their request was admitted."""
    @property
    def num_draft_tokens(self) -> int:
        """Tokens that were guessed and checked."""
    @property
    def num_accepted_tokens(self) -> int:
        """Those of them that came."""

@final
class AdapterStats:
    """One registered name now, and the past of its content, which other names may share."""

    @property
    def name(self) -> str:
        """What requests call it."""
    @property
    def id(self) -> int:
        """Of its content; other names may have the same."""
    @property
    def content_hash(self) -> str:
        """As it was registered with."""
    @property
    def nbytes(self) -> int:
        """Bytes of its packed weights."""
    @property
    def state(self) -> Literal["registered", "loading", "resident", "failed", "unloading"]:
        """Of its content; "unloading" is the name's own: it is refused, accepted requests go on."""
    @property
    def num_running(self) -> int:
        """Running requests of its content."""
    @property
    def num_waiting(self) -> int:
        """Waiting requests of its content."""
    @property
    def is_pinned(self) -> bool:
        """Under this name."""
    @property
    def num_loads(self) -> int:
        """Loads begun, failed ones too."""
    @property
    def num_load_failures(self) -> int:
        """Loads that failed."""
    @property
    def num_evictions(self) -> int:
        """Times it made room for others."""
    @property
    def num_uninvoked(self) -> int:
        """Requests that named it and whose prompt did not invoke it."""

@final
class FlowStats:
    """Who shares the engine now, and what it was served."""

    @property
    def name(self) -> str:
        """As requests say it."""
    @property
    def weight(self) -> float:
        """Of its share, as its last request says it."""
    @property
    def num_waiting(self) -> int:
        """Accepted requests that are not running."""
    @property
    def num_running(self) -> int:
        """Requests admitted and not ended, preempted ones left out."""
    @property
    def num_prompt_tokens(self) -> int:
        """Computed, each once; those that the prefix cache had are left out."""
    @property
    def num_generated_tokens(self) -> int:
        """Of its answers."""
    @property
    def lead(self) -> float:
        """How far it is ahead of the waiting flow that was served least; 0 where none waits.

        In tokens over weight, generated ones twice.
        """

# rust/py/src/scheduler.rs

@final
class SchedulerOutput:
    """What to do next: the moves in order, then start the loads, then run the batch and commit it."""

    @property
    def moves(self) -> list[tuple[int, int, int, int]]:
        """(slot, src_page, dst_page, num_pages); source and destination may overlap."""
    @property
    def loads(self) -> list[tuple[int, int, int, int]]:
        """(adapter_id, slot, first_page, num_pages); each is answered once."""
    @property
    def admitted(self) -> list[tuple[int, int]]:
        """(request id, prompt tokens found in the prefix cache) of requests that begin with this step."""
    @property
    def batch(self) -> Batch | None:
        """What to run; None if nothing can run now."""

@final
class RequestOutputs:
    """What has come of requests: tokens that were not their last ones, then ends."""

    @property
    def request_ids(self) -> list[int]:
        """Of the requests that were given a token and go on, as `submit` gave them."""
    @property
    def token_ids(self) -> list[int]:
        """The token of each of `request_ids`."""
    @property
    def ends(self) -> list[RequestEnd]:
        """Of requests that have ended."""

@final
class RequestEnd:
    """The end of a request, by a finish reason or an error, with the token that came with it."""

    @property
    def request_id(self) -> int:
        """As `submit` gave it."""
    @property
    def token_id(self) -> int | None:
        """Its last token, None where it ended between two."""
    @property
    def finish_reason(self) -> Literal["stop", "length", "abort"] | None:
        """Why it ended, None where `error` says why."""
    @property
    def error(self) -> LoraserveError | None:
        """The object that `finish` or `adapter_load_failed` was given; requests may share it."""

@final
class Scheduler:
    """Decides which pages, slots, tokens and segments each step uses; for one thread at a time.

    A step computes `max_batched_tokens`, of these `max_prefill_tokens` of prompts, and beside decodes of
    their flow `min_prefill_tokens` or twice as many as decode. `max_running_adapter_nbytes`: of different
    adapters that run at once. None sets no limit. Raises InvalidRequestError for a setting out of range.
    """

    def __new__(
        cls,
        *,
        num_pages: int,
        page_nbytes: int,
        block_size: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_model_len: int,
        prefix_caching: bool = True,
        max_num_slots: int | None = None,
        max_draft_tokens: int = 0,
        max_prefill_tokens: int | None = None,
        min_prefill_tokens: int | None = None,
        max_running_adapter_nbytes: int | None = None,
    ) -> Scheduler: ...
    def register_adapter(
        self,
        name: str,
        content_hash: str,
        nbytes: int,
        *,
        replace: bool = False,
        invocation_tokens: list[int] = ...,
    ) -> int:
        """Make an adapter known and return its id; the same name with the same hash again is a no-op.

        Adapters are identified by hash: several names may share one id. With `invocation_tokens` it acts from
        the last place of these in a prompt on, and on nothing if they are not there. With `replace` a name
        of other content passes over at once, pin and all, and accepted requests finish with what they had.
        Raises InvalidRequestError for a bad or taken name, CapacityError if the pool could never hold it or
        its pin has no room; then nothing has changed.
        """
    def unregister_adapter(self, name: str) -> None:
        """Refuse new requests; accepted ones finish, then the memory is freed. Raises AdapterNotFoundError.

        An accepted request that still waits may ask for the adapter's load afterwards.
        """
    def warm_adapter(self, name: str) -> bool:
        """Load it as soon as no request is short of memory; True if it is resident already.

        Raises AdapterNotFoundError, AdapterUnavailableError, CapacityError (no room beside what is pinned).
        """
    def pin_adapter(self, name: str, is_pinned: bool) -> None:
        """Keep it from being evicted and have it loaded, or let it go again.

        Raises AdapterNotFoundError, AdapterUnavailableError, CapacityError (beyond half of the pool, or an
        accepted request would not fit any more).
        """
    def submit(
        self,
        prompt: list[int] | NDArray[np.int32],
        adapters: list[tuple[str, float]],
        max_tokens: int | None,
        min_tokens: int,
        stop_token_ids: list[int],
        cache_scope: tuple[str, str] = ...,
        needs_adapter: bool = False,
        without_guesses: bool = False,
        prompt_rows: Literal["last", "all"] | None = None,
        flow: tuple[str, float] = ...,
    ) -> int:
        """Queue a request and return its id; it gets exactly one output with a finish reason.

        `flow` is whose share of the engine it is served from, with the weight of that share from now on;
        ("", 1.0) is the default.

        `prompt_rows` says of which tokens of the prompt hidden states are given out; with them `max_tokens`
        may be 0, and the request ends, by "length", with the step that computes its last token.

        `cache_scope` is (tenant, salt); no KV is shared between scopes, ("", "") is the default.

        `max_tokens` is clamped to the context; None is as many as fit it and the pool. Raises
        InvalidRequestError, AdapterNotFoundError, AdapterUnavailableError (being unloaded),
        CapacityError (could not run alone in an empty pool),
        PermissionDeniedError (`needs_adapter`, and the weights leave none).
        """
    def finish(self, request_id: int, reason: Literal["abort", "stop"] | LoraserveError) -> bool:
        """End a request now; False if it has ended already. Its last output says why.

        Legal between `schedule` and `commit`, which then takes no token for it. Raises ValueError for another
        reason.
        """
    def draftable(self) -> list[int]:
        """Requests whose next token the next step may sample; none where it has no room for guesses."""
    def draft(self, request_id: int, forced: list[int]) -> list[int]:
        """What would be guessed of a request behind `forced`, which are certain, and these in front.

        Empty in the middle of a prompt, or where guesses are off; `max_draft_tokens` at most.
        """
    def give_draft(self, request_id: int, token_ids: list[int]) -> None:
        """What is guessed of a request when its next token is sampled, in place of its own guess.

        It changes no answer.
        """
    def schedule(self) -> SchedulerOutput:
        """Plan a step. One with a batch must be committed before the next."""
    def schedule_ahead(self) -> SchedulerOutput | None:
        """Plan the step behind one that is not committed yet, for a device that runs them in this order.

        Its token ids are -1 - j where sample j of the step before is to be put in. None: commit that first.
        """
    def commit(self, step: SchedulerOutput, token_ids: NDArray[np.int32]) -> list[bool]:
        """Take the [L] sampled tokens, and say which were taken.

        The others' requests run no more, or they stand behind a guess that did not come true. -1, behind a
        guess, stands for one that could not be sampled: the next step tries again.

        Steps are committed in order. For one without a batch there are none, and the call is optional.
        """
    def adapter_loaded(self, adapter_id: int) -> None:
        """Answer a load: its bytes are in the extent, and requests may use them from now on.

        Raises InvalidRequestError: it is not loading.
        """
    def adapter_load_late(self, adapter_id: int) -> None:
        """A load takes long: until it is answered, only requests wait that need this adapter or its memory.

        Raises InvalidRequestError: it is not loading.
        """
    def adapter_load_failed(self, adapter_id: int, error: LoraserveError) -> None:
        """End the waiting requests that asked for it; a later request tries again."""
    def drain_outputs(self) -> RequestOutputs:
        """Of all requests since the last call, each in order."""
    def num_waiting(self) -> int:
        """Accepted requests that are not running."""
    def num_waiting_for_adapters(self) -> int:
        """Those of them that an adapter is missing for."""
    def has_its_adapters(self, request_id: int) -> bool:
        """Whether all adapters of an unfinished request are resident."""
    def has_adapter_turnover(self) -> bool:
        """Whether residents may have to be loaded again: some were evicted, or not all fit at once."""
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
    def stats(self) -> SchedulerStats:
        """Present load, and counts since start."""
    def adapters(self) -> list[AdapterStats]:
        """Every registered name, sorted."""
    def flows(self) -> tuple[list[FlowStats], tuple[int, int]]:
        """Who shares the engine, in order of first arrival, idle ones for a while.

        Behind them the (prompt, generated) tokens of those not told of any more.
        """
    def adapter_ids(self) -> list[int]:
        """Adapters a step may still ask to load: with a name, or unloaded but with unfinished requests."""
    def check_invariants(self) -> None:
        """Panic naming the first invariant that does not hold."""

# rust/py/src/layout.rs

_ModulePlace = tuple[int, int, int, int, int, float]
_GroupPlace = tuple[int, int, int, int, int, list[_ModulePlace]]
_ColumnsPlace = tuple[int, int, int, int, bool, bool]
_ScalesPlace = tuple[int, int, int]
_RowsPlace = tuple[int, int, int, int]

@final
class BaseShape:
    """The base model's linear layers an adapter may bind to, the same in every layer.

    `modules`: (path inside a layer, group, in_features, out_features, first column of the fused output);
    groups: 0 qkv, 1 o, 2 gate_up, 3 down. `biased`: paths of those that have a bias. `tokens`: rows and
    columns of embedding and head. `slices`: what ranks have of adapters, whose extents are then of the
    largest. Raises ValueError if modules contradict each other.
    """

    def __new__(
        cls,
        num_layers: int,
        modules: list[tuple[str, int, int, int, int]],
        biased: list[str] = ...,
        tokens: tuple[int, int] | None = None,
        slices: list[AdapterSlice] = ...,
    ) -> BaseShape: ...
    @property
    def num_layers(self) -> int:
        """Layers, each with all of the modules."""

@final
class AdapterLayout:
    """Where an adapter's packed weights lie inside its extent; offsets are bytes from the extent's base."""

    @staticmethod
    def from_groups(
        groups: list[_GroupPlace],
        num_layers: int,
        nbytes: int,
        columns: list[_ColumnsPlace] = ...,
        embedding: _RowsPlace | None = None,
        head: _RowsPlace | None = None,
        vocabulary: int | None = None,
        scales: list[_ScalesPlace] = ...,
    ) -> AdapterLayout:
        """What the methods of these names return, for an adapter that was not loaded from files.

        Raises ValueError for a layer, group or module that does not exist.
        """
    def to_json(self) -> bytes:
        """For `from_json` in another process."""
    @staticmethod
    def from_json(data: bytes) -> AdapterLayout:
        """What gave these bytes; checked against an extent where it is bound. Raises ValueError."""
    @property
    def nbytes(self) -> int:
        """Length of the extent."""
    @property
    def num_layers(self) -> int:
        """Of the base model, adapted or not."""
    @property
    def embedding(self) -> _RowsPlace | None:
        """Rows of the embedding in place of the base's: (tokens_offset, panels_offset, count, width).

        Their tokens are ascending int32 [count]; the rows lie as a packed weight [count, width].
        """
    @property
    def head(self) -> _RowsPlace | None:
        """Rows of the head in place of the base's, in the same form; it may be the same block."""
    @property
    def vocabulary(self) -> int | None:
        """Tokens of its head, where those are not the base's."""
    def groups(self) -> list[_GroupPlace]:
        """Present groups: (layer, group, a_offset, rank, in_features, modules).

        Each module: (rank_offset, rank, b_offset, out_offset, out_features, scale). A is
        [group rank, in_features]; a module's B is stored transposed, [module rank, out_features].
        """
    def scales(self) -> list[_ScalesPlace]:
        """Groups of int8: (layer, group, offset) of float32 [group rank], A's scale times B's."""
    def columns(self) -> list[_ColumnsPlace]:
        """Modules with gains or shifts: (layer, group, out_offset, offset, has_gain, has_shift).

        They are float32 [panels of B][gain, shift][16], 1 and 0 beside the module's columns; its output is
        gain · (base + adapters) + weight · shift.
        """

# rust/py/src/slice.rs

@final
class AdapterSlice:
    """The part that one rank has of packed adapters: an adapter of its smaller model.

    `modules`: (group, first column in the fused output of the model, and of the rank, the rank's rows of the
    weight from, to, its columns from, to, whether it adds shifts); `tokens`: first and end of its part of
    `vocabulary`. Raises ValueError for a part that is empty.
    """

    def __new__(
        cls,
        dtype: str,
        modules: list[tuple[int, int, int, int, int, int, int, bool]],
        tokens: tuple[int, int],
        vocabulary: int,
    ) -> AdapterSlice: ...
    def layout(self, whole: AdapterLayout, src_ptr: int) -> AdapterLayout:
        """Where the rank's part lies of the adapter at `src_ptr`, as many readable bytes as `whole` has."""
    def copy(
        self, whole: AdapterLayout, src_ptr: int, layout: AdapterLayout, dst_ptr: int, dst_nbytes: int
    ) -> None:
        """Write the part, as `layout` says, to `dst_nbytes` writable bytes at `dst_ptr`, without the GIL.

        Raises ValueError for bytes that don't hold it, and for layouts that don't belong together.
        """

# rust/py/src/adapters.rs

@final
class Receipt:
    """What a checked adapter turned out to be."""

    @property
    def directory(self) -> str:
        """Where it was read from: the directory given, or the only one with an adapter below that."""
    @property
    def tensors(self) -> int:
        """Tensors applied; every tensor in the file is, but for `base_copies`."""
    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules (`q_proj`), in the order they run."""
    @property
    def layers(self) -> list[int]:
        """Layers with at least one adapted module, ascending."""
    @property
    def rank(self) -> int:
        """Largest rank."""
    @property
    def ranks(self) -> list[int]:
        """Distinct ranks, ascending."""
    @property
    def nbytes(self) -> int:
        """Packed length in bytes."""
    @property
    def extent_nbytes(self) -> int:
        """Bytes in the pool: `nbytes`, or of the largest part that a rank has."""
    @property
    def hash(self) -> str:
        """BLAKE3 of tensors and scales, in hex: equal hashes compute the same."""
    @property
    def base_check(self) -> str:
        """How the adapter was compared with the base, in words."""
    @property
    def base_model(self) -> str | None:
        """`base_model_name_or_path` as recorded; not compared."""
    @property
    def base_copies(self) -> list[str]:
        """Modules of the base whose own weights the file repeats bit by bit; nothing is kept of those."""
    @property
    def is_compared(self) -> bool:
        """Whether the file has embeddings or a head, which were compared with the base's."""
    @property
    def changes_tables(self) -> bool:
        """Whether embedding, head or norms are other than the base's, by rows, tokens, LoRA or whole."""
    @property
    def added_tokens(self) -> list[int]:
        """Tokens beyond the base's that have an embedding, ascending."""
    @property
    def added_head_tokens(self) -> list[int]:
        """Those of them that can be chosen."""
    @property
    def invocation_tokens(self) -> list[int]:
        """Tokens of a prompt from whose last occurrence on the adapter acts; empty, it acts on all."""
    @property
    def head(self) -> tuple[str, int, int, bytes, bytes | None] | None:
        """What it classifies with: module, labels, features, weight [labels, features] and bias, float32.

        None where the file has no head; it is no part of what is packed.
        """
    @property
    def task_type(self) -> str | None:
        """PEFT's name of what it was trained for."""
    @property
    def notes(self) -> list[str]:
        """What was understood beyond the plain case, in words, in the order found."""
    @property
    def alone(self) -> str | None:
        """Why its weight must be 1 and no other adapter beside it in a request; None: it need not."""
    @property
    def not_used(self) -> list[str]:
        """What lies beside the weights, differs from the base model's and is not used, in words."""
    def with_beside(self, notes: list[str], not_used: list[str]) -> Receipt:
        """The same receipt with what lies beside the weights: further notes, and what is not used.

        Without the head, which is taken from this one.
        """

@final
class LoadPace:
    """How long reading adapters rests between bursts of half a megabyte; may change meanwhile."""

    def __new__(cls) -> LoadPace: ...
    def set_rest(self, seconds: float) -> None:
        """Zero, the default, is full speed. Raises ValueError if negative."""

class _BaseLinears(Protocol):
    """The base's linears where they are; bytes are little-endian float32, what is raised fails the load."""

    def row_norms(
        self, layer: int, group: int, first: int, count: int, rank: int, at: bytes, b: bytes
    ) -> bytes:
        """Lengths of the rows `first` … `first + count` of the fused weight plus B·A.

        `at`: A transposed [in_features, rank]; `b`: B [count, rank], scaled.
        """
    def rows_per_call(self, in_features: int, rank: int) -> int:
        """Rows that one call of `row_norms` takes at most."""
    def bias(self, layer: int, group: int, first: int, count: int) -> bytes:
        """The bias of these rows as it is stored."""

@final
class CpuBaseLinears:
    """The same of a model on the CPU, computed without the GIL."""

_BaseWeights: TypeAlias = Callable[[str], tuple[tuple[int, int], bytes, bool]]

def check_adapter(
    path: str,
    shape: BaseShape,
    dtype: str,
    max_lora_rank: int,
    pace: LoadPace | None = None,
    base_weights: _BaseWeights | None = None,
    stored: tuple[str, str] | None = None,
    adapter_dtype: str = "auto",
) -> Receipt:
    """Read and check all of a PEFT directory, without the GIL.

    With `stored`, the text of an adapter_config.json and the path of a safetensors file, those are read, and
    `path` is what errors call the file.

    `dtype`: storage dtype, "float32", "bfloat16" or "float16"; `adapter_dtype`: "auto", or "int8" for A and B
    of linears and head; `pace` None is full speed. `base_weights` gives (rows, columns) and `row_digests` of
    the base's "embed_tokens" or "lm_head" in that dtype, and whether both are one weight; it is asked where
    there are embeddings or a head, which are refused without it. Raises AdapterFormatError.
    """

def recognise_file(path: str, is_json: bool = False) -> str | None:
    """What a file is in place of binary weights, or of JSON: words that follow "it is", with the remedy."""

def row_digests(ptr: int, nbytes: int, row_nbytes: int) -> bytes:
    """BLAKE3 of each row, one after another, of `nbytes` readable bytes at `ptr`, without the GIL."""

def load_adapter(
    path: str,
    shape: BaseShape,
    dtype: str,
    max_lora_rank: int,
    expected_hash: str,
    dst_ptr: int,
    dst_nbytes: int,
    pace: LoadPace | None = None,
    base_linears: CpuBaseLinears | _BaseLinears | None = None,
    stored: tuple[str, str] | None = None,
    base_weights: _BaseWeights | None = None,
    known: Receipt | None = None,
    adapter_dtype: str = "auto",
) -> AdapterLayout:
    """Pack a registered adapter into `dst_nbytes` writable bytes at `dst_ptr`, without the GIL.

    `stored` is as in `check_adapter`. Writes all of them, or anything where it raises; the caller keeps them
    alive and to itself until the call returns. `base_linears` is asked where DoRA or trained biases need it,
    `base_weights` where there are embeddings or a head, unless `known` is the receipt of the files as now.
    Raises AdapterUnavailableError if the files are gone or changed, or the base's linears can't be had,
    AdapterFormatError if the files are malformed, CapacityError if the extent is too small.
    """

# rust/py/src/host_tier.rs

@final
class HostTierStats:
    """What a tier holds now, and what it was asked since it was made."""

    @property
    def limit_nbytes(self) -> int:
        """0: it keeps and counts nothing."""
    @property
    def nbytes(self) -> int:
        """At most the limit."""
    @property
    def num_adapters(self) -> int:
        """How many it keeps."""
    @property
    def num_hits(self) -> int:
        """Adapters found."""
    @property
    def num_misses(self) -> int:
        """Adapters looked for and not found."""
    @property
    def num_evictions(self) -> int:
        """Adapters that gave way to others."""
    @property
    def num_failures(self) -> int:
        """Adapters for which the system had no memory."""

@final
class PackedAdapter:
    """An adapter of a tier, as it lies in an extent; its bytes stay as long as this does."""

    @property
    def layout(self) -> AdapterLayout:
        """Where its parts lie."""
    @property
    def address(self) -> int:
        """Of `nbytes` readable bytes."""
    @property
    def nbytes(self) -> int:
        """As many as the layout says."""
    def copy_to(self, dst_ptr: int, dst_nbytes: int, pace: LoadPace) -> None:
        """Fill `dst_nbytes` writable bytes at `dst_ptr`, zeros behind the adapter, without the GIL.

        The caller keeps them alive and to itself until the call returns. ValueError if they are too few.
        """

@final
class HostTier:
    """Packed adapters in main memory by content hash, never more than `limit_nbytes` of them; for any thread.

    The one used longest ago gives way to another. A limit of 0 keeps and counts none.
    """

    def __new__(cls, limit_nbytes: int) -> HostTier: ...
    def find(self, content_hash: str) -> PackedAdapter | None:
        """The adapter of this content, counted as a hit, or as a miss."""
    def keep(self, content_hash: str, src_ptr: int, layout: AdapterLayout, pace: LoadPace) -> None:
        """Copy a packed adapter, if there is room, without the GIL.

        The caller keeps the `layout.nbytes` readable bytes at `src_ptr` alive and unchanged until the call
        returns.
        """
    def forget_except(self, content_hashes: list[str]) -> None:
        """Drop all others; their memory is free at once, or when whoever copies one has done so."""
    def stats(self) -> HostTierStats:
        """Of one moment."""

# rust/py/src/sampler.rs

@final
class Sampler:
    """What sampling knows of every unfinished sequence, by request id; for any thread.

    Raises KeyError for a request id that was not added or was removed, where nothing else is said.
    """

    def __new__(cls) -> Sampler: ...
    def add(
        self,
        request_id: int,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        typical_p: float = 1.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        num_logprobs: int | None = None,
        prompt_token_ids: Sequence[int] = ...,
        biased_ids: Sequence[int] = ...,
        biases: Sequence[float] = ...,
        end_token_ids: Sequence[int] = ...,
        min_tokens: int = 0,
        has_grammar: bool = False,
    ) -> None:
        """Take a sequence; its tokens are below `vocab_size`, its seed has 64 bits, temperature 0 is greedy.

        Raises ValueError if there are not as many biases as tokens that have one.
        """
    def remove(self, request_id: int) -> None:
        """Forget a sequence; unknown ones are left alone."""
    def append(self, request_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """Take one more token of each sequence into what is counted."""
    def num_tokens(self, request_id: int) -> int | None:
        """Tokens appended so far; None of one that was removed."""
    def depend_on_last_token(self, request_ids: Sequence[int]) -> bool:
        """Whether any of these can't be drawn for before the token drawn last is appended."""
    def draw(
        self,
        request_ids: Sequence[int],
        num_columns: int,
        masks: Sequence[NDArray[np.uint32]] = ...,
        masked_rows: Sequence[int] = ...,
        draft_token_ids: Sequence[int] = ...,
    ) -> SampleArrays:
        """The rows of these sequences' next tokens, of logits of so many columns; they then count as drawn.

        `masks` are of the rows `masked_rows`, which ascend: bit i % 32 of word i / 32 allows token i. Where
        tokens are guessed, `draft_token_ids` has one per row: the next row, of the same sequence, is drawn as
        if it had come; -1 in a sequence's last row. As many draws count as tokens are appended, at least one.
        Raises ValueError for a mask of another length.
        """

@final
class HostSampler:
    """Samples on threads of its own, where no backend's threads are at hand; as `CpuKernels` otherwise."""

    def __new__(cls, num_threads: int | None = None, isa: str | None = None) -> HostSampler: ...
    def sample(self, logits_ptr: int, num_rows: int, num_columns: int, arrays: SampleArrays) -> SampledRows:
        """Choose a token for each row of float32 logits [num_rows, num_columns] in main memory."""

# rust/py/src/cpu_kernels.rs

@final
class PackedLinear:
    """A weight, dense or quantised, and its bias, in the layout of the CPU GEMM kernel."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""

@final
class CpuStep:
    """A batch whose every index was checked; holds its own copy of the arrays."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_logits(self) -> int: ...
    @property
    def num_hidden(self) -> int:
        """Rows whose hidden states are given out."""
    def num_columns(self, vocabulary: int) -> int:
        """Columns of its logits: tokens of the base's head, or of an adapter's that has more."""

@final
class CpuKernels:
    """The CPU kernels of one model over one page pool; they run without the GIL on one thread pool.

    `*_ptr` are addresses of contiguous tensors in the storage dtype (`bias` and logits are float32) that
    live until the call returns; `loraserve.backends.cpu.ops` checks them. `isa` None takes
    `LORASERVE_CPU_ISA`, else the best; `num_threads` None means every core; `tokens` is the first that this
    rank has of a vocabulary shared out, and whether it has the last. Raises LoraserveError for an
    unknown or unsupported instruction set, ValueError for shapes and indices that don't fit, TypeError
    for another backend's step or weight.
    """

    def __new__(
        cls,
        *,
        dtype: str,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        pool_ptr: int,
        pool_nbytes: int,
        num_threads: int | None = None,
        isa: str | None = None,
        tokens: tuple[int, bool] | None = None,
    ) -> CpuKernels: ...
    @property
    def isa(self) -> str:
        """In use: "amx", "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2" or "portable"."""
    @property
    def num_threads(self) -> int:
        """Threads that compute, the caller's included."""
    def pack(
        self, weight_ptr: int, bias_ptr: int | None, in_features: int, out_features: int
    ) -> PackedLinear:
        """Copy weight [out, in] and bias [out] into the products' layout; both may be freed afterwards."""
    def pack_quantized(self, parts: list[QuantizedWeight], bias_ptr: int | None) -> PackedLinear:
        """As `pack` of the rows of all parts, one after another; before another format rows are whole 16s."""
    def base_linears(self, linears: list[PackedLinear]) -> CpuBaseLinears:
        """What adapters' gains and shifts are computed from: the linears of each layer in order of groups."""
    def set_adapter(self, slot: int, first_page: int, layout: AdapterLayout) -> None:
        """Bind a slot to the adapter packed from `first_page` on; `layout` says where its weights lie."""
    def move_extent(self, slot: int, src_page: int, dst_page: int, num_pages: int) -> None:
        """Move a slot's pages inside the pool (ranges may overlap) and bind it to the new place."""
    def begin_step(self, batch: Batch) -> CpuStep:
        """Check a batch and plan its tasks; the step holds for these kernels alone."""
    def sample(self, logits_ptr: int, num_rows: int, num_columns: int, arrays: SampleArrays) -> SampledRows:
        """Choose a token for each row of logits [num_rows, num_columns], which stay as they are."""

# rust/py/src/cpu_kernels/program.rs

@final
class Activation:
    """What a recorded op makes: [T, width]; T is known when the program runs."""

    @property
    def width(self) -> int:
        """Columns."""

@final
class CpuRecording:
    """A forward pass being recorded, op by op, for `CpuProgram`.

    `*_ptr` are addresses of contiguous tensors in the storage dtype (`cos_sin` is float32) that must outlive
    the program unchanged. Raises ValueError for widths that don't fit, for another recording's activations,
    and once the recording has ended.
    """

    def __new__(cls) -> CpuRecording: ...
    def input(self, rows_ptr: int, num_rows: int, width: int) -> Activation:
        """Rows [num_rows, width] of a tensor, one for each token of a step."""

    def embedding(self, table: Linear) -> Activation:
        """Rows of the table for the step's tokens: [T, in_features]."""
    def all_reduce(self, x: Activation) -> None:
        """What the embedding or a linear has just made is a rank's part of a sum; it becomes float32."""
    def rms_norm(
        self, x: Activation, residual: Activation | None, weight_ptr: int, num_features: int, eps: float
    ) -> Activation:
        """x / sqrt(mean(x²) + eps)·weight, per row; with a residual, x is added to it in place first."""
    def lora_linear(self, x: Activation, linear: Linear, layer: int, group: int) -> Activation:
        """x·Wᵀ + bias + what the step's adapters add to this layer and group: [T, out_features]."""
    def rope_and_cache(
        self,
        qkv: Activation,
        layer: int,
        cos_sin_ptr: int,
        num_positions: int,
        head_dim: int,
        q_norm_ptr: int | None,
        k_norm_ptr: int | None,
        eps: float,
    ) -> None:
        """Rotate q and k of qkv in place and write K, V to their pages; `ForwardOps` has the formula.

        `cos_sin`: [num_positions, head_dim]; `q_norm`, `k_norm`: [head_dim] of a norm before it, or None.
        """
    def attention(self, qkv: Activation, layer: int, num_features: int) -> Activation:
        """Causal paged attention of the q part of qkv: [T, num_features], heads times their dimension."""
    def silu_mul(self, gate_up: Activation) -> Activation:
        """silu(gate)·up, gate first: half as wide."""
    def logits(self, kernels: CpuKernels, hidden: Activation, lm_head: Linear) -> CpuProgram:
        """Ends the recording; the result is float32 [L, vocab]."""

    def output(self, kernels: CpuKernels, x: Activation) -> CpuProgram:
        """Ends the recording; the result is `x`, [T, width] in the storage dtype."""

@final
class CpuProgram:
    """A recorded forward pass; one step at a time, without the GIL."""

    def run(
        self, step: CpuStep, result_ptr: int, hidden_ptr: int = 0, first_op: int = 0
    ) -> tuple[int, int, int] | None:
        """Runs a step of its kernels and writes the result, and what it gives out: [H, hidden].

        Stops at each sum over ranks: (address, number) of the float32 that are this rank's part, to be
        replaced by the sum, and the `first_op` to go on with. Raises ValueError as the ops do.
        """
    def logits_of_hidden(self, step: CpuStep, first: int, count: int, rows_ptr: int, result_ptr: int) -> None:
        """Logits of these of the rows that a step gave out, float32 [count, the step's columns].

        `rows_ptr`: [count, hidden], as it gave them out. Raises ValueError as the ops do, and where the
        program has no logits.
        """

def default_isa() -> str:
    """The instruction set of the CPU kernels here: `LORASERVE_CPU_ISA`, or the best there is."""

# rust/py/src/pool_pretouch.rs

@final
class PoolPretouch:
    """A thread that touches a margin of the page pool before it is needed, at both ends of what is in use.

    `pool` keeps `pool_nbytes` writable bytes at `pool_ptr` alive; it is kept until the thread has ended. The
    rest may be called from any thread, and takes microseconds.
    """

    def __new__(cls, pool: object, pool_ptr: int, pool_nbytes: int) -> PoolPretouch: ...
    def use_below(self, end: int) -> None:
        """KV blocks lie in the first `end` bytes."""

    def use_above(self, start: int) -> None:
        """Adapters lie from byte `start` on."""

    def set_contended(self, is_contended: bool) -> None:
        """Whether the model computes now on the cores the thread runs on; it then keeps back."""

    def stop(self) -> None:
        """End the thread, without the GIL, and wait for it."""

# rust/py/src/quantized.rs

@final
class QuantizedWeight:
    """A weight [out, in] in groups of 16 or 32 columns: w = scale * (q - zero) + min.

    q has 4 bits (0 to 15) or 8 (-128 to 127); zero is 8 of 4 bits without minimums, else 0. `*_ptr` are
    addresses of contiguous arrays that live until the call returns. Raises ValueError for sizes that don't
    fit and for values and scales that are not finite.
    """

    @staticmethod
    def from_ggml(
        ggml_type: int,
        blocks_ptr: int,
        nbytes: int,
        in_features: int,
        out_features: int,
        order: Sequence[int] | None = None,
    ) -> QuantizedWeight:
        """Of the rows of blocks of a .gguf file; row n is row `order[n]` of them."""
    @staticmethod
    def from_arrays(
        bits: int,
        quants_ptr: int,
        scales_ptr: int,
        mins_ptr: int | None,
        in_features: int,
        out_features: int,
        group: int,
    ) -> QuantizedWeight:
        """Of uint8 (4 bits) or int8 (8) [out, in] and float32 [out, in / group]; `group` a multiple of 16."""
    @staticmethod
    def quantize(
        weight_ptr: int, dtype: str, in_features: int, out_features: int, to: str
    ) -> QuantizedWeight:
        """Near to weight [out, in] of `dtype`: "int8" without minimums, "int4" with, in groups of 32."""
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def bits(self) -> int:
        """4 or 8."""
    @property
    def group(self) -> int:
        """Columns that share a scale: 16 or 32."""
    @property
    def has_mins(self) -> bool:
        """Whether groups have a minimum, too."""
    def dequantize(self, out_ptr: int) -> None:
        """Write the weight it stands for: float32 [out, in]."""
    def copy_to(self, quants_ptr: int, scales_ptr: int, mins_ptr: int | None = None) -> None:
        """Write what `from_arrays` takes, in its own groups; `mins_ptr` exactly where there are minimums."""

def ggml_format(ggml_type: int) -> tuple[int, int, bool] | None:
    """(bits, group, whether there are minimums) of a type's weights; None where it is not kept quantised."""

# rust/py/src/sample_arrays.rs

class _SampleRow(TypedDict):
    bits: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    num_logprobs: int | None
    mask: int | None
    seen: tuple[int, int]
    counted: tuple[int, int]
    biased: tuple[int, int]
    banned: tuple[int, int]

@final
class SampleArrays:
    """How the rows of one step are sampled: `RowParams` of each, and lists that they have parts of."""

    def __new__(
        cls,
        vocab_size: int,
        rows: Sequence[_SampleRow],
        *,
        seen_ids: Sequence[int] = ...,
        counted_ids: Sequence[int] = ...,
        counts: Sequence[float] = ...,
        biased_ids: Sequence[int] = ...,
        biases: Sequence[float] = ...,
        banned_ids: Sequence[int] = ...,
        masks: Sequence[int] = ...,
    ) -> SampleArrays:
        """Ranges of rows are (start, end) in the lists; masks have ceil(vocab_size / 32) words each."""
    @property
    def num_rows(self) -> int:
        """L"""
    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
    def reference(self, logits: NDArray[np.float32]) -> SampledRows:
        """What the definition says of logits [L, vocab_size]: slow, for tests of the kernels.

        Raises ValueError where shapes or indices don't fit.
        """

@final
class SampledRows:
    """What came of a step's rows."""

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """[L]; 0 where a row is not finite."""
    @property
    def is_finite(self) -> NDArray[np.bool_]:
        """[L]: the largest of the logits is a finite number, and none is NaN."""
    @property
    def logprobs(self) -> list[tuple[float, list[tuple[int, float]]] | None]:
        """[L]: of the token, and of the likeliest ones; None where not asked for."""

# rust/py/src/cuda_kernels.rs

@final
class CudaStep:
    """A batch on the device, padding counted in; `*_ptr` are int32 arrays.

    Addresses are the same for every step of the same kernels: a captured graph reads the step begun last.
    """

    @property
    def num_tokens(self) -> int:
        """T"""
    @property
    def num_logits(self) -> int:
        """L"""
    @property
    def num_seqs(self) -> int:
        """S"""
    @property
    def num_waves(self) -> int:
        """Most adapters of one request; a captured graph serves one at most."""
    @property
    def has_adapters(self) -> bool:
        """Whether any row has one, or padding makes room for those of later steps."""
    @property
    def is_decode(self) -> bool:
        """Whether every sequence decodes one token."""
    @property
    def token_ids_ptr(self) -> int:
        """[T] as in `Batch`."""
    @property
    def positions_ptr(self) -> int:
        """[T] as in `Batch`."""
    @property
    def slot_mapping_ptr(self) -> int:
        """[T] as in `Batch`; -1 in padding."""
    @property
    def query_indptr_ptr(self) -> int:
        """[S + 1] first token of each sequence."""
    @property
    def context_lens_ptr(self) -> int:
        """[S] tokens in the KV cache after this step; 0 in padding."""
    @property
    def block_table_ptr(self) -> int:
        """Pages of all sequences, in token order."""
    @property
    def block_table_indptr_ptr(self) -> int:
        """[S + 1] first entry of each sequence in the block table."""
    @property
    def logits_indices_ptr(self) -> int:
        """[L] rows of T that are sampled, ascending."""

@final
class PendingSamples:
    """Sampled tokens on their way from the device; dropped unseen, they disturb nothing."""

    def wait(self) -> SampledRows:
        """Wait for them without the GIL; may be called again. Raises DeviceError where the device failed."""

@final
class CudaKernels:
    """Every CUDA kernel of one model over one page pool on one device.

    `*_ptr` are device addresses of contiguous tensors in the storage dtype (`cos_sin` is float32), 16-byte
    aligned, that live until the stream is past the call; `stream` is a CUstream as an integer. Ops only queue
    work, on one stream at a time. A kernel is compiled at its first use, or taken from the cache on disk.
    Raises DeviceError where the GPU, its driver or NVRTC is missing, unfit or fails, CapacityError where
    memory is short, ValueError for shapes and indices that don't fit.
    """

    def __new__(
        cls,
        *,
        dtype: str,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        pool_ptr: int,
        pool_nbytes: int,
        groups: list[tuple[int, int]],
        max_num_slots: int,
        max_num_tokens: int,
        max_num_seqs: int,
        max_group_rank: int,
        max_model_len: int | None = None,
        device: int = 0,
    ) -> CudaKernels:
        """`groups`: (in_features, out_features) of each projection; `max_model_len`: None is no limit."""
    @property
    def num_compiled(self) -> int:
        """Kernel sources compiled by this object because the cache had them not."""
    @property
    def target(self) -> str:
        """What the kernels were compiled to: "sm_90" is machine code, "compute_90" PTX."""
    def load_kernels(self) -> None:
        """Compile and load every kernel, so that no step has to."""
    def set_adapter(self, slot: int, first_page: int, layout: AdapterLayout, stream: int) -> None:
        """Bind a slot to the adapter whose packed bytes begin at `first_page`, for what is queued later."""
    def move_extent(self, slot: int, src_page: int, dst_page: int, num_pages: int, stream: int) -> None:
        """Move a slot's pages inside the pool (ranges may overlap) and bind it to the new place."""
    def order_uploads(self, stream: int) -> None:
        """Let uploads that begin later wait for what is on `stream` by now, because it uses their pages."""
    def upload(self, host_ptr: int, nbytes: int, first_page: int) -> None:
        """Copy host bytes to pages, beside the caller's streams and without the GIL; returns when done."""
    def begin_step(
        self,
        batch: Batch,
        stream: int,
        *,
        padded_tokens: int | None = None,
        padded_items: int | None = None,
    ) -> CudaStep:
        """Check a batch and queue the copy of its arrays over the last step's.

        `padded_tokens` adds rows to a step in which every sequence decodes one token, for a captured graph:
        they have slot mapping -1, context length 0 and no adapter, and are sampled like the others.
        `padded_items` makes LoRA launches of such a step as large as for so many items (`Batch.num_items`), 0
        launches none; without it they are as large as the step's own.
        A token id -1 - j stands for the token that was sampled last in row j, which may still be on its way.
        """
    def lora(self, step: CudaStep, x_ptr: int, y_ptr: int, layer: int, group: int, stream: int) -> None:
        """y [T, out] += what the step's adapters add for x [T, in]."""
    def rms_norm(
        self,
        x_ptr: int,
        residual_ptr: int | None,
        weight_ptr: int,
        out_ptr: int,
        num_rows: int,
        num_features: int,
        eps: float,
        stream: int,
    ) -> None:
        """x / sqrt(mean(x²) + eps)·weight, per row: out; with a residual, x is added to it in place first."""
    def silu_mul(self, gate_up_ptr: int, out_ptr: int, num_rows: int, intermediate: int, stream: int) -> None:
        """silu(gate)·up of gate_up [rows, 2·intermediate] (gate first): out [rows, intermediate]."""
    def rope_and_cache(
        self,
        step: CudaStep,
        qkv_ptr: int,
        layer: int,
        cos_sin_ptr: int,
        num_positions: int,
        q_norm_ptr: int | None,
        k_norm_ptr: int | None,
        eps: float,
        stream: int,
    ) -> None:
        """Rotate q and k of qkv [T, (H + 2·KV)·D] in place and write K, V to their pages.

        `cos_sin`: [num_positions, D]; `q_norm`, `k_norm`: [D] of the norm before it, None for none.
        """
    def attention(self, step: CudaStep, qkv_ptr: int, layer: int, out_ptr: int, stream: int) -> None:
        """Causal paged attention of the q part of qkv, scale 1/sqrt(D): out [T, H·D]."""
    def sample(self, logits_ptr: int, arrays: SampleArrays, stream: int) -> PendingSamples:
        """Queue the choice of a token for each row of logits, float32 [L, vocab_size].

        Rows change in place where their parameters say so. At most 20 logprobs a row and 327,680 tokens.
        """

# rust/py/src/cuda_kernels/facts.rs

class _DeviceFacts(TypedDict):
    name: str
    capability: tuple[int, int]
    num_sms: int
    total_nbytes: int
    free_nbytes: int | None
    error: str | None  # why it can't be used
    target: str | None  # what kernels are compiled to: "sm_90" is machine code, "compute_90" PTX
    target_error: str | None

class _CudaFacts(TypedDict):
    driver: str | None
    driver_error: str | None
    devices: list[_DeviceFacts]
    nvrtc: str | None
    nvrtc_path: Path | None
    nvrtc_error: str | None
    kernel_cache: Path | None

def cuda_facts() -> _CudaFacts:
    """What there is of CUDA on this machine; loads the driver and NVRTC. What is missing says why."""

def check_cuda(device: int = 0) -> None:
    """Look whether the kernels can run on a GPU, by driver, capability and compiler; doesn't take the GPU.

    Raises:
        DeviceError: they can't; the message says why.
    """

def count_json(data: bytes) -> tuple[int, int, int]:
    """(objects and arrays, commas between values, depth) of a JSON text; without the GIL.

    What is no JSON is counted as far as it looks like it.
    """

@final
class MessageShape:
    """What the fields of a protobuf message hold, by field number; others hold text, bytes or one number.

    Args:
        messages: fields of messages, and maps.
        varints: fields of packed numbers, each a varint.
    """

    def __new__(cls, messages: Mapping[int, MessageShape], varints: Sequence[int]) -> MessageShape: ...
    def count(self, data: bytes, max_objects: int, max_numbers: int) -> tuple[int, int]:
        """(messages and texts, numbers) in a message's bytes, those in inner messages too; without the GIL.

        Stops once either is above its limit. What is no message is counted as far as it looks like one.
        """

def usable_cores() -> int:
    """Cores that affinity and cgroup quotas leave this process, at least 1."""

# rust/py/src/simulation.rs

@final
class Simulated:
    """What came of each of n requests, in their order, and of each replica; times from the start."""

    @property
    def first_token_s(self) -> NDArray[np.float64]:
        """[n] NaN of one that was refused."""
    @property
    def end_s(self) -> NDArray[np.float64]:
        """[n] NaN of one that was refused."""
    @property
    def replica(self) -> NDArray[np.uint32]:
        """[n] which one it was sent to."""
    @property
    def cached_tokens(self) -> NDArray[np.uint32]:
        """[n] tokens of its prompt that the prefix cache had."""
    @property
    def was_resident(self) -> NDArray[np.bool_]:
        """[n] whether its adapter was in the pool when it arrived; true of one without."""
    @property
    def is_refused(self) -> NDArray[np.bool_]:
        """[n] whether it did not fit, or too many waited."""
    @property
    def num_gaps(self) -> int:
        """Tokens that were not their answers' first ones."""
    @property
    def mean_gap_s(self) -> float | None:
        """Between tokens of one answer; None of none."""
    def gap_s(self, share: float) -> float | None:
        """What `share` of them don't exceed, within a percent; None of none."""
    @property
    def replicas(self) -> list[tuple[int, int, float, int, int, int, int, int, float, float]]:
        """Of each: steps, tokens, busy seconds, loads, bytes loaded, evictions, preemptions, most waiting,
        mean pages of sequences and of adapters."""

def simulate(
    *,
    costs: Mapping[str, object],
    loading: Mapping[str, object],
    replica: Mapping[str, object],
    fleet: Mapping[str, object],
    arrivals: Mapping[str, NDArray[np.float64] | NDArray[np.int64] | NDArray[np.uint32]],
    adapter_nbytes: Sequence[int],
) -> Simulated:
    """Run a workload on replicas of the scheduler, without the GIL; see `loraserve.planning.simulator`.

    Raises InvalidRequestError for a value out of its range, ValueError for arrays of different lengths.
    """

def routing_policies() -> list[str]:
    """Names of the policies that `simulate` knows."""
