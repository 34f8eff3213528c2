"""Measures routing: which experts fire at reasoning markers, how sure that is, and which ones to steer."""

from typing import TYPE_CHECKING

from moe_steer.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from expert_stats.collect import collect_counts, reduce_counts
    from expert_stats.counter import RoutingCounter
    from expert_stats.counts import RoutingCounts
    from expert_stats.npmi import score_experts
    from expert_stats.scores import ExpertScores
    from expert_stats.select import select_experts, select_placebo
    from moe_steer.contrasts.collect import collect_contrast
    from moe_steer.contrasts.sequences import MarkedSequence
    from moe_steer.contrasts.sites import concise_and_verbose, decision_sites, thought_pairs
    from moe_steer.contrasts.texts import answer_pairs, prompt_pairs
    from moe_steer.tokens.markers import Marker, MarkerSet
    from moe_steer.tokens.traces import Trace, read_traces, trace_from_ids, write_traces

_HOME = {
    "ExpertScores": "expert_stats.scores",
    "MarkedSequence": "moe_steer.contrasts.sequences",
    "Marker": "moe_steer.tokens.markers",
    "MarkerSet": "moe_steer.tokens.markers",
    "RoutingCounter": "expert_stats.counter",
    "RoutingCounts": "expert_stats.counts",
    "Trace": "moe_steer.tokens.traces",
    "answer_pairs": "moe_steer.contrasts.texts",
    "collect_contrast": "moe_steer.contrasts.collect",
    "collect_counts": "expert_stats.collect",
    "concise_and_verbose": "moe_steer.contrasts.sites",
    "decision_sites": "moe_steer.contrasts.sites",
    "prompt_pairs": "moe_steer.contrasts.texts",
    "read_traces": "moe_steer.tokens.traces",
    "reduce_counts": "expert_stats.collect",
    "score_experts": "expert_stats.npmi",
    "select_experts": "expert_stats.select",
    "select_placebo": "expert_stats.select",
    "thought_pairs": "moe_steer.contrasts.sites",
    "trace_from_ids": "moe_steer.tokens.traces",
    "write_traces": "moe_steer.tokens.traces",
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
