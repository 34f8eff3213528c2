"""The embedded dense model, its tokenizer, its SAE and the texts it learned from."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch
from tokenizers import Tokenizer

from launch.lab.batches import corpus, overthinking_text
from launch.lab.models import new_dense_model, train_tokenizer
from launch.lab.scoring import export_model
from launch.lab.solutions import BRIEF_HINTS, MOST_CHECKS_OF_DOUBTERS, write_overthought
from launch.lab.train_dense import DENSE_LAB, RECIPE
from launch.lab.train_dense_sae import fit_on_new_solutions
from moe_steer import load_model
from moe_steer.backends import read_tokenizer
from moe_steer.lab import LAB_DENSE, LAB_SAE
from moe_steer.lab.problems import FAMILIES, draw_params
from moe_steer.saes import load_sae


def test_sizes() -> None:
    assert sum(path.stat().st_size for path in LAB_DENSE.iterdir()) < 10e6
    assert sum(path.stat().st_size for path in LAB_SAE.iterdir()) < 4e6


def test_the_tokenizer_that_users_load_is_the_one_it_was_trained_with() -> None:
    """Beside a Qwen2 model transformers may put another splitting of words in the place of tokenizer.json's."""
    loaded, written = read_tokenizer("lab-dense"), Tokenizer.from_file(str(LAB_DENSE / "tokenizer.json"))
    for text in corpus(40, 3, overthinking_text):
        assert loaded(text, add_special_tokens=False)["input_ids"] == written.encode(text, add_special_tokens=False).ids
    assert " + " in loaded.batch_decode([[i] for i in loaded("1 + 2")["input_ids"]])


def test_a_class_that_splits_words_its_own_way_gives_way_to_the_file(tmp_path: Path) -> None:
    """The file is read by the library's own reader: one with an entry twice, which the library takes, was refused."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LAB_DENSE / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    content = (tmp_path / "tokenizer.json").read_text()
    entry = re.search(r'"vocab":\s*\{\s*("[^"]+":\s*\d+,)', content)
    assert entry
    (tmp_path / "tokenizer.json").write_text(content.replace(entry[1], entry[1] * 2, 1))
    text, written = "12 + 15 = 27. Wait, so 27 * 2 = 54.", Tokenizer.from_file(str(LAB_DENSE / "tokenizer.json"))
    assert read_tokenizer(tmp_path)(text)["input_ids"] == written.encode(text, add_special_tokens=False).ids


def test_an_exported_dense_model_keeps_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(corpus(100, 0, overthinking_text))
    export_model(new_dense_model(tokenizer, 0), tokenizer, tmp_path)
    text = "12 + 15 = 27. Wait, so 27 * 2 = 54."
    assert read_tokenizer(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.slow
def test_the_sae_stands_for_the_activations() -> None:
    model, tokenizer = load_model("lab-dense")
    sae = load_sae(LAB_SAE)
    assert sae.about.layer == 4
    fit = fit_on_new_solutions(model, tokenizer, sae, seed=7)
    assert fit.fraction_variance_unexplained < 0.06
    assert 16 < fit.l0 < 32


def test_thoughts_repeat_themselves_unless_brevity_is_asked_for() -> None:
    rng = random.Random(0)
    checks: dict[bool, list[int]] = {True: [], False: []}
    for _ in range(1500):
        family = FAMILIES[rng.choice(list(FAMILIES))]
        hint, solution = write_overthought(family, draw_params(family, "train", rng), rng)
        checks[hint in BRIEF_HINTS].append(solution.num_checks)
    assert max(checks[False]) <= MOST_CHECKS_OF_DOUBTERS
    assert fmean(checks[False]) > 2 > 0.6 > fmean(checks[True])


def test_zeal_scales_the_checks() -> None:
    def mean_length(zeal: float) -> float:
        rng = random.Random(1)
        return fmean(len(overthinking_text(rng, zeal)[1]) for _ in range(300))

    assert mean_length(0.1) < 0.7 * mean_length(1.0)


def test_every_token_weighs_the_same_in_the_loss() -> None:
    """The summed form is the mean times tokens / tokens_per_batch."""
    from launch.lab.batches import BatchMaker
    from launch.lab.train import batch_loss

    tokenizer = read_tokenizer(LAB_DENSE)
    batch = BatchMaker(tokenizer, seed=1, write=overthinking_text, max_sequence=DENSE_LAB.max_sequence)(0)
    model = new_dense_model(tokenizer, 0)
    mean, summed = batch_loss(model, batch), batch_loss(model, batch, 2000)
    assert float(summed) == pytest.approx(float(mean) * int(batch.loss_mask_BS[:, 1:].sum()) / 2000, rel=1e-5)
    assert RECIPE.check_rates[-1] == (4992, 1.0)
    assert not torch.isnan(mean)
