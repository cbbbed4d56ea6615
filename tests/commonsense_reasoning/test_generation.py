"""Answers with shared prompts and an early end of the beam search, against plain transformers on one prompt."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from commonsense_reasoning.lm_eval_tasks.beam_search import ending_early, may_improve
from commonsense_reasoning.lm_eval_tasks.likelihoods import continuation_likelihoods
from commonsense_reasoning.lm_eval_tasks.prefill import common_length, read_prompts

PAD, END = 0, 1


def tiny(kind=LlamaForCausalLM, config=LlamaConfig, **settings):
    """A random model of few words, which is sure of them and often ends."""
    torch.manual_seed(0)
    model = kind(
        config(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.5,
            pad_token_id=PAD,
            eos_token_id=END,
            bos_token_id=None,
            **settings,
        )
    )
    with torch.no_grad():
        model.lm_head.weight *= 6
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Prompts of different lengths with five tokens in common."""
    generator = torch.Generator().manual_seed(1)
    rest = [torch.randint(2, 12, (1 + number % 7,), generator=generator).tolist() for number in range(24)]
    return [[2, 5, 3, 3, 7, *row] for row in rest]


@pytest.fixture
def rows_read(model, monkeypatch) -> list[tuple[int, int]]:
    """Rows and length of what the model reads, call by call."""
    shapes = []
    forward = model.forward

    def spy(*arguments, **inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(*arguments, **inputs)

    monkeypatch.setattr(model, "forward", spy)
    return shapes


def batch(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in prompts])
    return ids, (ids != PAD).long()


def new_tokens(model, inputs: dict, **settings) -> list[list[int]]:
    output = model.generate(**inputs, do_sample=False, max_new_tokens=24, **settings)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


def alone(model, prompts: list[list[int]], **settings) -> list[list[int]]:
    return [new_tokens(model, {"input_ids": torch.tensor([row])}, **settings)[0] for row in prompts]


def test_common_length():
    assert common_length([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 2
    assert common_length([[1, 2, 9, 3], [1, 2, 9, 3]]) == 4
    assert common_length([[1, 2], [2, 2]]) == 0


@pytest.mark.parametrize("beams", [1, 4])
def test_prompts_that_are_read_once_are_answered_as_each_alone(beams, model, prompts):
    found = new_tokens(model, read_prompts(model, *batch(prompts), beams), num_beams=beams)
    assert found == alone(model, prompts, num_beams=beams)
    assert len(set(map(tuple, found))) > 10


@pytest.mark.parametrize("rows", [[[4, 2]], [[4, 2], [4, 2]], [[3, 4], [4, 2, 5]], [[3, 4], [3, 4, 2]], [[7], [7]]])
@pytest.mark.parametrize("beams", [1, 3])
def test_batches_with_little_or_all_in_common(rows, beams, model):
    assert new_tokens(model, read_prompts(model, *batch(rows), beams), num_beams=beams) == alone(
        model, rows, num_beams=beams
    )


@pytest.mark.parametrize("beams", [1, 4])
def test_nothing_is_read_twice(beams, model, prompts, rows_read):
    inputs = read_prompts(model, *batch(prompts), beams)
    model.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=1)
    rest = max(map(len, prompts)) - 5
    expected = [(24, rest)] if beams == 1 else [(24, rest - 1), (24 * beams, 1)]
    assert rows_read == [(1, 5), *expected]


def test_a_sliding_window_is_left_to_generate(prompts):
    model = tiny(MistralForCausalLM, MistralConfig, sliding_window=4)
    ids, mask = batch(prompts)
    assert set(read_prompts(model, ids, mask, 4)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("length_penalty", [1.0, 2.0, 0.0, -1.0])
def test_a_search_that_ends_early_returns_the_same(length_penalty, model, prompts, rows_read):
    ids, mask = batch(prompts)
    inputs = {"input_ids": ids, "attention_mask": mask}
    settings = {"num_beams": 4, "length_penalty": length_penalty}
    expected = alone(model, prompts, **settings)
    steps = len(rows_read)
    rows_read.clear()
    with ending_early(model):
        assert alone(model, prompts, **settings) == expected
        early = len(rows_read)
        assert new_tokens(model, inputs, **settings) == expected
    if length_penalty in (0.0, 1.0):
        assert early < 0.96 * steps
    assert "_check_early_stop_heuristic" not in vars(model)


def test_a_search_goes_on_while_a_running_beam_may_win_at_the_greatest_length():
    running, complete = torch.tensor([[-3.0, -9.0]]), torch.tensor([[-0.5, -7.0]])
    for longest, expected in ((7, True), (6, True), (5, False)):
        assert may_improve(running, complete, 4 + longest, 4, 1.0).tolist() == [[expected]]
    assert may_improve(torch.tensor([[-3.0]]), torch.tensor([[-1e9]]), 8, 4, 1.0).tolist() == [[True]], "none complete"
    # the shortest hypothesis has the best chance where length is punished
    assert may_improve(running, torch.tensor([[-3.1]]), 9, 4, -1.0).tolist() == [[True]]


# --------------------------------------------------------------------------------------------------------- likelihoods


def pairs_of(prompts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Options of one and of two tokens after each prompt; the latter differ in the second."""
    return [(row, option) for row in prompts for option in ([4], [6], [9, 3], [9, 8], [5, 2])]


def likelihoods_alone(model, pairs, max_length: int) -> list[tuple[float, bool]]:
    found = []
    for context, continuation in pairs:
        tokens = torch.tensor([(context + continuation)[-(max_length + 1) :]])
        with torch.no_grad():
            logs = model(tokens).logits[0, :-1].log_softmax(-1)[-len(continuation) :]
        scores = [row[token].item() for row, token in zip(logs, continuation, strict=True)]
        found.append((sum(scores), logs.argmax(-1).tolist() == continuation))
    return found


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("max_length", [100, 9])
@pytest.mark.parametrize("chosen", [slice(None), slice(0, 1), slice(7, 8)])
def test_likelihoods_are_those_of_each_pair_alone(batch_size, max_length, chosen, model, prompts):
    pairs = pairs_of(prompts[chosen])
    found = continuation_likelihoods(model, pairs, batch_size, max_length)
    expected = likelihoods_alone(model, pairs, max_length)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    if len(pairs) > 50:
        assert len({greedy for _, greedy in found}) == 2


def test_likelihoods_of_a_model_that_shares_no_cache(prompts):
    model = tiny(MistralForCausalLM, MistralConfig, sliding_window=4)
    pairs = pairs_of(prompts)
    expected = [score for score, _ in likelihoods_alone(model, pairs, 100)]
    assert [score for score, _ in continuation_likelihoods(model, pairs, 8, 100)] == pytest.approx(expected, abs=1e-4)


def test_options_that_differ_in_their_last_token_are_one_row(model, prompts, rows_read, monkeypatch):
    pairs = pairs_of(prompts)
    distinct = len({tuple(context + continuation[:-1]) for context, continuation in pairs})
    assert distinct < 0.65 * len(pairs)
    continuation_likelihoods(model, pairs, 1000, 100)
    longest = max(map(len, prompts)) + 1
    assert rows_read == [(1, 5), (distinct, longest - 5)]


def test_logits_of_the_questions_are_not_computed(model, prompts, monkeypatch):
    kept, head = [], type(model.lm_head).forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: kept.append(x.shape[1]) or head(model.lm_head, x))
    same_length = [row for row in prompts if len(row) == 12]
    continuation_likelihoods(model, [(row, [4]) for row in same_length], 100, 100)
    assert kept == [1, 1], "of the common beginning, and of each row"
