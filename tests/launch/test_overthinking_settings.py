"""The overthinking job's options, its settings, and the choice among them."""

from __future__ import annotations

from typing import Any

import pytest

from launch.core.options import options_from
from launch.jobs.overthinking_options import METHODS, OverthinkingOptions
from launch.jobs.overthinking_settings import Setting, budget_settings, choose, direction_settings
from reasoning_evals.runs.grading_pass import GradeRow


def rows(arm: str, tokens: int, right: int, truncated: int = 0, num: int = 100) -> list[GradeRow]:
    def outcome(index: int) -> str:
        return "correct" if index < right else "truncated" if index < right + truncated else "wrong"

    base: dict[str, Any] = {
        "task": "t",
        "sample_idx": 0,
        "extracted": None,
        "reason": "",
        "method": "",
        "state": "closed",
    }
    return [
        GradeRow(
            arm=arm,
            problem_id=f"p{index}",
            outcome=outcome(index),
            finish_reason="stop",
            thinking_tokens=tokens,
            answer_tokens=1,
            total_tokens=tokens + 2,
            **base,
        )
        for index in range(num)
    ]


def setting(label: str, method: str = "caa") -> Setting:
    return Setting(method=method, label=label)


def test_shortest_within_the_margin_is_chosen() -> None:
    graded = rows("baseline", 100, 80) + rows("a", 70, 79) + rows("b", 50, 78) + rows("c", 60, 80)
    found = choose([setting("a"), setting("b"), setting("c")], graded, margin=1.0)
    assert found["caa"].setting.label == "c"
    assert found["caa"].within_margin
    assert choose([setting("a"), setting("b"), setting("c")], graded, margin=2.0)["caa"].setting.label == "b"


def test_cut_off_thoughts_count_against_a_setting() -> None:
    graded = rows("baseline", 100, 80) + rows("a", 40, 80, truncated=20) + rows("b", 90, 80)
    assert choose([setting("a"), setting("b")], graded, margin=1.0)["caa"].setting.label == "b"


def test_where_none_keeps_the_accuracy_the_one_that_loses_least_is_taken_and_said_so() -> None:
    graded = rows("baseline", 100, 80) + rows("a", 10, 20) + rows("b", 30, 60) + rows("c", 20, 60)
    found = choose([setting("a"), setting("b"), setting("c")], graded, margin=1.0)["caa"]
    assert found.setting.label == "c"
    assert not found.within_margin


def test_a_single_setting_needs_no_tuning_and_methods_are_chosen_apart() -> None:
    graded = rows("baseline", 100, 80) + rows("a", 70, 80) + rows("b", 50, 80)
    found = choose([setting("nowait", "nowait"), setting("a"), setting("b", "budget")], graded, margin=1.0)
    assert {method: choice.setting.label for method, choice in found.items()} == {
        "nowait": "nowait",
        "caa": "a",
        "budget": "b",
    }


def test_budgets_are_quantiles_of_the_unsteered_lengths() -> None:
    assert [one.budget for one in budget_settings(list(range(1, 101)), (0.5, 0.85))] == [86, 51]
    assert [one.budget for one in budget_settings([7, 7, 7], (0.5, 0.85))] == [7]
    with pytest.raises(ValueError, match="no unsteered answer with a thought is right"):
        budget_settings([], (0.5,))


def test_every_layer_and_strength_of_a_direction_is_a_setting() -> None:
    options = OverthinkingOptions()
    files = {"caa": [(2, "caa-L2.safetensors"), (3, "caa-L3.safetensors")], "decision": [(3, "d.safetensors")]}
    found = direction_settings(files, options)
    assert len(found) == 2 * 2 + 3
    assert found[0] == Setting(
        method="caa", label="caa L2 x0.1", layer=2, strength=0.1, scope="thought", file="caa-L2.safetensors"
    )
    assert {one.scope for one in found if one.method == "decision"} == {"step_end:stop+line"}
    assert len({one.label for one in found}) == len(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ("caa", "magic")}, "methods hold 'magic': choose among caa, sta"),
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("caa", "caa")}, "hold a name twice"),
        ({"model": "lab", "methods": ("sta",)}, "method sta reads a direction by an SAE: give --sae"),
        ({"strengths": (0.0,)}, "strengths are \\[0.0\\]: give different numbers other than 0"),
        ({"budgets": (0.5, 0.5)}, "budgets are .*: give different quantiles between 0 and 1"),
        ({"budgets": (1.5,)}, "budgets are \\[1.5\\]: give different quantiles between 0 and 1"),
        ({"samples_identification": 1}, "pairs of answers need at least 2"),
        ({"margin": -1}, "margin is -1"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"strengths": (float("inf"),)}, "strengths are \\[inf\\]"),
        ({"keep": 0.0}, "keep is 0.0: give a share above 0, at most 1"),
        ({"methods": ("caa",), "sae": "folder"}, "--sae is for atom, sae, sta, and none is asked for"),
        ({"sae_layer": 3}, "--sae-layer 3 says where the SAE of --sae belongs"),
        ({"num_test": 1}, "num_test is 1: give at least 2"),
        ({"temperature": float("nan")}, "temperature must be a positive number, got nan: for the argmax use greedy"),
        ({"concise_prompt": "  "}, "concise_prompt is empty"),
    ],
)
def test_wrong_options_are_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OverthinkingOptions(**given)
    assert "\n" not in str(caught.value)


def test_quick_tries_fewer_only_of_what_nobody_asked_for() -> None:
    quick = OverthinkingOptions(quick=True)
    assert (quick.tried_strengths, quick.tried_decision_strengths) == ((0.2,), (0.2, 0.4))
    assert quick.tried_budgets == (0.25, 0.5)
    asked = OverthinkingOptions(
        quick=True, strengths=(0.1, 0.2), decision_strengths=(0.1, 0.2, 0.4), budgets=(0.25, 0.5, 0.75)
    )
    assert (asked.tried_strengths, asked.tried_decision_strengths) == ((0.1, 0.2), (0.1, 0.2, 0.4))
    assert asked.tried_budgets == (0.25, 0.5, 0.75)


def test_the_config_holds_what_is_tried() -> None:
    config = OverthinkingOptions(quick=True).config()
    assert (config["strengths"], config["budgets"], config["keep"]) == ([0.2], [0.25, 0.5], 0.02)
    assert OverthinkingOptions(quick=True, strengths=(0.2,), scope="thought").config() == config
    read = options_from(config, OverthinkingOptions, [])
    assert (read.tried_strengths, read.tried_budgets) == ((0.2,), (0.25, 0.5))


def test_layers_follow_the_depth() -> None:
    assert OverthinkingOptions().tried_layers(28) == (16, 22)
    assert OverthinkingOptions(layers=(3, 3, 1)).tried_layers(5) == (3, 1)
    with pytest.raises(ValueError, match="layer 5 does not exist: this model has layers 0-4"):
        OverthinkingOptions(layers=(5,)).tried_layers(5)


def test_all_published_rivals_take_part_by_default() -> None:
    assert {"caa", "sta", "sae", "atom", "decision", "concise-prompt", "nowait", "budget"} == set(METHODS)
