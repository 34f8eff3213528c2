"""What routing counts are made of: counts of one trace by position, whole numbers, packed, with every law of counting; and counts at
reference tokens over all traces.

Dimension letters: B bins of positions, M markers, L layers with experts, E experts.

The bins: 0 holds the opening (tokens of the prompt, and the first token of the response), where templates and models open the
thought; 1 .. B-1 are equal parts of the rest of the response, by relative position.

Reference tokens are what a marker is compared with where the question is whether an expert answers to the thought or to a token: the most
frequent tokens of the traces, and the first tokens of thoughts and answers, where the marker's neighbours stand. R numbers them. Only
their sums over all traces are kept: 40 of them by trace would be larger than all else."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_steer.tokens import MarkerSet, Trace

Array = np.ndarray[Any, Any]

NUM_BINS = 7
"""The opening, and six parts of the response. Experts and markers both drift with position: what they share by it is no
association (`expert_stats.evidence`). Six parts of an R1 trace fit 1,000 traces x 14,848 experts into 100 MB."""
NUM_FREQUENT, NUM_FIRST = 40, 16


def problem_of(trace_id: str) -> str:
    """The problem of a trace: the part of its id before the last "#"."""
    return trace_id.rpartition("#")[0] or trace_id


def bins_of(positions: Array, prompt_length: int, length: int, back: int = 0) -> Array:
    """The bin of every position. ``back``: how far the position is before its token (1 where markers are predicted)."""
    opened = prompt_length + 1
    rest = np.asarray(positions) + back - opened
    parts = (NUM_BINS - 1) * rest // max(length - opened, 1)
    return np.where(rest < 0, 0, 1 + np.minimum(parts, NUM_BINS - 2)).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class TraceCounts:
    """Counts of one trace. Make one with ``pack``; ``expert_and_joint`` gives the large arrays back."""

    trace_id: str
    digest: str
    """Of the text that was counted."""
    family: str
    """The domain it is of; "" where the trace does not say it."""
    total_B: Array
    """Base tokens, int64."""
    marker_MB: Array
    """Occurrences of the markers, int64."""
    packed: bytes
    """The large arrays: zlib over their byte planes."""
    content: str
    """sha256 of the planes."""
    num_traces: int = 1
    """More for a group of traces of a file of version 1."""
    group: int = -1
    """Which group of such a file; -1 for a trace."""

    @classmethod
    def pack(
        cls,
        trace_id: str,
        expert_BLE: Array,
        joint_MLE: Array,
        marker_MB: Array,
        total_B: Array,
        *,
        digest: str = "",
        family: str = "",
        num_traces: int = 1,
        group: int = -1,
    ) -> TraceCounts:
        """Pack whole numbers >= 0; ValueError for others. ``expert_BLE``: selections at base tokens; ``joint_MLE``: at the
        marker's tokens."""
        for name, array in (("expert_BLE", expert_BLE), ("joint_MLE", joint_MLE), ("marker_MB", marker_MB)):
            if array.dtype.kind not in "iu" or (array.size and array.min() < 0):
                raise ValueError(
                    f"{name} of trace {trace_id!r} holds {array.dtype} or counts below 0: give whole numbers >= 0"
                )
        total_B = np.asarray(total_B, dtype=np.int64)
        planes = [_planes(expert_BLE[total_B > 0]), _planes(joint_MLE)]
        head = bytes([len(planes[0]), len(planes[1])])
        raw = head + b"".join(plane for side in planes for plane in side)
        # Counts of neighbours have nothing in common: looking for repeats costs time and finds none but runs of zeros.
        squeezer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
        return cls(
            trace_id,
            digest,
            family,
            total_B,
            np.asarray(marker_MB, dtype=np.int64),
            squeezer.compress(raw) + squeezer.flush(),
            hashlib.sha256(raw).hexdigest(),
            num_traces,
            group,
        )

    @property
    def key(self) -> tuple[str, str]:
        """What a trace is known by in a sum."""
        return (self.trace_id, self.digest)

    @property
    def problem(self) -> str:
        """Samples of one problem share it."""
        return problem_of(self.trace_id)

    @property
    def stamp(self) -> str:
        """All that was counted, as text: equal for equal counts, whatever packed them."""
        small = (self.total_B.tolist(), self.marker_MB.tolist(), self.num_traces, self.group)
        return repr((*self.key, self.family, small, self.content))

    def expert_and_joint(self, num_layers: int, num_experts: int, *, verify: bool = False) -> tuple[Array, Array]:
        """``expert_BLE`` and ``joint_MLE``, unsigned, in the smallest type that holds them.

        ValueError where the packed bytes do not fit these sizes or, with ``verify``, their checksum.
        """
        try:
            raw = zlib.decompress(self.packed)
        except zlib.error as error:
            raise ValueError(
                f"the counts of trace {self.trace_id!r} are damaged ({error}): collect them again"
            ) from error
        if verify and hashlib.sha256(raw).hexdigest() != self.content:
            raise ValueError(
                f"the counts of trace {self.trace_id!r} are damaged (another checksum): collect them again"
            )
        filled_B = self.total_B > 0
        cells, markers = num_layers * num_experts, len(self.marker_MB)
        sizes = (int(filled_B.sum()) * cells, markers * cells)
        counts = raw[:2]
        if len(counts) < 2 or len(raw) != 2 + counts[0] * sizes[0] + counts[1] * sizes[1] or max(counts) > 8:
            raise ValueError(
                f"the counts of trace {self.trace_id!r} have another size than their header: collect them again"
            )
        rows = _joined(raw, 2, counts[0], sizes[0]).reshape(-1, num_layers, num_experts)
        joint_MLE = _joined(raw, 2 + counts[0] * sizes[0], counts[1], sizes[1])
        expert_BLE = np.zeros((len(self.total_B), num_layers, num_experts), dtype=rows.dtype)
        expert_BLE[filled_B] = rows
        return expert_BLE, joint_MLE.reshape(markers, num_layers, num_experts)

    def check(self, num_layers: int, num_experts: int, top_k: int) -> None:
        """ValueError names the law of counting that the trace breaks, where, and both numbers."""
        expert_BLE, joint_MLE = self.expert_and_joint(num_layers, num_experts, verify=True)
        total_B, marker_M = self.total_B, self.marker_MB.sum(-1)
        if total_B.min(initial=0) < 0 or self.marker_MB.min(initial=0) < 0:
            raise ValueError(f"trace {self.trace_id!r} holds a negative count")
        where = f"trace {self.trace_id!r}; {num_layers} layers, {num_experts} experts, top-{top_k}"
        routed_B1, routed_M1 = total_B[:, None] * top_k, marker_M[:, None] * top_k
        fired_LE = expert_BLE.sum(0, dtype=np.int64)
        laws = [
            ("selections per layer == tokens x top-k", expert_BLE.sum(-1, dtype=np.int64), routed_B1, np.equal),
            ("selections at a marker per layer == occurrences x top-k", joint_MLE.sum(-1, dtype=np.int64), routed_M1, np.equal),
            ("selections of an expert <= tokens", expert_BLE.max(-1), total_B[:, None], np.less_equal),
            ("joint <= occurrences of the marker", joint_MLE.max(-1), marker_M[:, None], np.less_equal),
            ("joint <= selections of the expert", joint_MLE, fired_LE[None], np.less_equal),
            ("occurrences of a marker <= tokens", self.marker_MB, total_B[None], np.less_equal),
            ("a group without traces has no tokens", np.minimum(total_B, 1), np.array(self.num_traces), np.less_equal),
        ]  # fmt: skip
        for name, left, right, holds in laws:
            _law(f"{name} ({where})", left, right, holds)


def _planes(array: Array) -> list[bytes]:
    """The bytes of unsigned numbers, lowest first, as many as the largest needs."""
    top = int(array.max()) if array.size else 0
    wide = array.astype(np.uint64) if top > 0xFFFF else array.astype(np.uint16)
    return [
        (wide >> wide.dtype.type(8 * place)).astype(np.uint8).tobytes() for place in range((top.bit_length() + 7) // 8)
    ]


def _joined(raw: bytes, start: int, num_planes: int, size: int) -> Array:
    dtype: Any = np.uint8 if num_planes <= 1 else np.uint16 if num_planes == 2 else np.int64
    result = np.zeros(size, dtype=dtype)
    for place in range(num_planes):
        plane = np.frombuffer(raw, np.uint8, size, start + place * size)
        if num_planes == 1:
            return plane
        result |= plane.astype(dtype) << dtype(8 * place)
    return result


def _law(name: str, left: Array, right: Array, holds: np.ufunc) -> None:
    right = np.broadcast_to(right, left.shape)
    held = holds(left, right)
    if not held.all():
        at = tuple(int(index) for index in np.argwhere(~held)[0])
        raise ValueError(f"the counts break the law '{name}': {left[at]} against {right[at]} at {at}")


def reference_tokens(
    traces: Iterable[Trace], markers: MarkerSet, text_of: Callable[[int], str] | None = None
) -> Mapping[int, str]:
    """Token id -> text ("" without ``text_of``) of the references for these traces, by id.

    The 40 most frequent tokens of the responses, and the 16 most frequent of the first four of thoughts and of answers; tokens
    that belong to a marker are none. Ties go to the lower id, so that the order of the traces does not matter.
    """
    own = {token for marker in markers.markers for form in marker.forms for token in form}
    frequent: Counter[int] = Counter()
    first: Counter[int] = Counter()
    for trace in traces:
        frequent.update(trace.token_ids[trace.prompt_length :])
        for start in (trace.thought_start, None if trace.thought_end is None else trace.thought_end + 1):
            if start is not None:
                first.update(trace.token_ids[start : start + 4])
    chosen: list[int] = []
    for found, number in ((frequent, NUM_FREQUENT), (first, NUM_FIRST)):
        ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        chosen += [token for token, _ in ranked if token not in own and token not in chosen][:number]
    return {token: text_of(token) if text_of else "" for token in sorted(chosen)}


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """Counts at reference tokens over all traces of the sum: ``joint_RLE`` selections, ``seen_R`` occurrences, int64."""

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    joint_RLE: Array
    seen_R: Array

    @classmethod
    def none(cls, num_layers: int, num_experts: int) -> References:
        """Counts without references."""
        return cls((), (), np.zeros((0, num_layers, num_experts), np.int64), np.zeros(0, np.int64))

    def __add__(self, other: References) -> References:
        """Of tokens that both counted: a token that one of them did not count has no sum."""
        both = sorted({*self.tokens} & {*other.tokens})
        mine, theirs = ([side.tokens.index(token) for token in both] for side in (self, other))
        texts = tuple(max(self.texts[i], other.texts[j]) for i, j in zip(mine, theirs, strict=True))
        joint_RLE = self.joint_RLE[mine] + other.joint_RLE[theirs]
        return References(tuple(both), texts, joint_RLE, self.seen_R[mine] + other.seen_R[theirs])

    @property
    def stamp(self) -> str:
        """All of it, for a digest."""
        return repr((self.tokens, self.texts, self.seen_R.tolist())) + self.joint_RLE.astype("<i8").tobytes().hex()

    def check(self, top_k: int) -> None:
        """ValueError for sums that no counting gives."""
        wanted = self.seen_R[:, None] * top_k
        if (self.joint_RLE < 0).any() or (self.joint_RLE.sum(-1) != wanted).any():
            raise ValueError(
                "the counts break the law 'selections at a reference token per layer == occurrences x top-k': collect again"
            )
