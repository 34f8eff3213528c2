"""Measures routing: which experts fire at reasoning markers, how sure that is, and which ones to steer."""

from typing import TYPE_CHECKING

from moe_steer.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from expert_stats.collect import collect_counts
    from expert_stats.contrast_sequences import MarkedSequence
    from expert_stats.contrast_sites import concise_and_verbose, decision_sites, thought_pairs
    from expert_stats.contrast_texts import answer_pairs, prompt_pairs
    from expert_stats.contrasts import collect_contrast
    from expert_stats.counter import RoutingCounter
    from expert_stats.counts import RoutingCounts
    from expert_stats.markers import Marker, MarkerSet
    from expert_stats.npmi import score_experts
    from expert_stats.reduce import reduce_counts
    from expert_stats.scores import ExpertScores
    from expert_stats.select import select_experts, select_placebo
    from expert_stats.traces import Trace, read_traces, trace_from_ids, write_traces

_HOME = {
    "ExpertScores": "scores",
    "Marker": "markers",
    "MarkedSequence": "contrast_sequences",
    "MarkerSet": "markers",
    "RoutingCounter": "counter",
    "RoutingCounts": "counts",
    "Trace": "traces",
    "answer_pairs": "contrast_texts",
    "collect_contrast": "contrasts",
    "collect_counts": "collect",
    "concise_and_verbose": "contrast_sites",
    "decision_sites": "contrast_sites",
    "prompt_pairs": "contrast_texts",
    "read_traces": "traces",
    "reduce_counts": "reduce",
    "score_experts": "npmi",
    "select_experts": "select",
    "select_placebo": "select",
    "thought_pairs": "contrast_sites",
    "trace_from_ids": "traces",
    "write_traces": "traces",
}
__all__ = [
    "ExpertScores",
    "MarkedSequence",
    "Marker",
    "MarkerSet",
    "RoutingCounter",
    "RoutingCounts",
    "Trace",
    "answer_pairs",
    "collect_contrast",
    "collect_counts",
    "concise_and_verbose",
    "decision_sites",
    "prompt_pairs",
    "read_traces",
    "reduce_counts",
    "score_experts",
    "select_experts",
    "select_placebo",
    "thought_pairs",
    "trace_from_ids",
    "write_traces",
]

__getattr__ = lazy_exports(__name__, _HOME)
