"""The shipped checkpoint: loads offline, small, right in other engines, thinks in the expected form."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from launch.lab.card import FamilyScore, Scores, count_parameters, replace_scores
from launch.lab.models import new_model
from launch.lab.scoring import ROUTER_KEYS, export_model, is_correct, sample_texts
from moe_steer.lab import LAB_MODEL
from moe_steer.lab.problems import FAMILIES, LabProblem, generate_problems


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(LAB_MODEL).eval()


def test_files_are_there_and_small() -> None:
    names = {path.name for path in LAB_MODEL.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    }
    assert (LAB_MODEL / "model.safetensors").stat().st_size <= 12 * 2**20


def test_config_tells_other_engines_how_to_route() -> None:
    config = json.loads((LAB_MODEL / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    assert {key: config[key] for key in ROUTER_KEYS} == {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    assert config["num_key_value_heads"] == config["num_attention_heads"]


def test_saving_alone_lacks_the_router_keys_and_export_adds_them(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODEL)
    fresh = new_model(tokenizer, seed=0)
    fresh.save_pretrained(tmp_path / "plain")
    assert not ROUTER_KEYS.keys() & json.loads((tmp_path / "plain" / "config.json").read_text()).keys()
    export_model(fresh, tokenizer, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text()).items() >= ROUTER_KEYS.items()


def test_weights_have_the_hub_layout_with_learned_router_biases() -> None:
    with safe_open(LAB_MODEL / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        biases = [file.get_tensor(name) for name in names if name.endswith("e_score_correction_bias")]
    assert "model.layers.1.mlp.experts.15.down_proj.weight" in names
    assert len(biases) == 3
    assert all(float(bias.abs().max()) > 0 for bias in biases)


def test_reloaded_checkpoint_gives_bitwise_equal_logits(model: PreTrainedModel, tmp_path: Path) -> None:
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        logits = model(ids).logits
        export_model(model, AutoTokenizer.from_pretrained(LAB_MODEL), tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, again)


def test_generation_defaults() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODEL)
    defaults = GenerationConfig.from_pretrained(LAB_MODEL)
    assert (defaults.do_sample, defaults.temperature, defaults.top_p) == (True, 0.6, 0.95)
    assert (defaults.eos_token_id, defaults.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.slow
def test_sampled_answers_close_their_thought_and_are_often_right(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODEL)
    problems = generate_problems("test", len(FAMILIES), seed=11)
    torch.manual_seed(0)
    texts = sample_texts(model, tokenizer, [problem.prompt for problem in problems])
    assert sum("</think>" in text for text in texts) >= 22
    assert sum(is_correct(problem, text) for problem, text in zip(problems, texts, strict=True)) >= 10


def test_card_holds_the_scores_of_every_family_and_the_loss_curve() -> None:
    card = (LAB_MODEL / "README.md").read_text()
    for name in FAMILIES:
        assert re.search(rf"^\| {name} \| \d+ \| \d+\.\d% \|", card, re.MULTILINE)
    assert re.search(r"^\| all \| \d+ \|", card, re.MULTILINE)
    assert f"{count_parameters(LAB_MODEL / 'model.safetensors'):,} parameters" in card
    assert "| step | tokens | loss |" in card


def test_scores_in_a_card_can_be_replaced(tmp_path: Path) -> None:
    row = FamilyScore(family="all", num_samples=4, accuracy=0.5, closed=1.0, thinking_tokens=40.0, checks=0.75)
    scores = Scores(families=(), overall=row, split="test", seed=1)
    card = tmp_path / "README.md"
    card.write_text("above\n<!-- scores -->\nold\n<!-- /scores -->\nbelow\n")
    replace_scores(card, scores)
    assert "| all | 4 | 50.0% | 100.0% | 40.0 | 0.75 |" in card.read_text()
    assert "old" not in card.read_text()
    assert card.read_text().startswith("above")
    card.write_text("no place\n")
    with pytest.raises(ValueError, match=r"has no <!-- scores -->"):
        replace_scores(card, scores)


@pytest.mark.parametrize(
    ("text", "unit", "correct"),
    [
        ("4 m/s.</think>\nThe answer is \\boxed{4 m/s}.", "m/s", True),
        ("4 m/s.</think>\nThe answer is \\boxed{4}.", "m/s", False),
        ("\\boxed{4}.</think>\nThe answer is \\boxed{5}.", None, False),
        ("\\boxed{4}.", None, False),
        ("5.</think>\n\\boxed{5} or rather \\boxed{4}.", None, True),
        ("4.</think>\nfour", None, False),
    ],
)
def test_own_yardstick(text: str, unit: str | None, correct: bool) -> None:
    problem = LabProblem(problem_id="x", prompt="?", target="4", answer_type="integer", unit=unit)
    assert is_correct(problem, text) is correct
