"""The statistics pass against one sequence at a time through the whole model; dense and mixture-of-experts models."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from direction_cases import plain_sae, released
from expert_stats import MarkedSequence, collect_contrast
from moe_steer.contrasts.collect import measure_contrast_fit
from moe_steer.contrasts.sequences import batches, padded
from moe_steer.directions import DirectionWarning, caa, pca, sta
from moe_steer.observe import observe_residual
from tiny import VOCAB, deepseek_v3, hook_count, qwen2, qwen3_moe

MODELS = {"qwen2": qwen2, "deepseek_v3": deepseek_v3, "qwen3_moe": qwen3_moe}
models = pytest.mark.parametrize("name", list(MODELS))


def exact(name: str) -> Any:
    model = copy.deepcopy(MODELS[name]()).double()
    if name != "qwen2":
        model.set_experts_implementation("eager")  # the fused kernels have no float64
    return model


def answers(number: int, seed: int = 0) -> list[MarkedSequence]:
    """Pairs of answers of different lengths to the same prompts."""
    draw = random.Random(seed)
    found = []
    for index in range(number):
        prompt = [draw.randrange(1, VOCAB) for _ in range(draw.randint(2, 9))]
        for side in ("positive", "negative"):
            answer = [draw.randrange(1, VOCAB) for _ in range(draw.randint(1, 12))]
            marked = tuple(range(len(prompt), len(prompt) + len(answer)))
            found.append(MarkedSequence(f"{index}{side}", (*prompt, *answer), pair=str(index), **{side: marked}))
    return found


def decisions(number: int, seed: int = 0) -> list[MarkedSequence]:
    """Sequences with positions of both sides, some with one side alone."""
    draw = random.Random(seed)
    found = []
    for index in range(number):
        ids = tuple(draw.randrange(1, VOCAB) for _ in range(draw.randint(8, 30)))
        places = tuple(draw.sample(range(len(ids)), 5))
        found.append(MarkedSequence(str(index), ids, places[:1] if index % 3 else (), places[1 : 1 + index % 5]))
    return found


def hidden_of(model: Any, item: MarkedSequence, layer: int) -> torch.Tensor:
    """[S, D] at the output of a layer, from the library's own record of hidden states or, for the last layer, a
    hook."""
    seen: list[torch.Tensor] = []
    with torch.no_grad(), observe_residual(model, [layer], lambda _, hidden_BSD: seen.append(hidden_BSD[0])):
        states = model(torch.tensor([item.token_ids]), output_hidden_states=True).hidden_states
    if layer + 2 < len(states):
        torch.testing.assert_close(states[layer + 1][0], seen[0])
    return seen[0]


@models
@pytest.mark.parametrize("weight", ["sample", "token"])
def test_means_equal_one_sequence_at_a_time(name: str, weight: str) -> None:
    model, sequences = exact(name), decisions(9)
    width = model.config.hidden_size
    saes = {1: plain_sae(40, d_in=width, layer=1), 2: plain_sae(30, 1, d_in=width, layer=2)}
    contrasts = collect_contrast(model, sequences, [2, 0, 1], saes=saes, weight=weight, batch_tokens=70)
    assert list(contrasts) == [0, 1, 2]
    for layer, contrast in contrasts.items():
        for side in ("positive", "negative"):
            samples = [
                hidden_of(model, item, layer)[list(getattr(item, side))] for item in sequences if getattr(item, side)
            ]
            units = [x.mean(0) for x in samples] if weight == "sample" else list(torch.cat(samples))
            moments = getattr(contrast, side)
            assert moments.num_samples == len(samples)
            assert moments.num_tokens == sum(map(len, samples))
            torch.testing.assert_close(moments.mean_D, torch.stack(units).mean(0), rtol=1e-9, atol=1e-10)
            if layer in saes:
                acts = [saes[layer].encode(x) for x in samples]
                atoms = [a.mean(0) for a in acts] if weight == "sample" else list(torch.cat(acts))
                torch.testing.assert_close(moments.mean_F, torch.stack(atoms).mean(0), rtol=1e-8, atol=1e-9)
                assert torch.equal(moments.atoms.samples_fired_F, torch.stack([(a > 0).any(0) for a in acts]).sum(0))
        norms = [
            float(hidden_of(model, item, layer)[place].norm())
            for item in sequences
            for place in (*item.positive, *item.negative)
        ]
        assert contrast.residual_norm == pytest.approx(np.mean(norms))


@pytest.mark.parametrize("name", ["qwen2", "deepseek_v3"])
@pytest.mark.parametrize(("number", "keep"), [(1, 0.35), (6, 0.35), (6, 0.2), (6, 0.9)])
def test_sta_equals_the_release_on_a_model(name: str, number: int, keep: float) -> None:
    """The released way: a forward a sequence, means over the answer, stacked, then its formulae; float64."""
    model, sequences = exact(name), answers(number)
    sae = plain_sae(96, d_in=model.config.hidden_size, layer=1)
    means: dict[str, list[Any]] = {"positive": [], "negative": []}
    residuals: dict[str, list[Any]] = {"positive": [], "negative": []}
    for item in sequences:
        side = "positive" if item.positive else "negative"
        x_TD = hidden_of(model, item, 1)[list(item.positive + item.negative)]
        means[side].append(sae.encode(x_TD).mean(0).numpy())
        residuals[side].append(x_TD.mean(0).numpy())
    caa_D = np.mean([p - n for p, n in zip(residuals["positive"], residuals["negative"], strict=True)], axis=0)
    kept, _, scaled_D = released(
        np.stack(means["positive"]), np.stack(means["negative"]), sae.W_dec_FD.numpy(), caa_D, keep, "act_and_freq"
    )
    contrast = collect_contrast(model, sequences, [1], saes={1: sae})[1]
    np.testing.assert_allclose(caa(contrast).vector_D.numpy(), caa_D, rtol=1e-5, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirectionWarning)
        direction = sta(contrast, sae, keep=keep, parity=True)
    np.testing.assert_allclose(direction.vector_D.numpy(), scaled_D, rtol=1e-5, atol=1e-6)
    live = [j for j in kept if contrast.difference_F[j] != 0]
    assert sorted(atom for atom, _ in direction.header["atoms"]) == live
    assert direction.header["norm"] == pytest.approx(float(np.linalg.norm(caa_D)), rel=1e-9)


@models
def test_batches_and_shards_change_only_the_rounding(name: str) -> None:
    model, sequences = MODELS[name](), answers(7)
    sae = plain_sae(40, d_in=model.config.hidden_size, layer=1).to(dtype=torch.float32)
    whole = collect_contrast(model, sequences, [1], saes={1: sae})[1]
    for batch_tokens in (1, 30, 64):
        other = collect_contrast(model, sequences[::-1], [1], saes={1: sae}, batch_tokens=batch_tokens)[1]
        torch.testing.assert_close(other.difference_D, whole.difference_D, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.difference_F, whole.difference_F, rtol=1e-4, atol=1e-5)
        assert other.data == whole.data
    parts = [collect_contrast(model, part, [1], saes={1: sae})[1] for part in (sequences[:4], sequences[4:])]
    merged = parts[1] + parts[0]
    torch.testing.assert_close(merged.difference_F, whole.difference_F, rtol=1e-4, atol=1e-5)
    assert merged.data == whole.data
    assert merged.data != parts[0].data


@models
def test_nothing_above_the_highest_layer_runs_and_nothing_is_left_behind(name: str) -> None:
    model = MODELS[name]()
    ids = torch.tensor([answers(1)[0].token_ids])
    ran: list[int] = []
    before = model(ids).logits
    handles = [
        layer.register_forward_hook(lambda *_, at=index: ran.append(at))
        for index, layer in enumerate(model.model.layers)
    ]
    head = model.lm_head.register_forward_hook(lambda *_: ran.append(-1))
    collect_contrast(model, answers(2), [0, 1])
    for handle in (*handles, head):
        handle.remove()
    assert set(ran) == {0, 1}
    assert hook_count(model) == 0
    assert torch.equal(model(ids).logits, before)
    model.train()
    collect_contrast(model, answers(2), [0])
    assert model.training
    model.eval()


def test_an_error_inside_leaves_no_hook_and_comes_through() -> None:
    model = qwen2()

    class BrokenError(Exception):
        pass

    def broken(_: int, __: torch.Tensor) -> None:
        raise BrokenError

    with pytest.raises(BrokenError), observe_residual(model, [1], broken, stop=True):
        model(torch.tensor([[1, 2]]))
    with pytest.raises(BrokenError), observe_residual(model, [1], lambda *_: None, stop=True):
        raise BrokenError
    assert hook_count(model) == 0


def test_stopping_ends_the_block_and_two_nested_ones_do_not_mix() -> None:
    model, seen = qwen2(), []
    with observe_residual(model, [2], lambda layer, _: seen.append(layer)):
        with observe_residual(model, [0, 1], lambda layer, _: seen.append(layer), stop=True):
            model(torch.tensor([[1, 2]]))
            seen.append(99)
        model(torch.tensor([[1, 2]]))
    assert seen == [0, 1, 2]


def test_pairs_with_an_empty_side_are_left_out_with_a_warning() -> None:
    sequences = [
        *answers(3),
        MarkedSequence("e+", (1, 2), positive=(1,), pair="e"),
        MarkedSequence("e-", (1, 2), pair="e"),
    ]
    with pytest.warns(UserWarning, match="1 pairs are left out: one of their sides holds no tokens"):
        contrast = collect_contrast(qwen2(), sequences, [1])[1]
    assert contrast.num_left_out == 1
    torch.testing.assert_close(contrast.difference_D, collect_contrast(qwen2(), answers(3), [1])[1].difference_D)
    assert caa(contrast).header["contrast"]["pairs_left_out"] == 1


def test_pca_of_pairs_sees_every_pair() -> None:
    model, sequences = exact("qwen2"), answers(9)
    contrast = collect_contrast(model, sequences, [1], second_moments=True, batch_tokens=40)[1]
    assert contrast.pairs is not None
    assert contrast.pairs.num_pairs == 9
    sides = [
        torch.stack(
            [hidden_of(model, item, 1)[list(item.positive + item.negative)].mean(0) for item in sequences[side::2]]
        )
        for side in (0, 1)
    ]
    differences = sides[0] - sides[1]
    torch.testing.assert_close(contrast.pairs.second_DD, differences.T @ differences)
    axis_D = torch.linalg.svd(differences)[2][0]
    assert abs(float(pca(contrast, match_norm=False).vector_D.double() @ axis_D)) == pytest.approx(1, abs=1e-5)


def test_batches_are_of_one_length_and_rows_end_behind_the_last_marked_token() -> None:
    sequences = decisions(20)
    seen = []
    for batch in batches(sequences, 60):
        call = padded(batch, torch.device("cpu"))
        assert call["input_ids"].numel() <= 60 or len(batch) == 1
        for item, row in zip(batch, call["attention_mask"], strict=True):
            assert int(row.sum()) == max(item.positive + item.negative) + 1
            seen.append(item.name)
    assert sorted(seen) == sorted(item.name for item in sequences if item.positive or item.negative)
    together = [item.pair for batch in batches(answers(9), 60, keep_pairs=True) for item in batch]
    assert together[::2] == together[1::2]


def test_progress_and_notes() -> None:
    seen: list[tuple[int, int]] = []
    contrast = collect_contrast(
        qwen2(),
        answers(5),
        [0],
        batch_tokens=50,
        notes={"template": "x"},
        progress=lambda done, of: seen.append((done, of)),
    )[0]
    assert seen[-1] == (10, 10)
    assert len(seen) > 1
    assert caa(contrast).header["notes"] == {"template": "x"}
    assert caa(contrast).header["model"]["model_type"] == "qwen2"


def test_the_fit_is_measured_on_the_marked_tokens() -> None:
    model = qwen2()
    sae = plain_sae(40, d_in=32, layer=1).to(dtype=torch.float32)
    assert measure_contrast_fit(model, answers(5), 1, sae).num_tokens == sum(
        len(item.positive + item.negative) for item in answers(5)
    )
    with pytest.raises(ValueError, match="belongs to layer 1, not to layer 2"):
        measure_contrast_fit(model, answers(5), 2, sae)


@pytest.mark.parametrize(
    ("sequences", "options", "message"),
    [
        ([], {}, "there are no sequences: make some with answer_pairs, thought_pairs, prompt_pairs or decision_sites"),
        (answers(1) + answers(1), {}, "the sequence '0positive' occurs twice"),
        (
            [MarkedSequence("a", (1, VOCAB), (1,))],
            {},
            f"holds the token ids 1 to {VOCAB}, this model has 0-{VOCAB - 1}",
        ),
        ([MarkedSequence("a", (5,) * 257, (1,))], {}, "the sequence 'a' has 257 tokens, this model's context 256"),
        ([MarkedSequence("a", (1, 2))], {}, "no sequence marks a position: there is nothing to contrast"),
        (answers(1), {"layers": [3]}, "layer 3 does not exist: this model has layers 0-2"),
        (answers(1), {"layers": []}, r"layers are \[\] and SAEs are given for \[\]"),
        (answers(1), {"batch_tokens": 0}, "batch_tokens is 0: give at least 1"),
        (answers(1), {"weight": "word"}, "weight is 'word': choose one of sample, token"),
        (answers(1), {"saes": {2: plain_sae(8, d_in=32)}}, r"layers are \[1\] and SAEs are given for \[2\]"),
        (
            answers(1),
            {"saes": {1: plain_sae(8, d_in=31, layer=1)}},
            "reads activations of width 31, qwen2 has width 32",
        ),
        (answers(1), {"saes": {1: plain_sae(8, d_in=32)}}, "belongs to layer 3, not to layer 1"),
    ],
)
def test_what_does_not_fit_is_refused(sequences: list[MarkedSequence], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect_contrast(qwen2(), sequences, **{"layers": [1], **options})
    assert hook_count(qwen2()) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": ()}, "the sequence 'a' has 0 tokens: give a name and tokens"),
        ({"positive": (3,)}, r"the positive positions of 'a' are \[3\]: give distinct ones from 0 to 2"),
        ({"negative": (1, 1)}, r"the negative positions of 'a' are \[1, 1\]"),
        ({"negative": (-1,)}, r"the negative positions of 'a' are \[-1\]"),
    ],
)
def test_sequences_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MarkedSequence(**{"name": "a", "token_ids": (1, 2, 3), **fields})


def test_second_moments_need_one_sequence_of_each_side() -> None:
    twice = [MarkedSequence(name, (1, 2), positive=(1,), pair="p") for name in ("a", "b")]
    with pytest.raises(ValueError, match="pair 'p' has two sequences of one side"):
        collect_contrast(
            qwen2(), [*twice, MarkedSequence("c", (1, 2), negative=(1,), pair="p")], [1], second_moments=True
        )
