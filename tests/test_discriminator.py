import pytest
import torch

from discriminator import Discriminator, discriminator_loss, pair_ids
from model import adapter_parameters, hidden_states, pad
from reward import REAL
from rollout import strip_echo

PREFIX, SEP, TRUTH = "Return a new array of the given", "\n", "shape and type, filled with zeros, unless the caller asked for ones."


def spread(pool):
    """A head that returns, as its two logits, the first two pooled features, without the norm."""
    head = Discriminator(4, pool)
    head.norm = torch.nn.Identity()
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(2, 4))
    return head


def test_pooling_reads_the_completion_and_no_padding():
    hidden = torch.arange(2 * 4 * 4, dtype=torch.float).view(2, 4, 4)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert spread("last")(hidden, mask).tolist() == [[8.0, 9.0], [28.0, 29.0]]
    assert spread("mean")(hidden, mask).tolist() == [[6.0, 7.0], [26.0, 27.0]]


@pytest.mark.parametrize("opening", ["", " ", "\n\n", "\t \n", "... of the given ", "\u2026of the given\n", "the given "])
def test_a_generator_that_writes_the_truth_cannot_be_told_from_it(encode, opening):
    completion = strip_echo(opening + TRUTH, PREFIX, 16)
    real, generated = pair_ids(encode, [], PREFIX, SEP, TRUTH, completion)
    assert real == generated and sum(real[1]) > 5


@pytest.mark.parametrize("completion", ["shape", "a shorter one.", TRUTH + TRUTH, "caf\u00e9 \u2603\ufe0f \U0001f600" * 5])
def test_both_texts_are_cut_to_the_same_number_of_completion_tokens(encode, completion):
    (real_ids, real_mask), (generated_ids, generated_mask) = pair_ids(encode, [7], PREFIX, SEP, TRUTH, completion)
    assert sum(real_mask) == sum(generated_mask) > 0
    assert real_mask[-1] and generated_mask[-1] and real_ids[0] == generated_ids[0] == 7
    assert len(real_ids) == len(real_mask) and len(generated_ids) == len(generated_mask)


def test_an_empty_completion_is_not_shown(encode):
    assert pair_ids(encode, [], PREFIX, SEP, TRUTH, "") is None


def test_training_the_discriminator_leaves_the_generators_gradients_untouched(tiny):
    model, _ = tiny
    ids = torch.randint(0, 4000, (2, 12))
    model.set_adapter("generator")
    hidden_states(model, ids).square().mean().backward()
    before = [p.grad.clone() for p in adapter_parameters(model, "generator")]
    assert any(g.abs().sum() > 0 for g in before)
    model.set_adapter("discriminator")
    head = Discriminator(32, "last")
    torch.nn.init.normal_(head.linear.weight)
    logits = head(hidden_states(model, ids), torch.ones(2, 12, dtype=torch.bool))
    discriminator_loss(logits, torch.tensor([REAL, 1 - REAL]), "ce").backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(adapter_parameters(model, "generator"), before))
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter_parameters(model, "discriminator"))


def test_right_padding_reaches_no_token_before_it(tiny):
    model, _ = tiny
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    together = hidden_states(model, pad(rows))
    for i, row in enumerate(rows):
        torch.testing.assert_close(together[i, :len(row)], hidden_states(model, pad([row]))[0], rtol=1e-4, atol=1e-5)
