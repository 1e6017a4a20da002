from __future__ import annotations

import pytest
import torch
from tiny import make_model, make_tokenizer

from entrenar.training.batches import IGNORED, Example
from entrenar.training.evaluate import sample_answers
from entrenar.training.generate import generate, prompt_ids


def test_the_answer_is_the_greedy_one() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    ids = prompt_ids(tokenizer, "What is up?")
    expected: list[int] = []
    with torch.no_grad():
        while len(expected) < 12 and expected[-1:] != [tokenizer.eos_token_id]:
            row = torch.cat([ids, torch.tensor(expected, dtype=torch.int64)])
            expected.append(int(model(row.unsqueeze(0)).logits[0, -1].argmax()))
    assert generate(model, tokenizer, "What is up?", 12) == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_the_pieces_add_up_to_the_answer() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    pieces: list[str] = []
    answer = generate(model, tokenizer, "What is up?", 12, on_text=pieces.append)
    assert "".join(pieces).strip() == answer
    assert len(pieces) > 1


def test_without_a_template_the_text_goes_on() -> None:
    tokenizer = make_tokenizer(None)
    assert tokenizer.decode(prompt_ids(tokenizer, "The sky")) == "The sky"


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_stays(training: bool) -> None:
    model = make_model().train(training)
    generate(model, make_tokenizer(), "Up?", 2)
    assert model.training is training


def test_an_empty_prompt_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(make_model(), make_tokenizer(None), torch.tensor([], dtype=torch.int64))


def test_samples_are_spread_over_the_examples() -> None:
    tokenizer = make_tokenizer()
    ids = [torch.tensor([5, 6, 7 + n, 8, tokenizer.eos_token_id]) for n in range(7)]
    examples = [Example(i, i.masked_fill(torch.arange(5) < 3, IGNORED)) for i in ids]
    samples = sample_answers(make_model(), tokenizer, examples)
    assert [sample["prompt"] for sample in samples] == [tokenizer.decode(ids[n][:3]) for n in (0, 2, 4)]
    assert {sample["wanted"] for sample in samples} == {tokenizer.decode([8]).strip()}
